"""/api/sessions: begin, look up, branch, take along, bring back and forget sessions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from serving.errors import bad_request
from serving.runtime import Current, Owner
from serving.schemas import Body, ForkBody

SAFETENSORS = "application/octet-stream"

router = APIRouter(prefix="/api/sessions", tags=["sessions"])
Name = Annotated[str, Path(pattern=r"^sess-[0-9a-f]{32}$")]


@router.post("", status_code=201)
def create(runtime: Current, owner: Owner, body: Body | None = None) -> dict[str, Any]:
    """Begins a session that has read nothing."""
    return runtime.sessions.describe(runtime.sessions.create(owner))


@router.get("")
def owned(runtime: Current, owner: Owner) -> dict[str, Any]:
    """The caller's sessions, the latest used first."""
    found = [runtime.sessions.describe(summary) for summary in runtime.sessions.owned(owner)]
    return {"object": "list", "data": found}


@router.post(
    "/import",
    status_code=201,
    openapi_extra={"requestBody": {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def bring(request: Request, runtime: Current, owner: Owner) -> dict[str, Any]:
    """A new session from an exported one: a safetensors file of this model's shapes."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != SAFETENSORS:
        raise bad_request(f"Content-Type: expected {SAFETENSORS}", "Content-Type", "unsupported_media_type")
    session = await run_in_threadpool(runtime.sessions.imported, await request.body(), owner)
    return runtime.sessions.describe(session)


@router.get("/{session_id}")
def look_up(session_id: Name, runtime: Current, owner: Owner) -> dict[str, Any]:
    """One of the caller's sessions."""
    return runtime.sessions.describe(runtime.sessions.load_summary(session_id, owner))


@router.delete("/{session_id}")
def forget(session_id: Name, runtime: Current, owner: Owner) -> dict[str, Any]:
    """Removes a session for good."""
    runtime.sessions.forget(session_id, owner)
    return {"object": "session.deleted", "id": session_id, "deleted": True}


@router.post("/{session_id}/fork", status_code=201)
def fork(session_id: Name, runtime: Current, owner: Owner, body: ForkBody | None = None) -> dict[str, Any]:
    """A new session that starts where this one stands, or with what its fast-weight memory has learned alone."""
    memory_only = body is not None and body.memory_only
    return runtime.sessions.describe(runtime.sessions.fork(session_id, owner, memory_only=memory_only))


@router.get("/{session_id}/export", response_class=Response, responses={200: {"content": {SAFETENSORS: {}}}})
def take(session_id: Name, runtime: Current, owner: Owner) -> Response:
    """The session's state as a safetensors file."""
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.safetensors"', "Cache-Control": "no-store"}
    return Response(runtime.sessions.exported(session_id, owner), media_type=SAFETENSORS, headers=headers)
