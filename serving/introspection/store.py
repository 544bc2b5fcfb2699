"""Traces by their names: each its owner's, all of them bounded in bytes and time."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from serving.errors import not_found
from serving.introspection.record import TraceRecord
from serving.requests import GenerationRequest
from serving.settings import Settings

__all__ = ["TraceRecord", "TraceStore"]

MOST_REPLAYS = 2
"""Traces run again at once, for attribution or a comparison."""


class TraceStore:
    """Keeps traces until nothing has come to them for `trace_ttl` seconds, or newer ones need their bytes.

    Args:
        settings: its trace_* and traces_bytes are the bounds.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self.replays = asyncio.Semaphore(MOST_REPLAYS)
        """Held while a trace is run again: it takes the engine's time from everybody."""
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="synapse-traces")
        self._lock = threading.Lock()
        self._records: dict[str, tuple[TraceRecord, float]] = {}
        self._sizes: dict[str, int] = {}
        self._bytes = 0

    def open(
        self, request_id: str, *, owner: str, request: GenerationRequest, seed: int, session_id: str | None = None
    ) -> TraceRecord:
        """A new trace, to which the events of the request's ticket are added.

        Args:
            request_id: the name of the HTTP request.
            owner: who may see it.
            request: what is run, with a TraceSpec; the record holds on to its state.
            seed: the ticket's.
            session_id: the session it started from.
        """
        record = TraceRecord(
            f"trace-{secrets.token_hex(16)}", request, request_id=request_id, session_id=session_id, owner=owner,
            seed=seed, most_tokens=self._settings.trace_tokens, most_bytes=self._settings.trace_bytes,
            soon=self._prepare, heard=self._heard, grown=self._grown,
        )  # fmt: skip
        with self._lock:
            self._records[record.id] = (record, self._clock())
        self._grown(record)
        return record

    def get(self, trace_id: str, owner: str) -> TraceRecord:
        """An owner's trace.

        Raises:
            ApiError: 404 where there is none, it has made room for others, or it is another's.
        """
        with self._lock:
            self._expire()
            found = self._records.get(trace_id)
        if found is None or found[0].owner != owner:
            raise not_found("there is no such trace, or it has expired", "trace_id", "trace_not_found")
        return found[0]

    def owned(self, owner: str) -> list[TraceRecord]:
        """An owner's traces, the oldest first."""
        with self._lock:
            self._expire()
            return [record for record, _ in self._records.values() if record.owner == owner]

    def delete(self, trace_id: str, owner: str) -> None:
        """Forgets an owner's trace; the request behind it goes on.

        Raises:
            ApiError: 404, as `get`.
        """
        self.get(trace_id, owner)
        with self._lock:
            self._drop(trace_id)

    def stats(self) -> dict[str, int]:
        """How many traces there are, and their bytes."""
        with self._lock:
            self._expire()
            return {"count": len(self._records), "bytes": self._bytes, "limit_bytes": self._settings.traces_bytes}

    def close(self) -> None:
        """Forgets everything, and ends its thread."""
        self._decoder.shutdown(cancel_futures=True)
        with self._lock:
            for trace_id in list(self._records):
                self._drop(trace_id)

    def _prepare(self, record: TraceRecord) -> None:
        with suppress(RuntimeError):  # the store is closed: nobody will ask
            self._decoder.submit(record.prepare)

    def _heard(self, record: TraceRecord) -> None:
        """Something has come to a record: it lives on from now."""
        with self._lock:
            if self._records.pop(record.id, None) is not None:
                self._records[record.id] = (record, self._clock())

    def _grown(self, record: TraceRecord) -> None:
        """Counts a record's bytes anew; those to which nothing has come for longest make room."""
        size = record.nbytes
        with self._lock:
            if record.id not in self._records:
                return
            self._bytes += size - self._sizes.get(record.id, 0)
            self._sizes[record.id] = size
            self._expire()
            while self._bytes > self._settings.traces_bytes and self._records:
                self._drop(next(iter(self._records)))

    def _expire(self) -> None:
        oldest = self._clock() - self._settings.trace_ttl
        while self._records and next(iter(self._records.values()))[1] < oldest:
            self._drop(next(iter(self._records)))

    def _drop(self, trace_id: str) -> None:
        del self._records[trace_id]
        self._bytes -= self._sizes.pop(trace_id, 0)
