"""What every route works with, made once by `create_app` and handed out by two dependencies.

@router.get("/api/thing")
def thing(runtime: Current, owner: Owner) -> ...:
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from serving.settings import Settings
from synapse_arch import SynapseConfig

if TYPE_CHECKING:
    from serving.engine import Engine
    from serving.introspection.store import TraceStore
    from serving.metrics import Metrics
    from serving.sessions import Sessions
    from serving.tokens import Codec


@dataclass(frozen=True, eq=False)
class Runtime:
    """The parts of a running server.

    Attributes:
        settings: how it runs.
        config: the model's.
        weights: SHA-256 of the model's weights, in hex.
        state_bytes: of one sequence's state, however long it is.
        created: when it started, seconds since 1970.
        engine: alone touches the model.
        codec: text to tokens and back.
        sessions: what is remembered between requests.
        traces: what was recorded.
        metrics: what is counted.
        draining: set once the server is told to stop.
    """

    settings: Settings
    config: SynapseConfig
    weights: str
    state_bytes: int
    created: int
    engine: Engine
    codec: Codec
    sessions: Sessions
    traces: TraceStore
    metrics: Metrics
    draining: threading.Event

    def close(self) -> None:
        """Ends what runs, and lets go of everything; closing again changes nothing."""
        self.draining.set()
        self.engine.close()
        self.traces.close()
        self.sessions.close()


def current(request: Request) -> Runtime:
    """The server's parts."""
    runtime: Runtime = request.app.state.runtime
    return runtime


def owner(request: Request) -> str:
    """Whose sessions and traces the request may touch: the guard found out by its key."""
    name: str = request.scope["owner"]
    return name


Current = Annotated[Runtime, Depends(current)]
Owner = Annotated[str, Depends(owner)]
