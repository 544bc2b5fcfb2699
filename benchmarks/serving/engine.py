"""The engine in this process, without HTTP: the same bits in a crowd, then what company and traces cost.

S rows of the batch.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.measure import Figure, interleaved, progress
from serving.batch import Batch, seat_for
from serving.engine import Engine
from serving.prefill import read_prompt
from serving.requests import GenerationRequest, RowTrace, Token
from serving.tickets import Ticket
from synapse_arch import Sampling, SynapseModel, TraceSpec

PATIENCE = 300.0
"""Seconds without an event after which something is wrong."""


def request(number: int, tokens: int, *, trace: TraceSpec | None = None) -> GenerationRequest:
    """The request of that number: a short prompt, and so many tokens."""
    prompt = tuple((7 * number + place) % 256 for place in range(12))
    return GenerationRequest(prompt=prompt, sampling=Sampling(max_tokens=tokens, seed=number), trace=trace)


def exactness(model: SynapseModel, streams: int, tokens: int) -> Figure:
    """Counts outputs that differ in a bit between a run alone and one in a crowd."""
    requests = [request(number, tokens + number) for number in range(streams)]
    engine = Engine(model, slots=streams)
    try:
        alone = [_output(engine.submit(one)) for one in requests]
        together = [_output(ticket) for ticket in [engine.submit(one) for one in requests]]
    finally:
        engine.close()
    differing = [number for number, (a, b) in enumerate(zip(alone, together, strict=True)) if a != b]
    what = f"engine: outputs that differ in a bit between alone and {streams} together"
    details = {"differing": differing}
    return Figure(what=what, values=(float(len(differing)),), unit="count", goal=0.0, exact=True, details=details)


def throughput(model: SynapseModel, streams: int, tokens: int, rounds: int) -> Figure:
    """Tokens a second of several streams over those of one, prompts included."""
    engine = Engine(model, slots=streams)
    try:
        runs: dict[str, Callable[[], object]] = {str(n): partial(_run, engine, n, tokens) for n in (1, streams)}
        times = interleaved(runs, rounds, f"1 and {streams} streams")
    finally:
        engine.close()
    one, many = times["1"], times[str(streams)]
    return Figure(
        what=f"engine: tokens/s of {streams} streams over one", unit="ratio", goal=streams / 2, better="more",
        values=tuple(streams * a / b for a, b in zip(one, many, strict=True)),
        details={
            "tokens/s of one": tokens / statistics.median(one),
            f"tokens/s of {streams}": streams * tokens / statistics.median(many),
        },
    )  # fmt: skip


def overhead(model: SynapseModel, streams: int, tokens: int, rounds: int) -> Figure:
    """What the engine adds to a loop that only steps the model with the same rows and takes the likeliest token."""
    engine, gaps = Engine(model, slots=streams, buffer=1_000_000), []  # nobody reads along, so nobody is woken
    try:
        bare = BareLoop(model, streams)
        for index in progress(range(rounds + 1), "bare steps and the engine's"):
            step = bare.seconds(tokens)
            gap = _gap(engine, streams, tokens)
            if index:  # the first is not counted
                gaps.append((gap, step))
    finally:
        engine.close()
    return Figure(
        what=f"engine: time a token beyond the bare step of {streams} rows", unit="share", goal=0.1,
        values=tuple(gap / step - 1 for gap, step in gaps),
        details={"bare step, seconds": statistics.median(step for _, step in gaps)},
    )  # fmt: skip


class BareLoop:
    """Nothing but steps of the model.

    Args:
        model: in evaluation mode.
        rows: S.
    """

    def __init__(self, model: SynapseModel, rows: int) -> None:
        self._model = model
        self._ids = torch.arange(rows)[:, None]
        self._mask = torch.ones(rows, 1, dtype=torch.bool)
        with torch.inference_mode():
            self._state = model(self._ids.expand(-1, 12)).state

    @torch.inference_mode()
    def seconds(self, steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
        """The median duration of so many steps, by `clock`."""
        state, ids, times = self._state, self._ids, []
        for _ in range(steps):
            began = clock()
            out = self._model(ids, state, mask=self._mask, expert_backend="rowwise")
            state, ids = out.state, out.logits.argmax(-1)
            times.append(clock() - began)
        return statistics.median(times)


def tracing(model: SynapseModel, rows: int, steps: int, rounds: int) -> list[Figure]:
    """What a trace adds to a decode step, and what making its records takes on the reader's thread."""
    steppers = {
        name: _Stepper(model, rows, None if name == "off" else TraceSpec(level=name))  # type: ignore[arg-type]
        for name in ("off", "routes", "gates")
    }
    runs: dict[str, Callable[[], object]] = {name: partial(one.step, steps) for name, one in steppers.items()}
    times = interleaved(runs, rounds, "steps with and without a trace")
    figures = []
    for name, goal in (("routes", 0.02), ("gates", 0.05)):
        values = tuple(a / b - 1 for a, b in zip(times[name], times["off"], strict=True))
        what = f"trace: {name}, added to the decode time of {rows} rows"
        figures.append(Figure(what=what, values=values, unit="share", goal=goal))
        step = statistics.median(times["off"]) / steps
        what = f"trace: {name}, records made by the reader, over a step"
        making = []
        for _ in range(rounds):
            steppers[name].step(1)
            making.append(steppers[name].make() / step)
        figures.append(Figure(what=what, values=tuple(making), unit="share"))
    return figures


class _Stepper:
    """A full batch whose steps are timed."""

    def __init__(self, model: SynapseModel, rows: int, spec: TraceSpec | None) -> None:
        self._batch = Batch(model, rows)
        self._traces: dict[int, RowTrace | None] = {}
        for row in range(rows):
            seat = seat_for(request(row, 1, trace=spec), row)
            reader = read_prompt(model, seat, 64)
            try:
                next(reader)
            except StopIteration as end:
                self._batch.join(row, seat, end.value.state, end.value.logits)

    def step(self, count: int) -> None:
        """Chooses and reads so many tokens a row."""
        for _ in range(count):
            chosen = self._batch.choose()
            self._traces = self._batch.read({row: choice.token for row, choice in chosen.items()})

    def make(self) -> float:
        """How long the last step's records take."""
        trace = self._traces[0]
        assert trace is not None
        began = time.perf_counter()
        trace.get()
        return time.perf_counter() - began


def _output(ticket: Ticket) -> list[tuple[int, float, float]]:
    return [(event.id, event.logprob, event.entropy) for event in ticket.wait(PATIENCE) if isinstance(event, Token)]


def _run(engine: Engine, streams: int, tokens: int) -> None:
    """So many streams from start to end."""
    for ticket in [engine.submit(request(number, tokens)) for number in range(streams)]:
        _output(ticket)


def _gap(engine: Engine, streams: int, tokens: int) -> float:
    """The median time between the tokens of a stream while all the others run too."""
    others = [engine.submit(request(number, tokens + 8 * streams)) for number in range(streams - 1)]
    events = engine.submit(request(streams, tokens)).wait(PATIENCE)
    arrivals = [time.perf_counter() for event in events if isinstance(event, Token)]
    for ticket in others:
        ticket.cancel()
    return median_gap(arrivals)


def median_gap(arrivals: Sequence[float]) -> float:
    """The median of the times between neighbours."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(arrivals))
