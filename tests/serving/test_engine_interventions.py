"""Interventions: in force at their positions and nowhere else, in the prompt and in the output alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from serving.requests import Intervention, PromptRead, Token
from synapse_arch import ConfigError, Controls, SynapseModel, SynapseState, TraceSpec
from synapse_arch.introspection import SynapseTrace
from tests.helpers import assert_same
from tests.model.small import small_model
from tests.serving.engines import PATIENCE, ask, assert_same_bits, engine_of, one, outcome

PROMPT = (1, 2, 3, 4, 5, 6)
VECTOR = tuple(0.1 * number for number in range(16))


@pytest.fixture(scope="module")
def model() -> SynapseModel:
    torch.manual_seed(0)
    return small_model()


def acting(kind: Any, **options: Any) -> Intervention:
    return Intervention(kind=kind, **options)


def replay(model: SynapseModel, ids: list[int], changes: list[tuple[int, Controls | None]]) -> SynapseState:
    """Reads ids token by token; from each given position on the given controls hold."""
    state = model.init_state(1)
    current: Controls | None = None
    for position, token in enumerate(ids):
        current = dict(changes).get(position, current) if position in dict(changes) else current
        with torch.no_grad():
            state = model(torch.tensor([[token]]), state, controls=current).state
    return state


def some(model: SynapseModel, **values: Any) -> Controls:
    controls = Controls.neutral(model.config, 1)
    for name, value in values.items():
        getattr(controls, name)[:, 1] = torch.as_tensor(value)
    return controls


KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "force_expert", "expert": 2}, {"router_bias": [0.0, 0.0, torch.inf, 0.0]}),
    ({"kind": "ban_expert", "expert": 0}, {"router_bias": [-torch.inf, 0.0, 0.0, 0.0]}),
    ({"kind": "bias_expert", "expert": 3, "value": 1.5}, {"router_bias": [0.0, 0.0, 0.0, 1.5]}),
    ({"kind": "scale_memory", "value": -0.5}, {"memory_read": -0.5}),
    ({"kind": "freeze_writes"}, {"memory_write": 0.0}),
    ({"kind": "steer", "value": 2.0, "vector": VECTOR}, {"steer": [2.0 * x for x in VECTOR]}),
    ({"kind": "patch", "vector": VECTOR}, {"patch": VECTOR, "patch_on": True}),
]


@pytest.mark.parametrize(("options", "values"), KINDS, ids=[options["kind"] for options, _ in KINDS])
@pytest.mark.parametrize("span", [(0, None), (2, 5), (4, 8), (7, 9)])
def test_every_kind_acts_at_its_positions_only(
    model: SynapseModel, options: dict[str, Any], values: dict[str, Any], span: tuple[int, int | None]
) -> None:
    start, end = span
    change = acting(layer=1, start=start, end=end, **options)
    found = one(model, ask(PROMPT, max_tokens=5, interventions=(change,)), prefill_chunk=3)
    ends = [(end, None)] if end is not None else []
    expected = replay(model, [*PROMPT, *found.tokens], [(start, some(model, **values)), *ends])
    assert_same(found.state.to_tensors(), expected.to_tensors())


@pytest.mark.parametrize("start", [0, 3, 8])
def test_memory_is_cleared_once_in_front_of_a_position(model: SynapseModel, start: int) -> None:
    change = acting("clear_memory", layer=0, start=start)
    found = one(model, ask(PROMPT, max_tokens=4, interventions=(change,)))
    ids, state = [*PROMPT, *found.tokens], model.init_state(1)
    for position, token in enumerate(ids):
        if position == start:
            state.layers[0].memory.weights.zero_()
        with torch.no_grad():
            state = model(torch.tensor([[token]]), state).state
    assert_same(found.state.to_tensors(), state.to_tensors())


def test_positions_count_from_the_beginning_of_the_state(model: SynapseModel) -> None:
    first = one(model, ask(PROMPT, max_tokens=2))
    change = acting("freeze_writes", start=0)
    second = one(model, ask([7, 8], max_tokens=2, state=first.state, interventions=(change,)))
    for before, after in zip(first.state.layers, second.state.layers, strict=True):
        assert torch.equal(before.memory.weights, after.memory.weights)
    cleared = one(model, ask([7], max_tokens=0, state=first.state, interventions=(acting("clear_memory"),)))
    wiped = first.state.clone()
    for layer in wiped.layers:
        layer.memory.weights.zero_()
    with torch.no_grad():
        assert_same(cleared.state.to_tensors(), model(torch.tensor([[7]]), wiped).state.to_tensors())
    late = acting("freeze_writes", start=50)
    assert one(model, ask([7, 8], max_tokens=2, state=first.state, interventions=(late,))).tokens


def test_the_trace_shows_the_forced_expert(model: SynapseModel) -> None:
    change = acting("force_expert", layer=0, expert=1, start=2, end=8)
    with engine_of(model, prefill_chunk=4) as engine:
        request = ask(PROMPT, max_tokens=5, interventions=(change,), trace=TraceSpec())
        events = list(engine.submit(request).wait(PATIENCE))
    visited: dict[int, bool] = {}
    plain: list[SynapseTrace] = [
        event.trace.get() for event in events if isinstance(event, PromptRead | Token) and event.trace is not None
    ]
    for trace in plain:
        routing = trace.layers[0].routing
        assert routing is not None
        for place, experts in zip(trace.at[0].tolist(), routing.experts[0].tolist(), strict=True):
            visited[place] = 1 in experts
    assert list(visited) == list(range(11))
    assert all(visited[place] for place in range(2, 8))


def test_neighbours_do_not_notice(model: SynapseModel) -> None:
    plain = ask(PROMPT, max_tokens=9, trace=TraceSpec(level="full"))
    changes = (
        acting("steer", value=5.0, vector=VECTOR, start=7),
        acting("clear_memory", start=8),
        acting("ban_expert", expert=0, layer=1),
        acting("patch", vector=VECTOR, layer=0, start=9, end=10),
    )
    expected, alone = one(model, plain), one(model, ask(PROMPT, max_tokens=9, interventions=changes))
    with engine_of(model, slots=4) as engine:
        tickets = [engine.submit(plain), engine.submit(ask(PROMPT, max_tokens=9, interventions=changes))]
        tickets += [engine.submit(plain), engine.submit(ask(PROMPT, max_tokens=9, interventions=changes))]
        found = [outcome(ticket) for ticket in tickets]
        again = outcome(engine.submit(plain))
    for got in (found[0], found[2], again):
        assert_same_bits(got, expected)
    assert_same_bits(found[1], alone)
    assert_same_bits(found[3], alone)


def test_several_act_together(model: SynapseModel) -> None:
    changes = (
        acting("scale_memory", value=0.5, layer=1), acting("scale_memory", value=0.5),
        acting("steer", value=1.0, vector=VECTOR, layer=1), acting("steer", value=2.0, vector=VECTOR, layer=1),
    )  # fmt: skip
    found = one(model, ask(PROMPT, max_tokens=2, interventions=changes))
    controls = some(model, memory_read=0.25, steer=[3.0 * x for x in VECTOR])
    controls.memory_read[:, 0] = 0.5
    expected = replay(model, [*PROMPT, *found.tokens], [(0, controls)])
    assert_same(found.state.to_tensors(), expected.to_tensors())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "boost"}, "intervention.kind: expected one of"),
        ({"kind": "force_expert"}, "force_expert.expert: expected a value"),
        ({"kind": "freeze_writes", "value": 1.0}, "freeze_writes.value: expected none"),
        ({"kind": "steer", "vector": (1.0,)}, "steer.value: expected a value"),
        ({"kind": "steer", "value": 1.0, "vector": (float("nan"),)}, "steer: expected finite numbers"),
        ({"kind": "scale_memory", "value": float("inf")}, "scale_memory: expected finite"),
        ({"kind": "ban_expert", "expert": -1}, "ban_expert.expert: expected an integer of 0"),
        ({"kind": "ban_expert", "expert": True}, "ban_expert.expert: expected an integer of 0"),
        ({"kind": "freeze_writes", "start": 3, "end": 3}, "freeze_writes.end: expected above start=3"),
        ({"kind": "clear_memory", "end": 4}, "clear_memory.end: expected none"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Intervention(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"kind": "force_expert", "expert": 4}], "force_expert.expert: expected 0 to 3"),
        ([{"kind": "freeze_writes", "layer": 2}], "freeze_writes.layer: expected 0 to 1"),
        ([{"kind": "patch", "vector": (1.0,)}], "patch.vector: expected 16 numbers"),
        ([{"kind": "ban_expert", "expert": e, "start": e} for e in range(3)], "experts left a layer, got 1"),
        ([{"kind": "force_expert", "expert": e} for e in range(3)], "experts forced, got 3"),
        ([{"kind": "force_expert", "expert": 1}, {"kind": "ban_expert", "expert": 1}], "the same expert for both"),
    ],
)
def test_what_the_model_cannot_do(model: SynapseModel, changes: list[dict[str, Any]], message: str) -> None:
    with engine_of(model) as engine, pytest.raises(ConfigError, match=message):
        engine.submit(ask(interventions=tuple(Intervention(**change) for change in changes)))


@pytest.mark.parametrize(
    ("part", "change"), [("memory", {"kind": "freeze_writes"}), ("experts", {"kind": "ban_expert", "expert": 0})]
)
def test_regions_that_are_not_there(part: str, change: dict[str, Any]) -> None:
    with engine_of(small_model(**{part: None})) as engine, pytest.raises(ConfigError, match="a model with"):
        engine.submit(ask(interventions=(Intervention(**change),)))


def test_too_many_are_refused() -> None:
    with pytest.raises(ConfigError, match="interventions: expected at most 16, got 17"):
        ask(interventions=(acting("clear_memory"),) * 17)
