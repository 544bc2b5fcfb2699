"""What every store does. A store knows no models and no people: names, numbers and bytes.

Each call is atomic, also against other processes where they share the store. A session counts as used when it is
loaded or saved; one unused for `ttl` seconds is gone. Beyond `most_bytes` whoever holds most loses the longest unused,
so that nobody pushes out others who hold less.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from synapse_arch.errors import SynapseError


class StoreUnavailable(SynapseError):  # noqa: N818 - a state of the server, not a fault
    """The store does not answer."""


class Limits(NamedTuple):
    """How much is kept, and how long."""

    ttl: float
    """Seconds."""
    most_bytes: int
    """Of all sessions' data."""
    most_owned: int
    """Sessions of one owner."""


class Summary(NamedTuple):
    """What is known of a session without its data."""

    id: str
    owner: str
    version: int
    tokens: int
    size: int
    created: float
    used: float


class Entry(NamedTuple):
    """A session as it is kept.

    `version` counts its saves from 1; `tokens` is how many tokens it has read; times are seconds since 1970.
    """

    id: str
    owner: str
    version: int
    tokens: int
    created: float
    used: float
    data: bytes

    @property
    def summary(self) -> Summary:
        """All but the data."""
        return Summary(self.id, self.owner, self.version, self.tokens, len(self.data), self.created, self.used)


class Store(Protocol):
    """Keeps entries by their ids."""

    def load(self, session: str, now: float) -> Entry | None:
        """The entry, which counts as used `now`; None where there is none."""
        ...

    def save(self, entry: Entry) -> bool:
        """Keeps an entry whose version is one above what is kept, 1 where nothing is; False, and nothing done, else.

        Its owner's longest unused beyond `most_owned` make room for it, and beyond `most_bytes` those of whoever holds
        most, it included.
        """
        ...

    def delete(self, session: str) -> bool:
        """Forgets an entry; False where there is none."""
        ...

    def owned(self, owner: str, now: float) -> list[Summary]:
        """An owner's sessions, the latest used first."""
        ...

    def usage(self, now: float) -> tuple[int, int]:
        """How many sessions are kept, and their bytes."""
        ...

    def close(self) -> None:
        """Lets go of files and connections."""
        ...
