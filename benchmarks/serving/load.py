"""The server under load on loopback: what it adds to the bare step, how many streams it carries, how evenly."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence

from benchmarks.measure import Figure, progress
from benchmarks.serving.client import Answer, Server, completion, stream
from benchmarks.serving.engine import BareLoop, median_gap
from synapse_arch import SynapseModel


def throughput(server: Server, streams: int, tokens: int, rounds: int) -> Figure:
    """Tokens a second of several streams over those of one, over HTTP, prompts included."""
    rates: dict[int, list[float]] = {1: [], streams: []}
    for index in progress(range(rounds + 1), f"1 and {streams} streams over HTTP"):
        for count in (1, streams)[:: -1 if index % 2 else 1]:
            began = time.perf_counter()
            answers = asyncio.run(_together(server.port, count, tokens))
            _check(answers, tokens)
            if index:  # the first is not counted
                rates[count].append(count * tokens / (time.perf_counter() - began))
    return Figure(
        what=f"server: tokens/s of {streams} streams over one", unit="ratio", goal=4.0, better="more",
        values=tuple(many / one for one, many in zip(rates[1], rates[streams], strict=True)),
        details={f"tokens/s of {count}": statistics.median(found) for count, found in rates.items()},
    )  # fmt: skip


def overhead(server: Server, model: SynapseModel, streams: int, tokens: int, rounds: int) -> Figure:
    """Time between the tokens that clients get, beyond the bare step of as many rows, measured in turn."""
    bare, shares, steps = BareLoop(model, streams), [], []
    for index in progress(range(rounds + 1), "bare steps and streams"):
        step = bare.seconds(tokens)
        wanted = tokens + 4 * streams  # the first ones write while the others come
        answers = asyncio.run(_together(server.port, streams, wanted))
        _check(answers, wanted)
        if index:
            last = max(answer.arrivals[0] for answer in answers)  # from here on all of them run
            first = min(answer.arrivals[-1] for answer in answers)
            gap = statistics.median(
                median_gap([at for at in answer.arrivals if last <= at <= first]) for answer in answers
            )
            shares.append(gap / step - 1)
            steps.append(step)
    return Figure(
        what=f"server: time a token beyond the bare step of {streams} rows", unit="share", goal=0.1,
        values=tuple(shares), details={"bare step, seconds": statistics.median(steps)},
    )  # fmt: skip


def processor_time(server: Server, model: SynapseModel, streams: int, tokens: int, rounds: int) -> Figure:
    """Processor time a step in the server's process beyond the bare step's, which other programs hardly change."""
    bare, shares = BareLoop(model, streams), []

    def spent(count: int) -> float:
        before = server.cpu_seconds()
        _check(asyncio.run(_together(server.port, streams, count)), count)
        return server.cpu_seconds() - before

    spent(streams)
    for _ in progress(range(rounds), "processor time"):
        before = bare.seconds(tokens, time.process_time)
        step = (spent(2 * streams + tokens) - spent(2 * streams)) / tokens  # prompts and joins cancel out
        shares.append(2 * step / (before + bare.seconds(tokens, time.process_time)) - 1)
    what = f"server: processor time a step beyond the bare step of {streams} rows"
    return Figure(what=what, values=tuple(shares), unit="share", goal=0.1)


def evenness(server: Server, clients: int, tokens: int, each: int) -> list[Figure]:
    """How much longer than usual a client waits for a token while many come and go."""
    answers = asyncio.run(_clients(server.port, clients, tokens, each))
    _check(answers, tokens)
    gaps = sorted(later - earlier for answer in answers for earlier, later in itertools.pairwise(answer.arrivals))
    first = sorted(answer.arrivals[0] - answer.sent for answer in answers)
    median, slow = statistics.median(gaps), gaps[int(0.99 * len(gaps))]
    what = f"server: 99th percentile over median of the time between tokens, {clients} clients"
    details = {"gaps": len(gaps), "median gap": median, "99th percentile": slow, "longest": gaps[-1]}
    details |= {"median to the first token": statistics.median(first), "requests": len(answers)}
    return [
        Figure(what=what, values=(slow / median,), unit="ratio", goal=3.0, details=details),
        Figure(what=f"server: median time between tokens, {clients} clients", values=(median,), unit="seconds"),
    ]


async def _together(port: int, count: int, tokens: int) -> list[Answer]:
    return list(await asyncio.gather(*(stream(port, completion(number, tokens)) for number in range(count))))


async def _clients(port: int, clients: int, tokens: int, each: int) -> list[Answer]:
    """Clients that each ask one thing after another."""

    async def client(number: int) -> list[Answer]:
        return [await stream(port, completion(number * each + turn, tokens)) for turn in range(each)]

    found = await asyncio.gather(*(client(number) for number in range(clients)))
    return [answer for answers in found for answer in answers]


def _check(answers: Sequence[Answer], tokens: int) -> None:
    for answer in answers:
        if answer.status != 200 or len(answer.arrivals) != tokens:
            got = f"status {answer.status}, {len(answer.arrivals)} tokens"
            raise RuntimeError(f"a stream of {tokens} tokens was asked for, got {got}")
