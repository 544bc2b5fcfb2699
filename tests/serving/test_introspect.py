"""/api/introspect in an application: its numbers are the core's, its layout the published one, its pages bounded."""

import base64
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load
from starlette.testclient import TestClient

from serving.introspection.schema import TRACE
from synapse_arch import Controls, ExpertsConfig, SynapseModel, TraceSpec
from synapse_arch.introspection import SynapseTrace
from synapse_arch.model import accounting
from tests.helpers import assert_equal
from tests.serving.servers import byte_model, client_of, make_app, refused

URL = "/api/introspect"
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
PER_TOKEN = {
    "routing": ("experts", "weights", "entropy", "margin", "p1", "p2", "logits"),
    "gates": ("log_i", "log_f", "o_mean", "C_norm", "age_tokens", "half_life"),
    "memory": ("write", "decay", "collision", "read_conf", "fro_norm"),
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(make_app(byte_model().double())) as found:
        yield found


def run(client: TestClient, **body: Any) -> dict[str, Any]:
    asked = {"prompt": "the cat sat on the mat", "max_tokens": 9, "level": "full", "sampling": {"seed": 3}} | body
    answer = client.post(URL, json={key: value for key, value in asked.items() if value is not None})
    assert answer.status_code == 200, answer.text
    jsonschema.validate(answer.json(), TRACE)
    found: dict[str, Any] = answer.json()
    return found


def session_of(client: TestClient, prompt: str) -> str:
    made: str = client.post("/api/sessions", json={}).json()["id"]
    told = client.post("/v1/completions", json={"prompt": prompt, "session_id": made, "max_tokens": 2, "seed": 1})
    assert told.status_code == 200, told.text
    return made


@torch.no_grad()
def recomputed(ids: list[int], model: SynapseModel | None = None) -> SynapseTrace:
    """The core's trace of all the tokens in one pass, on a model of the same seed."""
    model = byte_model().double() if model is None else model
    trace = model(torch.tensor([ids]), trace=TraceSpec(level="full", max_tokens=4096)).trace
    assert trace is not None
    return trace


def close(got: Any, want: torch.Tensor) -> None:
    """JSON against a tensor: null where it is undefined or infinite."""

    def number(x: Any) -> Any:
        return [number(one) for one in x] if isinstance(x, list) else math.nan if x is None else x

    want = want.double()
    wanted = torch.where(want.isfinite(), want, torch.nan)
    torch.testing.assert_close(torch.tensor(number(got), dtype=torch.float64), wanted, equal_nan=True, **CLOSE)


def test_every_number_is_the_one_that_the_core_gives_for_the_same_tokens(client: TestClient) -> None:
    page = run(client)
    ids = [token["id"] for token in page["tokens"]]
    trace = recomputed(ids)
    assert [token["pos"] for token in page["tokens"]] == list(range(len(ids)))
    for got, want in zip(page["layers"], trace.layers, strict=True):
        for name, columns in PER_TOKEN.items():
            part = got["mlstm" if name == "gates" else name]
            for column in columns:
                close(part[column], getattr(getattr(want, name), column)[0])
        assert want.routing is not None
        assert want.memory is not None
        close(got["routing"]["balance"], want.routing.balance[0])
        close(got["routing"]["utilisation"], want.routing.utilisation[0])
        close(got["memory"]["utilisation"], want.memory.utilisation[0])
        assert got["memory"]["capacity"] == want.memory.capacity
        assert got["memory"]["writes"] == got["memory"]["reads"] == len(ids)
    stats = [stat.to_dict() for layer in trace.layers for stat in trace.expert_stats(layer.index)]
    assert [one.keys() for one in page["experts"]] == [one.keys() for one in stats]
    for got, want in zip(page["experts"], stats, strict=True):
        assert got == {key: pytest.approx(x, rel=1e-9) if isinstance(x, float) else x for key, x in want.items()}
    for got, want in zip(page["pathways"], trace.pathways(32), strict=True):
        assert (got["from"], got["to"]) == (list(want.source), list(want.target))
        assert (got["weight"], got["hebbian"]) == pytest.approx((want.weight, want.hebbian), rel=1e-6)


def test_tokens_are_what_was_read_and_thought(client: TestClient) -> None:
    page = run(client)
    tokens = page["tokens"]
    ids = torch.tensor([[token["id"] for token in tokens]])
    said = b"".join(base64.b64decode(token["bytes_b64"]) for token in tokens)
    assert said.decode(errors="replace") == "the cat sat on the mat" + page["text"]
    assert [token["src"] for token in tokens] == ["prompt"] * 23 + ["gen"] * 9
    assert page["request"] | {"seed": 3, "finish": "length", "output_tokens": 9} == page["request"]
    with torch.no_grad():
        logprobs = byte_model().double()(ids).logits.float().log_softmax(-1)[0]
    assert tokens[0]["logprob"] is None
    for before, token in zip(logprobs[:-1], tokens[1:], strict=True):
        assert token["logprob"] == pytest.approx(float(before[token["id"]]), abs=1e-5)
        assert token["entropy"] == pytest.approx(float(torch.special.entr(before.exp()).sum()), abs=1e-5)


def test_the_model_is_described_by_what_it_is(client: TestClient) -> None:
    model, found = byte_model(), client.get(URL).json()
    card = found["model"]
    assert (
        card["params"]["total"]
        == sum(x.numel() for x in model.parameters())
        == sum(card["params"]["by_module"].values())
    )
    assert card["params"]["active_per_token"] == accounting.active_parameters(model)
    assert card["state_bytes_per_session"] == model.init_state(1).nbytes
    assert found["config"] == model.config.to_dict()
    assert len(card["weights_sha256"]) == 64
    assert run(client)["model"] == card
    assert client.get(URL + "/schema").json() == TRACE
    jsonschema.Draft202012Validator.check_schema(TRACE)


def test_aggregates_count_the_callers_traces(client: TestClient) -> None:
    before = client.get(URL).json()["aggregates"]
    page = run(client)
    after = client.get(URL).json()["aggregates"]
    assert after["traces"] == before["traces"] + 1
    assert after["tokens"] == before["tokens"] + len(page["tokens"])
    for layer in after["layers"]:
        assert sum(layer["load"]) == pytest.approx(1)


@pytest.mark.parametrize("level", ["routes", "gates", "full"])
def test_levels_leave_out_what_was_not_asked_for(client: TestClient, level: str) -> None:
    page = run(client, level=level, layers=[1])
    (layer,) = page["layers"]
    assert layer["i"] == 1
    assert (layer["mlstm"] is None) == (layer["memory"] is None) == (level == "routes")
    assert ("logits" in layer["routing"]) == (level == "full")
    assert {expert["layer"] for expert in page["experts"]} == {1}
    assert (page["experts"][0]["out_norm"] is None) == (level != "full")


@pytest.mark.parametrize("level", ["routes", "gates", "full"])
def test_tracing_changes_no_token_and_no_logprob(client: TestClient, level: str) -> None:
    body = {"prompt": "abc", "max_tokens": 12, "seed": 5, "logprobs": 3}
    plain = client.post("/v1/completions", json=body).json()
    traced = client.post("/v1/completions", json=body | {"trace": {"level": level}}).json()
    assert plain["choices"] == traced["choices"]
    assert plain["trace_id"] is None
    page = client.get(f"{URL}/traces/{traced['trace_id']}").json()
    jsonschema.validate(page, TRACE)
    told = [token["logprob"] for token in page["tokens"] if token["src"] == "gen"]
    assert told == plain["choices"][0]["logprobs"]["token_logprobs"]


def test_a_trace_is_the_same_alone_and_in_a_crowd(client: TestClient) -> None:
    alone = run(client)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(run, client, prompt=f"noise {n}", level="routes", max_tokens=30) for n in range(3)]
        crowded = pool.submit(run, client).result()
        for other in others:
            other.result()
    assert [crowded[key] for key in ("tokens", "layers", "experts", "pathways")] == [
        alone[key] for key in ("tokens", "layers", "experts", "pathways")
    ]


