"""What stands in front of every route: who asks, from where, how much, in what form; and what is logged of it.

Bodies are read here, whole, within a time and a size; no route sees half a body, a compressed one or broken JSON.
Logs and metrics name the route's template, never an address, a query, a body or the message of an exception.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
import traceback
from collections.abc import Iterable
from urllib.parse import urlsplit

from pydantic_core import from_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, bad_request
from serving.metrics import Metrics
from serving.settings import Settings, is_loopback, owner_of

log = logging.getLogger("serving")

PUBLIC = frozenset({"/", "/health", "/ready"})
"""What needs no key: none of it tells anything of models, sessions or people."""
PUBLIC_BELOW = "/static/"
BINARY = "application/octet-stream"


class Guard:
    """The outermost part of the application.

    Args:
        app: what it guards.
        settings: keys, hosts and limits.
        metrics: counts every answer.
        most_json: bytes of any other body.
        most_upload: bytes of a binary body.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, most_json: int, most_upload: int) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._most_json, self._most_upload = most_json, most_upload
        self._keys = [(hashlib.sha256(key.encode()).digest(), owner_of(key)) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the request through or answers itself, and notes what came of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope["request_id"] = f"req-{secrets.token_hex(12)}"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = scope["request_id"]
                headers.setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            await self._app(scope, await self._admit(scope, receive), noted)
        except ApiError as error:
            await error.response()(scope, receive, noted)
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s failed: %s\n%s", scope["request_id"], type(error).__qualname__, frames)
            if status:
                raise ConnectionAbortedError("the answer broke off") from None
            await ApiError(500, "the server failed; its log says more", code="internal_error").response()(
                scope, receive, noted
            )
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.answered(scope["method"], route, status, seconds)
            log.info("%s %s %s %d %.3f s", scope["request_id"], scope["method"], route, status, seconds)

    async def _admit(self, scope: Scope, receive: Receive) -> Receive:
        """Lets a request in: its owner is noted, its body read.

        Raises:
            ApiError: it stays outside.
        """
        headers = Headers(scope=scope)
        check_host(headers, self._settings)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        scope["owner"] = owner_of(None)
        if self._keys and path not in PUBLIC and not path.startswith(PUBLIC_BELOW):
            scope["owner"] = self._owner(headers)
        return await self._read(scope, headers, receive)

    def _owner(self, headers: Headers) -> str:
        """Whose key was given; every key is compared, each in the same time."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [owner for known, owner in self._keys if hmac.compare_digest(known, given)]
        if kind.lower() != "bearer" or not found:
            message = "an API key is needed: send it as Authorization: Bearer KEY"
            raise ApiError(
                401, message, param="Authorization", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return found[0]

    async def _read(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        most = self._most_upload if kind == BINARY else self._most_json
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415, "compressed bodies are not taken", param="Content-Encoding", code="unsupported_encoding"
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self._settings.patience):
                body = await _collect(receive, most)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        if body and kind != BINARY:
            if kind != "application/json":
                message = f"Content-Type: expected application/json, got {kind or 'none'}"
                raise ApiError(415, message, param="Content-Type", code="unsupported_media_type")
            check_json(body)
        return _replay(body, receive)


def check_host(headers: Headers, settings: Settings) -> None:
    """Refuses what a foreign web page makes a browser send: other names for this server, other origins.

    Raises:
        ApiError: 403.
    """
    host = headers.get("host", "").lower()
    if "*" not in settings.allowed_hosts and not _known(host, settings):
        message = "this server does not go by that name: start it with --allowed-host NAME"
        raise ApiError(403, message, param="Host", code="foreign_host")
    origin = headers.get("origin")
    if origin is not None and _place(origin) != host:
        raise ApiError(403, "requests from other web pages are not taken", param="Origin", code="foreign_origin")


def check_json(body: bytes) -> None:
    """Refuses what is no JSON: NaN, lone surrogates and nesting without end among it.

    Raises:
        ApiError: 400.
    """
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is no JSON: {error}", code="invalid_json") from None


def _place(origin: str) -> str | None:
    """Host and port of an origin; None where it is no address."""
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return None


def _known(host: str, settings: Settings) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if not is_loopback(settings.host):  # reached by addresses that the server cannot know; a page has a name
            ipaddress.ip_address(name)
            return True
    except ValueError:
        pass
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name in settings.hosts


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body: expected at most {most} bytes", code="body_too_large")


async def _collect(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the connection was closed before the body's end", code="incomplete_body")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read once more, then whatever comes."""
    first: Iterable[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    messages = iter(first)

    async def again() -> Message:
        return next(messages, None) or await receive()

    return again
