"""Weights of transformers' Mamba and Mamba-2 mixers, for our Mamba. Works on plain dicts: transformers is not imported.

A mixer of a model that transformers has loaded:

    config = mamba_config_from_hf(model.config)
    mixer = Mamba(model.config.hidden_size, config)
    mixer.load_state_dict(mamba_state_dict_from_hf(model.state_dict(), "backbone.layers.0.mixer.", config))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from synapse_arch.errors import CheckpointError, ConfigError, explain
from synapse_arch.modules.mamba import MambaConfig

_SHARED = {
    "in_proj.weight": "in_proj.weight",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj.weight",
}
_NAMES = {
    "s6": _SHARED | {"x_proj.weight": "x_proj.weight", "dt_proj.weight": "dt_proj.weight", "dt_proj.bias": "dt_bias"},
    "ssd": _SHARED | {"dt_bias": "dt_bias", "norm.weight": "norm.weight"},
}
"""Their name -> ours, for each variant."""


def mamba_config_from_hf(config: Any) -> MambaConfig:
    """The MambaConfig of a transformers MambaConfig or Mamba2Config.

    Args:
        config: the configuration object, or the mapping a config.json holds.

    Returns:
        "s6" for model_type "mamba", "ssd" for "mamba2".

    Raises:
        ConfigError: another model type, a missing entry, or an option that our Mamba does not have.
    """
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    kind = entries.get("model_type")
    if kind not in ("mamba", "mamba2"):
        raise ConfigError(explain("transformers config.model_type", "'mamba' or 'mamba2'", repr(kind)))
    unlimited = (0.0, math.inf)
    for name, wanted, found in (
        ("use_bias", False, entries.get("use_bias", False)),
        ("hidden_act", "silu", entries.get("hidden_act", "silu")),
        ("time_step_limit", unlimited, tuple(entries.get("time_step_limit", unlimited))),
    ):
        if found != wanted:
            raise ConfigError(explain(f"transformers config.{name}", wanted, found, "our Mamba has no other"))

    def needed(name: str) -> Any:
        if entries.get(name) is None:
            raise ConfigError(explain(f"transformers config.{name}", "a value", None))
        return entries[name]

    common: dict[str, Any] = {
        "d_state": needed("state_size"),
        "expand": needed("expand"),
        "d_conv": needed("conv_kernel"),
        "dt_min": entries.get("time_step_min", 1e-3),
        "dt_max": entries.get("time_step_max", 0.1),
    }
    if kind == "mamba":
        rank = entries.get("time_step_rank", "auto")
        return MambaConfig(variant="s6", dt_rank=None if rank == "auto" else rank, **common)
    eps = entries.get("layer_norm_epsilon", 1e-5)
    return MambaConfig(head_dim=needed("head_dim"), n_groups=needed("n_groups"), norm_eps=eps, **common)


def mamba_state_dict_from_hf(state_dict: Mapping[str, Tensor], prefix: str, config: MambaConfig) -> dict[str, Tensor]:
    """One mixer's weights under our names, for `Mamba.load_state_dict`.

    Args:
        state_dict: of a MambaForCausalLM or Mamba2ForCausalLM, or of a mixer alone.
        prefix: what stands in front of the mixer's names, "backbone.layers.0.mixer." or "".
        config: what `mamba_config_from_hf` returned.

    Returns:
        Our names -> tensors (views where nothing had to change).

    Raises:
        CheckpointError: a weight is missing, or one is there that our Mamba has no place for.
    """
    found = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
    names = _NAMES[config.variant]
    if missing := sorted(names.keys() - found.keys() - {"conv1d.bias"}):
        remedy = "check prefix and config.variant"
        raise CheckpointError(explain(f"weights under {prefix!r}", ", ".join(missing), "none of these", remedy))
    if foreign := sorted(found.keys() - names.keys()):
        raise CheckpointError(explain(f"weights under {prefix!r}", ", ".join(names), f"also {', '.join(foreign)}"))
    weights = {names[name]: x for name, x in found.items()}
    weights["conv.weight"] = weights["conv.weight"].squeeze(1)  # (D, 1, W) -> (D, W)
    if "conv.bias" not in weights:
        weights["conv.bias"] = weights["conv.weight"].new_zeros(weights["conv.weight"].shape[0])
    weights |= _projections(weights["in_proj.weight"], weights["out_proj.weight"].shape[1], config)
    if "norm.weight" in weights:
        weights["norm.weight"] = weights["norm.weight"].reshape(config.n_groups, -1)
    return weights


def _projections(packed: Tensor, inner: int, config: MambaConfig) -> dict[str, Tensor]:
    """Their one input projection as our two; rows z, u B C, dt (Mamba-2) or u, z (Mamba), u and z `inner` wide."""
    if config.variant == "s6":
        return {"in_proj.weight": packed[:inner], "gate_proj.weight": packed[inner:]}
    mixed = inner + 2 * config.n_groups * config.d_state
    z, mixed_rows, dt = packed.split([inner, mixed, packed.shape[0] - inner - mixed])
    return {"in_proj.weight": mixed_rows, "gate_proj.weight": torch.cat([z, dt])}
