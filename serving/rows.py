"""Rows of a batch's state and trace: put in, taken out, poisoned. B rows."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from synapse_arch import SynapseState, TraceSpec
from synapse_arch.introspection import ExpertTrace, GateTrace, LayerTrace, MemoryTrace, RoutingTrace, SynapseTrace
from synapse_arch.introspection.joining import PER_TOKEN
from synapse_arch.model.state import map_tensors

Record = TypeVar("Record", RoutingTrace, ExpertTrace, GateTrace, MemoryTrace, SynapseTrace)
Series = TypeVar("Series", RoutingTrace, GateTrace, MemoryTrace)


class StepTrace:
    """The trace of a step, made when somebody first asks for it: outside the engine's thread.

    Args:
        make: what makes it.
    """

    def __init__(self, make: Callable[[], SynapseTrace]) -> None:
        self._make: Callable[[], SynapseTrace] | None = make
        self._made: SynapseTrace | None = None
        self._lock = threading.Lock()

    def get(self) -> SynapseTrace:
        """The trace of all rows."""
        with self._lock:
            if self._made is None:
                assert self._make is not None
                with torch.inference_mode():
                    self._made = self._make()
                self._make = None  # and with it the tensors of the step
            return self._made


def cut_trace(batch: SynapseTrace, row: int, spec: TraceSpec) -> SynapseTrace:
    """One row of a batch's trace, as `spec` would have recorded it alone.

    Args:
        batch: the trace of a pass; at least as deep and of at least the layers that `spec` asks for.
        row: which row.
        spec: its level and layers decide what is left out.
    """
    layers = tuple(_cut_layer(layer, row, spec) for layer in batch.layers if spec.covers(layer.index))
    return dataclasses.replace(_cut(batch, row), level=spec.level, layers=layers)


def pick_tokens(trace: SynapseTrace, which: slice | Tensor) -> SynapseTrace:
    """The trace with some of its tokens, and with all that it says of the whole pass."""
    layers = tuple(
        dataclasses.replace(
            layer,
            routing=None if layer.routing is None else _pick(layer.routing, which),
            gates=None if layer.gates is None else _pick(layer.gates, which),
            memory=None if layer.memory is None else _pick(layer.memory, which),
        )
        for layer in trace.layers
    )
    tokens, at, positions = trace.tokens[:, which], trace.at[:, which], trace.positions[which]
    return dataclasses.replace(trace, tokens=tokens, at=at, positions=positions, layers=layers)


def _pick(record: Series, which: slice | Tensor) -> Series:
    values = ((name, getattr(record, name)) for name in PER_TOKEN[type(record)])
    columns = {name: value[:, which] for name, value in values if value is not None}
    return dataclasses.replace(record, positions=record.positions[which], **columns)


def _cut_layer(layer: LayerTrace, row: int, spec: TraceSpec) -> LayerTrace:
    routing = None if layer.routing is None else _cut(layer.routing, row)
    if routing is not None and not spec.wants("full"):
        routing = dataclasses.replace(routing, logits=None)
    gates, full = spec.wants("gates"), spec.wants("full")
    return dataclasses.replace(
        layer,
        routing=routing,
        gates=_cut(layer.gates, row) if gates and layer.gates is not None else None,
        memory=_cut(layer.memory, row) if gates and layer.memory is not None else None,
        experts=_cut(layer.experts, row) if full and layer.experts is not None else None,
    )


def _cut(record: Record, row: int) -> Record:
    """One row of each of a record's tensors; all of `positions`, which the rows share."""
    values: dict[str, Any] = {
        field.name: (value if field.name == "positions" else value[row : row + 1]).clone()
        for field in dataclasses.fields(record)
        if isinstance(value := getattr(record, field.name), Tensor)
    }
    return dataclasses.replace(record, **values)


def put_row(batch: SynapseState, row: int, state: SynapseState) -> SynapseState:
    """The batch's state with one row taken over by `state`, a state of one row. Neither is changed."""

    def write(whole: Tensor, one: Tensor) -> Tensor:
        changed = whole.clone()
        changed[row] = one[0]
        return changed

    return _each(write, with_ages(batch), with_ages(state))


def poison(batch: SynapseState, row: int) -> SynapseState:
    """The batch's state with one row full of NaN (position 0), so that nothing of it can be used again."""

    def spoil(whole: Tensor) -> Tensor:
        changed = whole.clone()
        changed[row] = torch.nan if whole.is_floating_point() else 0
        return changed

    return _each(spoil, batch)


def take_row(batch: SynapseState, row: int, spec: TraceSpec | None) -> SynapseState:
    """One row of the batch's state, in memory of its own.

    The ages of what the language module holds stay only where `spec` traces them: others in the batch may have.
    """
    with torch.inference_mode(False):  # so that what leaves the engine can be used like any tensor
        one = _each(lambda whole: whole[row : row + 1].clone(), batch)
    gates = spec is not None and spec.wants("gates")
    layers = []
    for index, layer in enumerate(one.layers):
        kept = gates and spec is not None and spec.covers(index)
        if layer.xlstm is not None and not kept:
            layer = layer._replace(xlstm=layer.xlstm._replace(mass=None, age=None))
        layers.append(layer)
    return SynapseState(tuple(layers), one.position)


def with_ages(state: SynapseState) -> SynapseState:
    """The state with the optional ages of the language module, zeros where it has none."""
    layers = []
    for layer in state.layers:
        if layer.xlstm is not None and layer.xlstm.mass is None:
            zeros = torch.zeros_like(layer.xlstm.cell.m)
            layer = layer._replace(xlstm=layer.xlstm._replace(mass=zeros, age=zeros))
        layers.append(layer)
    return SynapseState(tuple(layers), state.position)


def _each(function: Callable[..., Tensor], first: SynapseState, *others: SynapseState) -> SynapseState:
    """Applies `function` tensor by tensor."""
    layers = map_tensors(function, first.layers, *(other.layers for other in others))
    return SynapseState(layers, function(first.position, *(other.position for other in others)))