def test_pages_join_to_the_whole(client: TestClient) -> None:
    whole = run(client)
    url, start, joined, pages = f"{URL}/traces/{whole['trace_id']}", 0, [], 0
    while start is not None:
        page = client.get(url, params={"from": start, "limit": 7}).json()
        jsonschema.validate(page, TRACE)
        joined += page["tokens"]
        column = [layer["memory"]["write"] for layer in page["layers"]]
        first = page["tokens"][0]["pos"]
        for values, layer in zip(column, whole["layers"], strict=True):
            assert values == layer["memory"]["write"][first : first + len(page["tokens"])]
        start, pages = page["next"], pages + 1
    assert joined == whole["tokens"]
    assert pages == math.ceil(len(joined) / 7)


def test_fields_and_layers_narrow_a_page(client: TestClient) -> None:
    url = f"{URL}/traces/{run(client)['trace_id']}"
    page = client.get(url, params={"fields": "routing,experts", "layers": "0"}).json()
    jsonschema.validate(page, TRACE)
    assert "tokens" not in page
    assert "pathways" not in page
    (layer,) = page["layers"]
    assert set(layer) == {"i", "routing"}
    assert {expert["layer"] for expert in page["experts"]} == {0}
    refused(client.get(url, params={"fields": "rooting"}), 400, "fields")
    refused(client.get(url, params={"layers": "0,2"}), 400, "layers.1")
    refused(client.get(url, params={"layers": "one"}), 400, "layers")
    refused(client.get(url, params={"from": -1}), 400, "from")
    refused(client.get(url, params={"limit": 0}), 400, "limit")


