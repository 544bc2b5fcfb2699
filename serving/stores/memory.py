"""Sessions in this process: gone when it ends."""

from __future__ import annotations

import threading
from collections import Counter

from serving.stores.base import Entry, Limits, Summary


class MemoryStore:
    """A dictionary in the order of use, the longest unused first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[str, Entry] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def load(self, session: str, now: float) -> Entry | None:
        """See `Store`."""
        with self._lock:
            self._expire(now)
            found = self._drop(session)
            if found is not None:
                self._add(found._replace(used=now))
            return found

    def save(self, entry: Entry) -> bool:
        """See `Store`."""
        with self._lock:
            self._expire(entry.used)
            kept = self._entries.get(entry.id)
            if entry.version != (kept.version if kept else 0) + 1:
                return False
            self._drop(entry.id)
            owned = [other.id for other in self._entries.values() if other.owner == entry.owner]
            for other in owned[: max(0, len(owned) + 1 - self._limits.most_owned)]:
                self._drop(other)
            while self._entries and self._bytes + len(entry.data) > self._limits.most_bytes:
                self._drop(self._longest_unused_of_the_largest(entry))
            self._add(entry)
            return True

    def delete(self, session: str) -> bool:
        """See `Store`."""
        with self._lock:
            return self._drop(session) is not None

    def owned(self, owner: str, now: float) -> list[Summary]:
        """See `Store`."""
        with self._lock:
            self._expire(now)
            return [entry.summary for entry in reversed(self._entries.values()) if entry.owner == owner]

    def usage(self, now: float) -> tuple[int, int]:
        """See `Store`."""
        with self._lock:
            self._expire(now)
            return len(self._entries), self._bytes

    def close(self) -> None:
        """See `Store`."""

    def _expire(self, now: float) -> None:
        while self._entries and (first := next(iter(self._entries.values()))).used < now - self._limits.ttl:
            self._drop(first.id)

    def _longest_unused_of_the_largest(self, coming: Entry) -> str:
        """Whose owner holds most; of equal ones the longest unused."""
        held = Counter({coming.owner: len(coming.data)})
        for entry in self._entries.values():
            held[entry.owner] += len(entry.data)
        return max(self._entries.values(), key=lambda entry: held[entry.owner]).id  # the first of equals

    def _add(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._bytes += len(entry.data)

    def _drop(self, session: str) -> Entry | None:
        found = self._entries.pop(session, None)
        self._bytes -= len(found.data) if found else 0
        return found
