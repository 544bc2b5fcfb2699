"""The trace of a whole model: pathways, joining, JSON and the report, on records made by hand."""

import json
import re

import pytest
import torch
from torch import Tensor

from synapse_arch.errors import ConfigError
from synapse_arch.introspection import LayerTrace, SynapseTrace, TraceSpec, join_traces
from synapse_arch.introspection.analysis import _pair_mean
from synapse_arch.introspection.probes import (
    expert_trace,
    gate_trace,
    memory_trace,
    routing_trace,
    synapse_trace,
)
from synapse_arch.introspection.report import bar, number
from synapse_arch.ops import delta_rule, mlstm

B, T, E, K, H, D = 2, 12, 4, 2, 2, 4


class Parts:
    """What the regions of a two-layer model might have computed; layer 1 has no language module."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(2)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.ids = torch.randint(0, 5, (B, T), generator=g)
        self.logits = [rand(B, T, E) for _ in range(2)]
        self.indices = [x.topk(K, -1).indices for x in self.logits]
        self.weights = [x.topk(K, -1).values.softmax(-1) for x in self.logits]
        self.coactivation = rand(B, E, E).abs()
        self.heads = [rand(B, T, H, D) for _ in range(3)]
        self.gates = rand(B, T, H), rand(B, T, H) - 1
        self.pool = rand(E, D, 2 * D), rand(E, D, D)

    def trace(self, spec: TraceSpec, cut: slice = slice(None), mask: Tensor | None = None) -> SynapseTrace:
        here = None if mask is None else mask[:, cut]
        q, k, v = (x[:, cut] for x in self.heads)
        i, f = (x[:, cut] for x in self.gates)
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        layers = []
        for n in range(2):
            indices = self.indices[n][:, cut]
            if here is not None:
                indices = torch.where(here[..., None], indices, -1)
            routing = routing_trace(
                self.logits[n][:, cut], indices, self.weights[n][:, cut], self.coactivation, spec, mask=here
            )
            o, weights = delta_rule(q, k, v, i.sigmoid(), mask=here)
            memory = memory_trace(q, k, v, i.sigmoid(), None, o, None, weights, spec, mask=here)
            _, cell = mlstm(q, k, v, i, f, mask=here)
            log_f = torch.nn.functional.logsigmoid(f)
            gates, _, _ = gate_trace(k, v, i, log_f, v.sigmoid(), None, cell, spec, mask=here)
            experts = expert_trace(q[:, :, 0], *self.pool, indices)
            layers.append(
                LayerTrace(index=n, routing=routing, memory=memory, gates=None if n else gates, experts=experts)
            )
        start = torch.tensor([0, 5]) + (0 if mask is None else mask[:, : cut.start or 0].sum(1))
        if mask is None:
            start = start + (cut.start or 0)
        return synapse_trace(self.ids[:, cut], start, tuple(layers), spec, mask=here)


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def mask() -> Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 6] = False
    return mask


def test_flows_and_pathways(parts: Parts, mask: Tensor) -> None:
    trace = parts.trace(TraceSpec(every=2), mask=mask)
    expected, both = [[0.0] * E for _ in range(E)], [[0.0] * E for _ in range(E)]
    inside = [[0.0] * E for _ in range(E)]
    seen = [(b, t) for b in range(B) for t in range(0, T, 2) if mask[b, t]]
    for b, t in seen:
        for e, w in zip(parts.indices[0][b, t].tolist(), parts.weights[0][b, t].tolist(), strict=True):
            for f, u in zip(parts.indices[1][b, t].tolist(), parts.weights[1][b, t].tolist(), strict=True):
                expected[e][f] += w * u / len(seen)
                both[e][f] += 1 / len(seen)
            for f, u in zip(parts.indices[0][b, t].tolist(), parts.weights[0][b, t].tolist(), strict=True):
                inside[e][f] += w * u / len(seen)
    torch.testing.assert_close(trace.flows(), torch.tensor([expected], dtype=torch.float64))
    assert trace.flows().sum() == pytest.approx(1)
    paths = trace.pathways(top=3)
    across, within = paths[:3], paths[3:]
    best = sorted((w for row in expected for w in row), reverse=True)[:3]
    assert [path.weight for path in across] == pytest.approx(best)
    for path in across:
        assert (path.source[0], path.target[0]) == (0, 1)
        assert path.hebbian == pytest.approx(both[path.source[1]][path.target[1]])
    strength = parts.coactivation.mean(0)
    pairs = sorted((float(strength[e, f]) for e in range(E) for f in range(e + 1, E)), reverse=True)
    assert [path.hebbian for path in within] == pytest.approx([pairs[0], pairs[0], pairs[1]])
    first = next(path for path in within if path.source[0] == 0)
    assert first.weight == pytest.approx(inside[first.source[1]][first.target[1]])


@pytest.mark.parametrize("masked", [False, True])
def test_joined_calls_read_like_one(parts: Parts, mask: Tensor, masked: bool) -> None:
    spec, real = TraceSpec(level="full"), mask if masked else None
    cuts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    joined = join_traces([parts.trace(spec, cut, real) for cut in cuts])
    whole = parts.trace(spec, mask=real)
    assert joined.length == whole.length
    for name in ("tokens", "at", "positions"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    for got, want in zip(joined.layers, whole.layers, strict=True):
        assert got.routing is not None
        assert want.routing is not None
        for name in (
            "positions",
            "experts",
            "weights",
            "p1",
            "margin",
            "entropy",
            "tokens",
            "importance",
            "reads",
            "logits",
        ):
            torch.testing.assert_close(getattr(got.routing, name), getattr(want.routing, name), equal_nan=True)
        for name in ("tokens", "out_norm", "sparsity"):
            torch.testing.assert_close(getattr(got.experts, name), getattr(want.experts, name), equal_nan=True)
        for name in ("positions", "write", "writes", "reads"):
            torch.testing.assert_close(getattr(got.memory, name), getattr(want.memory, name), equal_nan=True)
    assert [stat.top_tokens for stat in joined.expert_stats(0)] == [stat.top_tokens for stat in whole.expert_stats(0)]
    assert join_traces([joined], max_tokens=3).positions.tolist() == [9, 10, 11]


def test_joining_what_does_not_belong_together_is_refused(parts: Parts) -> None:
    with pytest.raises(ConfigError, match="at least one trace"):
        join_traces([])
    with pytest.raises(ConfigError, match="one level, batch size and set of layers"):
        join_traces([parts.trace(TraceSpec()), parts.trace(TraceSpec(level="full"))])


def test_json_round_trip(parts: Parts, mask: Tensor) -> None:
    trace = parts.trace(TraceSpec(level="full", every=2, max_tokens=4), mask=mask)
    data = json.loads(trace.to_json())
    assert data == trace.to_dict()
    assert data["schema"] == "synapse.introspect/1"
    assert data["truncated"] == {"tokens": True, "dropped": 8}
    assert data["tokens"]["id"] == trace.tokens.tolist()
    assert data["tokens"]["pos"] == trace.at.tolist()
    assert [sorted(layer) for layer in data["layers"]] == [
        ["activations", "i", "memory", "mlstm", "routing"],
        ["activations", "i", "memory", "routing"],
    ]
    routing, memory = data["layers"][0]["routing"], data["layers"][0]["memory"]
    assert torch.tensor(routing["experts"]).tolist() == trace.layers[0].routing.experts.tolist()
    assert routing["margin"][1][1] is None  # padding
    assert routing["margin"][0][2] == float(trace.layers[0].routing.margin[0, 2])
    assert "weights" not in memory
    assert len(data["experts"]) == 2 * E
    assert data["experts"][0]["label"] is None
    assert {"layer", "id", "load", "uniform", "out_norm", "sparsity", "specialisation", "top_tokens"} <= set(
        data["experts"][0]
    )
    assert set(data["pathways"][0]) == {"from", "to", "weight", "hebbian"}


def test_a_layer_that_was_not_traced_is_named(parts: Parts) -> None:
    trace = parts.trace(TraceSpec())
    assert trace.layer(1).index == 1
    with pytest.raises(ConfigError, match=r"layer: expected a traced layer \(0, 1\), got 7"):
        trace.layer(7)


def test_report_shows_the_numbers(parts: Parts, mask: Tensor) -> None:
    trace = parts.trace(TraceSpec(level="full"), mask=mask)
    text = trace.report()
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "2 rows" in text
    assert "19 real" in text
    first = text[text.index("layer 0") : text.index("layer 1")]
    for stat in trace.expert_stats(0):
        line = next(line for line in first.splitlines() if f"expert {stat.id} " in line)
        assert f"{100 * stat.load:.1f} %" in line
        special = [number(stat.specialisation), number(stat.specialisation_shuffled)]
        assert line.split()[-4:] == [*special, number(stat.out_norm), number(stat.sparsity)]
    routing, memory, gates = trace.layers[0].routing, trace.layers[0].memory, trace.layers[0].gates
    assert routing is not None
    assert memory is not None
    assert gates is not None
    assert f"entropy {number(float(routing.entropy.nanmean()))} of 1.39 nats" in first
    assert f"margin {number(float(routing.margin.nanmean()))}" in first
    assert number(float(memory.collision[..., 1].nanmean())) in first
    assert number(float(memory.fro_norm[..., 0].nanmean())) in first
    assert number(float(gates.age_tokens[..., 0].nanmedian())) + " tok" in first
    assert "language" in first
    assert "language" not in text[text.index("layer 1") :]
    best = trace.pathways()[0]
    assert re.search(
        rf"layer 0 expert {best.source[1]} +→ layer 1 expert {best.target[1]} .* {number(best.weight)}", text
    )


def test_report_of_an_untrained_shape_names_nothing(parts: Parts) -> None:
    trace = parts.trace(TraceSpec())
    assert "expert 0" in trace.report()
    named = SynapseTrace(**{**vars(trace), "labels": ("alpha", "beta", "gamma", "delta")}).report()
    assert "alpha" in named
    assert "expert 0" not in named
    decoded = trace.report(width=200, decode=lambda token: f"<{token}>")
    assert "'<" in decoded


def test_report_without_any_layer(parts: Parts) -> None:
    trace = synapse_trace(parts.ids, torch.zeros(B, dtype=torch.long), (), TraceSpec())
    assert trace.report().count("\n") == 1
    assert trace.flows().numel() == 0
    assert json.loads(trace.to_json())["layers"] == []


def test_many_experts_are_summarised() -> None:
    logits = torch.randn(1, 30, 40)
    top = logits.topk(2, -1)
    routing = routing_trace(logits, top.indices, top.values.softmax(-1), torch.zeros(1, 40, 40), TraceSpec())
    ids = torch.zeros(1, 30, dtype=torch.long)
    trace = synapse_trace(ids, torch.zeros(1), (LayerTrace(index=0, routing=routing),), TraceSpec())
    assert "… and 24 experts with less load" in trace.report()
    assert trace.flows().shape == (0, 40, 40)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.12345, "0.123"), (12.345, "12.3"), (1234.5, "1234"), (12345.0, "1.23e+04"), (-0.5, "-0.500"),
     (1e-5, "1.00e-05"), (float("nan"), "–"), (None, "–"), (float("inf"), "∞"), (float("-inf"), "-∞")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_bar() -> None:
    assert bar(1, 1, 4) == "████"
    assert bar(0.5, 1, 4) == "██  "
    assert bar(0.3, 1, 4) == "█▎  "
    assert bar(9, 1, 4) == "████"
    assert bar(float("nan"), 1, 4) == "    "
    assert bar(0.25, 1, 4, mark=0.5) == "█ │ "
    assert bar(1, 1, 4, mark=0.5) == "██┃█"


def test_what_fires_together_is_averaged_over_valid_tokens_only() -> None:
    a, b, valid = torch.rand(1, 3, 2), torch.rand(1, 3, 2), torch.tensor([[True, True, False]])
    torch.testing.assert_close(_pair_mean(a, b, valid), _pair_mean(a[:, :2], b[:, :2], valid[:, :2]))
