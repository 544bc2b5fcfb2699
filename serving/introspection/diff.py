"""What an intervention changes, and how much random ones of the same size change.

A run (a) is compared with the same run under an intervention (b): its text, written again from the same seed and state,
and what both think of a's text, read by both token by token. Each control is a run like b with an intervention drawn at
random, once a seed:

    random_expert   other experts in the place of those that were forced, banned or biased
    random_vector   a random direction added behind the intervened layer, as long as the intervention's effect there:
                    the root mean square of the change of the residual stream

n tokens of a's output, V vocabulary, L layers, D model width.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from serving.errors import bad_request
from serving.introspection.record import TraceRecord
from serving.introspection.replay import Reader, Run, on_engine, pieces
from serving.prefill import not_finite
from serving.requests import Failed, Intervention, Token
from serving.runtime import Runtime
from serving.tickets import Ticket
from serving.tokens import TextStopMatcher
from synapse_arch import SynapseConfig, SynapseModel, TraceSpec

CONTROLS = ("random_expert", "random_vector")


@dataclass(frozen=True, eq=False)
class Change:
    """How one run differs from a.

    Attributes:
        kl: KL(a || run) in nats, of the predictions of each token of a's output.
        jaccard: (L) a layer's mean overlap of the experts chosen, |both| / |either|, over all tokens read.
        effect: (L) root mean square, over the tokens from the intervention on, of the change of the residual stream
            behind each layer.
    """

    kl: list[float]
    jaccard: list[float]
    effect: list[float]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a run showed in one piece: predictions (t, V), experts (t, k) and residual stream (t, D) of each layer."""

    logprobs: Tensor
    experts: list[Tensor]
    streams: list[Tensor]


class _Sums:
    """What adds up while a run is read beside a; its intervention begins at offset `since`."""

    def __init__(self, since: int) -> None:
        self._since, self._changed = since, 0
        self._kl: list[float] = []
        self._overlaps: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, own: _Seen, other: _Seen, piece: slice, predicting: range) -> None:
        """Adds a piece; the tokens at the offsets `predicting` are those before a token of the output."""
        told = own.logprobs.exp() * (own.logprobs - other.logprobs)
        kl = torch.where(own.logprobs > -torch.inf, told, 0.0).sum(-1).clamp(min=0)
        offsets = range(piece.start, piece.stop)
        self._kl += [value for offset, value in zip(offsets, kl.tolist(), strict=True) if offset in predicting]
        pairs = zip(own.experts, other.experts, strict=True)
        self._overlaps.append(torch.tensor([float(_overlaps(a, b).sum()) for a, b in pairs], dtype=torch.float64))
        late = max(0, self._since - piece.start)
        self._changed += max(0, len(offsets) - late)
        streams = zip(own.streams, other.streams, strict=True)
        changes = [float((a - b)[late:].double().square().sum()) for a, b in streams]
        self._squares.append(torch.tensor(changes, dtype=torch.float64))

    def means(self, length: int) -> Change:
        """Over `length` tokens read."""
        effect = (torch.stack(self._squares).sum(0) / max(1, self._changed)).sqrt()
        return Change(self._kl, (torch.stack(self._overlaps).sum(0) / length).tolist(), effect.tolist())


