"""The page at `/`: its files out of the package, with headers that let it load nothing but them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, HTTPException, Request, Response

STATIC = Path(__file__).with_name("static")
TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
        "": "text/plain; charset=utf-8",
    }
)
"""Media type of each suffix; a file with another suffix is not served."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "object-src 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)
"""Sent with every file. `no-cache` keeps the copy and asks with its ETag whether it still holds."""

router = APIRouter()


@dataclass(frozen=True)
class Asset:
    """One file of the page.

    Attributes:
        body: its bytes.
        kind: its media type.
        tag: its strong ETag, quotes included.
    """

    body: bytes
    kind: str
    tag: str


@cache
def assets() -> Mapping[str, Asset]:
    """Every file of the page by its path below `static`, read once; a request can name no other.

    >>> assets()["index.html"].kind
    'text/html; charset=utf-8'
    """
    files = (path for path in sorted(STATIC.rglob("*")) if path.is_file() and path.suffix in TYPES)
    return MappingProxyType({path.relative_to(STATIC).as_posix(): _asset(path) for path in files})


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
def index(request: Request) -> Response:
    """The page itself."""
    return _answer(request, assets()["index.html"])


@router.api_route("/static/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
def static(request: Request, path: str) -> Response:
    """One of its files; 404 for any path that is not one of them."""
    asset = assets().get(path)
    if asset is None:
        raise HTTPException(404, "the page has no such file")
    return _answer(request, asset)


def _answer(request: Request, asset: Asset) -> Response:
    headers = {**HEADERS, "ETag": asset.tag}
    held = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if held & {asset.tag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.kind, headers=headers)


def _asset(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
