"""How a server runs: what the command line sets, checked once, the same for as long as it runs."""

from __future__ import annotations

import hashlib
import ipaddress
import math
from dataclasses import dataclass

from synapse_arch.errors import ConfigError, explain

MIB = 2**20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that can be set.

    Attributes:
        model_id: what the API calls the model.
        host: the address to listen on; others than loopback's need a key.
        port: 0 for any free one.
        api_keys: who may ask; none means everybody who reaches the port.
        allowed_hosts: names, besides `host` and loopback's, by which browsers may call the server.
        slots: sequences decoded side by side.
        queue: requests that may wait for a slot.
        prefill_chunk: tokens of a prompt read between two decode steps.
        max_prompt_tokens: longest prompt.
        max_output_tokens: longest output of one request.
        max_body: bytes of a JSON body; more where the model's own pathways need more.
        patience: seconds that headers or a body may take to arrive, and that a client may leave an answer unread.
        drain: seconds that running requests get after SIGTERM.
        session_store: "memory", "sqlite:PATH" or "redis://HOST:PORT/DB".
        session_ttl: seconds until an unused session is forgotten.
        session_bytes: bytes of all sessions; beyond, whoever holds most loses the longest unused ones.
        session_count: most sessions of one owner.
        trace_tokens: tokens a trace keeps, the latest.
        trace_bytes: bytes of one trace.
        traces_bytes: bytes of all traces.
        trace_ttl: seconds that a trace lives.

    Raises:
        ConfigError: a value out of its range, or a port that the world could reach without a key.
    """

    model_id: str = "synapse"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    slots: int = 8
    queue: int = 64
    prefill_chunk: int = 64
    max_prompt_tokens: int = 131_072
    max_output_tokens: int = 4096
    max_body: int = MIB
    patience: float = 30.0
    drain: float = 30.0
    session_store: str = "memory"
    session_ttl: float = 86_400.0
    session_bytes: int = 1024 * MIB
    session_count: int = 1000
    trace_tokens: int = 1024
    trace_bytes: int = 4 * MIB
    traces_bytes: int = 256 * MIB
    trace_ttl: float = 300.0

    def __post_init__(self) -> None:
        for name in (
            "slots", "prefill_chunk", "max_prompt_tokens", "max_output_tokens", "max_body", "patience",
            "session_ttl", "session_bytes", "session_count", "trace_tokens", "trace_bytes", "traces_bytes", "trace_ttl",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(explain(_option(name), "above 0", getattr(self, name)))
        for name in ("queue", "drain"):
            if not getattr(self, name) >= 0:
                raise ConfigError(explain(_option(name), "0 or more", getattr(self, name)))
        for name in ("patience", "drain", "session_ttl", "trace_ttl"):
            if not math.isfinite(getattr(self, name)):
                expected = "a finite number of seconds"
                raise ConfigError(explain(_option(name), expected, getattr(self, name), "such as 1e9 for ever"))
        if not 0 <= self.port <= 65535:
            raise ConfigError(explain("--port", "0 to 65535", self.port))
        if any(len(key) < 16 or not key.isascii() or not key.isprintable() for key in self.api_keys):
            remedy = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            raise ConfigError(explain("API key", "at least 16 printable ASCII characters", "another", remedy))
        if not self.api_keys and not is_loopback(self.host):
            remedy = "give --api-key-file or SYNAPSE_API_KEY, or listen on 127.0.0.1"
            raise ConfigError(explain(f"--host {self.host}", "an API key, as others can reach it", "none", remedy))

    @property
    def hosts(self) -> frozenset[str]:
        """The names under which a Host or Origin header may call this server, in lower case, without a port."""
        own = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, own, *self.allowed_hosts))


def owner_of(key: str | None) -> str:
    """The name under which sessions and traces of a key's bearer are kept; it does not give the key away.

    >>> owner_of(None)
    'anonymous'
    """
    return "anonymous" if key is None else hashlib.sha256(f"synapse owner {key}".encode()).hexdigest()[:32]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
