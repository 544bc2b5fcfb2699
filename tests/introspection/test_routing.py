"""RoutingTrace against plain Python written from the docstrings of its fields."""

import math

import pytest
import torch
from torch import Tensor

from synapse_arch.introspection import TraceSpec
from synapse_arch.introspection.probes import routing_trace

B, T, E, K = 3, 9, 5, 2


def routed(ranked: Tensor, logits: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    indices = ranked.topk(k, dim=-1).indices
    weights = logits.gather(-1, indices).softmax(-1)
    if mask is not None:
        indices = torch.where(mask[..., None], indices, -1)
    return indices, weights


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(B, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask() -> Tensor:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 4:6] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_every_field(logits: Tensor, mask: Tensor, masked: bool, biased: bool) -> None:
    real = mask if masked else torch.ones_like(mask)
    ranked = logits + torch.linspace(-1, 1, E, dtype=logits.dtype) if biased else logits
    indices, weights = routed(ranked, logits, K, real)
    coactivation = torch.rand(B, E, E)
    spec = TraceSpec(level="full", every=2, max_tokens=3)
    trace = routing_trace(
        logits, indices, weights, coactivation, spec, mask=mask if masked else None, ranked=ranked if biased else None
    )
    assert trace.positions.tolist() == [4, 6, 8]
    assert torch.equal(trace.coactivation, coactivation)
    for b in range(B):
        for j, t in enumerate((4, 6, 8)):
            if not real[b, t]:
                assert trace.experts[b, j].tolist() == [-1] * K
                assert trace.weights[b, j].tolist() == [0] * K
                for field in (trace.p1, trace.p2, trace.margin, trace.entropy, trace.confidence, trace.logits):
                    assert field is not None
                    assert field[b, j].isnan().all()
                continue
            p = softmax(logits[b, t].tolist())
            down = sorted(p, reverse=True)
            rank = sorted(softmax(ranked[b, t].tolist()), reverse=True)
            expected = (down[0], down[1], down[0] / down[1], rank[K - 1] - rank[K], -sum(x * math.log(x) for x in p))
            fields = (trace.p1, trace.p2, trace.confidence, trace.margin, trace.entropy)
            assert [float(field[b, j]) for field in fields] == pytest.approx(expected, rel=1e-10)
            assert trace.experts[b, j].tolist() == indices[b, t].tolist()
            assert trace.weights[b, j].tolist() == weights[b, t].tolist()
    check_counts(trace, logits, indices, real)


def check_counts(trace, logits: Tensor, indices: Tensor, real: Tensor) -> None:
    for b in range(B):
        counts, mean, tokens = [0] * E, [0.0] * E, 0
        for t in range(T):
            if real[b, t]:
                tokens += 1
                p = softmax(logits[b, t].tolist())
                mean = [m + x for m, x in zip(mean, p, strict=True)]
                for e in indices[b, t].tolist():
                    counts[e] += 1
        load = [c / sum(counts) for c in counts]
        deviation = math.sqrt(sum((x - 1 / E) ** 2 for x in load) / E)
        assert trace.tokens[b].tolist() == counts
        assert trace.reads[b] == tokens
        assert trace.load[b].tolist() == pytest.approx(load)
        assert trace.importance[b].tolist() == pytest.approx([m / tokens for m in mean], rel=1e-10)
        assert float(trace.balance[b]) == pytest.approx(max(0.0, 1 - deviation * E), abs=1e-6)
        assert float(trace.utilisation[b]) == pytest.approx(sum(c > 0 for c in counts) / E)
    assert trace.uniform == 1 / E


def test_a_row_of_padding_has_no_shares(logits: Tensor) -> None:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1] = False
    trace = routing_trace(logits, *routed(logits, logits, K, mask), torch.zeros(B, E, E), TraceSpec(), mask=mask)
    assert trace.load[1].isnan().all()
    assert trace.importance[1].isnan().all()
    assert trace.to_dict()["load"][1] == [None] * E
    assert not trace.load[0].isnan().any()


def test_unequal_numbers_of_experts(logits: Tensor) -> None:
    indices, weights = routed(logits, logits, K, None)
    indices[:, ::2, 1] = -1
    trace = routing_trace(logits, indices, weights, torch.zeros(B, E, E), TraceSpec())
    assert (trace.weights[:, ::2, 1] == 0).all()
    assert trace.tokens.sum(1).tolist() == [(indices[b] >= 0).sum() for b in range(B)]


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 2), (3, 1)])
def test_undefined_margin_and_runner_up(experts: int, k: int) -> None:
    logits = torch.randn(1, 4, experts)
    indices, weights = routed(logits, logits, k, None)
    trace = routing_trace(logits, indices, weights, torch.zeros(1, experts, experts), TraceSpec())
    assert trace.margin.isnan().all() == (k == experts)
    assert trace.p2.isnan().all() == (experts == 1)
    assert trace.logits is None
    assert trace.to_dict()["logits"] is None


def test_bfloat16_logits_are_measured_in_float32(logits: Tensor) -> None:
    narrow = logits.bfloat16()
    trace = routing_trace(narrow, *routed(narrow, narrow, K, None), torch.zeros(B, E, E), TraceSpec())
    assert trace.entropy.dtype == torch.float32
    torch.testing.assert_close(trace.p1, narrow.float().softmax(-1).amax(-1))