async def compare(
    runtime: Runtime, record: TraceRecord, change: Sequence[Intervention], *, max_tokens: int, seeds: int
) -> dict[str, Any]:
    """Compares a traced run with itself under further interventions.

    Args:
        runtime: the server's parts.
        record: the trace of the run.
        change: the interventions, besides those that the run had.
        max_tokens: of its output, and as many of each other run's.
        seeds: random draws of each control.

    Returns:
        {"a", "b": {"text", "tokens"}, "first_divergence", "kl", "jaccard": [{"layer", "value"}], "controls": [{"kind",
        "seeds", "kl", "kl_spread", "first_divergence", "jaccard": [{"layer", "value", "spread"}]}]}: first_divergence
        counts tokens of the output, None where none differs; kl_spread and spread are standard deviations over seeds.

    Raises:
        ApiError: 400 where the run has no output. StateError: predictions under an intervention are not finite.
    """
    prompt, written = record.tokens()
    written = written[:max_tokens]
    if not written:
        raise bad_request("max_tokens: the run has no output to compare", "max_tokens")
    base = Run.of(record.request, written)
    (own,) = await _changes(runtime, base, [change], len(prompt))
    draws = [
        (kind, draw) for kind in CONTROLS for draw in _draws(kind, base, change, own.effect, runtime.config, seeds)
    ]
    others = await _changes(runtime, base, [draw for _, draw in draws], len(prompt))
    outputs = await _outputs(runtime, record, [change, *(draw for _, draw in draws)], len(written))
    controls = []
    for kind in CONTROLS:
        rows = [index for index, (name, _) in enumerate(draws) if name == kind]
        if rows:
            parts = [divergence(written, outputs[1 + row]) for row in rows]
            controls.append({"kind": kind, **_spread([others[row] for row in rows]), "first_divergence": parts})
    return {
        "a": _said(runtime, written), "b": _said(runtime, outputs[0]),
        "first_divergence": divergence(written, outputs[0]), "kl": own.kl,
        "jaccard": [{"layer": layer, "value": value} for layer, value in enumerate(own.jaccard)],
        "controls": controls,
    }  # fmt: skip


def divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two outputs part: the first index at which they differ or one has ended; None where they are the same.

    >>> divergence((1, 2, 3), (1, 2, 4)), divergence((1, 2), (1, 2, 4)), divergence((1, 2), (1, 2))
    (2, 2, None)
    """
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


async def _changes(runtime: Runtime, base: Run, changes: Sequence[Sequence[Intervention]], prompt: int) -> list[Change]:
    """Reads the run and the same run under each of `changes` side by side, piece by piece.

    Raises:
        StateError: what one of them predicts, or its residual stream, is not finite.
    """
    if not changes:
        return []
    runs = [base, *(dataclasses.replace(base, interventions=(*base.interventions, *one)) for one in changes)]
    readers = [await on_engine(runtime.engine, run.reader) for run in runs]
    sums = [_Sums(min((one.start for one in change), default=0) - base.first) for change in changes]
    for piece in pieces(runs, runtime.settings.prefill_chunk):
        own = await on_engine(runtime.engine, partial(_read, readers[0], piece))
        for reader, total in zip(readers[1:], sums, strict=True):
            other = await on_engine(runtime.engine, partial(_read, reader, piece))
            total.add(own, other, piece, range(prompt - 1, len(base.ids) - 1))
    found = [one.means(len(base.ids)) for one in sums]
    if not all(math.isfinite(value) for one in found for value in (*one.kl, *one.effect)):
        raise not_finite("NaN or infinite ones")
    return found


def _read(reader: Reader, piece: slice, model: SynapseModel) -> _Seen:
    """Reads a piece on the engine's thread."""
    streams: list[Tensor] = []

    def note(_: nn.Module, __: object, out: Any) -> None:
        streams.append(out.x[0])

    hooks = [layer.register_forward_hook(note) for layer in model.layers]
    try:
        reader.enter(piece)
        out = reader.read(piece, trace=TraceSpec(level="routes", max_tokens=len(reader.run.ids)))
    finally:
        for hook in hooks:
            hook.remove()
    assert out.trace is not None
    experts = [layer.routing.experts[0] for layer in out.trace.layers if layer.routing is not None]
    return _Seen(out.logits[0].float().log_softmax(-1), experts, streams)


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """|both| / |either| of the experts (t, k) chosen for each token: (t,)."""
    both = (a[:, :, None] == b[:, None, :]).sum((1, 2)).double()
    return both / (a.shape[1] + b.shape[1] - both)


