"""The routes of /api/introspect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from serving import interventions
from serving.errors import ApiError, bad_request
from serving.introspection import diff, pathways, run, sources, view
from serving.introspection.bodies import AttributionBody, DiffBody, PathwaysBody, Refusal, RunBody
from serving.introspection.card import capabilities, model_card, observed
from serving.introspection.events import events
from serving.introspection.interventions import check_layers, parse
from serving.introspection.record import TraceRecord
from serving.introspection.schema import TRACE
from serving.runtime import Current, Owner, Runtime
from serving.stream import EventStream, gone
from synapse_arch.errors import SynapseError
from synapse_arch.introspection.records import SCHEMA

T = TypeVar("T")
Documented = dict[int | str, dict[str, Any]]

PAGE: Documented = {200: {"content": {"application/json": {"schema": {k: v for k, v in TRACE.items() if k[0] != "$"}}}}}
EVENTS: Documented = {200: {"content": {"text/event-stream": {}}}}
FILE: Documented = {200: {"content": {"application/octet-stream": {}}}}

REFUSED: Documented = {"4XX": {"description": "Refused; `param` names the field at fault.", "model": Refusal}}

router = APIRouter(prefix="/api/introspect", tags=["introspection"], responses=REFUSED)


@router.get("")
def introspect(runtime: Current, owner: Owner) -> dict[str, Any]:
    """The model as it is, what can be asked of it, and what the caller's traces have shown."""
    records = runtime.traces.owned(owner)
    return {
        "schema": SCHEMA,
        "model": model_card(runtime),
        "config": runtime.config.to_dict(),
        "capabilities": capabilities(runtime.config, runtime.settings),
        "aggregates": observed(records),
        "traces": [_listed(record) for record in records],
    }


@router.get("/schema")
def schema() -> dict[str, Any]:
    """The JSON schema of a trace's pages."""
    return TRACE


@router.post("", response_class=Response, responses=PAGE | {200: PAGE[200]})
async def introspect_run(body: RunBody, request: Request, runtime: Current, owner: Owner) -> Response:
    """Runs a prompt and traces it: the trace's first page and the text, or live events."""
    ticket, record = await run.start(runtime, owner, request.scope["request_id"], body)
    card = await run_in_threadpool(model_card, runtime)
    if body.stream:
        return EventStream(_live(run.complete(ticket, record), events(record, runtime, card)), ticket)
    try:
        if not await _unless_gone(request, _true(run.complete(ticket, record))):
            return Response(status_code=499)  # nobody reads it
    finally:
        ticket.cancel()

    def first() -> view.Page:
        text = runtime.codec.decode(record.tokens()[1])
        return view.page(record, record.view(), runtime, card, extra={"text": text})

    return _json((await run_in_threadpool(first)).text)


@router.get("/traces/{trace_id}.safetensors", response_class=Response, responses=FILE)
def trace_file(trace_id: str, runtime: Current, owner: Owner) -> Response:
    """The whole trace as a safetensors file."""
    record = runtime.traces.get(trace_id, owner)
    name = f'attachment; filename="{record.id}.safetensors"'
    data = view.tensors_of(record, record.view())
    return Response(data, media_type="application/octet-stream", headers={"Content-Disposition": name})


@router.get("/traces/{trace_id}", response_class=Response, responses=PAGE)
def trace_page(
    trace_id: str,
    runtime: Current,
    owner: Owner,
    layers: Annotated[str | None, Query(pattern=r"^\d{1,6}(,\d{1,6})*$")] = None,
    start: Annotated[int, Query(alias="from", ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=1024)] = 256,
    fields: Annotated[str | None, Query(pattern=r"^[a-z]+(,[a-z]+)*$")] = None,
) -> Response:
    """A page of a trace: `limit` tokens from position `from` on, fewer where they would pass 1 MiB."""
    record = runtime.traces.get(trace_id, owner)
    chosen = None if layers is None else [int(layer) for layer in layers.split(",")]
    check_layers(chosen, runtime.config)
    shown = view.page(
        record, record.view(), runtime, model_card(runtime), start=start, limit=limit, layers=chosen,
        fields=_fields(fields),
    )  # fmt: skip
    return _json(shown.text)


