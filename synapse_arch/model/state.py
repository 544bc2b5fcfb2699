"""What a model remembers of what it has read: a tree of tensors, one row a sequence, always functional.

    SynapseState ── layers: tuple[LayerState] ── xlstm, thalamus, memory ── tensors (B, ...)
                 └─ position (B,) int64: tokens read

Every leaf has the batch first. A leaf may be None where the tensor is optional. No method changes its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from synapse_arch.errors import StateError, explain
from synapse_arch.model._files import PathLike, TensorFile, pack_tensors, save_whole, unpack_tensors, write_tensors
from synapse_arch.modules.memory import FastWeightState
from synapse_arch.modules.thalamus import ThalamusState
from synapse_arch.modules.xlstm import MLSTMLayerState

STATE_SCHEMA = "synapse.state/1"

Tree = TypeVar("Tree")


class LayerState(NamedTuple):
    """The state of one SynapseLayer; None where the layer has no such part."""

    xlstm: MLSTMLayerState | None
    thalamus: ThalamusState
    memory: FastWeightState | None


class HasState(Protocol):
    """What a state is checked against: anything that makes fresh ones, such as a SynapseModel."""

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> SynapseState:
        """A state of `batch_size` rows that has read nothing."""
        ...


def map_tensors(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Applies `function` leaf by leaf to trees of nested tuples and NamedTuples; None where the first has None."""
    if tree is None:
        return tree
    if isinstance(tree, Tensor):
        return function(tree, *others)  # type: ignore[return-value]
    if not isinstance(tree, tuple):
        remedy = "use init_state(batch_size)"
        raise StateError(explain("state", "nested tuples of tensors", type(tree).__name__, remedy))
    parts = [map_tensors(function, *children) for children in zip(tree, *others, strict=True)]
    return type(tree)._make(parts) if hasattr(tree, "_make") else tuple(parts)  # type: ignore[return-value]


