"""Low-rank adapters (LoRA, Hu et al. 2022) on a SynapseModel, through peft and in its format.

A saved adapter goes onto its model again, or into it:

    from peft import PeftModel
    model = PeftModel.from_pretrained(SynapseModel.from_pretrained(base), folder)
    model.merge_and_unload().save_pretrained("merged")
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from synapse_arch import SynapseModel
from synapse_arch.errors import CheckpointError, ConfigError, explain
from synapse_arch.modules import ExpertPool

LEFT_ALONE = frozenset({"router", "head"})
"""Projections that are no targets unless named: which expert is right for a token, and what a token is."""
ADAPTER_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def linear_names(model: nn.Module) -> list[str]:
    """The names of the projections that LoRA adapts unless told otherwise.

    >>> from synapse_arch import SynapseConfig
    >>> linear_names(SynapseModel(SynapseConfig.preset("tiny", n_layers=1)))
    ['gate_proj', 'in_proj', 'out_proj', 'qk_proj']
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - LEFT_ALONE)


def expert_names(model: nn.Module) -> list[str]:
    """The names of the stacked expert weights, none where there are no experts."""
    pooled = any(isinstance(module, ExpertPool) for module in model.modules())
    return ["experts.w_in", "experts.w_out"] if pooled else []


def add_lora(
    model: SynapseModel, *, rank: int, alpha: float, modules: Sequence[str] = (), parameters: Sequence[str] = ()
) -> Any:
    """The model with adapters, which alone learn; its own weights are frozen.

    Args:
        model: changed in place.
        rank: r, the width of each adapter; each expert has one of its own.
        alpha: the adapters' product is scaled by alpha / rank.
        modules: names of projections, as endings of their dotted names; without any name at all `linear_names`.
        parameters: names of stacked weights, likewise; without any name at all `expert_names`.

    Returns:
        A peft.PeftModel; what it computes is unchanged until it has learned.

    Raises:
        ConfigError: a name fits nothing in the model, or the rank is below 1.
    """
    peft = _peft()
    if rank < 1:
        raise ConfigError(explain("rank", "1 or more", rank))
    if not modules and not parameters:
        modules, parameters = linear_names(model), expert_names(model)
    there = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stacked = [name for name, value in model.named_parameters() if value.ndim == 3]
    for kind, names, known in (("modules", modules, there), ("parameters", parameters, stacked)):
        for name in names:
            if not any(full == name or full.endswith(f".{name}") for full in known):
                raise ConfigError(explain(f"LoRA {kind}", f"endings of {', '.join(known[:4])} ...", repr(name)))
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(modules), target_parameters=list(parameters) or None
    )
    return peft.get_peft_model(model, config)


def load_lora(model: SynapseModel, folder: Path, *, trainable: bool = False) -> Any:
    """The model with the adapters that a folder holds.

    Raises:
        CheckpointError: there are none, or they do not fit.
    """
    if not (folder / ADAPTER_FILE).exists():
        raise CheckpointError(explain(str(folder), "an adapter in peft's format", "none", "give its folder"))
    peft, remedy = _peft(), "give the model that the adapter was trained on"
    try:
        with warnings.catch_warnings():  # what is missing is an error here
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(explain(str(folder), "an adapter of this model", error, remedy)) from error
    if (file := folder / WEIGHTS_FILE).exists():  # peft warns of missing tensors at most, and of others not at all
        with safe_open(file, framework="pt") as opened:
            there = set(opened.keys())
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if there != wanted:
            odd = sorted(there ^ wanted)
            got = f"{len(wanted - there)} tensors missing and {len(there - wanted)} too many, {odd[0]} for one"
            raise CheckpointError(explain(str(folder), "an adapter of this model", got, remedy))
    return adapted


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError(explain("LoRA", "peft installed", error, "pip install 'synapse-arch[peft]'")) from error
    return peft
