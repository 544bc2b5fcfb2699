"""peft's LoRA adapters as models: what they add to the base, exactly, without building the adapted model.

ΔW = s · B A in float32, s = α/r or α/√r (rank-stabilised), for linear layers, embeddings, convolutions and single
parameters; of experts stacked as (E, ·, ·) each has its own B and A, in the layout of peft's ParamWrapper.
Tensors saved whole (modules_to_save) are taken as they are. What is not plain LoRA is refused.

r rank, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge.io import Checkpoint
from merge.vectors import Delta, Given
from synapse_arch.errors import CheckpointError, explain
from synapse_arch.model._files import PathLike
from synapse_arch.model.checkpoint import SCHEMA

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.(?P<kind>lora_(embedding_)?)A(\.weight)?")
_KNOWN = re.compile(r".+\.lora_(embedding_)?[AB](\.weight)?")
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_BEYOND = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
"""Settings of peft's LoraConfig under which an adapter adds something else than s · B A."""


class _Low(NamedTuple):
    """A low-rank change of one tensor.

    Attributes:
        a, b: names of A and B in the adapter's file.
        experts: E, or 0 where the tensor is one matrix.
        transposed: the tensor is stored as (A's width, B's height), per expert.
        scale: s.
    """

    a: str
    b: str
    experts: int
    transposed: bool
    scale: float


def is_adapter(path: PathLike) -> bool:
    """Whether a folder holds a peft adapter."""
    return (Path(path) / CONFIG).is_file()


