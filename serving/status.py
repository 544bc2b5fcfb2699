"""Is it alive, is it ready, what is it doing."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Response

from serving.errors import ApiError
from serving.runtime import Current

router = APIRouter(tags=["status"])


@router.get("/health")
def health(runtime: Current) -> dict[str, str]:
    """200 as long as the process answers and its engine runs."""
    if not runtime.engine.alive and not runtime.draining.is_set():
        raise ApiError(503, "the engine has stopped", code="engine_stopped")
    return {"status": "ok"}


@router.get("/ready")
def ready(runtime: Current) -> dict[str, str]:
    """200 as long as requests are taken; 503 from the moment the server is told to stop."""
    if runtime.draining.is_set() or not runtime.engine.alive:
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(runtime: Current) -> Response:
    """Counters in Prometheus' text format."""
    return Response(runtime.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/api/status")
def status(runtime: Current) -> dict[str, Any]:
    """The model, the engine, the sessions and the traces in figures."""
    settings, config = runtime.settings, runtime.config
    count, size = runtime.sessions.usage()
    return {
        "model": {
            "id": settings.model_id, "weights_sha256": runtime.weights, "layers": config.n_layers,
            "d_model": config.d_model, "vocab_size": config.vocab_size, "experts": config.n_experts,
            "state_bytes": runtime.state_bytes,
        },
        "engine": runtime.engine.stats.to_dict(),
        "sessions": {
            "store": settings.session_store.partition(":")[0], "count": count, "bytes": size,
            "limit_bytes": settings.session_bytes, "ttl": settings.session_ttl,
        },
        "traces": runtime.traces.stats(),
        "limits": {
            "prompt_tokens": settings.max_prompt_tokens, "output_tokens": settings.max_output_tokens,
            "body_bytes": settings.max_body,
        },
        "draining": runtime.draining.is_set(),
        "uptime": round(time.time() - runtime.created, 3),
    }  # fmt: skip
