"""In front of every route: keys, hosts, sizes, forms; and nothing of a prompt in logs or metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from serving.errors import ApiError
from serving.guard import PUBLIC, PUBLIC_BELOW, check_json
from serving.settings import Settings
from synapse_arch.errors import ConfigError
from tests.serving.servers import SECRET, byte_model, client_of, make_app, refused, runtime

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return make_app()


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> FastAPI:
    return make_app(api_keys=KEYS)


@pytest.fixture(scope="module")
def stranger(locked: FastAPI) -> Iterator[TestClient]:
    with client_of(locked) as found:
        yield found


def operations(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path of an application, parameters filled in."""
    found = []
    for route in _routes(app.routes):
        path = re.sub(r"{(\w+)(:\w+)?}", "x", route.path)
        found += [(method, path) for method in sorted(route.methods or ())]
    return found


def _routes(routes: Any) -> Iterator[Any]:
    for route in routes:
        if hasattr(route, "path") and hasattr(route, "methods"):
            yield route
        else:
            nested = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            assert nested, f"{route!r} is neither a route nor a router: this test would miss it"
            yield from _routes(nested)


def test_a_client_that_leaves_before_its_body_ends_is_not_waited_for(app: FastAPI) -> None:
    messages = iter([{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(app(scope | {"query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send))
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["code"] == "incomplete_body"


class TestKeys:
    def test_everything_but_the_public_set_needs_one(self, locked: FastAPI, stranger: TestClient) -> None:
        assert (set(PUBLIC), PUBLIC_BELOW) == ({"/", "/health", "/ready"}, "/static/")
        tried = operations(locked)
        assert len(tried) > 15
        for method, path in tried:
            for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {KEYS[0]}"}):
                status = stranger.request(method, path, headers=headers).status_code
                is_public = path in PUBLIC or path.startswith(PUBLIC_BELOW)
                assert (status != 401) == is_public, f"{method} {path}: {status}"

    def test_a_refusal_says_how(self, stranger: TestClient) -> None:
        response = stranger.get("/v1/models")
        refused(response, 401, "Authorization", "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert stranger.get("/no/such/path").status_code == 401

    @pytest.mark.parametrize("key", KEYS)
    def test_each_key_opens(self, stranger: TestClient, key: str) -> None:
        assert stranger.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200

    def test_keys_are_compared_in_constant_time(self, stranger: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        compared = []
        monkeypatch.setattr("serving.guard.hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
        stranger.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[0]}"})
        assert len(compared) == len(KEYS)  # all of them, whichever fits
        assert all(len(a) == len(b) == 32 for a, b in compared)

    def test_a_port_for_others_needs_a_key(self) -> None:
        for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
            with pytest.raises(ConfigError, match="an API key, as others can reach it, got none"):
                Settings(host=host)
            Settings(host=host, api_keys=KEYS)
        with pytest.raises(ConfigError, match="at least 16"):
            Settings(api_keys=("short",))


class TestHosts:
    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "10.0.0.1", "[::2]:1"]
    )
    def test_foreign(self, client: TestClient, host: str) -> None:
        refused(client.get("/v1/models", headers={"Host": host}), 403, "Host", "foreign_host")

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:9", "[::1]"])
    def test_own(self, client: TestClient, host: str) -> None:
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200

    @pytest.mark.parametrize(
        "origin", ["http://evil.example", "null", "http://localhost:9", "https://127.0.0.1.evil.example"]
    )
    def test_foreign_origins(self, client: TestClient, origin: str) -> None:
        headers = {"Origin": origin, "Host": "localhost:8000"}
        refused(client.post("/v1/completions", json={"prompt": "x"}, headers=headers), 403, "Origin", "foreign_origin")
        refused(client.options("/v1/completions", headers=headers), 403, "Origin")

    def test_an_origin_that_is_no_address(self, client: TestClient) -> None:
        refused(client.get("/health", headers={"Origin": "http://[::1"}), 403, "Origin", "foreign_origin")

    def test_own_origin_and_no_cors(self, client: TestClient) -> None:
        response = client.get("/v1/models", headers={"Origin": "http://localhost:8000", "Host": "localhost:8000"})
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_names_that_were_allowed(self) -> None:
        with client_of(make_app(host="0.0.0.0", api_keys=KEYS, allowed_hosts=("models.example",)), KEYS[0]) as client:
            for host, status in (
                ("models.example:1", 200),
                ("10.1.2.3", 200),
                ("[2001:db8::1]:80", 200),
                ("evil.example", 403),
            ):
                assert client.get("/v1/models", headers={"Host": host}).status_code == status, host


MALFORMED = {
    "nan": b'{"prompt": "x", "temperature": NaN}', "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "overflow": b'{"prompt": "x", "temperature": 1e999}', "surrogate": b'{"prompt": "\\ud800"}',
    "nul": b'{"prompt": "a\\u0000b"}', "raw nul": b'{"prompt": "a\x00b"}', "deep": b"[" * 10_000 + b"]" * 10_000,
    "deep prompt": b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "array": b"[]", "string": b'"x"',
    "null": b"null", "number": b"1", "empty": b"", "no json": b"{", "not utf-8": b'{"prompt": "\xff"}',
    "huge integer": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "trailing": b'{"prompt": "x"} x',
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(MALFORMED) - {"nul", "overflow", "array", "string", "null", "number"}))
def test_no_json_at_all(name: str) -> None:
    """Refused before any route sees it."""
    with pytest.raises(ApiError, match="the body is no JSON"):
        check_json(MALFORMED[name])


class TestBodies:
    @pytest.mark.parametrize("name", MALFORMED)
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_malformed(self, client: TestClient, path: str, name: str) -> None:
        response = client.post(path, content=MALFORMED[name], headers=JSON)
        refused(response, 400)
        assert response.headers["X-Request-Id"].startswith("req-")

    @pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
    def test_other_media_types(self, client: TestClient, kind: str) -> None:
        response = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        refused(response, 415, "Content-Type")

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
    def test_compressed(self, client: TestClient, encoding: str) -> None:
        headers = JSON | {"Content-Encoding": encoding}
        refused(client.post("/v1/completions", content=b"\x1f\x8b\x08", headers=headers), 415, "Content-Encoding")

    def test_binary_where_json_is_wanted(self, client: TestClient) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        refused(client.post("/v1/completions", content=b"\xff" * 100, headers=headers), 400)

    def test_too_large(self, client: TestClient) -> None:
        body = json.dumps({"prompt": "x" * 2**20}).encode()
        refused(client.post("/v1/completions", content=body, headers=JSON), 413, code="body_too_large")
        announced = JSON | {"Content-Length": str(10**9)}  # refused before it is read
        refused(client.post("/v1/completions", content=b"{}", headers=announced), 413, code="body_too_large")

        def pieces() -> Iterator[bytes]:  # without a length that would give it away
            yield from (body[at : at + 2**16] for at in range(0, len(body), 2**16))

        refused(client.post("/v1/completions", content=pieces(), headers=JSON), 413, code="body_too_large")
        fits = json.dumps({"prompt": [1] * 300_000, "max_tokens": 0}).encode()
        refused(client.post("/v1/completions", content=fits, headers=JSON), 400, "prompt", "context_length_exceeded")

    def test_unknown_paths_and_methods(self, client: TestClient) -> None:
        refused(client.get("/v1/nothing"), 404)
        refused(client.get("/v1/completions"), 405)


class TestFailures:
    def test_what_the_server_did_wrong_is_not_told(
        self, app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError(f"on the way to {SECRET}")

        monkeypatch.setattr(runtime(app).codec, "encode", broken)
        with caplog.at_level(logging.DEBUG):
            response = client.post("/v1/completions", json={"prompt": SECRET})
        error = refused(response, 500, code="internal_error")
        assert SECRET not in json.dumps(error) + caplog.text
        assert "RuntimeError" in caplog.text
        assert "test_guard.py" in caplog.text  # where, in a traceback without messages


class TestPrivacy:
    def test_prompts_are_in_no_log_and_no_metric(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG), client_of(make_app(byte_model())) as client:
            session = client.post("/api/sessions", json={}).json()["id"]
            for body in (
                {"prompt": SECRET}, {"prompt": SECRET, "session_id": session}, {"prompt": SECRET, "stream": True},
                {"prompt": SECRET, "temperature": SECRET}, {SECRET: SECRET}, {"prompt": "x", "model": SECRET},
                {"prompt": "x", "user": SECRET}, {"prompt": SECRET, "stop": SECRET * 30},
            ):  # fmt: skip
                client.post("/v1/completions", json=body)
                client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": SECRET}]} | body)
            client.get(f"/v1/models/{SECRET}?{SECRET}")
            client.get("/", headers={"User-Agent": SECRET, "Authorization": f"Bearer {SECRET}"})
            client.post("/v1/completions", content=f'{{"prompt": {SECRET}'.encode(), headers=JSON)
            text = client.get("/metrics").text + json.dumps(client.get("/api/status").json())
        own = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
        assert "/v1/completions" in own
        assert SECRET not in own
        assert session not in own
        assert SECRET not in text
        assert session not in text

    def test_introspected_runs_count_too(self) -> None:
        with client_of(make_app()) as client:
            client.post("/api/introspect", json={"prompt": "abc", "max_tokens": 3, "sampling": {"seed": 1}})
            text = client.get("/metrics").text
        for line in (
            'synapse_tokens_total{kind="prompt"} 4.0', 'synapse_tokens_total{kind="output"} 3.0',
            'synapse_outputs_total{finish="length"} 1.0',
        ):  # fmt: skip
            assert line in text, text

    def test_metrics_count(self) -> None:
        with client_of(make_app()) as client:
            client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3, "seed": 1})
            client.get("/v1/nothing")
            client.request("BREW", "/v1/models")
            text = client.get("/metrics").text
        for line in (
            'synapse_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
            'synapse_http_requests_total{method="GET",route="unmatched",status="404"} 1.0',
            'synapse_tokens_total{kind="prompt"} 4.0', 'synapse_outputs_total{finish="length"} 1.0',
            "synapse_first_token_seconds_count 1.0", "synapse_inter_token_seconds_count 2.0", "synapse_slots_busy 0.0",
            "synapse_sessions 0.0",
        ):  # fmt: skip
            assert line in text, text
        assert 'method="other"' in text
        assert "BREW" not in text


def test_status() -> None:
    with client_of(make_app()) as client:
        found = client.get("/api/status").json()
    assert found["model"]["id"] == "tiny"
    assert len(found["model"]["weights_sha256"]) == 64
    assert found["engine"]["slots"] == 3
    assert found["sessions"]["store"] == "memory"
    assert found["draining"] is False


def test_no_answer_is_taken_for_another_kind(client: TestClient) -> None:
    assert client.get("/v1/models").headers["X-Content-Type-Options"] == "nosniff"
