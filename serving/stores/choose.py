"""From the words of the command line to a store."""

from __future__ import annotations

from pathlib import Path

from serving.stores.base import Limits, Store
from serving.stores.memory import MemoryStore
from serving.stores.redis import RedisStore
from serving.stores.sealed import SealedStore
from serving.stores.sqlite import SQLiteStore
from synapse_arch.errors import ConfigError, explain


def open_store(where: str, limits: Limits, *, key: bytes | None = None) -> Store:
    """The store that a text names.

    Args:
        where: "memory", "sqlite:PATH", "redis://HOST:PORT/DB" or "rediss://...".
        limits: how much is kept, and how long.
        key: seals what is kept; None leaves it readable.

    Raises:
        ConfigError: no such kind, or it cannot be opened.
    """
    kind, _, rest = where.partition(":")
    store: Store
    if where == "memory":
        store = MemoryStore(limits)
    elif kind == "sqlite" and rest:
        store = SQLiteStore(Path(rest), limits)
    elif kind in ("redis", "rediss") and rest:
        store = RedisStore(where, limits)
    else:
        raise ConfigError(explain("--session-store", "memory, sqlite:PATH or redis://HOST:PORT/DB", repr(where)))
    return store if key is None else SealedStore(store, key)
