"""ExpertTrace and ExpertStats against plain loops."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.introspection import LayerTrace, TraceSpec
from synapse_arch.introspection.analysis import MIN_COUNT, expert_statistics, specialisation
from synapse_arch.introspection.probes import expert_trace, routing_trace, synapse_trace

N, D, HIDDEN, E = 23, 8, 4, 5


def pool(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    w_in = torch.randn(E, D, 2 * HIDDEN, generator=g, dtype=torch.float64) / 8
    w_out = torch.randn(E, HIDDEN, D, generator=g, dtype=torch.float64)
    indices = torch.stack([torch.randperm(E - 1, generator=g)[:2] for _ in range(N)])  # expert E - 1 gets none
    indices[3, 1] = -1
    indices[5] = -1
    return x.to(dtype), w_in.to(dtype), w_out.to(dtype), indices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # every expert on every token; grouped products
def test_expert_activity(dtype: torch.dtype) -> None:
    x, w_in, w_out, indices = pool(dtype)
    trace = expert_trace(x[None], w_in, w_out, indices[None])
    norms: list[list[float]] = [[] for _ in range(E)]
    silent: list[list[float]] = [[] for _ in range(E)]
    for n in range(N):
        for e in indices[n].tolist():
            if e >= 0:
                gate, up = (x[n] @ w_in[e]).split(HIDDEN)
                hidden = F.silu(gate) * up
                norms[e].append(math.sqrt(sum(y * y for y in (hidden @ w_out[e]).tolist())))
                silent[e].append(sum(abs(h) < 0.01 for h in hidden.tolist()) / HIDDEN)
    rel = 1e-10 if dtype == torch.float64 else 1e-5
    assert trace.tokens.tolist() == [[len(found) for found in norms]]
    for e in range(E - 1):
        assert float(trace.out_norm[0, e]) == pytest.approx(sum(norms[e]) / len(norms[e]), rel=rel)
        assert float(trace.sparsity[0, e]) == pytest.approx(sum(silent[e]) / len(silent[e]), rel=rel)
    assert trace.out_norm[0, -1].isnan()
    assert trace.to_dict()["sparsity"][0][-1] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_have_activities_of_their_own(dtype: torch.dtype) -> None:
    x, w_in, w_out, indices = pool(dtype)
    pair, routes = x[: N - 1].unflatten(0, (2, -1)), indices[: N - 1].unflatten(0, (2, -1))
    both = expert_trace(pair, w_in, w_out, routes)
    for row in range(2):
        alone = expert_trace(pair[row : row + 1], w_in, w_out, routes[row : row + 1])
        for name in ("tokens", "out_norm", "sparsity"):
            torch.testing.assert_close(getattr(both, name)[row], getattr(alone, name)[0], equal_nan=True)


def test_widths_that_grouped_products_refuse() -> None:
    x, w_in, w_out, indices = pool(torch.float32)
    trace = expert_trace(x[None, :, :7], w_in[:, :7], w_out[:, :, :7], indices[None])
    wide = expert_trace(x[None, :, :7].double(), w_in[:, :7].double(), w_out[:, :, :7].double(), indices[None])
    torch.testing.assert_close(trace.out_norm.double(), wide.out_norm, equal_nan=True, rtol=1e-5, atol=1e-5)


def statistics(ids: Tensor, experts: Tensor, n_experts: int, **known: object) -> list[dict]:
    logits = torch.zeros(*ids.shape, n_experts)
    weights = torch.full(experts.shape, 1 / experts.shape[-1])
    routing = routing_trace(
        logits,
        experts,
        weights,
        torch.zeros(ids.shape[0], n_experts, n_experts),
        TraceSpec(),
        mask=known.pop("mask", None),
    )
    return expert_statistics(ids, LayerTrace(index=2, routing=routing, **known), ("a", "b", "c", "d"))


def test_statistics_of_each_expert() -> None:
    rng = random.Random(5)
    ids = torch.tensor([[rng.randrange(6) for _ in range(40)] for _ in range(2)])
    experts = torch.tensor([[rng.sample(range(3), 2) for _ in range(40)] for _ in range(2)])
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :5] = False
    experts[0, :5] = -1
    rows = statistics(ids, experts, 4, mask=mask, expert_ids=torch.tensor([10, 11, 12, 13]))
    pairs = [(int(ids[b, t]), e) for b in range(2) for t in range(40) if mask[b, t] for e in experts[b, t].tolist()]
    total = len(pairs)
    for e, row in enumerate(rows):
        mine = [token for token, owner in pairs if owner == e]
        assert (row["id"], row["label"], row["layer"], row["index"]) == (10 + e, "abcd"[e], 2, e)
        assert row["tokens"] == len(mine)
        assert row["load"] == pytest.approx(len(mine) / total)
        if not mine:
            assert row["specialisation"] is None
            assert row["top_tokens"] == ()
            continue
        divergence, lifts = 0.0, {}
        for token in set(mine):
            given, overall = mine.count(token) / len(mine), sum(t == token for t, _ in pairs) / total
            divergence += given * math.log(given / overall)
            lifts[token] = (given / overall, mine.count(token))
        assert row["specialisation"] == pytest.approx(divergence / -math.log(len(mine) / total))
        for top in row["top_tokens"]:
            assert (top.lift, top.n) == pytest.approx(lifts[top.id])
            assert top.n >= 3
        assert [top.lift for top in row["top_tokens"]] == sorted((top.lift for top in row["top_tokens"]), reverse=True)


def test_specialisation_reaches_its_bounds() -> None:
    assert specialisation(torch.tensor([[5.0, 0, 0], [0, 2, 7]])).tolist() == pytest.approx([1, 1])
    assert specialisation(torch.tensor([[2.0, 4, 6], [1, 2, 3]])).tolist() == pytest.approx([0, 0])
    assert specialisation(torch.tensor([[3.0, 4]])).isnan().all()


def test_shuffled_baseline_shows_the_bias_of_few_samples() -> None:
    rng = random.Random(1)
    ids = torch.tensor([[rng.randrange(50) for _ in range(400)]])
    experts = torch.tensor([[[rng.randrange(4)] for _ in range(400)]])  # routing that ignores the token
    for row in statistics(ids, experts, 4):
        assert row["specialisation"] > 0.08
        assert row["specialisation_shuffled"] == pytest.approx(row["specialisation"], rel=0.4)
    again = statistics(ids, experts, 4)
    assert again == statistics(ids, experts, 4)


def test_experts_seen_only_through_padding() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    rows = statistics(ids, torch.full((1, 3, 1), -1), 4)
    assert [row["load"] for row in rows] == [0] * 4
    assert {row["specialisation"] for row in rows} == {None}


def test_token_history_positions_skip_padding() -> None:
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[False, False, True, True, True], [True, True, False, True, True]])
    trace = synapse_trace(ids, torch.tensor([100, 7]), (), TraceSpec(every=2), mask=mask)
    assert trace.at.tolist() == [[-1, 100, 102], [7, -1, 10]]
    assert trace.tokens.tolist() == [[-1, 2, 4], [5, -1, 9]]
    assert trace.positions.tolist() == [0, 2, 4]
    assert trace.dropped == 2


@pytest.mark.parametrize(("counts", "wanted"), [((3, 2), [7]), ((3, 5), [8, 7])])
def test_top_tokens_are_frequent_enough_and_the_more_frequent_first(counts: tuple[int, int], wanted: list[int]) -> None:
    assert MIN_COUNT == 3
    ids = torch.tensor([[7] * counts[0] + [8] * counts[1]])
    rows = statistics(ids, torch.zeros(*ids.shape, 1, dtype=torch.long), 2)
    assert [top.id for top in rows[0]["top_tokens"]] == wanted
