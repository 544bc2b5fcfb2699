"""A store whose data only the holder of a key can read or change: AES-256-GCM (NIST SP 800-38D).

An entry's id, owner, version and token count are sealed along with its data: what was swapped, renamed or put back
from an older version is not opened.
"""

from __future__ import annotations

import base64
import binascii
import secrets

from serving.stores.base import Entry, Store, Summary
from synapse_arch.errors import ConfigError, StateError, explain

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16


def read_key(text: str) -> bytes:
    """A key of 32 bytes from base64 (either alphabet).

    Raises:
        ConfigError: it is none.
    """
    try:
        key = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        remedy = "make one with: python -c 'import base64, os; print(base64.b64encode(os.urandom(32)).decode())'"
        raise ConfigError(explain("the sessions' key", f"{KEY_BYTES} bytes in base64", "something else", remedy))
    return key


class SealedStore:
    """Seals what goes into another store and opens what comes out.

    Args:
        store: the other one.
        key: 32 bytes.

    Raises:
        ConfigError: the cryptography package is not installed.
    """

    def __init__(self, store: Store, key: bytes) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError as error:
            remedy = "pip install 'synapse-arch[serve]'"
            raise ConfigError(explain("encryption", "the cryptography package", "not installed", remedy)) from error
        self._store = store
        self._cipher = AESGCM(key)
        self._invalid: type[Exception] = InvalidTag

    def load(self, session: str, now: float) -> Entry | None:
        """See `Store`.

        Raises:
            StateError: the entry was sealed with another key, or changed.
        """
        entry = self._store.load(session, now)
        if entry is None:
            return None
        nonce, sealed = entry.data[:NONCE_BYTES], entry.data[NONCE_BYTES:]
        try:
            return entry._replace(data=self._cipher.decrypt(nonce, sealed, _bound(entry)))
        except (self._invalid, ValueError) as error:
            remedy = "start the server with the key that it was saved with"
            raise StateError(explain("session", "data sealed with this server's key", "others", remedy)) from error

    def save(self, entry: Entry) -> bool:
        """See `Store`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return self._store.save(entry._replace(data=nonce + self._cipher.encrypt(nonce, entry.data, _bound(entry))))

    def delete(self, session: str) -> bool:
        """See `Store`."""
        return self._store.delete(session)

    def owned(self, owner: str, now: float) -> list[Summary]:
        """See `Store`; sizes are those of the data before it was sealed."""
        extra = NONCE_BYTES + TAG_BYTES
        return [summary._replace(size=summary.size - extra) for summary in self._store.owned(owner, now)]

    def usage(self, now: float) -> tuple[int, int]:
        """See `Store`."""
        return self._store.usage(now)

    def close(self) -> None:
        """See `Store`."""
        self._store.close()


def _bound(entry: Entry) -> bytes:
    """What is sealed along with the data."""
    return "\0".join((entry.id, entry.owner, str(entry.version), str(entry.tokens))).encode()
