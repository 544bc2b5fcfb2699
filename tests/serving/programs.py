"""Programs that tests start: a real Redis, and servers as processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving.servers import wait_for

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> str:
    """Where a program is; without it the test is skipped, and the summary says why."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of a Redis that keeps nothing on the disk."""
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen([program("redis-server"), *options], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: _answers(port))
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


@dataclass(frozen=True)
class Running:
    """A server that is a process of its own."""

    process: subprocess.Popen[str]
    address: str

    def end(self) -> tuple[int, str]:
        """SIGTERM; the exit code and what it said."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@contextmanager
def serving(*arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """`python -m serving`, once it says where it is; killed if it is still there at the end."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "serving", "--port", "0", "--threads", "1", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            pytest.fail(f"the server did not start: {line}{process.communicate(timeout=10)[1]}")
        yield Running(process, line.split(" is at ")[1].split()[0])
    finally:
        process.kill()
        process.communicate()