def test_the_ring_keeps_the_last_tokens_and_says_so() -> None:
    with client_of(make_app(trace_tokens=40)) as client:
        page = run(client, max_tokens=60, level="routes", layers=[0], sampling={"temperature": 0})
        assert page["truncated"] == {"tokens": True, "dropped": 43}
        assert [token["pos"] for token in page["tokens"]] == list(range(43, 83))
        last = client.get(f"{URL}/traces/{page['trace_id']}", params={"from": 70}).json()
        assert [token["pos"] for token in last["tokens"]] == list(range(70, 83))
        assert last["next"] is None
        assert sum(expert["tokens"] for expert in last["experts"]) == 2 * 83


def test_a_stride_keeps_every_nth_token_and_drops_none(client: TestClient) -> None:
    page = run(client, every=4)
    assert [token["pos"] for token in page["tokens"]] == list(range(0, 32, 4))
    assert page["truncated"] == {"tokens": False, "dropped": 0}
    whole = run(client)
    for got, want in zip(page["layers"], whole["layers"], strict=True):
        assert got["routing"]["experts"] == want["routing"]["experts"][::4]
        close(got["memory"]["fro_norm"], torch.tensor(want["memory"]["fro_norm"][::4], dtype=torch.float64))


@pytest.mark.parametrize("every", [4, 50])
def test_what_is_said_of_the_whole_covers_every_token_whatever_the_stride(client: TestClient, every: int) -> None:
    got, want = run(client, every=every), run(client)
    assert [token["pos"] for token in got["tokens"]] == list(range(0, 32, every))
    for mine, theirs in zip(got["layers"], want["layers"], strict=True):
        assert mine["memory"]["reads"] == mine["memory"]["writes"] == 32
        for part, names in (("memory", ("utilisation", "reads", "writes")), ("routing", ("balance", "utilisation"))):
            assert [mine[part][name] for name in names] == [theirs[part][name] for name in names]
    for name in ("tokens", "load", "out_norm", "sparsity"):
        assert [one[name] for one in got["experts"]] == pytest.approx([one[name] for one in want["experts"]])
    within = [[p["hebbian"] for p in page["pathways"] if p["from"][0] == p["to"][0]] for page in (got, want)]
    assert within[0] == within[1]


