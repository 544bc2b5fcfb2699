"""Sessions in a file: they survive a restart, and several processes of one machine can share them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.stores.base import Entry, Limits, StoreUnavailable, Summary
from synapse_arch.errors import ConfigError, explain

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, version INTEGER NOT NULL, tokens INTEGER NOT NULL,
    size INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS sessions_by_use ON sessions (used);
CREATE INDEX IF NOT EXISTS sessions_by_owner ON sessions (owner, used);
"""
SUMMARY = "id, owner, version, tokens, size, created, used"
# What makes room: an owner's longest unused, and one of whoever holds most, as often as it takes.
EVICT_OWNED = """
DELETE FROM sessions WHERE id IN (
    SELECT id FROM sessions WHERE owner = ?1 AND id <> ?2 ORDER BY used DESC, id LIMIT -1 OFFSET ?3)
"""
EVICT_BYTES = """
DELETE FROM sessions WHERE (SELECT sum(size) FROM sessions) > ?2 AND id IN (
    SELECT id FROM sessions JOIN (SELECT owner, sum(size) AS held FROM sessions GROUP BY owner) USING (owner)
    WHERE id <> ?1 ORDER BY held DESC, used, id LIMIT 1)
"""


class SQLiteStore:
    """A table with a row a session.

    Args:
        path: the file, made where missing, readable by its owner alone.
        limits: how much is kept.

    Raises:
        ConfigError: it cannot be opened or is no such file.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        try:
            self._connection = _opened(path)
        except (OSError, sqlite3.Error) as error:
            remedy = "check the folder and its permissions"
            raise ConfigError(explain(f"--session-store sqlite:{path}", "a database file", error, remedy)) from error

    def load(self, session: str, now: float) -> Entry | None:
        """See `Store`."""
        with self._writing(now) as connection:
            connection.execute("UPDATE sessions SET used = ? WHERE id = ?", (now, session))
            columns = "id, owner, version, tokens, created, used, data"
            row = connection.execute(f"SELECT {columns} FROM sessions WHERE id = ?", (session,)).fetchone()
            return Entry(*row) if row else None

    def save(self, entry: Entry) -> bool:
        """See `Store`."""
        with self._writing(entry.used) as connection:
            row = connection.execute("SELECT version FROM sessions WHERE id = ?", (entry.id,)).fetchone()
            if entry.version != (row[0] if row else 0) + 1:
                return False
            values = (*entry.summary, entry.data)
            connection.execute(f"REPLACE INTO sessions ({SUMMARY}, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            connection.execute(EVICT_OWNED, (entry.owner, entry.id, self._limits.most_owned - 1))
            while connection.execute(EVICT_BYTES, (entry.id, self._limits.most_bytes)).rowcount > 0:
                pass
            return True

    def delete(self, session: str) -> bool:
        """See `Store`."""
        with self._writing(0) as connection:
            return connection.execute("DELETE FROM sessions WHERE id = ?", (session,)).rowcount > 0

    def owned(self, owner: str, now: float) -> list[Summary]:
        """See `Store`."""
        with self._writing(now) as connection:
            order = "ORDER BY used DESC, id"
            rows = connection.execute(f"SELECT {SUMMARY} FROM sessions WHERE owner = ? {order}", (owner,)).fetchall()
            return [Summary(*row) for row in rows]

    def usage(self, now: float) -> tuple[int, int]:
        """See `Store`."""
        with self._writing(now) as connection:
            count, size = connection.execute("SELECT count(*), coalesce(sum(size), 0) FROM sessions").fetchone()
            return int(count), int(size)

    def close(self) -> None:
        """See `Store`."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _writing(self, now: float) -> Iterator[sqlite3.Connection]:
        """A transaction that other processes wait for, in which what has expired is gone."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.execute("DELETE FROM sessions WHERE used < ?", (now - self._limits.ttl,))
                yield self._connection
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise StoreUnavailable(f"the session store does not answer: {error}") from error


def _opened(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {SCHEMA}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection
