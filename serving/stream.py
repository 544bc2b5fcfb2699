"""Server-sent events (WHATWG HTML, section 9.2) that end when their reader does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Cancellable(Protocol):
    """Work that can be given up."""

    def cancel(self) -> None:
        """Gives it up; harmless when it is done."""
        ...


def frame(data: dict[str, Any], event: str | None = None) -> bytes:
    r"""One event.

    >>> frame({"a": 1}, event="done")
    b'event: done\ndata: {"a":1}\n\n'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


class EventStream(Response):
    """Sends frames as they come; a client that goes ends the work behind them.

    Args:
        frames: what is sent.
        work: what is given up in any case when the response ends.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], work: Cancellable) -> None:
        self._frames, self._work = frames, work
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers(HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends, and listens for the client's leaving."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._work.cancel()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            if isinstance(self._frames, AsyncGenerator):
                await self._frames.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._frames:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Returns once the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