class Adapter:
    """A base with a LoRA adapter on it. It is a `Source`.

    Attributes:
        label: the path it was given as.
        base: what it is applied to.
        files: its own weights.
    """

    def __init__(self, path: PathLike, base: Checkpoint) -> None:
        """Reads the configuration and finds the tensor of the base that each matrix belongs to.

        Raises:
            CheckpointError: the adapter is not plain LoRA, is only there as a pickle, or does not fit the base.
        """
        self.label, self.base = str(path), base
        folder = Path(path)
        config = _plain_lora(folder / CONFIG)
        if not (folder / WEIGHTS).is_file() and any(folder.glob("adapter_model.bin")):
            remedy = "pickles run code and are never loaded: save the adapter again with safetensors"
            raise CheckpointError(explain(self.label, WEIGHTS, "adapter_model.bin, a pickle", remedy))
        self._own = Checkpoint(folder / WEIGHTS)
        self.files = self._own.files
        self._low: dict[str, list[_Low]] = {}
        self._whole: dict[str, str] = {}
        self._assign(config)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's."""
        return self.base.shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The base's."""
        return self.base.dtypes

    def given(self, name: str, base: Tensor) -> Given:
        """The adapter's task vector of a tensor, or the base's tensor itself where it has none."""
        if name not in self._low:
            return self._own.tensor(self._whole[name]) if name in self._whole else base
        delta = torch.zeros(base.shape)
        for low in self._low[name]:
            self._add(delta, low)
        if name in self._whole:
            delta += self._own.tensor(self._whole[name]).float().sub_(base)
        return Delta(delta)

    def tensor(self, name: str) -> Tensor:
        """The adapted tensor, in float32 where the adapter changes it."""
        base = self.base.tensor(name)
        given = self.given(name, base)
        return given.value.add_(base) if isinstance(given, Delta) else given

    def _add(self, delta: Tensor, low: _Low) -> None:
        """Adds s · B A in place."""
        a, b = self._own.tensor(low.a).float(), self._own.tensor(low.b).float()
        if not low.experts:
            product = b.flatten(1) @ a.flatten(1)
            delta.add_((product.T if low.transposed else product).reshape(delta.shape), alpha=low.scale)
            return
        a = a.view(low.experts, -1, a.shape[-1])  # (rE, in) -> (E, r, in)
        b = b.view(b.shape[0], -1, low.experts)  # (out, rE) -> (out, r, E)
        for expert in range(low.experts):
            one = b[:, :, expert] @ a[expert]
            delta[expert].add_(one.T if low.transposed else one, alpha=low.scale)

    def _assign(self, config: dict[str, Any]) -> None:
        """Fills the maps from the base's names to what changes them."""
        unknown = []
        for key in self._own.shapes:
            if found := _MATRIX.fullmatch(key):
                module = _unwrapped(found["module"].removeprefix(_ROOT))
                other = re.sub(r"A(\.weight)?$", r"B\1", key)
                target = self._target(key, other, module, config)
                if target is None:
                    unknown.append(key)
                else:
                    self._low.setdefault(target[0], []).append(target[1])
            elif not _KNOWN.fullmatch(key):
                name = _unwrapped(key.removeprefix(_ROOT))
                if self.base.shapes.get(name) != self._own.shapes[key]:
                    unknown.append(key)
                self._whole[name] = key
        if unknown:
            expected = "matrices and tensors that fit tensors of the base by name and shape"
            remedy = "give the base that it was trained on; if it is, it names or stores its tensors in another way"
            raise CheckpointError(explain(f"{self.label} on {self.base.label}", expected, unknown[:10], remedy))

    def _target(self, a: str, b: str, module: str, config: dict[str, Any]) -> tuple[str, _Low] | None:
        """The tensor of the base that a pair of matrices changes, and how."""
        if b not in self._own.shapes:
            return None
        wanted = config.get("target_parameters") or []
        names = [
            name
            for name in self.base.shapes
            if name.rpartition(".")[0] == module and any(f".{name}".endswith(f".{one}") for one in wanted)
        ]
        fits: list[tuple[str, _Low]] = []
        for name in names or [f"{module}.weight"]:
            key = name if names else module
            fits += [(name, low) for low in self._layouts(a, b, name, config, bool(names), key)]
        return fits[0] if len(fits) == 1 else self._undecided(a, fits)

    def _layouts(self, a: str, b: str, name: str, config: dict[str, Any], parameter: bool, key: str) -> list[_Low]:
        """The ways in which B and A make up a change of the tensor `name`."""
        shape, a_shape, b_shape = self.base.shapes.get(name, ()), self._own.shapes[a], self._own.shapes[b]
        experts = shape[0] if parameter and len(shape) == 3 else 0
        rank, left = divmod(a_shape[0], experts or 1)
        rows, columns = b_shape[0], a_shape[1:]
        if left or b_shape[1] != a_shape[0] or rank == 0:
            return []
        alpha = _setting(config.get("alpha_pattern") or {}, key, config["lora_alpha"])
        scale = float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
        plain, turned = (rows, *columns), (*columns, rows)
        flipped = "embedding" in a or bool(config.get("fan_in_fan_out"))
        if not parameter:
            return [_Low(a, b, 0, flipped, scale)] if shape == (turned if flipped else plain) else []
        if not experts:
            return [_Low(a, b, 0, False, scale)] if shape == plain else []
        return [_Low(a, b, experts, way, scale) for way, own in ((False, plain), (True, turned)) if shape[1:] == own]

    def _undecided(self, a: str, fits: list[tuple[str, _Low]]) -> tuple[str, _Low] | None:
        """Square stacked experts: which way round they are stored does not show in the shapes."""
        if not fits:
            return None
        ours = [fit for fit in fits if not fit[1].transposed]
        if self.base.metadata.get("schema") == SCHEMA and len(ours) == 1:
            return ours[0]  # ExpertPool does not call itself transposed
        got = f"it may be any of {[(name, 'in, out' if low.transposed else 'out, in') for name, low in fits]}"
        remedy = "merge the adapter into its base with peft's merge_and_unload, and give the result"
        raise CheckpointError(explain(f"{self.label}: {a}", "one tensor of the base that it fits", got, remedy))


def _unwrapped(name: str) -> str:
    """A name without the layers that peft wraps around a module."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _setting(patterns: Mapping[str, float], key: str, default: float) -> float:
    """The value of the first pattern that a module's name ends with, as peft matches them."""
    return next((value for one, value in patterns.items() if re.match(rf"(.*\.)?({one})$", key)), default)


def _plain_lora(path: Path) -> dict[str, Any]:
    """The configuration of an adapter that adds s · B A and nothing else."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, alpha = config["peft_type"], config["lora_alpha"] if config["peft_type"] == "LORA" else 0
    except (OSError, ValueError, KeyError, TypeError) as cause:
        got = f"{type(cause).__name__}: {cause}"
        raise CheckpointError(explain(str(path), "the configuration of a peft adapter", got)) from cause
    remedy = "merge it into its base with peft's merge_and_unload, and give the result"
    if kind != "LORA" or not isinstance(alpha, int | float):
        raise CheckpointError(explain(f"{path}: peft_type", "LORA", kind, remedy))
    beyond = [key for key in _BEYOND if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        beyond.append(f"init_lora_weights={config['init_lora_weights']}, which changes the base")
    if beyond:
        raise CheckpointError(explain(str(path), "plain LoRA", f"{', '.join(beyond)}", remedy))
    return dict(config)
