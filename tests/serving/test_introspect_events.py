"""Live events: every token once, in order, while the run goes on; then the statistics of the whole."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.testclient import TestClient

from serving.introspection import events as events_module
from serving.introspection.schema import TRACE
from tests.serving.servers import byte_model, client_of, listening, make_app, refused, runtime, wait_for
from tests.serving.test_introspect import URL, run


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(make_app(byte_model())) as found:
        yield found


def frames(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(event, page) of a stream; comments are left out."""
    found = []
    for part in filter(None, text.split("\n\n")):
        lines = dict(line.split(": ", 1) for line in part.split("\n") if not line.startswith(":"))
        if lines:
            page = json.loads(lines["data"])
            jsonschema.validate(page, TRACE)
            found.append((lines.get("event", "message"), page))
    return found


def check_whole(found: list[tuple[str, dict[str, Any]]], whole: dict[str, Any]) -> None:
    """The events are the pages of the trace."""
    *growing, (last, done) = found
    assert last == "done"
    assert {kind for kind, _ in growing} <= {"message"}
    assert [token for _, page in growing for token in page["tokens"]] == whole["tokens"]
    for index, layer in enumerate(whole["layers"]):
        written = [values for _, page in growing for values in page["layers"][index]["memory"]["write"]]
        assert written == layer["memory"]["write"]
    assert done["tokens"] == []
    for name in ("experts", "pathways", "truncated", "request"):
        assert done[name] == whole[name]
    assert done["timing"]["itl_ms_p50"] is not None


def test_a_finished_trace_is_told_in_events(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "BUNCH", 10)
    whole = run(client, max_tokens=20)
    url = f"{URL}/traces/{whole['trace_id']}/events"
    answer = client.get(url)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    found = frames(answer.text)
    assert len(found) > 4
    check_whole(found, client.get(f"{URL}/traces/{whole['trace_id']}").json())
    late = frames(client.get(url, params={"from": 30}).text)
    assert [token["pos"] for _, page in late for token in page["tokens"]] == list(range(30, 43))


def test_a_run_can_be_followed_from_its_first_event(client: TestClient) -> None:
    asked = {"prompt": "follow me", "max_tokens": 20, "stream": True, "sampling": {"seed": 1}}
    answer = client.post(URL, json=asked)
    found = frames(answer.text)
    whole = client.get(f"{URL}/traces/{found[0][1]['trace_id']}").json()
    check_whole(found, whole)
    plain = run(client, **{**asked, "stream": False, "level": "gates"})
    assert plain["tokens"] == whole["tokens"]


def test_events_come_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real connection, beside the OpenAI stream that the trace belongs to."""
    monkeypatch.setattr(events_module, "PACE", 0.0)
    app = make_app(byte_model(), max_output_tokens=4000)
    with listening(app) as address, httpx.Client(base_url=address, timeout=30) as http:
        body = {"prompt": "go on", "max_tokens": 3000, "stream": True, "trace": {"level": "routes"}, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            trace_id = json.loads(next(lines).removeprefix("data: "))["trace_id"]
            drain = threading.Thread(target=lambda: list(lines))
            drain.start()
            with http.stream("GET", f"{URL}/traces/{trace_id}/events") as live:
                seen = 0
                for line in live.iter_lines():
                    if line.startswith("data: "):
                        page = json.loads(line.removeprefix("data: "))
                        seen += len(page["tokens"])
                        if seen > 20:
                            break
                assert page["request"]["finish"] is None
                assert page["request"]["output_tokens"] < 3000
            record = runtime(app).traces.get(trace_id, "anonymous")
            assert not record.closed
            assert http.delete(f"{URL}/traces/{trace_id}").status_code == 204
            refused(http.get(f"{URL}/traces/{trace_id}"), 404)
            assert not record.closed  # the answer itself goes on
            for output in list(runtime(app).engine._running.values()):
                output.ticket.cancel()
            drain.join(20)
            assert not drain.is_alive()
            wait_for(lambda: not record._watchers)


def test_who_leaves_a_streamed_run_ends_it() -> None:
    app = make_app(byte_model(), max_output_tokens=4000)
    with listening(app) as address, httpx.Client(base_url=address, timeout=30) as http:
        asked = {"prompt": "x", "max_tokens": 3900, "stream": True, "sampling": {"temperature": 0.0}}
        with http.stream("POST", URL, json=asked) as live:
            next(live.iter_lines())
        wait_for(lambda: runtime(app).engine.stats.busy == 0)
        wait_for(lambda: runtime(app).traces.owned("anonymous")[0].finish == "cancelled")


def test_replays_beyond_those_allowed_are_told_to_wait(client: TestClient) -> None:
    page = run(client, max_tokens=4)
    traces = client.app.state.runtime.traces  # type: ignore[attr-defined]
    held = traces.replays._value
    try:
        traces.replays._value = 0
        url = f"{URL}/traces/{page['trace_id']}"
        for path, body in (
            ("/attribution", {"layer": 0, "head": 0, "pos": 2}),
            ("/diff", {"interventions": [{"kind": "freeze_writes"}]}),
        ):
            answer = client.post(url + path, json=body)
            refused(answer, 429, code="replays_full")
            assert answer.headers["retry-after"] == "1"
    finally:
        traces.replays._value = held