def test_a_page_stays_below_a_mebibyte() -> None:
    """500 tokens at full level of 64 experts are several pages."""
    with client_of(make_app(byte_model(experts=ExpertsConfig(n_experts=64, d_expert=2)))) as client:
        page = run(client, prompt="x" * 500, max_tokens=0)
        url, seen = f"{URL}/traces/{page['trace_id']}", 0
        start: int | None = 0
        while start is not None:
            answer = client.get(url, params={"from": start, "limit": 1024})
            assert len(answer.content) <= 2**20
            seen += len(answer.json()["tokens"])
            start = answer.json()["next"]
        assert seen == 501


def test_the_file_holds_what_the_pages_show(client: TestClient) -> None:
    page = run(client)
    answer = client.get(f"{URL}/traces/{page['trace_id']}.safetensors")
    assert answer.headers["content-disposition"].endswith(f'"{page["trace_id"]}.safetensors"')
    tensors = load(answer.content)
    assert tensors["tokens.id"].tolist() == [token["id"] for token in page["tokens"]]
    for layer in page["layers"]:
        for name in ("routing", "mlstm", "memory"):
            for column, values in layer[name].items():
                if isinstance(values, list) and column not in ("C_norm", "half_life", "utilisation"):
                    close(values, tensors[f"layers.{layer['i']}.{name}.{column}"])


def test_a_run_forks_its_session_and_leaves_it_as_it_is(client: TestClient) -> None:
    session = session_of(client, "secrets of the past")
    before = load(client.get(f"/api/sessions/{session}/export").content)
    known = client.get(f"/api/sessions/{session}").json()
    first = run(client, session_id=session, prompt=" and more")
    again = run(client, session_id=session, prompt=" and more")
    assert first["session_id"] == session
    assert first["tokens"] == again["tokens"]
    assert first["tokens"][0]["pos"] == first["request"]["first"] == known["tokens"] > 0
    after = client.get(f"/api/sessions/{session}").json()
    assert (after["version"], after["tokens"]) == (known["version"], known["tokens"])
    assert_equal(load(client.get(f"/api/sessions/{session}/export").content), before)
    fresh = run(client, prompt=" and more")
    assert fresh["tokens"][0]["pos"] == 0


@pytest.mark.parametrize("how", ["fresh", "forked", "imported", "used"])
def test_a_run_reads_its_prompt_as_a_completion_does(client: TestClient, how: str) -> None:
    session: str = client.post("/api/sessions", json={}).json()["id"]
    if how == "forked":
        told = session_of(client, "the dog")
        session = client.post(f"/api/sessions/{told}/fork", json={"memory_only": True}).json()["id"]
    elif how == "imported":
        data = client.get(f"/api/sessions/{session}/export").content
        kind = {"Content-Type": "application/octet-stream"}
        session = client.post("/api/sessions/import", content=data, headers=kind).json()["id"]
    elif how == "used":
        session = session_of(client, "the dog")
    page = run(client, session_id=session, max_tokens=4, sampling={"temperature": 0})
    body = {"prompt": "the cat sat on the mat", "session_id": session, "max_tokens": 4, "temperature": 0, "trace": {}}
    told = client.post("/v1/completions", json=body).json()
    other = client.get(f"{URL}/traces/{told['trace_id']}").json()
    assert [token["id"] for token in page["tokens"]] == [token["id"] for token in other["tokens"]]
    assert page["text"] == told["choices"][0]["text"]
    assert (page["tokens"][0]["id"] == 0) == (how != "used")


