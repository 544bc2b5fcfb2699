"""Servers for tests: a small model of bytes, an application around it, and one that listens on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from serving.__main__ import listen
from serving.app import create_app
from serving.runtime import Runtime
from serving.server import Server
from serving.settings import Settings
from serving.tokens import Codec, byte_codec
from synapse_arch import (
    ExpertsConfig,
    MemoryConfig,
    SynapseConfig,
    SynapseModel,
    ThalamusConfig,
    XLSTMConfig,
)

SECRET = "xyzzy-4711-plugh"


def byte_model(seed: int = 0, **changes: Any) -> SynapseModel:
    """Two layers of every region over bytes; it writes printable ASCII, so that its text is easy to compare."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "thalamus": ThalamusConfig(d_state=4, head_dim=8, top_k=2),
        "xlstm": XLSTMConfig(n_heads=2),
        "experts": ExpertsConfig(n_experts=4, d_expert=6),
        "memory": MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=1),
    }
    config = SynapseConfig(**({"vocab_size": 256, "d_model": 16, "n_layers": 2} | parts | changes))
    model = SynapseModel(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
        model.head.weight[:32] = model.head.weight[127:] = 0
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "w_out")):
                parameter.mul_(5)  # what was read long ago counts, too
    return model


def cycle_model(text: str) -> SynapseModel:
    """A model that writes `text` round and round, whatever came before: byte by byte, each byte at most once in it."""
    data = text.encode()
    assert len(set(data)) == len(data)
    model = byte_model(d_model=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "w_out", "router.weight")):
                parameter.zero_()
        model.embedding.weight.copy_(torch.eye(256))
        model.head.weight.zero_()
        model.head.weight[data[0]] = 5.0  # after whatever is not in it
        for before, after in zip(data, data[1:] + data[:1], strict=True):
            model.head.weight[after, before] = 10.0
    return model


def settings(**changes: Any) -> Settings:
    """Small limits."""
    return Settings(**({"model_id": "tiny", "slots": 3, "queue": 8, "max_output_tokens": 200, "port": 0} | changes))


def make_app(model: SynapseModel | None = None, codec: Codec | None = None, **changes: Any) -> FastAPI:
    """An application around a small model."""
    return create_app(byte_model() if model is None else model, codec or byte_codec(), settings(**changes))


def runtime(app: FastAPI) -> Runtime:
    """Its parts."""
    found: Runtime = app.state.runtime
    return found


@contextmanager
def client_of(app: FastAPI, key: str | None = None) -> Iterator[TestClient]:
    """A client in this process, for as long as the application lives."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with TestClient(app, base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=False) as client:
        yield client


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of the application on loopback, served by a thread."""
    with running(app) as (_, address):
        yield address


@contextmanager
def running(app: FastAPI) -> Iterator[tuple[Server, str]]:
    """The same with its server."""
    with listen("127.0.0.1", 0) as found:
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield server, f"http://127.0.0.1:{found.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    """Waits until the condition holds; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def events(response: httpx.Response) -> list[Any]:
    """What a stream of events said; the last, [DONE], as None."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [part for part in response.text.split("\n\n") if part]
    assert all(part.startswith("data: ") for part in frames)
    return [None if part == "data: [DONE]" else json.loads(part[6:]) for part in frames]


def refused(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Checks a refusal in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error
