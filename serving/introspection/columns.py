"""The latest tokens of one row's trace, gathered from passes over whole batches. n kept tokens."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from serving.requests import RowTrace
from serving.rows import cut_trace, pick_tokens
from synapse_arch.introspection import LayerTrace, SynapseTrace, join_traces
from synapse_arch.introspection.joining import PER_TOKEN

MOST_PARTS = 8
"""Parts that are kept before they are joined."""
TENSOR_BYTES = 512
"""What a tensor takes besides its numbers."""

Record = TypeVar("Record")


class Ring:
    """The latest tokens, as parts that are joined when somebody looks or they are many.

    Args:
        most_tokens: tokens it keeps.
        most_bytes: bytes that what grows with its tokens may take.

    Attributes:
        nbytes: bytes it takes by now.
    """

    def __init__(self, most_tokens: int, most_bytes: int) -> None:
        self._most_tokens, self._most_bytes = most_tokens, most_bytes
        self._parts: list[SynapseTrace] = []
        self._activity = Activity()
        self.nbytes = 0

    def add(self, passes: list[RowTrace]) -> None:
        """Takes further passes of the row, in order."""
        for _, run in itertools.groupby(passes, _kind):
            if self._parts:
                self._parts[-1] = _without_states(self._parts[-1])
            together = list(run)
            self._activity.add(together)
            self._parts.append(row_trace(together, self._most_tokens))
        if len(self._parts) > MOST_PARTS:
            self.whole()
        self._weigh()

    def whole(self) -> SynapseTrace | None:
        """All that is kept, as one trace on the CPU, B = 1; None for nothing."""
        if not self._parts:
            return None
        kept = sum(len(part.positions) for part in self._parts)
        room = max(1, min(self._most_tokens, self._most_bytes // max(1, token_bytes(self._parts[-1]))))
        if len(self._parts) > 1 or kept > room:
            self._parts = [map_trace(_compact, join_traces(self._parts, max_tokens=room))]
            self._weigh()
        return self._activity.put_into(self._parts[0])

    def _weigh(self) -> None:
        self.nbytes = sum(_size(x) for part in self._parts for x in tensors(part))


class Activity:
    """What the experts did with one row's tokens, added up pass by pass.

    Means of means, as `join_traces` makes them, would have other bits when other passes are joined first; which ones
    come together depends on the time.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # layer -> (2, E) float64: output norms, silent shares

    def add(self, passes: list[RowTrace]) -> None:
        """Takes passes of one row and one kind of batch, in order."""
        row, spec = passes[0].row, passes[0].spec
        if not spec.wants("full"):
            return
        for layers in zip(*(one.batch.layers for one in passes), strict=True):
            calls = [layer.experts for layer in layers if layer.experts is not None and spec.covers(layer.index)]
            if calls:
                means = torch.stack([torch.stack((call.out_norm[row], call.sparsity[row])) for call in calls])
                counts = torch.stack([call.tokens[row] for call in calls]).cpu()[:, None]
                sums = torch.where(counts > 0, means.cpu().double() * counts, 0)
                before = self._sums.get(layers[0].index, torch.zeros_like(sums[0]))
                self._sums[layers[0].index] = functools.reduce(torch.add, sums, before)

    def put_into(self, trace: SynapseTrace) -> SynapseTrace:
        """The row's trace with what was added up."""

        def put(layer: LayerTrace) -> LayerTrace:
            if layer.experts is None:
                return layer
            norms, silent = (self._sums[layer.index] / layer.experts.tokens).to(layer.experts.out_norm.dtype)
            experts = dataclasses.replace(layer.experts, out_norm=norms[None].clone(), sparsity=silent[None].clone())
            return dataclasses.replace(layer, experts=experts)

        return dataclasses.replace(trace, layers=tuple(put(layer) for layer in trace.layers))


def row_trace(passes: list[RowTrace], most: int) -> SynapseTrace:
    """Passes of one row and one kind of batch as one trace on the CPU, B = 1; at most the last `most` tokens."""
    first, batches = passes[0], [one.batch for one in passes]
    kept = [one.kept for one, batch in zip(passes, batches, strict=True) for _ in range(len(batch.positions))]
    batch = batches[0] if len(batches) == 1 else join_traces(batches, max_tokens=len(kept))
    row = map_trace(lambda x: x.cpu(), cut_trace(batch, first.row, first.spec))
    return row if all(kept) and len(kept) <= most else pick_tokens(row, torch.tensor(kept).nonzero()[-most:, 0])


def token_bytes(trace: SynapseTrace) -> int:
    """Bytes that one kept token takes."""
    values = [
        value
        for record in parts_of(trace)
        for name in PER_TOKEN[type(record)]
        if (value := getattr(record, name)) is not None
    ]
    return sum(x.shape[2:].numel() * x.element_size() for x in (*values, trace.tokens, trace.at))


def parts_of(trace: SynapseTrace) -> Iterator[Any]:
    """The records of all layers that hold values a token."""
    for layer in trace.layers:
        yield from (part for part in (layer.routing, layer.gates, layer.memory) if part is not None)


def map_trace(function: Callable[[Tensor], Tensor], record: Record) -> Record:
    """A trace with every tensor replaced by what `function` makes of it."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = function(value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = map_trace(function, value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            changes[field.name] = tuple(map_trace(function, one) for one in value)
    return dataclasses.replace(record, **changes)  # type: ignore[type-var]


def tensors(record: object) -> Iterator[Tensor]:
    """All tensors of a trace."""
    if isinstance(record, Tensor):
        yield record
    elif isinstance(record, tuple):
        for one in record:
            yield from tensors(one)
    elif dataclasses.is_dataclass(record):
        for field in dataclasses.fields(record):
            yield from tensors(getattr(record, field.name))


def _kind(trace: RowTrace) -> tuple[Any, ...]:
    """What passes must share to be joined before their row is cut out."""
    batch = trace.batch
    return trace.row, batch.level, batch.tokens.shape[0], tuple(layer.index for layer in batch.layers)


def _size(x: Tensor) -> int:
    return TENSOR_BYTES + x.numel() * x.element_size()


def _compact(x: Tensor) -> Tensor:
    """The tensor in memory of its own size."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def _without_states(trace: SynapseTrace) -> SynapseTrace:
    """The trace without what only the last part of several is asked for."""

    def strip(layer: LayerTrace) -> LayerTrace:
        gone = torch.empty(0)
        routing, memory = layer.routing, layer.memory
        return dataclasses.replace(
            layer,
            routing=None if routing is None else dataclasses.replace(routing, coactivation=gone),
            memory=None if memory is None else dataclasses.replace(memory, weights=gone),
        )

    return dataclasses.replace(trace, layers=tuple(strip(layer) for layer in trace.layers))
