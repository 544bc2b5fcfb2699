"""Conversations that the server remembers: a model's state under a name, kept in a store, seen by its owner alone.

What is kept is the state, never the text. Whoever saves must have seen the version before: of two that continue a
session at once, the second is refused.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from serving.errors import ApiError, not_found
from serving.settings import Settings
from serving.stores import Entry, Store, Summary
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.errors import ConfigError, StateError, explain

HEADER = 32
"""In front of a state's bytes: the SHA-256 of the weights it belongs to."""
MOST_POSITION = 2**53


@dataclass(frozen=True, eq=False)
class Session:
    """A conversation as it stands.

    Attributes:
        id: its name.
        owner: whose it is.
        version: counts its saves.
        created: seconds since 1970.
        used: likewise, the last time.
        state: what the model remembers, one row; None before anything was read.
        size: bytes of it.
    """

    id: str
    owner: str
    version: int
    created: float
    used: float
    state: SynapseState | None
    size: int

    @property
    def tokens(self) -> int:
        """How many tokens it has read."""
        return 0 if self.state is None else int(self.state.position)


def goes_on(session: Session | None) -> bool:
    """Whether what is read next goes on from a text; otherwise it opens a document."""
    return session is not None and session.tokens > 0


class Sessions:
    """Sessions of one model.

    Args:
        store: where they are kept.
        model: whose states they are; only a fresh state's shapes, and where the model lies, are taken from it.
        weights: SHA-256 of its weights, in hex; a session of other weights is refused.
        settings: limits.

    Raises:
        ConfigError: not one session fits into the bytes allowed.
    """

    def __init__(self, store: Store, model: SynapseModel, weights: str, settings: Settings) -> None:
        self._store, self._model, self._settings = store, model, settings
        self._header = bytes.fromhex(weights)
        size = len(model.init_state(1, device="cpu").to_bytes()) + HEADER
        if size > settings.session_bytes:
            raise ConfigError(explain("--session-bytes", f"at least {size}, one session", settings.session_bytes))
        self.most_upload = 2 * size
        """Bytes that an imported session may have: the optional statistics of a traced state fit in."""

    def create(self, owner: str, state: SynapseState | None = None) -> Session:
        """A new session, which starts from `state`."""
        now = time.time()
        return self._save(Session(f"sess-{secrets.token_hex(16)}", owner, 0, now, now, state, 0), now)

    def load(self, session: str, owner: str) -> Session:
        """An owner's session.

        Raises:
            ApiError: 404 where there is none or it is another's, 409 where it cannot be read here.
        """
        try:
            entry = self._store.load(session, time.time())
        except StateError as error:
            raise ApiError(409, str(error), param="session_id", code="session_unreadable") from error
        if entry is None or entry.owner != owner:
            raise _unknown()
        header, data = entry.data[:HEADER], entry.data[HEADER:]
        if header != self._header:
            message = (
                "the session was kept by a server with another model, or sealed with a key that this one lacks: "
                "give the key with --session-key-file, export it where it can be read, or begin a new one"
            )
            raise ApiError(409, message, param="session_id", code="session_of_another_model")
        device = self._model.embedding.weight.device  # where it will be gone on from
        state = SynapseState.from_bytes(data, source="session").to(device) if data else None
        return Session(entry.id, owner, entry.version, entry.created, entry.used, state, len(data))

    def save(self, session: Session, state: SynapseState) -> Session:
        """The next version of a session.

        Raises:
            ApiError: 409 where it was saved or forgotten since it was loaded.
        """
        return self._save(replace(session, state=state), time.time())

    def fork(self, session: str, owner: str, *, memory_only: bool = False) -> Session:
        """A new session that starts where another stands, or only with what its fast-weight memory has learned."""
        state = self.load(session, owner).state
        return self.create(owner, state.memory_only() if state is not None and memory_only else state)

    def imported(self, data: bytes, owner: str) -> Session:
        """A new session from an exported state.

        Raises:
            StateError: no state, or one that this model cannot go on from.
        """
        state = SynapseState.from_bytes(data, source="body")
        state.check_against(self._model, 1)
        if not 0 <= int(state.position) <= MOST_POSITION:
            raise StateError(explain("body: position", f"0 to {MOST_POSITION}", int(state.position)))
        broken = [name for name, tensor in state.to_tensors().items() if not bool(tensor.isfinite().all())]
        if broken:
            raise StateError(explain(f"body: {broken[0]}", "finite numbers", "NaN or infinite ones"))
        return self.create(owner, state)

    def exported(self, session: str, owner: str) -> bytes:
        """The state of a session as a safetensors file; a fresh one's where nothing was read."""
        state = self.load(session, owner).state
        return (self._model.init_state(1, device="cpu") if state is None else state).to_bytes()

    def forget(self, session: str, owner: str) -> None:
        """Removes a session for good."""
        self.load_summary(session, owner)
        self._store.delete(session)

    def load_summary(self, session: str, owner: str) -> Summary:
        """What is known of a session besides its state; this is no use of it."""
        for summary in self.owned(owner):
            if summary.id == session:
                return summary
        raise _unknown()

    def owned(self, owner: str) -> list[Summary]:
        """An owner's sessions, the latest used first."""
        return [one._replace(size=one.size - HEADER) for one in self._store.owned(owner, time.time())]

    def usage(self) -> tuple[int, int]:
        """How many sessions are kept, and their bytes."""
        return self._store.usage(time.time())

    def describe(self, one: Session | Summary) -> dict[str, Any]:
        """What a client sees of a session."""
        return {
            "object": "session", "id": one.id, "version": one.version, "tokens": one.tokens, "bytes": one.size,
            "created": int(one.created), "used": int(one.used), "expires": int(one.used + self._settings.session_ttl),
        }  # fmt: skip

    def close(self) -> None:
        """Lets go of the store."""
        self._store.close()

    def _save(self, session: Session, now: float) -> Session:
        data = b"" if session.state is None else session.state.to_bytes()
        saved = replace(session, version=session.version + 1, used=now, size=len(data))
        entry = Entry(saved.id, saved.owner, saved.version, saved.tokens, saved.created, now, self._header + data)
        if not self._store.save(entry):
            message = "the session was continued or forgotten by another request in the meantime; nothing was saved"
            raise ApiError(409, message, param="session_id", code="session_conflict")
        return saved


def _unknown() -> ApiError:
    return not_found("there is no such session, or it has expired", "session_id", "session_not_found")
