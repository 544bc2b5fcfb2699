"""The application: its parts made, its routes joined, its guard in front."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

import synapse_arch
from serving import errors, openai, page, session_routes, status
from serving.engine import Engine
from serving.guard import Guard
from serving.introspection import pathways
from serving.introspection import router as introspection
from serving.introspection.store import TraceStore
from serving.metrics import Metrics
from serving.runtime import Runtime
from serving.sessions import Sessions
from serving.settings import Settings
from serving.stores import Limits, open_store
from serving.tokens import Codec
from synapse_arch import SynapseModel
from synapse_arch.model import accounting


def create_app(model: SynapseModel, codec: Codec, settings: Settings, *, session_key: bytes | None = None) -> FastAPI:
    """A server of one model. Its engine runs from now until the application's lifespan ends.

    Args:
        model: in evaluation mode; from now on the engine's alone.
        codec: its tokens.
        settings: how it runs.
        session_key: 32 bytes that seal what the session store keeps; None leaves it readable.

    Raises:
        ConfigError: the session store cannot be opened, or the limits do not fit the model.
    """
    runtime = _runtime(model, codec, settings, session_key)
    app = FastAPI(
        title="synapse_arch", version=synapse_arch.__version__, docs_url=None, redoc_url=None, lifespan=_lifespan,
        summary="Serves a SynapseModel and shows what happens inside.",
    )  # fmt: skip
    app.state.runtime = runtime
    errors.install(app)
    for part in (status, openai, session_routes, introspection, page):
        app.include_router(part.router)
    most_json = max(settings.max_body, pathways.most_bytes(model.config))  # any request can have them as interventions
    app.add_middleware(
        Guard, settings=settings, metrics=runtime.metrics, most_json=most_json,
        most_upload=runtime.sessions.most_upload,
    )  # fmt: skip
    app.openapi = lambda: _schema(app, settings)  # type: ignore[method-assign]
    return app


def _runtime(model: SynapseModel, codec: Codec, settings: Settings, session_key: bytes | None) -> Runtime:
    weights = fingerprint(model)
    limits = Limits(settings.session_ttl, settings.session_bytes, settings.session_count)
    sessions = Sessions(open_store(settings.session_store, limits, key=session_key), model, weights, settings)
    traces, metrics = TraceStore(settings), Metrics()
    engine = Engine(
        model, slots=settings.slots, queue=settings.queue, prefill_chunk=settings.prefill_chunk, ended=metrics.finished
    )
    metrics.watch("synapse_slots_busy", "Sequences being decoded.", lambda: engine.stats.busy)
    metrics.watch("synapse_queue", "Requests that wait for a slot.", lambda: engine.stats.queued)
    metrics.watch("synapse_sessions", "Sessions kept.", lambda: sessions.usage()[0])
    metrics.watch("synapse_session_bytes", "Their bytes.", lambda: sessions.usage()[1])
    return Runtime(
        settings=settings, config=model.config, weights=weights, state_bytes=accounting.state_bytes(model.config),
        created=int(time.time()), engine=engine, codec=codec, sessions=sessions, traces=traces, metrics=metrics,
        draining=threading.Event(),
    )  # fmt: skip


def fingerprint(model: SynapseModel) -> str:
    """SHA-256 over the names, dtypes, shapes and bits of a model's tensors, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await run_in_threadpool(app.state.runtime.close)


def _schema(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The OpenAPI schema, with this server's own limits and the shape in which it refuses."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        parts = schema["components"]["schemas"]
        parts["Error"] = errors.SCHEMA
        refusal = {"$ref": "#/components/schemas/Error"}
        for operation in (one for path in schema["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)
            for status, about in (("4XX", "Refused"), ("5XX", "Not served")):
                operation["responses"][status] = {
                    "description": about, "content": {"application/json": {"schema": refusal}}
                }  # fmt: skip
        for body, name in (
            ("CompletionBody", "max_tokens"),
            ("ChatBody", "max_tokens"),
            ("ChatBody", "max_completion_tokens"),
        ):
            parts[body]["properties"][name]["anyOf"][0]["maximum"] = settings.max_output_tokens
    return app.openapi_schema or {}
