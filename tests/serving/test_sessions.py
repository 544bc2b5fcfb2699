"""Sessions: what they remember, to whom they belong, how they branch, travel and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from serving.app import create_app
from serving.sessions import Sessions
from serving.stores.base import Limits
from serving.stores.memory import MemoryStore
from serving.tokens import Codec, byte_codec
from synapse_arch import SynapseState
from tests.helpers import assert_equal
from tests.serving.programs import redis_server
from tests.serving.servers import byte_model, client_of, events, make_app, refused, runtime, settings

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return make_app()


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as found:
        yield found


def new(client: TestClient) -> str:
    response = client.post("/api/sessions", json={})
    assert response.status_code == 201
    name: str = response.json()["id"]
    return name


def say(client: TestClient, prompt: str, session: str | None = None, **fields: Any) -> str:
    body = {"prompt": prompt, "session_id": session, "max_tokens": 6, "temperature": 0} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def state_of(client: TestClient, session: str) -> SynapseState:
    return SynapseState.from_bytes(client.get(f"/api/sessions/{session}/export").content)


class TestMemory:
    def test_what_is_loaded_lies_where_the_model_does(self) -> None:
        """Kept as bytes, it comes back on the CPU; a model on a GPU could not go on from there."""
        for device in ("cpu", "meta"):
            model = byte_model().to(device)
            sessions = Sessions(MemoryStore(Limits(60.0, 2**20, 4)), model, "ab" * 32, settings())
            made = sessions.create("me", byte_model().init_state(1))
            loaded = sessions.load(made.id, "me").state
            assert loaded is not None
            loaded.check_against(model, 1, device=device)

    def test_a_session_goes_on_where_it_stood(self, client: TestClient) -> None:
        session = new(client)
        first = say(client, "Once upon", session)
        second = say(client, " a time", session)
        model = byte_model()
        ids = [0, *b"Once upon", *first.encode(), *b" a time", *second.encode()]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).state
        got = state_of(client, session)
        assert int(got.position) == len(ids)
        for name, tensor in got.to_tensors().items():
            torch.testing.assert_close(tensor, expected.to_tensors()[name], rtol=1e-3, atol=1e-4)
        whole = say(client, "Once upon" + first + " a time")
        assert whole == second
        assert say(client, " a time") != second

    def test_chats_send_only_what_is_new(self, client: TestClient) -> None:
        session = new(client)
        body: dict[str, Any] = {"temperature": 0, "max_tokens": 5}
        said: list[dict[str, str]] = []
        for words in ("Hello", "And then?", "Why?"):
            said.append({"role": "user", "content": words})
            fresh = client.post("/v1/chat/completions", json=body | {"messages": said}).json()
            kept = client.post(
                "/v1/chat/completions", json=body | {"messages": said[-1:], "session_id": session}
            ).json()
            assert kept["choices"] == fresh["choices"]
            assert kept["session_id"] == session
            said.append(fresh["choices"][0]["message"])
            del said[-1]["refusal"]

    def test_streams_and_whole_answers_keep_the_same(self, client: TestClient) -> None:
        first, second = new(client), new(client)
        say(client, "Hello", first, stop=["q"], max_tokens=30)
        body = {
            "prompt": "Hello",
            "session_id": second,
            "max_tokens": 30,
            "temperature": 0,
            "stream": True,
            "stop": ["q"],
        }
        events(client.post("/v1/completions", json=body))
        assert_equal(state_of(client, first).to_tensors(), state_of(client, second).to_tensors())

    def test_reading_without_writing(self, client: TestClient) -> None:
        session = new(client)
        assert say(client, "Once upon", session, max_tokens=0) == ""
        assert client.get(f"/api/sessions/{session}").json()["tokens"] == 10
        assert say(client, " a time", session) == say(client, "Once upon a time")

    def test_a_session_cannot_go_on_from_nothing(self, client: TestClient) -> None:
        session = new(client)
        say(client, "x", session)
        body = {"prompt": "", "session_id": session}
        refused(client.post("/v1/completions", json=body), 400, "prompt")

    def test_a_secret_of_one_session_is_in_no_other(self, client: TestClient) -> None:
        fresh = new(client)
        before = say(client, "The secret is", fresh, max_tokens=30)
        told = new(client)
        for _ in range(4):  # every slot gets to see it
            say(client, "The secret is xyzzy. " * 10, told)
        assert say(client, "The secret is", new(client), max_tokens=30) == before
        assert say(client, "The secret is", max_tokens=30) == before

    def test_weights_never_change(self, app: FastAPI, client: TestClient) -> None:
        from serving.app import fingerprint

        session = new(client)
        for _ in range(3):
            say(client, "learn this, learn this", session)
        assert runtime(app).engine.run(fingerprint).result() == runtime(app).weights

    def test_interventions_leave_the_session_as_it_was(self, client: TestClient) -> None:
        session = new(client)
        say(client, "Hello", session)
        before = state_of(client, session)
        say(client, "x", session, interventions=[{"kind": "clear_memory"}])
        assert_equal(state_of(client, session).to_tensors(), before.to_tensors())
        assert client.get(f"/api/sessions/{session}").json()["version"] == 2

    def test_text_before_a_stop_inside_a_token_is_remembered(self) -> None:
        """A token "b." of which the stop takes the dot: the text has the b, and so has the session."""
        letters = [bytes((value,)) for value in range(256)]
        letters[1] = b"b."
        codec = Codec(letters, lambda text, _: list(text.encode()))
        model = byte_model(d_model=256)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("out_proj.weight", "w_out")):
                    parameter.zero_()
            model.embedding.weight.copy_(torch.eye(256))
            model.head.weight.zero_()
            for before, after in ((ord("?"), ord("a")), (ord("a"), 1)):
                model.head.weight[after, before] = 10.0
        app = make_app(model, codec)
        submit, asked = runtime(app).engine.submit, []
        runtime(app).engine.submit = lambda request: asked.append(request) or submit(request)
        with client_of(app) as client:
            session = new(client)
            assert say(client, "?", session, stop=".") == "ab"
            assert len(asked) == 1  # a second request could be refused, by a full queue or a shutdown
            with torch.no_grad():
                expected = byte_model(d_model=256)
                expected.load_state_dict(model.state_dict())
                state = expected(torch.tensor([[0, *b"?ab"]])).state
            assert int(state_of(client, session).position) == 4
            for name, tensor in state_of(client, session).to_tensors().items():
                torch.testing.assert_close(tensor, state.to_tensors()[name], rtol=1e-3, atol=1e-4)


class TestLives:
    def test_what_a_client_sees(self, client: TestClient) -> None:
        session = new(client)
        say(client, "Hello", session)
        size = len(client.get(f"/api/sessions/{session}/export").content)
        found = client.get(f"/api/sessions/{session}").json()
        assert (found["id"], found["version"], found["tokens"], found["bytes"]) == (session, 2, 12, size)
        assert found["expires"] > found["used"] >= found["created"]
        assert found in client.get("/api/sessions").json()["data"]  # looking is no use

    def test_a_branch_is_independent(self, client: TestClient) -> None:
        trunk = new(client)
        say(client, "Hello", trunk)
        branch = client.post(f"/api/sessions/{trunk}/fork", json={}).json()
        assert branch["version"] == 1
        before = state_of(client, trunk)
        assert_equal(state_of(client, branch["id"]).to_tensors(), before.to_tensors())
        say(client, " you", branch["id"])
        assert_equal(state_of(client, trunk).to_tensors(), before.to_tensors())
        assert client.post(f"/api/sessions/{trunk}/fork").status_code == 201  # a body is not needed

    def test_memory_alone_can_be_carried_over(self, client: TestClient) -> None:
        session = new(client)
        say(client, "Hello", session)
        fork = client.post(f"/api/sessions/{session}/fork", json={"memory_only": True}).json()
        assert fork["tokens"] == 0
        expected = state_of(client, session).memory_only()
        assert_equal(state_of(client, fork["id"]).to_tensors(), expected.to_tensors())
        say(client, "Hello", fork["id"])
        assert client.get(f"/api/sessions/{fork['id']}").json()["tokens"] == 12  # it opened a document of its own

    def test_out_and_in_again(self, client: TestClient, tmp_path: Path) -> None:
        session = new(client)
        say(client, "Hello", session)
        exported = client.get(f"/api/sessions/{session}/export")
        assert exported.headers["content-disposition"] == f'attachment; filename="{session}.safetensors"'
        (tmp_path / "s").write_bytes(exported.content)
        assert_equal(SynapseState.load(tmp_path / "s").to_tensors(), state_of(client, session).to_tensors())
        back = client.post("/api/sessions/import", content=exported.content, headers=BINARY)
        assert back.status_code == 201
        assert_equal(state_of(client, back.json()["id"]).to_tensors(), state_of(client, session).to_tensors())
        assert say(client, " you", back.json()["id"]) == say(client, " you", session)

    def test_files_that_are_none(self, app: FastAPI, client: TestClient) -> None:
        session = new(client)
        say(client, "Hello", session)
        good = client.get(f"/api/sessions/{session}/export").content
        other = byte_model(n_layers=1)
        with torch.no_grad():
            foreign = other(torch.tensor([[1, 2]])).state.to_bytes()
            rows = byte_model()(torch.tensor([[1, 2], [3, 4]])).state.to_bytes()
            state = byte_model()(torch.tensor([[1, 2]])).state
        negative = SynapseState(state.layers, torch.tensor([-5])).to_bytes()
        broken = state.clone()
        broken.layers[0].memory.weights[0, 0] = torch.nan
        for data in (
            b"", good[:-1], good[:100], b"\xff" * 8 + good[8:], b"PK\x03\x04" + good, foreign, rows, negative,
            broken.to_bytes(), SynapseState(state.layers, torch.tensor([2**53 + 1])).to_bytes(),
            (2**62).to_bytes(8, "little") + good[8:], good[:8] + b"{" * 50 + good[58:],
        ):  # fmt: skip
            refused(client.post("/api/sessions/import", content=data, headers=BINARY), 400)
        huge = b"x" * (runtime(app).sessions.most_upload + 1)
        refused(client.post("/api/sessions/import", content=huge, headers=BINARY), 413, code="body_too_large")
        refused(client.post("/api/sessions/import", json={}), 400, "Content-Type")

    def test_forgotten(self, client: TestClient) -> None:
        session = new(client)
        assert client.delete(f"/api/sessions/{session}").json()["deleted"] is True
        refused(client.delete(f"/api/sessions/{session}"), 404, "session_id", "session_not_found")
        refused(client.post("/v1/completions", json={"prompt": "x", "session_id": session}), 404, "session_id")

    @pytest.mark.parametrize("name", ["x", "sess-" + "0" * 31, "sess-" + "G" * 32, "..%2f..%2fetc"])
    def test_names_that_are_none(self, client: TestClient, name: str) -> None:
        assert client.get(f"/api/sessions/{name}").status_code in (400, 404)

    def test_one_is_gone_after_its_time_and_many_make_room(self) -> None:
        with client_of(make_app(session_ttl=0.3)) as client:
            session = new(client)
            time.sleep(0.5)
            refused(client.get(f"/api/sessions/{session}/export"), 404)
        with client_of(make_app(session_count=3)) as client:
            names = [new(client) for _ in range(5)]
            assert [one["id"] for one in client.get("/api/sessions").json()["data"]] == names[:1:-1]

    def test_bytes_are_bounded(self) -> None:
        with client_of(make_app(session_bytes=40_000)) as client:
            names = [new(client) for _ in range(12)]
            for name in names:
                client.post("/v1/completions", json={"prompt": "x", "session_id": name, "max_tokens": 1})
            found = client.get("/api/status").json()["sessions"]
            assert found["bytes"] <= 40_000
            assert 0 < found["count"] < 12


class TestOwners:
    def test_anothers_session_is_not_there(self) -> None:
        app = make_app(api_keys=KEYS)
        with client_of(app, KEYS[0]) as ann, client_of(app, KEYS[1]) as bob:
            session = new(ann)
            for method, path, body in (
                ("GET", "", None), ("DELETE", "", None), ("POST", "/fork", {}), ("GET", "/export", None),
            ):  # fmt: skip
                refused(bob.request(method, f"/api/sessions/{session}{path}", json=body), 404, "session_id")
            refused(bob.post("/v1/completions", json={"prompt": "x", "session_id": session}), 404, "session_id")
            assert bob.get("/api/sessions").json()["data"] == []
            assert [one["id"] for one in ann.get("/api/sessions").json()["data"]] == [session]
            assert ann.get(f"/api/sessions/{session}").json()["version"] == 1


class TestTwoWriters:
    def test_the_second_is_refused(self, app: FastAPI, client: TestClient) -> None:
        session = new(client)
        found = []

        def write() -> None:
            found.append(client.post("/v1/completions", json={"prompt": "x", "session_id": session, "max_tokens": 50}))

        threads = [threading.Thread(target=write) for _ in range(3)]
        blocked = threading.Event()
        runtime(app).engine.run(lambda _: blocked.wait(10))  # until all have loaded the session
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while runtime(app).engine.stats.queued < 3 and time.monotonic() < until:
            time.sleep(0.01)
        blocked.set()
        for thread in threads:
            thread.join()
        assert sorted(response.status_code for response in found) == [200, 409, 409]
        for response in found:
            if response.status_code == 409:
                refused(response, 409, "session_id", "session_conflict")
        assert client.get(f"/api/sessions/{session}").json()["version"] == 2

    def test_a_stream_says_so_in_its_last_frame(self, app: FastAPI, client: TestClient) -> None:
        session = new(client)
        sessions = runtime(app).sessions
        stale = sessions.load(session, "anonymous")
        sessions.save(stale, byte_model().init_state(1))
        load, sessions.load = sessions.load, lambda *_: stale  # type: ignore[method-assign]
        try:
            body = {"prompt": "x", "session_id": session, "stream": True, "max_tokens": 2}
            *_, last = events(client.post("/v1/completions", json=body))
        finally:
            sessions.load = load  # type: ignore[method-assign]
        assert last["error"]["code"] == "session_conflict"


class TestStores:
    def test_a_restart_keeps_what_a_file_keeps(self, tmp_path: Path) -> None:
        where = {"session_store": f"sqlite:{tmp_path / 'sessions.db'}"}
        with client_of(make_app(**where)) as client:
            session = new(client)
            say(client, "Hello", session)
            branch = client.post(f"/api/sessions/{session}/fork", json={}).json()["id"]
            expected = say(client, " you", branch)
        with client_of(make_app(**where)) as client:
            assert say(client, " you", session) == expected
        with client_of(make_app(byte_model(seed=1), **where)) as client:
            response = client.post("/v1/completions", json={"prompt": "x", "session_id": session})
            refused(response, 409, "session_id", "session_of_another_model")

    def test_a_sealed_session_needs_its_key(self, tmp_path: Path) -> None:
        where = {"session_store": f"sqlite:{tmp_path / 'sessions.db'}"}
        with client_of(create_app(byte_model(), byte_codec(), settings(**where), session_key=bytes(32))) as client:
            session = new(client)
            say(client, "Hello", session)
        with client_of(make_app(**where)) as client:
            error = refused(client.get(f"/api/sessions/{session}/export"), 409, "session_id")
            assert "or sealed with a key that this one lacks" in error["message"]

    def test_a_store_that_went_away(self, tmp_path: Path) -> None:
        """Sessions are not to be had, in so many words; all else goes on."""
        with redis_server(tmp_path) as url:
            app = make_app(session_store=url)
        with client_of(app) as client:
            refused(client.post("/api/sessions", json={}), 503, code="store_unavailable")
            assert say(client, "Hello")
            assert "synapse_sessions NaN" in client.get("/metrics").text
            assert client.get("/ready").status_code == 200
