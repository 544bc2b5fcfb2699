"""Rows of a batch's trace, each in memory of its own. B rows, L layers."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from torch import Tensor

from synapse_arch import TraceSpec
from synapse_arch.introspection import ExpertTrace, GateTrace, LayerTrace, MemoryTrace, RoutingTrace, SynapseTrace

Record = TypeVar("Record", RoutingTrace, ExpertTrace, GateTrace, MemoryTrace)


def cut_trace(batch: SynapseTrace, row: int, spec: TraceSpec) -> SynapseTrace:
    """One row of a batch's trace, as `spec` would have recorded it alone.

    Args:
        batch: the trace of a pass; at least as deep and of at least the layers that `spec` asks for.
        row: which row.
        spec: its level and layers decide what is left out.
    """
    layers = tuple(_cut_layer(layer, row, spec) for layer in batch.layers if spec.covers(layer.index))
    tokens, at = (x[row : row + 1].clone() for x in (batch.tokens, batch.at))
    return dataclasses.replace(batch, level=spec.level, tokens=tokens, at=at, layers=layers)


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
    """One row of each of a record's tensors but for `positions`, which all rows share."""
    values = {
        field.name: value[row : row + 1].clone()
        for field in dataclasses.fields(record)
        if field.name != "positions" and isinstance(value := getattr(record, field.name), Tensor)
    }
    return dataclasses.replace(record, **values)
