"""Several calls' traces as one: what a stream of single steps reported, read like one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, explain
from synapse_arch.introspection.analysis import weighted_mean
from synapse_arch.introspection.records import (
    ExpertTrace,
    GateTrace,
    LayerTrace,
    MemoryTrace,
    RoutingTrace,
    SynapseTrace,
)

Record = TypeVar("Record", RoutingTrace, GateTrace, MemoryTrace)

PER_TOKEN = {
    RoutingTrace: ("experts", "weights", "p1", "p2", "margin", "entropy", "logits"),
    GateTrace: ("log_i", "log_f", "o_mean", "log_C_norm", "age_tokens"),
    MemoryTrace: ("write", "decay", "collision", "read_conf", "fro_norm"),
}
"""The fields of each record that hold one value (or several) a token, (B, n, ...)."""


@torch.no_grad()
def join_traces(traces: Sequence[SynapseTrace], *, max_tokens: int = 1024) -> SynapseTrace:
    """Joins the traces of consecutive calls on the same rows, in order.

    Args:
        traces: one or more, of one level, one set of layers and one batch size.
        max_tokens: per-token values are kept for so many offsets at most, the last ones.

    Returns:
        A trace as if the calls had been one. Counts add up, shares and means are weighted by their counts, states
        (co-activation, memory weights) are the last call's.

    Raises:
        ConfigError: there is no trace, or they do not belong together.
    """
    if not traces:
        raise ConfigError(explain("traces", "at least one trace", "none"))
    first, last = traces[0], traces[-1]
    kinds = {(t.level, t.tokens.shape[0], tuple(layer.index for layer in t.layers)) for t in traces}
    if len(kinds) > 1:
        raise ConfigError(explain("traces", "one level, batch size and set of layers", sorted(kinds)))
    starts = [sum(t.length for t in traces[:i]) for i in range(len(traces))]
    positions = torch.cat([t.positions + start for t, start in zip(traces, starts, strict=True)])[-max_tokens:]
    layers = zip(*(t.layers for t in traces), strict=True)
    return dataclasses.replace(
        last,
        length=sum(t.length for t in traces),
        tokens=torch.cat([t.tokens for t in traces], 1)[:, -max_tokens:],
        at=torch.cat([t.at for t in traces], 1)[:, -max_tokens:],
        positions=positions,
        layers=tuple(_join_layer(parts, positions, max_tokens) for parts in layers) if first.layers else (),
    )


def _join_layer(parts: Sequence[LayerTrace], positions: Tensor, most: int) -> LayerTrace:
    routing = _series([part.routing for part in parts if part.routing], positions, most)
    gates = _series([part.gates for part in parts if part.gates], positions, most)
    memory = _series([part.memory for part in parts if part.memory], positions, most)
    if routing is not None:
        calls = [part.routing for part in parts if part.routing]
        reads = torch.stack([call.reads for call in calls])
        routing = dataclasses.replace(
            routing,
            tokens=torch.stack([call.tokens for call in calls]).sum(0),
            importance=weighted_mean(torch.stack([call.importance for call in calls]), reads[..., None]),
            reads=reads.sum(0),
        )
    if memory is not None:
        writes = torch.stack([part.memory.writes for part in parts if part.memory]).sum(0)
        reads = torch.stack([part.memory.reads for part in parts if part.memory]).sum(0)
        memory = dataclasses.replace(memory, writes=writes, reads=reads)
    experts = _join_experts([part.experts for part in parts if part.experts])
    return dataclasses.replace(parts[-1], routing=routing, gates=gates, memory=memory, experts=experts)


def _join_experts(calls: Sequence[ExpertTrace]) -> ExpertTrace | None:
    if not calls:
        return None
    tokens = torch.stack([call.tokens for call in calls])
    return ExpertTrace(
        tokens=tokens.sum(0),
        out_norm=weighted_mean(torch.stack([call.out_norm for call in calls]), tokens),
        sparsity=weighted_mean(torch.stack([call.sparsity for call in calls]), tokens),
    )


def _series(calls: Sequence[Record], positions: Tensor, most: int) -> Record | None:
    """The last call's record with the per-token values of all calls."""
    if not calls:
        return None
    values = {
        name: torch.cat([getattr(call, name) for call in calls], 1)[:, -most:]
        for name in PER_TOKEN[type(calls[0])]
        if getattr(calls[0], name) is not None
    }
    return dataclasses.replace(calls[-1], positions=positions, **values)
