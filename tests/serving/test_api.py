"""OpenAI's API: shapes, sampling, streams, limits, refusals that name the field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from serving.tokens import Codec, byte_codec
from synapse_arch import Sampling, TraceSpec
from tests.serving.servers import (
    byte_model,
    client_of,
    cycle_model,
    events,
    listening,
    make_app,
    refused,
    runtime,
    wait_for,
)

ROUND = "abécd☃ef🙂gh."
"""What the cycling model writes: characters of one to four bytes, each byte a token."""


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return make_app(max_prompt_tokens=9000)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as found:
        yield found


@pytest.fixture(scope="module")
def cycle() -> Iterator[TestClient]:
    with client_of(make_app(cycle_model(ROUND))) as found:
        yield found


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": "Hello", "temperature": 0, "max_tokens": 12} | fields)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def text_of(client: TestClient, **fields: Any) -> str:
    text: str = complete(client, **fields)["choices"][0]["text"]
    return text


class TestModels:
    def test_list_and_look_up(self, client: TestClient) -> None:
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["object"]) == ("tiny", "model")
        assert client.get("/v1/models/tiny").json() == model
        refused(client.get("/v1/models/other"), 404, "model", "model_not_found")

    def test_the_model_must_match(self, client: TestClient) -> None:
        assert complete(client, model="tiny")["model"] == "tiny"
        response = client.post("/v1/completions", json={"prompt": "x", "model": "gpt-4"})
        refused(response, 404, "model", "model_not_found")


class TestCompletions:
    def test_what_the_model_itself_writes(self, client: TestClient) -> None:
        model = byte_model()
        ids = torch.tensor([0, *b"Hello"])
        for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "seed": 7}, {"top_p": 0.7, "seed": 3}):
            expected = [token.id for token in model.stream(ids, sampling=Sampling(max_tokens=12, **options))]
            got = complete(client, **({"temperature": 1} | options))
            assert got["choices"][0]["text"] == byte_codec().decode(expected)
            assert got["choices"][0]["finish_reason"] == "length"

    def test_shape(self, client: TestClient) -> None:
        got = complete(client, user="somebody")
        assert got["id"].startswith("cmpl-")
        assert got["object"] == "text_completion"
        assert got["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
        assert got["choices"][0]["logprobs"] is None
        assert (got["session_id"], got["trace_id"]) == (None, None)

    def test_a_seed_repeats_and_another_does_not(self, client: TestClient) -> None:
        options = {"temperature": 1, "max_tokens": 12}
        assert text_of(client, seed=1, **options) == text_of(client, seed=1, **options)
        assert text_of(client, seed=1, **options) != text_of(client, seed=2, **options)
        drawn = complete(client, **options)
        assert text_of(client, seed=drawn["seed"], **options) == drawn["choices"][0]["text"]
        assert text_of(client, seed=-5, **options) == text_of(client, seed=-5, **options)

    def test_repetition_penalty(self, client: TestClient) -> None:
        assert text_of(client, repetition_penalty=10, max_tokens=24) != text_of(client, max_tokens=24)

    def test_a_stateless_call_starts_from_nothing(self, client: TestClient) -> None:
        before = text_of(client, max_tokens=24)
        text_of(client, prompt="The secret is xyzzy. " * 20)
        assert text_of(client, max_tokens=24) == before

    def test_token_ids_are_a_prompt_too(self, client: TestClient) -> None:
        assert text_of(client, prompt=list(b"Hello")) == text_of(client) == text_of(client, prompt=[0, *b"Hello"])

    def test_several_prompts_and_several_outputs(self, client: TestClient) -> None:
        got = complete(client, prompt=["Hello", "Other"], n=2, seed=5, temperature=1)
        assert [choice["index"] for choice in got["choices"]] == [0, 1, 2, 3]
        assert len({choice["text"] for choice in got["choices"]}) == 4
        assert got["usage"] == {"prompt_tokens": 12, "completion_tokens": 48, "total_tokens": 60}
        assert got["choices"][0]["text"] == text_of(client, seed=5, temperature=1)
        alone = complete(client, prompt="Hello", n=2, seed=5, temperature=1)
        assert [c["text"] for c in alone["choices"]] == [c["text"] for c in got["choices"][:2]]

    def test_nothing_written_and_everything_echoed(self, client: TestClient) -> None:
        got = complete(client, max_tokens=0, echo=True, logprobs=3)
        (choice,) = got["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
        scores = choice["logprobs"]
        assert scores["tokens"] == list("Hello")
        assert scores["text_offset"] == [0, 1, 2, 3, 4]
        model, ids = byte_model(), torch.tensor([[0, *b"Hello"]])
        with torch.no_grad():
            expected = model(ids).logits[0].log_softmax(-1)
        for place, (token, score, top) in enumerate(
            zip(b"Hello", scores["token_logprobs"], scores["top_logprobs"], strict=True)
        ):
            assert score == pytest.approx(expected[place, token].item(), abs=1e-4)
            assert len(top) == 3
            assert max(top.values()) == pytest.approx(expected[place].max().item(), abs=1e-4)

    def test_offsets_of_an_echo_count_characters(self, client: TestClient) -> None:
        scores = complete(client, prompt="é€x", max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
        assert scores["text_offset"] == [0, 0, 1, 1, 1, 2, 3]

    def test_a_limit_below_the_defaults(self) -> None:
        with client_of(make_app(max_output_tokens=8)) as client:
            for path, body in (
                ("/v1/completions", {"prompt": "a", "seed": 0}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "seed": 0}),
            ):
                assert client.post(path, json=body).json()["usage"]["completion_tokens"] <= 8
            found = client.post("/api/introspect", json={"prompt": "a", "sampling": {"seed": 0}})
            assert found.status_code == 200, found.text

    def test_more_outputs_than_can_ever_run(self) -> None:
        with client_of(make_app(slots=1, queue=2)) as client:
            refused(client.post("/v1/completions", json={"prompt": "a", "n": 4}), 400, "n")
            assert client.post("/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 2}).status_code == 200

    def test_a_model_by_a_name_with_a_slash(self) -> None:
        with client_of(make_app(model_id="house/tiny")) as client:
            assert client.get("/v1/models/house/tiny").json()["id"] == "house/tiny"

    def test_logprobs(self, client: TestClient) -> None:
        scores = complete(client, logprobs=2, max_tokens=5, echo=True)["choices"][0]["logprobs"]
        assert [len(scores[name]) for name in scores] == [10] * 4
        assert scores["text_offset"] == list(range(10))
        for token, score, top in zip(*(scores[name][5:] for name in list(scores)[:3]), strict=True):
            assert len(top) == 2
            assert top[token] == score == max(top.values())  # temperature 0
        assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 12

    def test_a_prompt_longer_than_a_piece_is_read_whole(self, client: TestClient) -> None:
        assert complete(client, prompt="x" * 3000, max_tokens=1)["usage"]["prompt_tokens"] == 3001


class TestText:
    """Characters of several tokens and stop strings; the model writes a known text round and round."""

    def test_characters_come_whole(self, cycle: TestClient) -> None:
        whole = text_of(cycle, prompt=".", max_tokens=2 * len(ROUND.encode()))
        assert whole == 2 * ROUND
        body = {"prompt": ".", "temperature": 0, "max_tokens": 2 * len(ROUND.encode()), "stream": True}
        *chunks, done = events(cycle.post("/v1/completions", json=body))
        assert done is None
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(texts) == 2 * ROUND
        assert max(map(len, texts)) == 1
        assert "\ufffd" not in "".join(texts)

    def test_half_a_character_at_the_end_is_marked(self, cycle: TestClient) -> None:
        assert text_of(cycle, prompt="d", max_tokens=2) == "\ufffd"

    @pytest.mark.parametrize(
        ("stop", "expected"),
        [
            ("☃", "abécd"), ("f🙂g", "abécd☃e"), (["zzz", "d☃"], "abéc"), (["h.a", "gh"], "abécd☃ef🙂"),
            ("a", ""), (["☃ef", "cd"], "abé"), ("nothing", 2 * ROUND),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("stream", [False, True])
    def test_stops(self, cycle: TestClient, stop: str | list[str], expected: str, stream: bool) -> None:
        body = {"prompt": ".", "temperature": 0, "max_tokens": 2 * len(ROUND.encode()), "stop": stop}
        reason = "length" if expected == 2 * ROUND else "stop"
        if not stream:
            got = complete(cycle, **body)
            assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == (expected, reason)
            assert got["usage"]["completion_tokens"] == len(expected.encode())
            return
        *chunks, _ = events(cycle.post("/v1/completions", json=body | {"stream": True}))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, reason]

    def test_the_end_of_a_document_stops(self) -> None:
        model = cycle_model("abc")
        with torch.no_grad():
            model.head.weight[:, ord("c")] = 0
            model.head.weight[0, ord("c")] = 10
        with client_of(make_app(model)) as client:
            got = complete(client, prompt="a")
            assert (got["choices"][0]["text"], got["choices"][0]["finish_reason"]) == ("bc", "stop")

    def test_offsets_count_what_half_a_character_becomes(self) -> None:
        pieces = [bytes((value,)) for value in range(256)]
        pieces[ord("B")] = b"\xe3\x81"
        codec = Codec(pieces, lambda text, _: list(text.encode()))
        with client_of(make_app(cycle_model("ABC"), codec)) as client:
            body = {"prompt": [67, 0xF0, 0x9F, 66, 0x82, 0xE3, 67], "max_tokens": 6, "logprobs": 0, "echo": True}
            choice = complete(client, **body)["choices"][0]
            assert choice["text"] == "C\ufffdあ\ufffdCA\ufffdCA\ufffdC"
            assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 3, 4, *range(5, 11)]
            streamed = events(client.post("/v1/completions", json=body | {"stream": True, "temperature": 0}))
            offsets = [x for chunk in streamed[:-1] for x in chunk["choices"][0]["logprobs"]["text_offset"]]
            assert offsets == choice["logprobs"]["text_offset"]

    def test_tokens_that_are_no_text_have_names(self) -> None:
        model, pieces = cycle_model("ab"), [bytes((value,)) if value > 2 else b"" for value in range(255)]
        with torch.no_grad():
            for rank, token in enumerate((0, 1, 255)):
                model.head.weight[token] = 4.5 - rank
        specials = {0: "<|document|>", 1: "<|im_end|>"}
        codec = Codec(pieces, lambda text, _: list(text.encode()), ends=(0, 1), specials=specials)
        with client_of(make_app(model, codec)) as client:
            scores = complete(client, prompt="a", max_tokens=1, logprobs=5)["choices"][0]["logprobs"]
            assert list(scores["top_logprobs"][0]) == ["b", "a", "<|document|>", "<|im_end|>", "<|255|>"]
            read = complete(client, prompt=[1, 97], max_tokens=0, echo=True, logprobs=1)["choices"][0]
            assert (read["text"], read["logprobs"]["tokens"]) == ("a", ["<|im_end|>", "a"])
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "temperature": 0}
            said = client.post("/v1/chat/completions", json=body | {"logprobs": True, "top_logprobs": 3}).json()
            (entry,) = said["choices"][0]["logprobs"]["content"]
            assert [(top["token"], top["bytes"]) for top in entry["top_logprobs"]][1:] == [
                ("<|document|>", []), ("<|im_end|>", []),
            ]  # fmt: skip


class TestChat:
    def test_shape_and_prompt(self, client: TestClient) -> None:
        messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
        got = client.post("/v1/chat/completions", json=body).json()
        (choice,) = got["choices"]
        assert (got["object"], choice["message"]["role"]) == ("chat.completion", "assistant")
        prompt = "Be kind.\n\nUser:\nHello\n\nAssistant:\n"
        assert choice["message"]["content"] == text_of(client, prompt=prompt, max_tokens=9)
        scored = choice["logprobs"]["content"]
        assert "".join(chr(entry["bytes"][0]) for entry in scored) == choice["message"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in scored)
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        again = client.post(
            "/v1/chat/completions", json=body | {"messages": [messages[0], {"role": "user", "content": parts}]}
        )
        assert again.json()["choices"] == got["choices"]

    def test_streams_a_token_a_chunk(self, client: TestClient) -> None:
        body = {
            "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 7, "seed": 1, "logprobs": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        first, *middle, last, usage, done = events(client.post("/v1/chat/completions", json=body))
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert len(middle) == 7
        assert all(len(chunk["choices"][0]["logprobs"]["content"]) == 1 for chunk in middle)
        assert last["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == []
        assert [chunk["usage"] for chunk in (first, *middle, last)] == [None] * 9
        plain = events(client.post("/v1/chat/completions", json=body | {"stream_options": {"include_usage": False}}))
        assert not any("usage" in chunk for chunk in plain[:-1])
        assert usage["usage"]["completion_tokens"] == 7
        assert done is None
        assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1
        whole = client.post("/v1/chat/completions", json={k: v for k, v in body.items() if "stream" not in k}).json()
        assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == whole["choices"][0]["message"]["content"]
        assert usage["usage"] == whole["usage"]

    def test_several_outputs_stream_side_by_side(self, client: TestClient) -> None:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "seed": 1, "n": 3}
        whole = client.post("/v1/chat/completions", json=body).json()
        *chunks, _ = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
        for index in range(3):
            own = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"][0]["index"] == index]
            assert "".join(own) == whole["choices"][index]["message"]["content"]

    def test_the_plain_template_ends_where_the_user_would_speak(self) -> None:
        model = cycle_model("x\nUser:")
        with torch.no_grad():  # after a newline another, then User:
            model.head.weight[:, ord("x")] = 0
            model.head.weight[ord("\n"), ord("x")] = 10
        with client_of(make_app(model)) as client:
            body = {"messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 20}
            assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["finish_reason"] == "length"


class TestTraces:
    def test_chunks_can_carry_their_tokens_experts(self, client: TestClient) -> None:
        body = {"prompt": "Hello", "temperature": 0, "max_tokens": 5, "stream": True}
        plain = events(client.post("/v1/completions", json=body))
        traced = events(client.post("/v1/completions", json=body | {"trace": {"level": "routes"}}))
        shown = events(client.post("/v1/completions", json=body | {"trace": {"layers": [1], "inline": True}}))
        assert not any("route" in chunk for chunk in (*plain[:-1], *traced[:-1]))
        assert {chunk["trace_id"] for chunk in plain[:-1]} == {None}
        assert traced[0]["trace_id"].startswith("trace-")
        text = byte_codec().encode("".join(chunk["choices"][0]["text"] for chunk in plain[:-1]))
        model, ids = byte_model(), torch.tensor([[0, *b"Hello", *text]])
        with torch.no_grad():
            routing = model(ids, trace=TraceSpec()).trace.layer(1).routing
        routes = [chunk["route"] for chunk in shown[:-1] if "route" in chunk]
        assert len(routes) == 5
        for place, (layer,) in enumerate(routes, start=6):
            assert [expert for expert, _ in layer] == routing.experts[0, place].tolist()
            assert [weight for _, weight in layer] == pytest.approx(routing.weights[0, place].tolist(), abs=1e-3)
        sparse = events(client.post("/v1/completions", json=body | {"trace": {"every": 3, "inline": True}}))
        assert ["route" in chunk for chunk in sparse[1:-2]] == [True, False, False, True, False]  # from position 6 on


class TestRefusals:
    """Nothing is silently ignored, and the field at fault is named."""

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"best_of": 2}, "best_of"), ({"suffix": "x"}, "suffix"), ({"logit_bias": {"5": 1}}, "logit_bias"),
            ({"presence_penalty": 0.5}, "presence_penalty"), ({"temperature": -1}, "temperature"),
            ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"),
            ({"top_k": 0}, "top_k"), ({"n": 0}, "n"), ({"n": 9}, "n"), ({"max_tokens": -1}, "max_tokens"),
            ({"max_tokens": 201}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"logprobs": 21}, "logprobs"),
            ({"seed": 2**63}, "seed"), ({"stop": ["a", "b", "c", "d", "e"]}, "stop"), ({"stop": ""}, "stop"),
            ({"stop": ["a", ""]}, "stop"), ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"),
            ({"prompt": [256]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": ["a", 1]}, "prompt"),
            ({"prompt": "a\0b"}, "prompt"), ({"prompt": ["x"] * 9}, "prompt"), ({"prompt": ["x"] * 5, "n": 2}, "n"),
            ({"prompt": "x" * 9001}, "prompt"), ({"stream": "yes"}, "stream"), ({"trace": {"level": 1}}, "trace.level"),
            ({"trace": {"level": "routes", "layers": [2]}}, "trace.layers.0"), ({"trace": {}, "n": 2}, "trace"),
            ({"session_id": "x"}, "session_id"), ({"session_id": "sess-" + "0" * 32, "n": 2}, None),
            ({"session_id": "sess-" + "0" * 32}, "session_id"), ({"stream_options": {}}, "stream_options"),
            ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
            ({"trace": {"inline": True}}, "trace.inline"),
        ],
    )  # fmt: skip
    def test_completions(self, client: TestClient, fields: dict[str, Any], param: str | None) -> None:
        response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | fields)
        assert response.status_code in (400, 404)
        error = refused(response, response.status_code)
        assert param is None or re.fullmatch(rf"{param}(\.\d+)*", error["param"]), error

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character"),
            ({"stop": ""}, "stop: String should have at least 1 character"),
            ({"stop": 5}, "stop: Input should be a valid string"),
            ({"prompt": ["a", "b\0"]}, "prompt.1: the character U+0000 is no text"),
            ({"prompt": [3, -1]}, "prompt.1: Input should be greater than or equal to 0"),
        ],
    )
    def test_of_a_value_with_several_types_the_fault_is_told(
        self, client: TestClient, fields: dict[str, Any], message: str
    ) -> None:
        error = refused(client.post("/v1/completions", json={"prompt": "x"} | fields), 400)
        assert error["message"].startswith(message)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": []}, "messages"), ({"messages": "x"}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": "a\0"}]}, "messages.0.content"),
            ({"tools": []}, "tools"), ({"top_logprobs": 2}, "top_logprobs"), ({"max_tokens": 0}, "max_tokens"),
            ({"prompt": "x"}, "prompt"), ({"max_completion_tokens": 201, "max_tokens": None}, "max_completion"),
            ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"), ({"logprobs": 2}, "logprobs"),
            ({"max_tokens": 201}, "max_tokens"),
        ],
    )  # fmt: skip
    def test_chats(self, client: TestClient, fields: dict[str, Any], param: str) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | fields
        error = refused(client.post("/v1/chat/completions", json=body), 400)
        assert error["param"].startswith(param), error

    def test_what_has_no_effect_may_be_said(self, client: TestClient) -> None:
        fields = {"presence_penalty": 0, "frequency_penalty": 0.0, "stop": None, "n": 1, "stream": False, "user": "x"}
        assert text_of(client, **fields) == text_of(client)


class TestCrowds:
    def test_a_full_queue_says_when_to_come_back(self) -> None:
        app = make_app(cycle_model("abc"), slots=1, queue=2, max_output_tokens=20_000)
        with client_of(app) as client, listening(app) as address:
            body = {"prompt": "a", "max_tokens": 20_000, "temperature": 0, "stream": True}
            with httpx.stream("POST", f"{address}/v1/completions", json=body) as first:
                reading = first.iter_raw()
                next(reading)
                wait_for(lambda: runtime(app).engine.stats.busy == 1)
                with httpx.stream("POST", f"{address}/v1/completions", json=body) as second:
                    waiting = second.iter_raw()
                    next(waiting)
                    several = client.post("/v1/completions", json={"prompt": "x", "n": 2, "max_tokens": 20_000})
                    refused(several, 429)
                    wait_for(lambda: runtime(app).engine.stats.queued == 1)  # the one that had a place gave it back
                    with httpx.stream("POST", f"{address}/v1/completions", json=body) as third:
                        more = third.iter_raw()
                        next(more)
                        response = client.post("/v1/completions", json={"prompt": "x"})
                        refused(response, 429, code="queue_full")
                        assert int(response.headers["Retry-After"]) >= 1
            wait_for(lambda: runtime(app).engine.stats.busy == runtime(app).engine.stats.queued == 0)
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


@pytest.fixture(scope="module")
def official() -> Iterator[openai.OpenAI]:
    with listening(make_app(cycle_model(ROUND))) as address, httpx.Client() as http:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, http_client=http)


class TestOfficialClient:
    def test_models(self, official: openai.OpenAI) -> None:
        assert [model.id for model in official.models.list()] == ["tiny"]

    def test_completions(self, official: openai.OpenAI) -> None:
        got = official.completions.create(model="tiny", prompt=".", max_tokens=40, temperature=0, stop="gh", logprobs=2)
        assert got.choices[0].text == "abécd☃ef🙂"
        assert got.choices[0].finish_reason == "stop"
        assert got.usage is not None
        assert got.usage.completion_tokens == len("abécd☃ef🙂".encode())
        assert got.choices[0].logprobs is not None
        assert (got.choices[0].logprobs.tokens or [])[:3] == ["a", "b", "bytes:\\xc3"]

    def test_chats(self, official: openai.OpenAI) -> None:
        got = official.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "."}], max_completion_tokens=6, temperature=0, seed=1
        )
        assert got.choices[0].message.content is not None
        assert got.choices[0].finish_reason == "length"

    def test_streams(self, official: openai.OpenAI) -> None:
        stream = official.completions.create(
            model="tiny", prompt=".", max_tokens=40, temperature=0, stop=["☃"], stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abécd"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 6
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert reasons[-1] == "stop"
        deltas = official.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "."}], max_tokens=5, stream=True, logprobs=True
        )
        assert [chunk.choices[0].finish_reason for chunk in deltas][-1] == "length"

    def test_errors(self, official: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            official.completions.create(model="gpt-4", prompt="x")
        assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.BadRequestError) as wrong:
            official.completions.create(model="tiny", prompt="x", best_of=3)
        assert (wrong.value.param, wrong.value.code) == ("best_of", "unknown_parameter")

    def test_the_extensions_go_through_extra_body(self, official: openai.OpenAI) -> None:
        got = official.completions.create(model="tiny", prompt="x", extra_body={"top_k": 1, "repetition_penalty": 1.1})
        assert got.choices[0].text
