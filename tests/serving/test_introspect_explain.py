"""Why and what if: reads split into their sources, interventions checked, their effects against random ones."""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from starlette.testclient import TestClient

from serving.errors import ApiError
from serving.interventions import clear_memory
from serving.introspection import diff, sources
from serving.introspection.diff import divergence
from serving.introspection.interventions import check_layers, parse
from serving.requests import Intervention
from synapse_arch import Controls, MemoryConfig, SynapseModel, SynapseState
from synapse_arch.ops import delta_rule
from tests.serving.servers import byte_model, client_of, make_app, refused
from tests.serving.test_introspect import URL, recomputed, run, session_of

WRITES = MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=2)
PROMPT = "a key opens one lock; another key another lock"


def model() -> SynapseModel:
    return byte_model(memory=WRITES).double()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of(make_app(model(), prefill_chunk=16)) as found:
        yield found


def attribute(client: TestClient, page: dict[str, Any], **body: Any) -> dict[str, Any]:
    answer = client.post(f"{URL}/traces/{page['trace_id']}/attribution", json={"layer": 1, "head": 0} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@torch.no_grad()
def memory_reads(ids: list[int], layer: int, state: SynapseState | None = None) -> torch.Tensor:
    """What a layer's memory answers at every token (T, H, V), by the loop over time."""
    the_model, seen = model(), []
    the_layer: Any = the_model.layers[layer]

    def look(memory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        *inputs, write = memory.signals(*args)
        before = args[1] and args[1].weights
        seen.append(delta_rule(*inputs, before, write=write, backend="reference")[0][0])

    the_layer.memory.register_forward_pre_hook(look, with_kwargs=True)
    the_model(torch.tensor([ids]), state)
    return torch.cat(seen)


def shares(found: dict[str, Any]) -> float:
    listed = sum(source["share"] for source in found["sources"])
    return listed + found["rest"]["share"] + found["residual"]["share"]


@pytest.mark.parametrize(("head", "pos"), [(0, 0), (1, 20), (0, 51)])
def test_sources_and_residual_are_the_read(client: TestClient, head: int, pos: int) -> None:
    page = run(client, prompt=PROMPT, max_tokens=5)
    found = attribute(client, page, head=head, pos=pos, top=1024)
    read = memory_reads([token["id"] for token in page["tokens"]], 1)[pos, head]
    assert found["read_norm"] == pytest.approx(float(read.norm()), rel=1e-9)
    assert shares(found) == pytest.approx(1, rel=1e-9)
    assert found["residual"] == {"share": 0.0, "norm": 0.0}  # it began with an empty memory
    assert sorted(source["pos"] for source in found["sources"]) == list(range(pos + 1))
    assert [len(source["overlaps"]) for source in found["sources"]] == [2] * (pos + 1)
    sizes = [abs(source["share"]) for source in found["sources"]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_read_is_the_traced_one(client: TestClient) -> None:
    """||W^T q|| = read_conf * ||W|| * ||q||, where q is of length 1 but for the epsilon of its norm."""
    page = run(client, prompt=PROMPT, max_tokens=5)
    for pos in (7, 50):
        found = attribute(client, page, pos=pos)
        memory = page["layers"][1]["memory"]
        assert found["read_norm"] == pytest.approx(memory["read_conf"][pos][0] * memory["fro_norm"][pos][0], rel=1e-4)


def test_top_lists_the_largest_and_sums_up_the_rest(client: TestClient) -> None:
    page = run(client, prompt=PROMPT, max_tokens=5)
    whole, some = attribute(client, page, pos=40, top=1024), attribute(client, page, pos=40, top=3)
    assert some["sources"] == whole["sources"][:3]
    assert some["rest"]["share"] == pytest.approx(sum(source["share"] for source in whole["sources"][3:]))
    assert shares(some) == pytest.approx(1)


def test_what_a_session_remembered_is_the_residual(client: TestClient) -> None:
    session = session_of(client, "what was learned before")
    page = run(client, prompt=" shows", max_tokens=3, session_id=session)
    first = page["tokens"][0]["pos"]
    found = attribute(client, page, pos=first, top=1024)
    assert [source["pos"] for source in found["sources"]] == [first]
    assert abs(found["residual"]["share"]) > 0.01
    assert shares(found) == pytest.approx(1)
    refused(
        client.post(f"{URL}/traces/{page['trace_id']}/attribution", json={"layer": 0, "head": 0, "pos": first - 1}),
        400, "pos",
    )  # fmt: skip


def test_older_tokens_than_the_window_are_residual(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run(client, prompt=PROMPT, max_tokens=5)
    whole = attribute(client, page, pos=45, top=1024)
    monkeypatch.setattr(sources, "MOST_SOURCES", 10)
    found = attribute(client, page, pos=45, top=1024)
    assert found["window"] == {"first": 36, "tokens": 10}
    by_pos = {source["pos"]: source["share"] for source in whole["sources"]}
    for source in found["sources"]:
        assert source["share"] == pytest.approx(by_pos[source["pos"]], rel=1e-6)
    assert found["residual"]["share"] == pytest.approx(sum(by_pos[pos] for pos in range(36)), rel=1e-6)
    assert found["read_norm"] == pytest.approx(whole["read_norm"])


def test_a_cleared_memory_has_no_older_sources(client: TestClient) -> None:
    changes = [{"kind": "clear_memory", "layer": 1, "start": 21}, {"kind": "freeze_writes", "layer": 1, "start": 30}]
    page = run(client, prompt=PROMPT, max_tokens=5, interventions=changes)
    found = attribute(client, page, pos=44, top=1024)
    assert found["window"] == {"first": 21, "tokens": 24}
    assert found["residual"] == {"share": 0.0, "norm": 0.0}
    assert {source["pos"] for source in found["sources"] if source["share"]} == set(range(21, 30))
    assert shares(found) == pytest.approx(1)
    memory = page["layers"][1]["memory"]
    assert found["read_norm"] == pytest.approx(memory["read_conf"][44][0] * memory["fro_norm"][44][0], rel=1e-4)


@pytest.mark.parametrize(
    ("body", "param"),
    [({"layer": 2}, "layer"), ({"head": 2}, "head"), ({"pos": 99}, "pos"), ({"pos": -1}, "pos"), ({"top": 0}, "top")],
)
def test_attribution_of_what_is_not_there(client: TestClient, body: dict[str, int], param: str) -> None:
    page = run(client, max_tokens=0)
    asked = {"layer": 0, "head": 0, "pos": 3} | body
    refused(client.post(f"{URL}/traces/{page['trace_id']}/attribution", json=asked), 400, param)


def test_a_model_without_memory_has_no_attribution() -> None:
    with client_of(make_app(byte_model(memory=None))) as client:
        page = run(client, max_tokens=0)
        asked = {"layer": 0, "head": 0, "pos": 3}
        refused(client.post(f"{URL}/traces/{page['trace_id']}/attribution", json=asked), 400, "layer")
        found = client.get(URL).json()["capabilities"]
        assert not found["attribution"]
        assert "freeze_writes" not in found["interventions"]
        refused(client.post(URL, json={"prompt": "a", "interventions": [{"kind": "freeze_writes"}]}), 400)


# Interventions


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({}, "kind"),
        ({"kind": "explode"}, "kind"),
        ({"kind": "ban_expert"}, "expert"),
        ({"kind": "ban_expert", "expert": 4}, "expert"),
        ({"kind": "ban_expert", "expert": -1}, "expert"),
        ({"kind": "ban_expert", "expert": 1.0}, "expert"),
        ({"kind": "ban_expert", "expert": 1, "value": 2.0}, "value"),
        ({"kind": "ban_expert", "expert": 1, "layer": 2}, "layer"),
        ({"kind": "bias_expert", "expert": 1}, "value"),
        ({"kind": "bias_expert", "expert": 1, "value": 1e30}, "value"),
        ({"kind": "scale_memory", "value": None}, "value"),
        ({"kind": "steer", "value": 1.0, "vector": [1.0] * 15}, "vector"),
        ({"kind": "patch", "vector": []}, "vector"),
        ({"kind": "freeze_writes", "start": 5, "end": 5}, "end"),
        ({"kind": "clear_memory", "end": 9}, "end"),
        ({"kind": "freeze_writes", "strength": 1}, "strength"),
    ],
)
def test_an_intervention_that_does_not_fit_is_refused_by_its_field(item: dict[str, Any], field: str) -> None:
    good = {"kind": "freeze_writes"}
    with pytest.raises(ApiError) as refusal:
        parse([good, item], byte_model().config)
    assert (refusal.value.status, refusal.value.param) == (400, f"interventions.1.{field}")


def test_interventions_that_contradict_each_other_or_are_too_many() -> None:
    config = byte_model().config
    ban = [{"kind": "ban_expert", "layer": 0, "expert": expert} for expert in range(3)]
    for items in (ban, [ban[0], {"kind": "force_expert", "expert": 0}], [{"kind": "clear_memory"}] * 17):
        with pytest.raises(ApiError) as refusal:
            parse(items, config)
        assert refusal.value.param == "interventions"
    parsed = parse([{"kind": "steer", "value": 2, "vector": [1.0] * 16, "layer": 1, "start": 3, "end": 9}], config)
    assert parsed == (Intervention(kind="steer", value=2.0, vector=(1.0,) * 16, layer=1, start=3, end=9),)
    with pytest.raises(ApiError, match="there already"):
        check_layers([0, 0], config)


def test_interventions_act_on_a_run_and_are_named_in_its_trace(client: TestClient) -> None:
    page = run(client, interventions=[{"kind": "ban_expert", "layer": 0, "expert": 2}])
    chosen = [expert for token in page["layers"][0]["routing"]["experts"] for expert in token]
    assert 2 not in chosen
    assert page["request"]["interventions"] == ["ban_expert"]
    frozen = run(client, interventions=[{"kind": "freeze_writes", "layer": 1, "start": 10}])
    norms = frozen["layers"][1]["memory"]["fro_norm"]
    assert norms[9:] == [pytest.approx(norms[9], rel=1e-12)] * len(norms[9:])


# Comparisons


def compare(client: TestClient, page: dict[str, Any], *changes: dict[str, Any], **body: Any) -> dict[str, Any]:
    answer = client.post(f"{URL}/traces/{page['trace_id']}/diff", json={"interventions": list(changes)} | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


ENDLESS = [{"kind": "scale_memory", "value": 1e6}] * 8
"""Beyond what float32 holds."""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_what_is_not_finite_is_a_refusal_wherever_it_is_seen(max_tokens: int, stream: bool) -> None:
    what = {"prompt": "hello world", "max_tokens": max_tokens, "stream": stream}
    early, late = ([one | {"start": start} for one in ENDLESS] for start in (4, 14))
    with client_of(make_app()) as client:
        for changes in [early, late][: 1 + bool(max_tokens)]:
            for url, more in (
                ("/v1/completions", {"echo": True, "logprobs": 2}), ("/v1/completions", {"trace": {"level": "gates"}}),
                ("/v1/completions", {}), (URL, {"level": "full"}),
            ):  # fmt: skip
                told = client.post(url, json=what | more | {"interventions": changes})
                if not stream:
                    assert "logits: expected finite values" in refused(told, 400)["message"]
                elif url == URL:
                    last = json.loads(told.text.split("event: done\ndata: ")[1])["request"]
                    assert last["finish"] == "failed"
                    assert "logits: expected finite values" in last["error"]
                else:
                    assert "logits: expected finite values" in told.text.split("data: ")[-1]
        for trace in client.get(URL).json()["traces"]:
            page = client.get(f"{URL}/traces/{trace['trace_id']}").json()
            assert page["request"]["finish"] == trace["finish"] == "failed"
            assert "logits: expected finite values" in page["request"]["error"]
            assert client.get(f"{URL}/traces/{trace['trace_id']}.safetensors").status_code == 200
        if max_tokens:
            assert page["layers"][1]["memory"]["utilisation"] == [None, None]


def test_a_comparison_under_what_overflows_says_so(client: TestClient) -> None:
    page = run(client, prompt=PROMPT, max_tokens=4)
    told = client.post(f"{URL}/traces/{page['trace_id']}/diff", json={"interventions": ENDLESS})
    assert "logits: expected finite values" in refused(told, 400)["message"]


def test_the_divergence_is_that_of_the_predictions_under_the_intervention(client: TestClient) -> None:
    """KL and Jaccard against one plain pass and one with the controls set by hand."""
    page = run(client, prompt=PROMPT, max_tokens=6)
    found = compare(client, page, {"kind": "ban_expert", "layer": 0, "expert": 2})
    ids = torch.tensor([[token["id"] for token in page["tokens"]]])
    controls = Controls.neutral(model().config, 1)
    controls.router_bias[0, 0, 2] = -torch.inf
    with torch.no_grad():
        a, b = (model()(ids, controls=one, trace=diff.TraceSpec()) for one in (None, controls))
        p, q = (out.logits[0, len(ids[0]) - 7 : -1].float().log_softmax(-1) for out in (a, b))
    assert found["kl"] == pytest.approx(
        F.kl_div(q, p, log_target=True, reduction="none").sum(-1).tolist(), rel=1e-4, abs=1e-6
    )
    for layer, entry in enumerate(found["jaccard"]):
        pairs = zip(*(out.trace.layer(layer).routing.experts[0].tolist() for out in (a, b)), strict=True)
        overlaps = [len({*x} & {*y}) / len({*x} | {*y}) for x, y in pairs]
        assert entry == {"layer": layer, "value": pytest.approx(math.fsum(overlaps) / len(overlaps))}
    assert found["a"]["tokens"] == [token["id"] for token in page["tokens"] if token["src"] == "gen"]
    assert found["a"]["text"] == page["text"]


def test_the_other_text_is_what_a_run_under_the_intervention_writes(client: TestClient) -> None:
    page = run(client, prompt=PROMPT, max_tokens=8, sampling={"seed": 11, "temperature": 0.7})
    steer = {"kind": "steer", "layer": 1, "value": 3.0, "vector": [1.0, -1.0] * 8, "start": 10}
    found = compare(client, page, steer)
    other = run(client, prompt=PROMPT, max_tokens=8, sampling={"seed": 11, "temperature": 0.7}, interventions=[steer])
    assert found["b"]["tokens"] == [token["id"] for token in other["tokens"] if token["src"] == "gen"]
    assert found["first_divergence"] == divergence(found["a"]["tokens"], found["b"]["tokens"])
    vectors = [control for control in found["controls"] if control["kind"] == "random_vector"]
    assert [control["kind"] for control in found["controls"]] == ["random_vector"]
    assert vectors[0]["seeds"] == [0, 1, 2]


def test_a_change_that_does_nothing_changes_nothing(client: TestClient) -> None:
    page = run(client, prompt=PROMPT, max_tokens=6)
    found = compare(client, page, {"kind": "scale_memory", "value": 1.0})
    assert found["first_divergence"] is None
    assert found["a"] == found["b"]
    assert found["kl"] == [0.0] * 6
    assert [entry["value"] for entry in found["jaccard"]] == [1.0, 1.0]
    (control,) = found["controls"]  # a direction of length 0
    assert control["kl"] == [0.0] * 6
    assert control["first_divergence"] == [None] * 3


def test_controls_take_other_experts_and_vectors_as_long_as_the_effect(client: TestClient) -> None:
    page = run(client, prompt=PROMPT, max_tokens=6)
    ban = {"kind": "ban_expert", "layer": 0, "expert": 2}
    found = compare(client, page, ban, seeds=4)
    expert, vector = found["controls"]
    assert (expert["kind"], vector["kind"]) == diff.CONTROLS
    for control in (expert, vector):
        assert control["seeds"] == list(range(4))
        assert [len(control[name]) for name in ("kl", "kl_spread", "first_divergence")] == [6, 6, 4]
        assert max(control["kl"]) > 0
        assert max(control["kl_spread"]) > 0
    one = compare(client, page, ban, seeds=1)
    assert one["controls"][0]["kl_spread"] == [None] * 6
    config = model().config
    base = diff.Run((1, 2, 3), None)
    draws = diff._draws("random_expert", base, parse([ban], config), [], config, 8)
    assert {draw[0].expert for draw in draws} <= {0, 1, 3}
    assert len({draw[0].expert for draw in draws}) > 1
    (steer,) = diff._draws("random_vector", base, parse([ban], config), [2.5, 0.0], config, 1)[0]
    assert (steer.kind, steer.layer, steer.value) == ("steer", 0, 2.5)
    assert math.hypot(*(steer.vector or ())) == pytest.approx(1, rel=1e-5)


def test_the_effect_is_measured_where_the_intervention_acts(client: TestClient) -> None:
    """A steering vector's effect behind its layer is its own length, from its first token on."""
    vector = tuple([3.0, 4.0] + [0.0] * 14)
    base = diff.Run(tuple(range(1, 40)), None)
    change = [Intervention(kind="steer", layer=1, value=2.0, vector=vector, start=17)]
    the_runtime = client.app.state.runtime  # type: ignore[attr-defined]
    (found,) = asyncio.run(diff._changes(the_runtime, base, [change], 30))
    assert found.effect == pytest.approx([0.0, 10.0], rel=1e-6)
    assert len(found.kl) == 9


def test_a_comparison_needs_no_more_places_than_the_server_has() -> None:
    with client_of(make_app(slots=1, queue=0)) as small:
        page = run(small, prompt=PROMPT, max_tokens=3)
        found = compare(small, page, {"kind": "ban_expert", "layer": 0, "expert": 2}, seeds=4)
        assert [len(control["first_divergence"]) for control in found["controls"]] == [4, 4]


def test_a_comparison_leaves_the_session_as_it_is(client: TestClient) -> None:
    session = session_of(client, "as it was")
    known = client.get(f"/api/sessions/{session}").json()
    page = run(client, prompt=" is", max_tokens=4, session_id=session)
    compare(client, page, {"kind": "clear_memory"})
    attribute(client, page, pos=page["tokens"][0]["pos"])
    after = client.get(f"/api/sessions/{session}").json()
    assert (after["version"], after["tokens"]) == (known["version"], known["tokens"])


def test_comparisons_that_cannot_be(client: TestClient) -> None:
    url = f"{URL}/traces/{run(client, max_tokens=0)['trace_id']}/diff"
    freeze = {"kind": "freeze_writes"}
    refused(client.post(url, json={"interventions": [freeze]}), 400, "max_tokens")
    refused(client.post(url, json={"interventions": []}), 400, "interventions")
    refused(client.post(url, json={"interventions": [freeze], "seeds": 9}), 400, "seeds")
    refused(client.post(url, json={"interventions": [{"kind": "patch"}]}), 400, "interventions.0.vector")
    banned = run(client, interventions=[{"kind": "ban_expert", "layer": 0, "expert": 2}])
    url = f"{URL}/traces/{banned['trace_id']}/diff"
    refused(client.post(url, json={"interventions": [{"kind": "force_expert", "expert": 2}]}), 400, "interventions")


def test_clearing_and_forking_change_no_given_state() -> None:
    the_model = byte_model()
    with torch.no_grad():
        state = the_model(torch.tensor([[1, 2, 3]])).state
    before = {name: x.clone() for name, x in state.to_tensors().items()}
    clear_memory(state, 0, [None])
    assert all(torch.equal(x, before[name]) for name, x in state.to_tensors().items())


# Pathways


def test_pathways_are_what_consolidation_would_write(client: TestClient) -> None:
    session = session_of(client, PROMPT)
    found = client.get(f"{URL}/pathways", params={"session_id": session}).json()
    state = client.app.state.runtime.sessions.load(session, "anonymous").state  # type: ignore[attr-defined]
    the_model = model()
    the_model.consolidate(state)
    for index, layer in enumerate(found["layers"]):
        the_layer: Any = the_model.layers[index]
        want = the_layer.thalamus.pathways.double()
        torch.testing.assert_close(torch.tensor(layer["pathways"], dtype=torch.float64), want, rtol=1e-6, atol=1e-7)
        assert layer["i"] == index
    assert found["tokens"] == int(state.position)
    empty = client.post("/api/sessions", json={}).json()["id"]
    refused(client.get(f"{URL}/pathways", params={"session_id": empty}), 400, "session_id")
    refused(client.get(f"{URL}/pathways", params={"session_id": "sess-" + "0" * 32}), 404, "session_id")


def test_imported_pathways_act_like_consolidated_ones(client: TestClient) -> None:
    found = client.get(f"{URL}/pathways", params={"session_id": session_of(client, PROMPT)}).json()
    imported = client.put(f"{URL}/pathways", json=found | {"scale": 30.0})
    assert imported.status_code == 200, imported.text
    page = run(client, prompt=PROMPT, max_tokens=6, interventions=imported.json()["interventions"])
    wired = model()
    for layer, one in zip(found["layers"], wired.layers, strict=True):
        thalamus: Any = one.thalamus
        thalamus.pathways.copy_(30 * torch.tensor(layer["pathways"]))
    ids = [token["id"] for token in page["tokens"]]
    want = recomputed(ids, wired)
    plain = recomputed(ids, model())
    for layer, one, other in zip(page["layers"], want.layers, plain.layers, strict=True):
        assert one.routing is not None
        assert other.routing is not None
        assert layer["routing"]["experts"] == one.routing.experts[0].tolist() != other.routing.experts[0].tolist()
    again = run(client, prompt=PROMPT, max_tokens=6)
    kept = recomputed([token["id"] for token in again["tokens"]], model()).layers[0].routing
    assert kept is not None
    assert again["layers"][0]["routing"]["experts"] == kept.experts[0].tolist()


def test_a_models_own_pathways_are_no_body_too_large() -> None:
    with client_of(make_app(max_body=500)) as client:
        found = client.get(f"{URL}/pathways", params={"session_id": session_of(client, PROMPT)})
        assert len(found.content) > 500
        imported = client.put(f"{URL}/pathways", json=found.json())
        assert imported.status_code == 200, imported.text
        run(client, prompt=PROMPT, max_tokens=1, interventions=imported.json()["interventions"])
        refused(client.put(f"{URL}/pathways", json=found.json() | {"x": "x" * 3000}), 413, code="body_too_large")


def test_pathways_of_another_kind_are_refused(client: TestClient) -> None:
    good = client.get(f"{URL}/pathways", params={"session_id": session_of(client, "abc")}).json()
    first = good["layers"][0]
    for change, param in (
        ({"scale": 1000.0, "layers": [first | {"pathways": [[2e3] * 4] * 4}]}, "scale"),
        ({"schema": "synapse.pathways/2"}, "schema"),
        ({"weights_sha256": "0" * 64}, "weights_sha256"),
        ({"n_experts": 5}, "n_experts"),
        ({"layers": [first, first]}, "layers.1.i"),
        ({"layers": [first | {"i": 2}]}, "layers.0.i"),
        ({"layers": [first | {"pathways": [[0.0] * 4] * 3}]}, "layers.0.pathways"),
        ({"layers": [first | {"pathways": [[0.0] * 3] * 4}]}, "layers.0.pathways"),
        ({"layers": []}, "layers"),
        ({"strength": 2}, "strength"),
    ):
        refused(client.put(f"{URL}/pathways", json=good | change), 400, param)
    assert client.put(f"{URL}/pathways", json=good | {"weights_sha256": None}).status_code == 200