@router.get("/traces/{trace_id}/events", response_class=Response, responses=EVENTS)
async def trace_events(
    trace_id: str, runtime: Current, owner: Owner, start: Annotated[int, Query(alias="from", ge=0, lt=2**63)] = 0
) -> Response:
    """A trace's tokens as they come, then an event "done"."""
    record = runtime.traces.get(trace_id, owner)
    card = await run_in_threadpool(model_card, runtime)
    return EventStream(events(record, runtime, card, start=start), _Nothing())


@router.delete("/traces/{trace_id}", status_code=204)
def forget_trace(trace_id: str, runtime: Current, owner: Owner) -> None:
    """Forgets a trace."""
    runtime.traces.delete(trace_id, owner)


@router.post("/traces/{trace_id}/attribution")
async def attribution(trace_id: str, body: AttributionBody, request: Request, runtime: Current, owner: Owner) -> Any:
    """Splits a memory read into the tokens it comes from and a residual for what is older."""
    record = runtime.traces.get(trace_id, owner)
    async with _replaying(runtime):
        work = sources.attribute(
            runtime.engine, record, runtime.config, layer=body.layer, head=body.head, pos=body.pos, top=body.top,
            piece=runtime.settings.prefill_chunk,
        )  # fmt: skip
        return await _unless_gone(request, work) or Response(status_code=499)


@router.post("/traces/{trace_id}/diff")
async def difference(trace_id: str, body: DiffBody, request: Request, runtime: Current, owner: Owner) -> Any:
    """Compares the run with itself under interventions, and with random ones."""
    record = runtime.traces.get(trace_id, owner)
    change = parse(body.interventions, runtime.config)
    try:
        interventions.check((*record.request.interventions, *change), runtime.config)
    except SynapseError as error:
        raise bad_request(f"interventions: {error}", "interventions") from error
    most = body.max_tokens or runtime.settings.max_output_tokens
    async with _replaying(runtime):
        work = diff.compare(runtime, record, change, max_tokens=most, seeds=body.seeds)
        return await _unless_gone(request, work) or Response(status_code=499)


@router.get("/pathways")
def pathways_of_session(session_id: str, runtime: Current, owner: Owner) -> dict[str, Any]:
    """What a session's experts would be wired like, if what fired together were consolidated."""
    state = runtime.sessions.load(session_id, owner).state
    if state is None:
        raise bad_request("session_id: this session has read nothing yet", "session_id")
    if not runtime.config.n_experts:
        raise bad_request("this model has no experts", None)
    return pathways.export(state, runtime.config, runtime.weights)


@router.put("/pathways")
def import_pathways(body: PathwaysBody, runtime: Current, owner: Owner) -> dict[str, Any]:
    """An export as an intervention for any request. Nothing changes on the server: weights never do."""
    return pathways.load(body, runtime.config, runtime.weights)


class _Nothing:
    """What stands behind a stream that only looks on."""

    def cancel(self) -> None:
        """Nothing to give up."""


async def _live(work: Awaitable[None], frames: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """A run's events while it runs; it ends with its reader."""
    running = asyncio.ensure_future(work)
    try:
        async for data in frames:
            yield data
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _true(work: Awaitable[None]) -> bool:
    await work
    return True


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` comes to; None where the client has gone, and then it does not go on."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


@asynccontextmanager
async def _replaying(runtime: Runtime) -> AsyncIterator[None]:
    """Room for a replay, or a 429."""
    if runtime.traces.replays.locked():
        message = "other traces are being run again; try once more in a moment"
        raise ApiError(429, message, code="replays_full", headers={"Retry-After": "1"})
    async with runtime.traces.replays:
        yield


def _fields(names: str | None) -> tuple[str, ...]:
    chosen = view.FIELDS if names is None else tuple(names.split(","))
    for name in chosen:
        if name not in view.FIELDS:
            raise bad_request(f"fields: expected some of {', '.join(view.FIELDS)}, got {name}", "fields")
    return chosen


def _listed(record: TraceRecord) -> dict[str, Any]:
    return {
        "trace_id": record.id, "request_id": record.request_id, "session_id": record.session_id,
        "level": record.level, "finish": record.finish, "bytes": record.nbytes,
    }  # fmt: skip


def _json(text: bytes) -> Response:
    return Response(text, media_type="application/json")
