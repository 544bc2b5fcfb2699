"""What a read of the fast-weight memory is made of: the tokens that wrote it, and what was there before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from torch import Tensor, nn

from serving.engine import Engine
from serving.errors import bad_request
from serving.introspection.record import TraceRecord
from serving.introspection.replay import Reader, Run, on_engine, pieces
from synapse_arch import FastWeightMemory, MemoryConfig, SynapseConfig, SynapseModel
from synapse_arch.introspection.attribution import read_sources
from synapse_arch.introspection.records import plain
from synapse_arch.model.state import LayerState
from synapse_arch.modules.memory import MemorySignals
from synapse_arch.ops.delta_rule import Rule

MOST_SOURCES = 1024
"""Tokens in front of a read that are looked at one by one; what is older is part of the residual."""


class _Window:
    """What a layer's memory was given over the last pieces, and what it held before them."""

    def __init__(self, layer: int) -> None:
        self.layer, self.start = layer, 0
        self.before = torch.empty(0)
        self.signals: list[MemorySignals] = []

    def begin(self, at: int, state: LayerState) -> None:
        """Forgets what was in front of offset `at`, where the layer is in `state`."""
        assert state.memory is not None
        self.start, self.before, self.signals = at, state.memory.weights, []

    def read(self, reader: Reader, piece: slice) -> None:
        """Reads a piece and keeps what the memory is given."""
        layer: Any = reader.model.layers[self.layer]
        hook = layer.memory.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            reader.read(piece, logits_to_keep=1)
        finally:
            hook.remove()

    def _note(self, memory: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(memory, FastWeightMemory)
        self.signals.append(memory.signals(*args, mask=kwargs["mask"], plasticity=kwargs["plasticity"]))


async def attribute(
    engine: Engine, record: TraceRecord, config: SynapseConfig, *, layer: int, head: int, pos: int, top: int, piece: int
) -> dict[str, Any]:
    """Splits one read of a traced run.

    Args:
        engine: runs the model.
        record: the trace.
        config: the model's.
        layer: which layer's memory.
        head: which of its heads.
        pos: position of the token that reads.
        top: sources listed, the largest by |share|.
        piece: tokens read between two steps of the engine.

    Returns:
        {"layer", "head", "pos", "sources": [{"pos", "share", "norm", "overlaps"}], "rest", "residual", "read_norm",
        "window": {"first", "tokens"}}: share = <part, read> / ||read||²; the shares of sources, rest (the sources not
        listed) and residual (older than the window) add up to 1. overlaps: query · effective key, a number a write.

    Raises:
        ApiError: 400, no such memory or token.
    """
    memory = _check(config, layer, head)
    _, output = record.tokens()
    run = Run.of(record.request, output)
    at = pos - run.first
    if not 0 <= at < len(run.ids):
        last = run.first + len(run.ids) - 1
        raise bad_request(f"pos: expected {run.first} to {last}, got {pos}", "pos")
    window = await _replay(engine, run, _Window(layer), at, piece)
    return await run_in_threadpool(_split, window, memory.rule, head, run.first, at, top)


async def _replay(engine: Engine, run: Run, window: _Window, at: int, piece: int) -> _Window:
    """Reads up to and with offset `at`; the window holds what came since its beginning."""
    reader = await on_engine(engine, run.reader)
    opening = max(0, at + 1 - MOST_SOURCES)

    def read(span: slice, _: SynapseModel) -> None:
        emptied = reader.enter(span)
        if span.start == opening or window.layer in emptied or None in emptied:
            window.begin(span.start, reader.state.layers[window.layer])
        if span.start < opening:
            reader.read(span, logits_to_keep=1)
        else:
            window.read(reader, span)

    for span in (*pieces([run], piece, end=opening), *pieces([run], piece, start=opening, end=at + 1)):
        await on_engine(engine, partial(read, span))
    return window


def _split(window: _Window, rule: Rule, head: int, first: int, at: int, top: int) -> dict[str, Any]:
    """The answer, from what the window holds."""
    last, written = window.signals[-1].q[:, -1, head : head + 1], [_of_head(part, head) for part in window.signals]
    k, v, beta, log_decay, write = (_joined(parts) for parts in zip(*written, strict=True))
    before = window.before[:, head : head + 1]
    found = read_sources(last, k, v, beta, log_decay, before, write=write, rule=rule)
    parts, residual = found.contributions[0, :, 0].double().cpu(), found.residual[0, 0].double().cpu()
    read = parts.sum(0) + residual
    square = (read * read).sum()
    shares, norms = parts @ read / square, parts.norm(dim=-1)
    order = shares.abs().nan_to_num().argsort(descending=True, stable=True)
    listed, others = order[:top], order[top:]
    sources = [
        {
            "pos": first + window.start + index,
            "share": plain(shares[index]),
            "norm": plain(norms[index]),
            "overlaps": plain(found.overlaps[0, index, :, 0]),
        }
        for index in listed.tolist()
    ]
    return {
        "layer": window.layer, "head": head, "pos": first + at, "sources": sources,
        "rest": _part(parts[others].sum(0), read, square), "residual": _part(residual, read, square),
        "read_norm": plain(square.sqrt()), "window": {"first": first + window.start, "tokens": len(parts)},
    }  # fmt: skip


def _part(x: Tensor, read: Tensor, square: Tensor) -> dict[str, Any]:
    return {"share": plain((x * read).sum() / square), "norm": plain(x.norm())}


def _of_head(signals: MemorySignals, head: int) -> tuple[Any, ...]:
    """k, v, beta, log_decay, write of one head, which stays an axis."""
    behind = {"k": 2, "v": 2, "beta": 1, "log_decay": 1, "write": 2}  # dims from the axis of heads on
    values = ((getattr(signals, name), -dims) for name, dims in behind.items())
    return tuple(None if value is None else value.narrow(dim, head, 1) for value, dim in values)


def _joined(parts: Sequence[Tensor | None]) -> Any:
    """All pieces along the time; None where there is none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known, dim=1) if known else None


def _check(config: SynapseConfig, layer: int, head: int) -> MemoryConfig:
    if config.memory is None:
        raise bad_request("layer: this model has no fast-weight memory", "layer")
    for name, value, count in (("layer", layer, config.n_layers), ("head", head, config.memory.n_heads)):
        if value >= count:
            raise bad_request(f"{name}: expected 0 to {count - 1}, got {value}", name)
    return config.memory
