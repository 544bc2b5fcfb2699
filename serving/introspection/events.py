"""A trace while it grows, as server-sent events: new tokens as they come, and at the end what they come to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from serving.introspection.record import TraceRecord
from serving.introspection.view import Page, page
from serving.runtime import Runtime

PACE = 0.05
"""Seconds between events at least; what comes in between is sent together."""
IDLE = 15.0
"""Seconds after which a comment shows that the connection stands."""
BUNCH = 256
"""Most tokens of an event."""


async def events(
    record: TraceRecord, runtime: Runtime, card: dict[str, Any], *, start: int = 0
) -> AsyncIterator[bytes]:
    """Pages with the tokens from position `start` on, each once; then a page named "done" with the statistics."""
    version = -1

    def render() -> tuple[int, bool, Page]:
        closed, view = record.closed, record.view()
        shown = page(record, view, runtime, card, start=start, limit=BUNCH, fields=("tokens", "layers"))
        return view.version, closed and shown.next is None, shown

    def finish() -> Page:
        return page(record, record.view(), runtime, card, start=start, limit=0)

    while True:
        if not await record.changed(version, IDLE):
            yield b": nothing new\n\n"
            continue
        version, ended, shown = await run_in_threadpool(render)
        if shown.last is not None:
            start = shown.last + 1
            yield _event(shown)
        if ended:
            yield b"event: done\n" + _event(await run_in_threadpool(finish))
            return
        if shown.next is None:
            await asyncio.sleep(PACE)
        else:
            version = -1


def _event(shown: Page) -> bytes:
    return b"data: " + shown.text + b"\n\n"
