"""One model, one text, read in one pass, in chunks and token by token: the same numbers, and the same bits when traced.

L layers, B rows, T tokens, V vocabulary, k experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Figure, Tensors, progress
from synapse_arch import SynapseConfig, SynapseModel, SynapseState, TraceSpec

TIE = 1e-6
"""A margin of probability below which float32 does not settle which expert is chosen."""
GOAL = 1e-5
ROUTES = TraceSpec(level="routes", max_tokens=1 << 30)


class Pass(NamedTuple):
    """What one way of reading gave."""

    logits: Tensor
    """(B, T, V)."""
    experts: Tensor
    """(L, B, T, k) int64, ascending."""
    margins: Tensor
    """(L, B, T) probability between the last chosen expert and the first that was not."""
    state: SynapseState


class Agreement(NamedTuple):
    """How two passes compare. Differences are relative to the largest logit."""

    before: float
    """Largest difference of logits up to each row's first token that was routed otherwise."""
    after: float
    """The same from that token on; 0 where there is none."""
    state: float | None
    """Largest relative difference of a tensor of the final states; None where routing differed."""
    flips: Tensor
    """(n,) margins of the tokens routed otherwise, but for those that an earlier such token can have caused."""
    compared: int
    """Tokens that `before` covers."""


def read(model: SynapseModel, ids: Tensor, size: int, what: str) -> Pass:
    """Reads ids (B, T) in calls of `size` tokens."""
    state, logits, routing = model.init_state(len(ids)), [], []
    with torch.inference_mode():
        for piece in progress(ids.split(size, dim=1), what):
            out = model(piece, state, trace=ROUTES)
            state = out.state
            logits.append(out.logits)
            routing.append([layer.routing for layer in out.trace.layers])
        layers = [list(calls) for calls in zip(*routing, strict=True)]
        experts = torch.stack([torch.cat([call.experts for call in calls], dim=1) for calls in layers])
        margins = torch.stack([torch.cat([call.margin for call in calls], dim=1) for calls in layers])
        return Pass(torch.cat(logits, dim=1), experts.sort(-1).values, margins, state)


def compare(expected: Pass, got: Pass) -> Agreement:
    """How far `got` is from `expected`, with every routing that differs brought to light.

    A token routed otherwise in a layer changes what later layers see from that token on, and nothing else: a difference
    there is a consequence, all others stand for themselves.
    """
    differs = (expected.experts != got.experts).any(-1)  # (L, B, T)
    seen = differs.cummax(-1).values
    caused = torch.cat([torch.zeros_like(seen[:1]), seen[:-1].cummax(0).values])
    same = ~seen.any(0)  # (B, T)
    errors = (got.logits.double() - expected.logits.double()).abs().amax(-1) / expected.logits.abs().max().double()
    wanted, found = expected.state.to_tensors(), got.state.to_tensors()
    state = None if differs.any() else max(_relative(found[name], x) for name, x in wanted.items())
    return Agreement(
        before=errors[same].max().item() if same.any() else 0.0,
        after=errors[~same].max().item() if not same.all() else 0.0,
        state=state,
        flips=expected.margins[differs & ~caused],
        compared=int(same.sum()),
    )


def streaming(
    config: SynapseConfig, length: int, sizes: tuple[int, ...], *, rows: int = 2, seed: int = 0
) -> list[Figure]:
    """Compares a whole pass over random tokens with passes in calls of other sizes; 1 is token by token.

    Args:
        config: the model, with fresh weights.
        length: T.
        sizes: tokens a call.
        rows: B.
        seed: of weights and tokens.
    """
    torch.manual_seed(seed)
    model = SynapseModel(config).eval()
    ids = torch.randint(config.vocab_size, (rows, length))
    whole = read(model, ids, length, "one pass")
    found = {size: compare(whole, read(model, ids, size, f"calls of {size} tokens")) for size in sizes}
    flips = torch.cat([agreement.flips for agreement in found.values()])
    tied, clear = flips[flips < TIE], flips[flips >= TIE]
    each = {str(size): agreement._asdict() | {"flips": agreement.flips.tolist()} for size, agreement in found.items()}
    ways = ", ".join(map(str, sizes))
    states = [agreement.state for agreement in found.values() if agreement.state is not None]
    choices = whole.margins.numel() * len(sizes)
    figures = [
        Figure(
            what=f"streaming: logits of one pass against calls of {ways} (T = {length:,})",
            values=(max(agreement.before for agreement in found.values()),), unit="relative", goal=GOAL, exact=True,
            details={"each call size": each},
        ),
        Figure(
            what=f"streaming: routing flips at a margin of {TIE:.0e} or more", values=(float(clear.numel()),),
            unit="count", goal=0.0, exact=True, details={"margins": clear.tolist()},
        ),
        Figure(
            what=f"streaming: routing flips at a smaller margin (of {choices:,} choices)",
            values=(float(tied.numel()),), unit="count", exact=True,
            details={"margins": tied.tolist(), "choices with so small a margin": int((whole.margins < TIE).sum())},
        ),
    ]  # fmt: skip
    if states:
        what = "streaming: final states"
        figures.append(Figure(what=what, values=(max(states),), unit="relative", goal=GOAL, exact=True))
    if flips.numel():
        after = max(agreement.after for agreement in found.values())
        share = 1 - sum(agreement.compared for agreement in found.values()) / (ids.numel() * len(sizes))
        what = f"streaming: logits behind those flips ({100 * share:.1f} % of the tokens)"
        figures.append(Figure(what=what, values=(after,), unit="relative", exact=True))
    return [*figures, _tracing(model, ids)]


def _tracing(model: SynapseModel, ids: Tensor) -> Figure:
    """Counts tensors of outputs and states that a trace changes, in whole passes and in steps."""
    changed: list[str] = []
    with torch.inference_mode():
        plain, pieces = _outputs(model, ids, None)
        for level in ("routes", "gates", "full"):
            traced, traced_pieces = _outputs(model, ids, TraceSpec(level=level))
            for kind, a, b in (("whole", plain, traced), ("steps", pieces, traced_pieces)):
                changed += [f"{level}, {kind}: {name}" for name, x in a.items() if not torch.equal(x, b[name])]
    what = "tracing: outputs and states in which a bit changes"
    details = {"changed": changed}
    return Figure(what=what, values=(float(len(changed)),), unit="count", goal=0.0, exact=True, details=details)


def _outputs(model: SynapseModel, ids: Tensor, trace: TraceSpec | None) -> tuple[Tensors, Tensors]:
    """Logits and final state, of one pass and of the same tokens in a half and single steps."""
    out = model(ids, trace=trace)
    whole = {"logits": out.logits, **out.state.to_tensors()}
    steps = min(16, ids.shape[1] // 2)
    first, *rest = ids.split([ids.shape[1] - steps, *[1] * steps], dim=1)
    out = model(first, trace=trace)
    logits = [out.logits]
    for token in rest:
        out = model(token, out.state, trace=trace)
        logits.append(out.logits)
    return whole, {"logits": torch.cat(logits, dim=1), **out.state.to_tensors()}


def _relative(got: Tensor, expected: Tensor) -> float:
    error, scale = (got.double() - expected.double()).abs().max().item(), expected.double().abs().max().item()
    return error / scale if error else 0.0