def named_tensors(tree: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree with their dotted names, such as "layers.0.xlstm.cell.C", in order."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, tuple):
        keys = getattr(tree, "_fields", range(len(tree)))
        for key, child in zip(keys, tree, strict=True):
            yield from named_tensors(child, f"{prefix}.{key}" if prefix else str(key))


@dataclass(frozen=True, eq=False, repr=False)
class SynapseState:
    """The whole recurrent state of a model, its size independent of how much was read.

    Attributes:
        layers: one LayerState a layer.
        position: (B,) int64, the number of tokens each row has read.
    """

    layers: tuple[LayerState, ...]
    position: Tensor

    def __repr__(self) -> str:
        size = f"{len(self.layers)} layers, {self.batch_size} rows, {self.nbytes} bytes"
        return f"SynapseState({size}, {self.device}, position={self.position.tolist()})"

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.position.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, `position` included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.to_tensors().values())

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name ("layers.0.memory.weights", ..., "position"); optional ones that are None are absent."""
        return dict(named_tensors(self.layers, "layers")) | {"position": self.position}

    def detach(self) -> SynapseState:
        """The same values without their history, so that gradients stop here."""
        return self._map(torch.Tensor.detach)

    def clone(self) -> SynapseState:
        """A copy that shares no memory with this state; gradients flow through."""
        return self._map(torch.Tensor.clone)

    def to(self, device: torch.device | str) -> SynapseState:
        """The state on another device; its dtypes are the model's, and stay.

        Raises:
            StateError: `device` is no device.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise StateError(explain("device", "a device", repr(device)))
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor | Sequence[int]) -> SynapseState:
        """The given rows in the given order; a row may be taken several times.

        Raises:
            StateError: no row is asked for, or one that the state does not have.
        """
        wanted = rows.reshape(-1).tolist() if isinstance(rows, Tensor) else list(rows)
        valid = all(isinstance(row, int) and not isinstance(row, bool) and 0 <= row < self.batch_size for row in wanted)
        if not wanted or not valid:
            raise StateError(explain("rows", f"at least one index, each 0 to {self.batch_size - 1}", wanted))
        index = torch.tensor(wanted, device=self.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def where(self, rows: Tensor, other: SynapseState) -> SynapseState:
        """This state in the rows where `rows` (B,) bool is True, `other` in the rest.

        Raises:
            StateError: the two are not of one model and batch size, or `rows` is not (B,) bool.
        """
        if not isinstance(rows, Tensor) or rows.shape != (self.batch_size,) or rows.dtype != torch.bool:
            got = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else repr(rows)
            raise StateError(explain("rows", f"({self.batch_size},) bool", got))
        first, second = _aligned([self, other], same_batch=True)
        return first._map(lambda a, b: torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b), second)

    @staticmethod
    def cat(states: Iterable[SynapseState]) -> SynapseState:
        """One state with the rows of all, in order.

        Optional statistics (such as the memory ages of the language module) are kept where every state has them.

        Raises:
            StateError: nothing to join, or states of different models or devices.
        """
        states = list(states)
        if not states:
            raise StateError(explain("states", "at least one SynapseState", "none"))
        first, *rest = _aligned(states)
        return first._map(lambda *tensors: torch.cat(tensors), *rest)

    def memory_only(self) -> SynapseState:
        """A state that knows only what the fast-weight memory learned: all else as fresh, position 0."""

        def keep(layer: LayerState) -> LayerState:
            fresh = map_tensors(torch.zeros_like, layer)
            if layer.memory is None or fresh.memory is None:
                return fresh
            return fresh._replace(memory=fresh.memory._replace(weights=layer.memory.weights))

        layers = tuple(keep(_without_optional(layer)) for layer in self.layers)
        return SynapseState(layers, torch.zeros_like(self.position))

    def check_against(self, model: HasState, batch_size: int, *, device: torch.device | str | None = None) -> None:
        """Checks that a model can go on from this state with a batch of `batch_size` rows on `device`.

        Raises:
            StateError: naming the first tensor that is missing, unexpected, or of another shape, kind or device.
        """
        expected = model.init_state(batch_size, device="meta")
        _compare(expected, self, same_batch=True)
        place = self.device if device is None else torch.device(device)
        if place.type != self.device.type or None is not place.index != self.device.index:
            raise StateError(explain("state", f"device {device}", self.device, "move it with state.to(device)"))

    def save(self, path: PathLike) -> None:
        """Writes the state as one safetensors file, which replaces an older one whole or not at all.

        Raises:
            StateError: the file cannot be written; an older file of that name is untouched.
        """
        save_whole(Path(path), lambda aside: write_tensors(aside, *self._described()), error=StateError)

    @staticmethod
    def load(path: PathLike, *, device: torch.device | str = "cpu") -> SynapseState:
        """Reads what `save` wrote. Nothing in the file is executed.

        Raises:
            StateError: the file is missing, truncated, a pickle, or holds no state of a schema known here.
        """
        file = TensorFile(Path(path), error=StateError)
        tensors = {name: file.tensor(name).to(device, copy=True) for name in file.names}
        return _restore(tensors, file.metadata, str(path))

    def to_bytes(self) -> bytes:
        """What `save` writes, in memory."""
        return pack_tensors(*self._described())

    @staticmethod
    def from_bytes(data: bytes, *, source: str = "state") -> SynapseState:
        """Reads what `to_bytes` made, or the content of a file of `save`, onto the CPU; errors name `source`.

        Raises:
            StateError: as `load`.
        """
        return _restore(*unpack_tensors(data, source, error=StateError), source)

    def _described(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a file of it holds: the tensors, and what they are."""
        return self.to_tensors(), {"format": "pt", "schema": STATE_SCHEMA, "layers": str(len(self.layers))}

    def _map(self, function: Callable[..., Tensor], *others: SynapseState) -> SynapseState:
        layers = map_tensors(function, self.layers, *(other.layers for other in others))
        return SynapseState(layers, function(self.position, *(other.position for other in others)))


@cache
def _fields(kind: Any) -> dict[str, tuple[type | None, bool]]:
    """Of each field of a NamedTuple: the NamedTuple it holds (None for a tensor), and whether it may be None."""
    fields: dict[str, tuple[type | None, bool]] = {}
    for name, hint in get_type_hints(kind).items():
        options: tuple[Any, ...] = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        held = [option for option in options if option not in (Tensor, type(None))]
        fields[name] = (held[0] if held else None, type(None) in options)
    return fields


def _build(kind: type, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Rebuilds a NamedTuple of tensors from their names: a part without tensors is None where that is allowed."""
    values: list[Any] = []
    for field, (held, optional) in _fields(kind).items():
        name = f"{prefix}.{field}"
        if held is not None:
            present = any(key.startswith(f"{name}.") for key in tensors)
            values.append(_build(held, name, tensors) if present or not optional else None)
        elif name in tensors or optional:
            values.append(tensors.get(name))
        else:
            remedy = "the file holds the state of another model"
            raise StateError(explain(name, "a tensor of that name", "none", remedy))
    return kind._make(values)  # type: ignore[attr-defined]


def _restore(tensors: dict[str, Tensor], metadata: dict[str, str], source: str) -> SynapseState:
    """A state from the tensors and the metadata of a file."""
    schema = metadata.get("schema")
    if schema != STATE_SCHEMA:
        remedy = "give a file that SynapseState.save wrote with this version of the library"
        raise StateError(explain(f"{source}: schema", STATE_SCHEMA, schema, remedy))
    count = metadata.get("layers", "")
    if not count.isdecimal() or len(count) > 6 or "position" not in tensors:
        raise StateError(explain(source, "a number of layers and a position", "neither or one of them"))
    layers = tuple(_build(LayerState, f"layers.{index}", tensors) for index in range(int(count)))
    state = SynapseState(layers, tensors["position"])
    _check_loaded(state, tensors, source)
    return state


def _check_loaded(state: SynapseState, tensors: dict[str, Tensor], path: str) -> None:
    unknown = sorted(tensors.keys() - state.to_tensors().keys())
    if unknown:
        raise StateError(explain(path, "only tensors of a state", unknown[:10]))
    if state.position.dim() != 1 or state.position.dtype != torch.int64 or state.batch_size == 0:
        got = f"{tuple(state.position.shape)} {state.position.dtype}"
        raise StateError(explain(f"{path}: position", "(B,) torch.int64", got))
    for name, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.shape[0] != state.batch_size:
            raise StateError(explain(f"{path}: {name}", f"B={state.batch_size} rows", tuple(tensor.shape)))


def _without_optional(tree: Tree) -> Tree:
    """The tree with its optional tensors left out, as in a fresh state."""
    if not hasattr(tree, "_replace"):
        return tree
    gone: dict[str, Any] = {}
    kind: Any = type(tree)
    for field, (held, optional) in _fields(kind).items():
        value = getattr(tree, field)
        gone[field] = None if held is None and optional else _without_optional(value)
    return tree._replace(**gone)  # type: ignore[no-any-return]


def _optional_names(tree: object, prefix: str) -> set[str]:
    """The names of the tensors that a tree of this structure may leave out."""
    names: set[str] = set()
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        for index, child in enumerate(tree):
            names |= _optional_names(child, f"{prefix}.{index}")
    elif isinstance(tree, tuple):
        for field, (held, optional) in _fields(type(tree)).items():
            if held is None and optional:
                names.add(f"{prefix}.{field}")
            names |= _optional_names(getattr(tree, field), f"{prefix}.{field}")
    return names


def _compare(expected: SynapseState, got: SynapseState, *, same_batch: bool) -> None:
    """Raises StateError unless both have the same tensors, but for those a state may leave out."""
    if not isinstance(got, SynapseState):
        raise StateError(explain("state", "a SynapseState", type(got).__name__, "use model.init_state(batch_size)"))
    remedy = "it belongs to another configuration: use model.init_state(batch_size)"
    if len(expected.layers) != len(got.layers):
        raise StateError(explain("state.layers", f"{len(expected.layers)} layers", len(got.layers), remedy))
    if same_batch and expected.batch_size != got.batch_size:
        hint = "pick rows with state.select(rows), or start with model.init_state(batch_size)"
        raise StateError(explain("state", f"batch size {expected.batch_size}", got.batch_size, hint))
    wanted, found = expected.to_tensors(), got.to_tensors()
    optional = _optional_names(expected.layers, "layers")
    for name in wanted | found:
        if name not in wanted or name not in found:
            if name not in optional:
                present = ("a tensor", "none") if name in wanted else ("none", "a tensor")
                raise StateError(explain(f"state.{name}", *present, remedy))
            continue
        a, b = wanted[name], found[name]
        if a.shape[1:] != b.shape[1:] or b.dim() != a.dim():
            raise StateError(explain(f"state.{name}", (got.batch_size, *a.shape[1:]), tuple(b.shape), remedy))
        if a.is_floating_point() != b.is_floating_point() or (not a.is_floating_point() and a.dtype != b.dtype):
            raise StateError(explain(f"state.{name}", a.dtype, b.dtype, "states are kept as the model returned them"))
        if b.device != got.device or b.shape[0] != got.batch_size:
            place = f"{got.batch_size} rows on {got.device}"
            got_place = f"{b.shape[0]} rows on {b.device}"
            raise StateError(explain(f"state.{name}", place, got_place, "use state.to(device)"))


def _aligned(states: Sequence[SynapseState], *, same_batch: bool = False) -> list[SynapseState]:
    """The states with one structure and device, optional tensors left out where one of them lacks them."""
    first, *rest = states
    for other in rest:
        _compare(first, other, same_batch=same_batch)
        if other.device != first.device:
            raise StateError(explain("states", f"all on {first.device}", other.device, "move it with state.to(device)"))
    names = {tuple(state.to_tensors()) for state in states}
    if len(names) == 1:
        return list(states)
    return [SynapseState(tuple(map(_without_optional, state.layers)), state.position) for state in states]
