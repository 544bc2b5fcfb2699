"""A server in a process of its own on loopback, and clients that speak just enough HTTP/1.1 to time its streams."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

STARTING = 120.0
"""Seconds a server may take until it is ready."""


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        port: on loopback.
        process: its process.
    """

    port: int
    process: subprocess.Popen[bytes]

    def open_files(self) -> int:
        """File descriptors it holds (Linux)."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Threads it runs (Linux)."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def resident(self) -> int:
        """Bytes of memory it holds (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """Processor time it has used (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(model: Path, *options: str) -> Iterator[Server]:
    """Starts a server for the folder `model`, and stops it as an operator would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serving", "--model", str(model), "--model-id", "m", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "warning", *options], cwd=ROOT)
    try:
        _wait(port, process)
        yield Server(port, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STARTING)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"the server ended with exit code {process.returncode}")


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STARTING
    while process.poll() is None and time.monotonic() < until:
        try:
            if asyncio.run(call(port, "GET", "/ready")).status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready; its log says why")


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP.
        body: the whole of it, as bytes.
        arrivals: when each token's frame came, by `time.perf_counter`.
        sent: when the request was sent.
    """

    status: int
    body: bytes = b""
    arrivals: list[float] = field(default_factory=list)
    sent: float = 0.0


def completion(number: int, tokens: int, **options: Any) -> dict[str, Any]:
    """The body of a streamed completion: a short prompt of its own, and so many tokens."""
    prompt = [(7 * number + place) % 256 for place in range(12)]
    return {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True} | options


async def call(port: int, method: str, path: str, body: bytes = b"") -> Answer:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        answer = Answer(0, sent=time.perf_counter())
        writer.write(head(method, path, len(body)) + body)
        await writer.drain()
        answer.status = await read_status(reader)
        answer.body = await reader.read()
        return answer
    finally:
        writer.close()


async def stream(port: int, body: dict[str, Any]) -> Answer:
    """One streamed completion, its tokens timed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        answer = Answer(0, sent=time.perf_counter())
        writer.write(head("POST", "/v1/completions", len(data)) + data)
        await writer.drain()
        answer.status = await read_status(reader)
        frames = [moment async for moment in _frames(reader)]
        answer.arrivals = frames[1:-2]  # in front of the tokens the opening, behind them the reason and [DONE]
        return answer
    finally:
        writer.close()


def head(method: str, path: str, length: int) -> bytes:
    """A request's head; the connection closes behind the answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


async def read_status(reader: asyncio.StreamReader) -> int:
    """The status; the answer's head is read."""
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    return int(lines[0].split()[1])


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[float]:
    """When each frame came."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield time.perf_counter()
