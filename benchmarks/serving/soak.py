"""A long hard day: clients that leave, dawdle and talk nonsense, and a server that must not notice.

Slots, file descriptors, threads and memory are read from the server while it works and when it is quiet again.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

from benchmarks.measure import Figure, progress
from benchmarks.serving.client import Server, call, completion, head, read_status

CALM = 60.0
"""Seconds in which everything must have ended after the last request."""
MEMORY_GOAL = 32e6
"""Bytes that the second half may leave behind, for the allocator's moods."""
BUSY = 429
Client = Callable[[int, random.Random], Awaitable[int]]

NONSENSE: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"null", b'"text"', b'{"model":"m"}', b'{"model":"m","prompt":NaN}',
    b'{"model":"m","prompt":"x","max_tokens":-1}', b'{"model":"m","prompt":"x","temperature":"hot"}',
    b'{"model":"m","prompt":[999999]}', b'{"model":"m","prompt":"\\ud800"}', b'{"model":"other","prompt":"x"}',
    b'{"model":"m","prompt":"x","stop":["a","b","c","d","e"]}', b'{"model":"m","prompt":"x","logprobs":99}',
    b'{"model":"m","prompt":"x","n":100000}', b"[" * 10_000, b"\xff\xfe\x00",
    b'{"model":"m","prompt":"x"' + b" " * 2**21,
)  # fmt: skip
"""Bodies that no completion can be made of."""


def soak(server: Server, requests: int, clients: int, *, seed: int = 0) -> list[Figure]:
    """Sends so many requests of every kind, and looks what is left.

    Args:
        server: with a small model.
        requests: how many.
        clients: at once.
        seed: of who does what.
    """
    statuses: Counter[int] = Counter()
    warm = max(requests // 10, 4 * clients)
    numbers = iter(progress(range(warm + requests), "requests"))
    half = warm + requests // 2
    marks = [_quiet_after(server, numbers, count, clients, statuses, seed) for count in (warm, half - warm, requests)]
    before, middle, after = marks
    server_errors = sum(count for status, count in statuses.items() if status >= 500)
    return [
        Figure(
            what=f"soak: 5xx answers to {warm + requests:,} requests", values=(float(server_errors),), unit="count",
            goal=0.0, exact=True, details={"statuses": {str(k): v for k, v in sorted(statuses.items())}},
        ),
        _left("slots taken or requests queued", after["working"], 0),
        _left("file descriptors", after["files"], before["files"]),
        Figure(  # the server's pools grow and shrink within their bounds
            what="soak: threads beyond the most there were in the first half", unit="count", goal=0.0,
            values=(float(max(after["threads"] - max(before["threads"], middle["threads"]), 0)),),
            details={"threads": [mark["threads"] for mark in marks]},
        ),
        Figure(
            what="soak: memory that the second half left behind", unit="bytes", goal=MEMORY_GOAL,
            values=(float(after["memory"] - middle["memory"]),), details={"resident": [m["memory"] for m in marks]},
        ),
    ]  # fmt: skip


def _left(what: str, after: int, before: int) -> Figure:
    return Figure(
        what=f"soak: {what} left behind", values=(float(max(after - before, 0)),), unit="count", goal=0.0, exact=True,
        details={"before": before, "after": after},
    )  # fmt: skip


def _quiet_after(
    server: Server, numbers: Iterator[int], count: int, clients: int, statuses: Counter[int], seed: int
) -> dict[str, int]:
    """Sends `count` requests, waits until nothing is running, and reads what the server holds."""
    asyncio.run(_send(server.port, numbers, count, clients, statuses, seed))
    until = time.monotonic() + CALM
    while (working := _working(server.port)) and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(0.5)  # connections that were just closed
    held = {"files": server.open_files(), "threads": server.threads(), "memory": server.resident()}
    return held | {"working": working}


def _working(port: int) -> int:
    answer = asyncio.run(call(port, "GET", "/api/status"))
    engine = json.loads(_unchunked(answer.body))["engine"]
    return int(engine["busy"]) + int(engine["queued"])


def _unchunked(body: bytes) -> bytes:
    return body[body.index(b"{") : body.rindex(b"}") + 1]


async def _send(port: int, numbers: Iterator[int], count: int, clients: int, statuses: Counter[int], seed: int) -> None:
    left = count

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            number = next(numbers, None)
            if number is None:
                return
            draw = random.Random(seed * 1_000_003 + number)
            while (status := await draw.choice(KINDS)(port, draw)) == BUSY:
                statuses[status] += 1
                await asyncio.sleep(0.2)
            statuses[status] += 1

    await asyncio.gather(*(client() for _ in range(clients)))


async def _whole(port: int, draw: random.Random) -> int:
    """Waits for a whole answer."""
    return (await call(port, "POST", "/v1/completions", _body(draw, stream=False))).status


async def _streamed(port: int, draw: random.Random) -> int:
    """Reads a stream to its end."""
    return (await call(port, "POST", "/v1/completions", _body(draw))).status


async def _nonsense(port: int, draw: random.Random) -> int:
    """Sends what makes no sense; it is the client's fault, and it is told so."""
    with suppress(ConnectionError, asyncio.IncompleteReadError):  # a server may hang up on too long a body
        status = (await call(port, "POST", "/v1/completions", draw.choice(NONSENSE))).status
        if not 400 <= status < 500:
            raise RuntimeError(f"nonsense was answered with {status}")
        return status
    return 0


async def _leaving(port: int, draw: random.Random) -> int:
    """Goes at once, in the middle of the body, or after a few frames."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = _body(draw, max_tokens=500)
        part = draw.choice([data, data, data[: len(data) // 2]])
        writer.write(head("POST", "/v1/completions", len(data)) + part)
        await writer.drain()
        if len(part) < len(data) or draw.random() < 0.3:
            return 0
        status = await read_status(reader)
        for _ in range(draw.randrange(12)):
            await reader.readline()
        return status
    finally:
        writer.transport.abort()


async def _dawdling(port: int, draw: random.Random) -> int:
    """Reads a few bytes at a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=256)
    try:
        data = _body(draw)
        writer.write(head("POST", "/v1/completions", len(data)) + data)
        status = int((await reader.readline()).split()[1])
        for _ in range(20):
            await reader.read(16)
            await asyncio.sleep(0.01)
        while await reader.read(4096):
            pass
        return status
    finally:
        writer.close()


KINDS: tuple[Client, ...] = (_whole, _streamed, _nonsense, _leaving, _leaving, _dawdling)


def _body(draw: random.Random, **options: Any) -> bytes:
    extra: dict[str, Any] = {"temperature": 1.0, "seed": draw.randrange(1000)}
    if draw.random() < 0.2:
        extra["trace"] = {"level": draw.choice(["routes", "gates"])}
    if draw.random() < 0.2:
        extra["logprobs"] = 2
    return json.dumps(completion(draw.randrange(99), draw.randrange(1, 12)) | extra | options).encode()
