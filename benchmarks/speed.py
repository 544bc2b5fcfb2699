"""Speed and memory of training, and what a longer text costs: everything as ratios within one run.

T tokens of a sequence, L layers.
"""

from __future__ import annotations

import itertools
import resource
import statistics
from collections.abc import Callable

import torch

from benchmarks.measure import Figure, interleaved, peak_bytes, progress, seconds
from benchmarks.processes import alone
from recipes.malloc import keep_freed_memory
from synapse_arch import SynapseConfig, SynapseModel, SynapseState
from synapse_arch.model import accounting

RATE_GOAL, MEMORY_GOAL, LENGTH_GOAL, DECODE_GOAL = 0.5, 1.5e9, 1.15, 1.10
WINDOW = 2048
"""Tokens a call while a long context is read."""


def training_rate(config: SynapseConfig, *, batch: int, length: int, product: int, rounds: int) -> list[Figure]:
    """Arithmetic rate of training steps as a share of the rate of a matrix product timed before and after each.

    The rate is 6 × active parameters × tokens/s: the parameters a token is multiplied with, top_k of the experts and
    without the embedding table, which is looked up; recurrences, scores and elementwise work add nothing to it.
    A step is forward, losses, backward and a fused AdamW.

    Args:
        config: the model, in float32.
        batch: sequences of a step.
        length: tokens of each.
        product: N of the (N, N) @ (N, N) float32 product.
        rounds: how often the pair is timed.
    """
    keep_freed_memory()  # as training does on a CPU
    step = _training_step(config, batch, length)
    a, b = torch.randn(2, product, product)
    out = torch.empty(product, product)

    def multiply() -> float:
        return 2 * product**3 / statistics.median(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3))

    step()
    work = 6 * accounting.active_parameters(config) * batch * length
    products, rates = [multiply()], []
    for _ in progress(range(rounds), "training rate"):
        rates.append(work / seconds(step))
        products.append(multiply())
    limits = [(before + after) / 2 for before, after in itertools.pairwise(products)]
    shares = tuple(rate / limit for rate, limit in zip(rates, limits, strict=True))
    active, tokens = accounting.active_parameters(config), tuple(batch * length * rate / work for rate in rates)
    return [
        Figure(
            what="training: 6 x active parameters x tokens/s over the matrix-product rate", values=shares,
            unit="share", goal=RATE_GOAL, better="more",
            details={"active parameters, embedding table not counted": active},
        ),
        Figure(what=f"training: matrix product {product}^3 beside it", values=tuple(products), unit="FLOP/s"),
        Figure(what=f"training: batch {batch} x {length}", values=tokens, unit="tokens/s"),
    ]  # fmt: skip


def training_memory(config: SynapseConfig, *, batch: int, length: int, steps: int = 3) -> list[Figure]:
    """The most memory a fresh process holds that trains a few steps, interpreter and torch included."""
    peaks = alone(_peaks, config, batch, length, steps)
    what = f"training: peak memory ({peaks[0] / 1e9:.2f} GB of it before there is a model)"
    return [Figure(what=what, values=(peaks[1],), unit="bytes", goal=MEMORY_GOAL, details={"at import": peaks[0]})]


def length_cost(config: SynapseConfig, *, short: int, long: int, rounds: int) -> list[Figure]:
    """Forward time a token of a long sequence over that of a short one, and the bytes of state behind both.

    A round reads the long sequence in one call, and the short one in as many calls as make about half its tokens.
    The second ratio reads the long sequence in calls of `short` tokens, the state going from call to call: the same
    numbers with the activations of a short one. What sets the two apart is memory, not arithmetic: the allocator hands
    large activations back to the system after each use, and every page comes back with a fault.
    """
    model, ids = _evaluated(config, long)
    calls = max(1, long // short // 2)

    def brief() -> None:
        for _ in range(calls):
            model(ids[:, :short])

    with torch.inference_mode():
        states, faults = [model(ids[:, :short]).state.nbytes], {}  # a first call pays for what is set up once
        for length in (short, long):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            states.append(model(ids[:, :length]).state.nbytes)
            faults[length] = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / length
        runs: dict[str, Callable[[], object]] = {
            "short": brief, "long": lambda: model(ids), "windows": lambda: _read(model, ids, short)
        }  # fmt: skip
        times = interleaved(runs, rounds, f"forward at T = {short:,} and {long:,}")
    base = [value / (calls * short) for value in times["short"]]
    ratios = {
        name: tuple(value / long / each for value, each in zip(times[name], base, strict=True))
        for name in ("long", "windows")
    }
    lengths = f"T = {long:,} over T = {short:,}"
    return [
        Figure(
            what=f"length: forward time a token, {lengths}", values=ratios["long"], unit="ratio", goal=LENGTH_GOAL,
            details={"page faults a token": faults},
        ),
        Figure(what=f"length: the same, read in calls of {short:,}", values=ratios["windows"], unit="ratio"),
        Figure(what=f"length: forward time a token at T = {short:,}", values=tuple(base), unit="seconds"),
        Figure(
            what=f"length: bytes of state after {long:,} tokens less those after {short:,}",
            values=(float(abs(states[2] - states[1])),), unit="count", goal=0.0, exact=True,
            details={"bytes": states[2], "accounting.state_bytes": accounting.state_bytes(config)},
        ),
    ]  # fmt: skip


def decoding(config: SynapseConfig, *, near: int, far: int, steps: int) -> list[Figure]:
    """Time of a step after `far` tokens over that after `near`, both states stepped in turn."""
    model, ids = _evaluated(config, far)
    with torch.inference_mode():
        states = {
            "near": _read(model, ids[:, :near], WINDOW),
            "far": _read(model, ids, WINDOW, f"reading {far:,} tokens"),
        }

        def step(name: str) -> Callable[[], None]:
            def run() -> None:
                states[name] = model(ids[:, :1], states[name]).state

            return run

        for _ in range(10):
            step("near")(), step("far")()
        times = interleaved({name: step(name) for name in states}, steps, "decoding")
    ratios = tuple(late / early for late, early in zip(times["far"], times["near"], strict=True))
    what = f"decoding: time a step, after {far:,} tokens over after {near:,}"
    return [
        Figure(what=what, values=ratios, unit="ratio", goal=DECODE_GOAL),
        Figure(what=f"decoding: time a step after {near:,} tokens", values=tuple(times["near"]), unit="seconds"),
    ]


def _read(model: SynapseModel, ids: torch.Tensor, size: int, what: str = "") -> SynapseState:
    """The state after ids, read in calls of `size` tokens, with a bar where `what` says of what."""
    state, pieces = model.init_state(len(ids)), ids.split(size, dim=1)
    for piece in progress(pieces, what) if what else pieces:
        state = model(piece, state).state
    return state


def _evaluated(config: SynapseConfig, length: int) -> tuple[SynapseModel, torch.Tensor]:
    """A fresh model and one row of random tokens."""
    torch.manual_seed(0)
    return SynapseModel(config).eval(), torch.randint(config.vocab_size, (1, length))


def _training_step(config: SynapseConfig, batch: int, length: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = SynapseModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (batch, length + 1))

    def step() -> None:
        loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peaks(config: SynapseConfig, batch: int, length: int, steps: int) -> tuple[int, int]:
    """Peak bytes of this process before and after it trains."""
    before = peak_bytes()
    step = _training_step(config, batch, length)
    for _ in range(steps):
        step()
    return before, peak_bytes()
