"""Every refusal of the server in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

`param` names the field, header or path part that is at fault, None where it is none of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.requests import Draining, EngineFault, QueueFull
from serving.stores.base import StoreUnavailable
from synapse_arch.errors import SynapseError

log = logging.getLogger("serving")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
"""`type` by status; other 4xx are invalid requests, 5xx are the server's."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
"""The shape as JSON Schema."""


class ApiError(Exception):
    """A refusal that a client sees.

    Args:
        status: the HTTP status.
        message: one sentence: what is wrong, and what would be right.
        param: the field at fault.
        code: a stable word for programs.
        type: the family; None for that of the status.
        headers: sent along, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent, as a response or as the last frame of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The refusal as a response."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, param: str | None = None, code: str = "not_found") -> ApiError:
    """A 404, also for what belongs to somebody else."""
    return ApiError(404, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what the client may know of it; what the server did wrong is not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        wait = str(max(1, math.ceil(error.retry_after)))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": wait})
    if isinstance(error, Draining):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, StoreUnavailable):
        return ApiError(503, str(error), code="store_unavailable", headers={"Retry-After": "5"})
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, SynapseError) and not isinstance(error, EngineFault):
        return bad_request(str(error))
    return ApiError(500, "the server failed; its log says more", code="internal_error")


def install(app: FastAPI) -> None:
    """Lets every error of `app` leave in this shape."""
    for kind in (ApiError, RequestValidationError, HTTPException, SynapseError, Exception):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    if found.status >= 500 and found.code == "internal_error":
        route = request.scope.get("route")
        log.error("%s %s failed: %s", request.method, getattr(route, "path", "?"), type(error).__name__)
    return found.response()


NO_PLACES = {"body", "query", "path", "header", "str", "int", "float", "bool", "dict", "list"}
"""What pydantic puts in front of a place, or behind it where a value fits none of several types."""


def _is_place(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in NO_PLACES)


def _most_fitting(errors: Sequence[Any]) -> Any:
    """The first complaint; of a value that fits none of several types, that of the type which it almost has."""
    first = errors[0]
    place = list(first["loc"][:-1])
    if not first["loc"] or _is_place(first["loc"][-1]):
        return first
    same = (error for error in errors if list(error["loc"][: len(place)]) == place)
    return next((error for error in same if not error["type"].endswith("_type")), first)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's complaints, in one sentence."""
    first = _most_fitting(errors)
    places = [str(part) for part in first["loc"] if _is_place(part)]
    param = ".".join(places) or None
    unknown = first["type"] == "extra_forbidden"
    message = "unknown parameter" if unknown else str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    code = "unknown_parameter" if unknown else "missing" if first["type"] == "missing" else "invalid_value"
    return bad_request(f"{param}: {message}{more}" if param else f"{message}{more}", param, code)
