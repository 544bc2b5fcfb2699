"""What a caller holds of its request: the events, as they come, and the right to give up."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from serving.requests import Done, Event, Failed, GenerationRequest


class Ticket:
    """The running request. One reader takes its events, in a thread by `wait` or in asyncio by `async for`.

    Whoever stops reading before the last event gives the request up.

    Args:
        request: what was asked for.
        seed: what its draws come from.
        room: so many events may wait; a reader that falls behind by more is given up.
        wake: called when the request is given up.

    Attributes:
        request: what was asked for.
        seed: what its draws come from.
    """

    def __init__(self, request: GenerationRequest, *, seed: int, room: int, wake: Callable[[], None]) -> None:
        self.request, self.seed = request, seed
        self._room, self._wake_engine = room, wake
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._wake_reader: Callable[[], None] | None = None
        self._cancelled = self._finished = False

    @property
    def cancelled(self) -> bool:
        """Whether the request was given up."""
        return self._cancelled

    def cancel(self) -> None:
        """Gives the request up: its slot is free within a step. The last event still comes."""
        if not (self._cancelled or self._finished):
            self._cancelled = True
            self._wake_engine()

    def put(self, event: Event) -> None:
        """Hands an event to the reader; for the engine."""
        with self._lock:
            self._finished = isinstance(event, Done | Failed)
            self._events.append(event)
            wake, self._wake_reader = self._wake_reader, None
        if len(self._events) > self._room and not self._finished:
            self._cancelled = True
        if wake is not None:
            wake()

    def wait(self, timeout: float | None = None) -> Iterator[Event]:
        """Yields the events up to the last one.

        Args:
            timeout: seconds to wait for each; None for as long as it takes.

        Raises:
            TimeoutError: none came in time.
        """
        arrived = threading.Event()
        try:
            while True:
                if not self._sleeps(arrived.set):
                    event = self._events.popleft()
                    yield event
                    if isinstance(event, Done | Failed):
                        return
                elif not arrived.wait(timeout):
                    raise TimeoutError(f"no event within {timeout} s")
                arrived.clear()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yields the events up to the last one."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed: nobody reads any more
                self.cancel()

        try:
            while True:
                if not self._sleeps(wake):
                    event = self._events.popleft()
                    yield event
                    if isinstance(event, Done | Failed):
                        return
                else:
                    await arrived.wait()
                arrived.clear()
        finally:
            self.cancel()

    def _sleeps(self, wake: Callable[[], None]) -> bool:
        """Where no event is there: asks to be woken by the next one."""
        with self._lock:
            self._wake_reader = None if self._events else wake
            return not self._events
