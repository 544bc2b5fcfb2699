"""The process: listens, and ends in order. SIGTERM first makes /ready say 503, then running answers get their time."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.runtime import Runtime

LAST_FRAMES = 5
"""Seconds in which streams that were cut off may send their error."""


class Protocol(H11Protocol):
    """HTTP/1.1 that waits neither for headers nor for a reader for ever."""

    def connection_made(self, transport: Any) -> None:
        """A connection, whose headers are awaited."""
        super().connection_made(transport)
        runtime: Runtime = self.config.app.state.runtime  # type: ignore[union-attr]
        patience = runtime.settings.patience
        self._headers = _Timer(self.loop, patience, transport.abort)
        self._reader = _Timer(self.loop, patience, transport.abort)
        self._headers.start()

    def data_received(self, data: bytes) -> None:
        """Bytes, after which headers are complete or still awaited."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._headers.start()
        else:
            self._headers.stop()

    def pause_writing(self) -> None:
        """The client does not read what was sent."""
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._reader.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._headers.stop()
        self._reader.stop()
        super().connection_lost(exc)


class _Timer:
    """Does something unless it is stopped in time; starting it again while it runs changes nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, action: Callable[[], object]) -> None:
        self._loop, self._seconds, self._action = loop, seconds, action
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._action)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Server(uvicorn.Server):
    """Uvicorn's server, which drains before it closes its port.

    Args:
        app: of `create_app`.
        started: called once requests are taken and signals understood.
    """

    def __init__(self, app: FastAPI, started: Callable[[], object] = lambda: None) -> None:
        runtime: Runtime = app.state.runtime
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=30, timeout_graceful_shutdown=LAST_FRAMES,
        )  # fmt: skip
        super().__init__(config)
        self._runtime, self._say = runtime, started
        self._draining: threading.Thread | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes requests."""
        await super().startup(sockets)
        self._say()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one ends at once."""
        if self._runtime.draining.is_set():
            self.should_exit = self.force_exit = True
            return
        self._runtime.draining.set()
        close = self._runtime.engine.close
        self._draining = threading.Thread(target=close, kwargs={"drain": self._runtime.settings.drain}, daemon=True)
        self._draining.start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to close the port: once nothing is running any more."""
        if self._draining is not None and not self._draining.is_alive():
            self.should_exit = True
        return await super().on_tick(counter)
