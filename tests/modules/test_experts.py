"""ExpertPool: the op behind a routing, the shared expert, ids and labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from synapse_arch.errors import ConfigError, ShapeError
from synapse_arch.modules import ExpertPool, ExpertsConfig, Routing
from tests.helpers import assert_close

E, F_WIDTH, D = 4, 6, 8


def route(batch: int, length: int) -> Routing:
    indices = torch.randint(-1, E, (batch, length, 2))
    return Routing(indices, torch.rand(batch, length, 2), torch.zeros(batch, length, E))


@pytest.mark.parametrize("shared", [0, 10])
def test_each_token_gets_its_experts(shared: int) -> None:
    pool = ExpertPool(D, ExpertsConfig(n_experts=E, d_expert=F_WIDTH, d_shared=shared))
    x, routing = torch.randn(2, 5, D), route(2, 5)
    y, trace = pool(x, routing)
    assert trace is None
    for b in range(2):
        for t in range(5):
            expected = torch.zeros(D)
            for e, weight in zip(routing.indices[b, t].tolist(), routing.weights[b, t], strict=True):
                if e >= 0:
                    gate, up = (x[b, t] @ pool.w_in[e]).chunk(2)
                    expected = expected + weight * (F.silu(gate) * up) @ pool.w_out[e]
            if shared:
                gate, up = pool.shared_in(x[b, t]).chunk(2)
                expected = expected + pool.shared_out(F.silu(gate) * up)
            assert_close(y[b, t], expected)


def test_batch_and_length_do_not_matter() -> None:
    pool = ExpertPool(D, ExpertsConfig(n_experts=E, d_expert=F_WIDTH))
    x, routing = torch.randn(3, 7, D), route(3, 7)
    whole = pool(x, routing).y
    one = Routing(*(z[1:2, 4:5] for z in routing))
    assert_close(pool(x[1:2, 4:5], one).y, whole[1:2, 4:5])


def test_ids_and_labels() -> None:
    pool = ExpertPool(D, ExpertsConfig(n_experts=2, d_expert=3, labels=("a", "b")))
    assert pool.expert_ids.tolist() == [0, 1]
    assert "expert_ids" in pool.state_dict()
    assert ExpertsConfig().labels is None
    with pytest.raises(ConfigError, match="labels: expected 2 names, got 1"):
        ExpertsConfig(n_experts=2, labels=("a",))


def test_initialisation() -> None:
    pool = ExpertPool(64, ExpertsConfig(n_experts=4, d_expert=100, d_shared=100), residual_branches=4)
    assert pool.w_in.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert pool.w_out.std().item() == pytest.approx(100**-0.5 / 2, rel=0.02)
    assert pool.shared_out.weight.std().item() == pytest.approx(100**-0.5 / 2, rel=0.05)


def test_what_does_not_fit() -> None:
    pool = ExpertPool(D, ExpertsConfig(n_experts=E, d_expert=F_WIDTH))
    with pytest.raises(ShapeError, match="routing: expected"):
        pool(torch.randn(2, 5, D), route(2, 6))
    with pytest.raises(ShapeError, match="expected"):
        pool(torch.randn(2, 5, D + 1), route(2, 5))
    for wrong in ({"n_experts": 0}, {"d_expert": 0}, {"d_shared": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ExpertsConfig(**wrong)