def _draws(
    kind: str, base: Run, change: Sequence[Intervention], effect: Sequence[float], config: SynapseConfig, seeds: int
) -> list[tuple[Intervention, ...]]:
    """The interventions of a control, one tuple a seed; none where there is nothing to draw from."""
    if kind == "random_vector":
        return [_random_vectors(change, effect, config, seed) for seed in range(seeds)]
    named = sorted({one.expert for one in change if one.expert is not None})
    taken = {*named, *(one.expert for one in base.interventions)}
    free = [expert for expert in range(config.n_experts) if expert not in taken]
    if not named or len(free) < len(named):
        return []
    draws = []
    for seed in range(seeds):
        other = dict(zip(named, random.Random(seed).sample(free, len(named)), strict=True))
        draws.append(tuple(
            one if one.expert is None else dataclasses.replace(one, expert=other[one.expert]) for one in change
        ))  # fmt: skip
    return draws


def _random_vectors(
    change: Sequence[Intervention], effect: Sequence[float], config: SynapseConfig, seed: int
) -> tuple[Intervention, ...]:
    """A direction behind each intervened layer, the last one for interventions on all."""
    generator = torch.Generator().manual_seed(seed)
    start = min(one.start for one in change)
    ends = [one.end for one in change if one.end is not None]
    end = max(ends) if len(ends) == len(change) else None
    vectors = []
    for layer in sorted({config.n_layers - 1 if one.layer is None else one.layer for one in change}):
        direction = torch.randn(config.d_model, generator=generator)
        vector = tuple((direction / direction.norm()).tolist())
        vectors.append(
            Intervention(kind="steer", layer=layer, value=effect[layer], vector=vector, start=start, end=end)
        )
    return tuple(vectors)


async def _outputs(
    runtime: Runtime, record: TraceRecord, changes: Sequence[Sequence[Intervention]], length: int
) -> list[tuple[int, ...]]:
    """What the run writes under each of `changes`; as many run side by side as there are slots."""
    slots = runtime.settings.slots
    groups = [changes[at : at + slots] for at in range(0, len(changes), slots)]
    return [output for group in groups for output in await _group(runtime, record, group, length)]


async def _group(
    runtime: Runtime, record: TraceRecord, changes: Sequence[Sequence[Intervention]], length: int
) -> list[tuple[int, ...]]:
    tickets: list[Ticket] = []
    try:
        for change in changes:
            sampling = dataclasses.replace(record.request.sampling, seed=record.seed, max_tokens=length)
            request = dataclasses.replace(
                record.request, sampling=sampling,
                interventions=(*record.request.interventions, *change), stops=TextStopMatcher((), runtime.codec),
                trace=None, top_logprobs=0, echo_logprobs=False,
            )  # fmt: skip
            tickets.append(runtime.engine.submit(request))
        return await asyncio.gather(*map(_output, tickets))
    finally:
        for ticket in tickets:
            ticket.cancel()


async def _output(ticket: Ticket) -> tuple[int, ...]:
    tokens = []
    async for event in ticket:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Token):
            tokens.append(event.id)
    return tuple(tokens)


def _said(runtime: Runtime, tokens: Sequence[int]) -> dict[str, Any]:
    return {"text": runtime.codec.decode(tokens), "tokens": list(tokens)}


def _spread(changes: Sequence[Change]) -> dict[str, Any]:
    """Means and standard deviations over the seeds; None for the latter where there is one seed."""
    kl = [_over(values) for values in zip(*(change.kl for change in changes), strict=True)]
    jaccard = [_over(values) for values in zip(*(change.jaccard for change in changes), strict=True)]
    return {
        "seeds": list(range(len(changes))),
        "kl": [mean for mean, _ in kl],
        "kl_spread": [spread for _, spread in kl],
        "jaccard": [{"layer": i, "value": mean, "spread": spread} for i, (mean, spread) in enumerate(jaccard)],
    }


def _over(values: Sequence[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None