def test_the_longest_prompt_is_as_long_as_a_completions() -> None:
    with client_of(make_app(max_prompt_tokens=8)) as client:
        for url in (URL, "/v1/completions"):
            assert client.post(url, json={"prompt": "a" * 8, "max_tokens": 1}).status_code == 200
            refused(client.post(url, json={"prompt": "a" * 9, "max_tokens": 1}), 400, "prompt")
        refused(client.post(URL, json={"tokens": [7] * 9, "max_tokens": 1}), 400, "tokens")


def test_a_stop_at_the_end_of_a_document(client: TestClient) -> None:
    page = run(client, tokens=[5, 6, 7], prompt=None, max_tokens=0)
    assert [token["id"] for token in page["tokens"]] == [5, 6, 7]
    assert page["text"] == ""
    assert page["timing"]["ttft_ms"] is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"prompt": "a", "tokens": [1]}, None),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, 256]}, "tokens.1"),
        ({"tokens": [1, -1]}, "tokens.1"),
        ({"prompt": "a", "level": "deep"}, "level"),
        ({"prompt": "a", "layers": [0, 2]}, "layers.1"),
        ({"prompt": "a", "layers": [1, 1]}, "layers.1"),
        ({"prompt": "a", "every": 0}, "every"),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "sampling": {"temperature": 3}}, "sampling.temperature"),
        ({"prompt": "a", "sampling": {"heat": 1}}, "sampling.heat"),
        ({"prompt": "a", "depth": 1}, "depth"),
        ({"prompt": "a\u0000"}, "prompt"),
        ({"prompt": "a", "session_id": "sess-" + "0" * 32}, "session_id"),
        ({"prompt": "a", "interventions": [{"kind": "ban_expert", "expert": 9}]}, "interventions.0.expert"),
    ],
)
def test_what_is_refused_names_the_field(client: TestClient, body: dict[str, Any], param: str | None) -> None:
    refused(client.post(URL, json=body), 404 if param == "session_id" else 400, param)


def test_a_trace_is_its_owners() -> None:
    keys = ("k" * 20, "q" * 20)
    app = make_app(api_keys=keys)
    with client_of(app, keys[0]) as client:
        trace = f"{URL}/traces/{run(client)['trace_id']}"
        other = {"Authorization": f"Bearer {keys[1]}"}
        for method, path, body in (
            ("GET", trace, None), ("GET", trace + "/events", None), ("GET", trace + ".safetensors", None),
            ("POST", trace + "/attribution", {"layer": 0, "head": 0, "pos": 1}),
            ("POST", trace + "/diff", {"interventions": [{"kind": "freeze_writes"}]}), ("DELETE", trace, None),
        ):  # fmt: skip
            refused(client.request(method, path, json=body, headers=other), 404, "trace_id", "trace_not_found")
            assert client.request(method, path, json=body, headers={"Authorization": ""}).status_code == 401
        assert client.get(URL, headers=other).json()["traces"] == []
        assert client.get(URL).json()["traces"][0]["trace_id"] in trace
        assert client.delete(trace).status_code == 204
        refused(client.get(trace), 404)


@pytest.mark.parametrize("level", ["routes", "gates", "full"])
def test_a_traced_step_never_looks_at_a_value(level: str) -> None:
    """On meta tensors `.item()`, `.tolist()`, `nonzero` and `if tensor` raise."""
    model = byte_model(experts=ExpertsConfig(n_experts=4, d_expert=8)).to("meta", torch.bfloat16)
    ids, mask = torch.zeros(3, 1, dtype=torch.long, device="meta"), torch.ones(3, 1, dtype=torch.bool, device="meta")
    state = model.init_state(3)
    for _ in range(2):
        with torch.no_grad():
            controls = Controls.neutral(model.config, 3, device="meta")
            out = model(ids, state, mask=mask, trace=TraceSpec(level=level), controls=controls)
        state = out.state
    assert out.trace is not None
    assert json.dumps([layer.index for layer in out.trace.layers]) == "[0, 1]"
