"""Thalamus: routing, its losses, and the Hebbian pathways, each against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, StateError
from synapse_arch.modules import Routing, Thalamus, ThalamusConfig, ThalamusState
from synapse_arch.modules.thalamus import expert_load, expert_loads, load_balance_loss, router_z_loss
from tests.helpers import assert_close

E, K, D, T = 5, 2, 8, 12
SIZES = {"d_state": 6, "head_dim": 4}


def make(**changed: object) -> Thalamus:
    return Thalamus(D, E, ThalamusConfig(**(SIZES | changed))).eval()  # type: ignore[arg-type]


def inputs(batch: int = 3) -> Tensor:
    return torch.randn(batch, T, D)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_largest_logits_share_the_weight(top_k: int) -> None:
    routing = make(top_k=top_k)(inputs()).routing
    values, indices = routing.logits.topk(top_k, dim=-1)
    assert torch.equal(routing.indices, indices)
    assert_close(routing.weights, values.softmax(-1))
    assert routing.logits.dtype == torch.float32


@pytest.mark.filterwarnings("default")  # the compiler warns itself
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_leaves_the_router_alone(compiled: bool) -> None:
    """Its gradients too, wherever the backward pass runs."""
    thalamus, x = make(mamba=None), inputs()

    def gradients(narrow: bool) -> list[Tensor]:
        torch.compiler.reset()
        run = torch.compile(thalamus, fullgraph=True, backend="aot_eager") if compiled and narrow else thalamus
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            logits = run(leaf).routing.logits
            return list(torch.autograd.grad(logits.square().sum(), [leaf, *thalamus.router.parameters()]))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(found, expected)


def test_the_router_reads_the_normalised_relay() -> None:
    thalamus, x = make(), inputs()
    y, routing, _, _ = thalamus(x)
    assert torch.equal(y, thalamus.mamba(x).y)
    normal = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(routing.logits, normal * thalamus.router_norm.weight @ thalamus.router.weight.T)


def test_without_context_the_router_reads_the_token() -> None:
    """The Mamba still relays; a token is routed alike whatever stands before it."""
    thalamus, x = make(context=False), inputs()
    y, routing, _, _ = thalamus(x)
    assert torch.equal(y, thalamus.mamba(x).y)
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(routing.logits, normal * thalamus.router_norm.weight @ thalamus.router.weight.T)
    assert_close(thalamus(x.flip(1)).routing.logits.flip(1), routing.logits)


def test_without_a_mamba_it_only_routes() -> None:
    thalamus, x = make(mamba=None), inputs()
    assert {name for name, _ in thalamus.named_parameters()} == {"router.weight", "router_norm.weight"}
    y, routing, state, _ = thalamus(x)
    assert y is None
    assert state.mamba is None
    blind = make(context=False)
    blind.load_state_dict(thalamus.state_dict(), strict=False)
    assert torch.equal(blind(x).routing.logits, routing.logits)
    assert torch.equal(blind(x).state.coactivation, state.coactivation)


def test_a_state_of_the_other_kind_is_refused() -> None:
    """None for a Mamba's state would start it afresh without a word."""
    with_mamba, without = make(), make(mamba=None)
    with pytest.raises(StateError, match=r"state\.mamba: expected a MambaState, got None"):
        with_mamba(inputs(), without.init_state(3))
    with pytest.raises(StateError, match=r"state\.mamba: expected None, got a MambaState"):
        without(inputs(), with_mamba.init_state(3))


def test_the_start_is_near_uniform() -> None:
    probabilities = make()(inputs(20)).routing.logits.softmax(-1)
    assert probabilities.min() > 0.8 / E
    assert probabilities.max() < 1.25 / E


def test_masked_positions_visit_nobody() -> None:
    mask = torch.rand(3, T) > 0.3
    routing = make()(inputs(), mask=mask).routing
    assert (routing.indices[~mask] == -1).all()
    assert not routing.weights[~mask].any()
    assert (routing.indices[mask] >= 0).all()


def test_noise_is_for_training_alone() -> None:
    thalamus, x = make(noise=0.5), inputs()
    quiet = thalamus(x).routing
    assert torch.equal(thalamus(x).routing.indices, quiet.indices)
    thalamus.train()
    noisy = thalamus(x).routing
    assert not torch.equal(noisy.indices, quiet.indices)
    assert torch.equal(noisy.logits, quiet.logits)  # the losses see the router, not the noise
    silent = make(noise=0.0).train()
    assert torch.equal(silent(x).routing.indices, silent(x).routing.indices)


def test_biases_move_the_choice_and_not_the_weights() -> None:
    thalamus, x = make(), inputs()
    free = thalamus(x).routing
    thalamus.router_bias[3] = 100.0
    bound = thalamus(x).routing
    assert (bound.indices == 3).any(-1).all()
    assert torch.equal(bound.logits, free.logits)
    assert_close(bound.weights, bound.logits.gather(-1, bound.indices).softmax(-1))


def test_balance_favours_who_got_too_little() -> None:
    thalamus = make(bias_rate=0.01)
    thalamus.balance(torch.tensor([10, 0, 4, 3, 3]))
    assert thalamus.router_bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.01, 0.01])
    still = make(bias_rate=0.0)
    still.balance(torch.tensor([10, 0, 4, 3, 3]))
    assert not still.router_bias.any()


def routed(indices: list[list[int]], logits: Tensor) -> Routing:
    chosen = torch.tensor([indices])
    return Routing(chosen, torch.ones_like(chosen, dtype=torch.float32), logits)


def test_load_balance_by_its_formula() -> None:
    """E Σ f_e P_e: 1 when balanced, E when all goes to one expert that the router is sure of."""
    even = routed([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]], torch.zeros(1, 5, E))
    assert load_balance_loss(even).item() == pytest.approx(1.0)
    sure = torch.full((1, 4, E), -100.0)
    sure[..., 2] = 0.0
    assert load_balance_loss(routed([[2]] * 4, sure)).item() == pytest.approx(E)
    logits = torch.randn(1, 4, E)
    some = routed([[0, 1], [0, 2], [-1, -1], [0, 4]], logits)
    mask = torch.tensor([[True, True, False, True]])
    share = torch.tensor([3, 1, 1, 0, 1]) / 6
    expected = E * (share * logits[0, mask[0]].softmax(-1).mean(0)).sum()
    assert load_balance_loss(some, mask).item() == pytest.approx(expected.item())


def test_z_loss_by_its_formula() -> None:
    logits = torch.randn(2, 3, E)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    routing = routed([[0]], logits)
    assert router_z_loss(routing).item() == pytest.approx(logits.exp().sum(-1).log().square().mean().item())
    expected = logits.exp().sum(-1).log().square()[mask].mean()
    assert router_z_loss(routing, mask).item() == pytest.approx(expected.item())
    assert router_z_loss(routing).dim() == 0


def test_expert_load_counts_assignments() -> None:
    assert expert_load(torch.tensor([[[0, 2], [2, -1]], [[-1, -1], [4, 2]]]), E).tolist() == [1, 0, 3, 0, 1]
    assert expert_loads(torch.tensor([[[0, 2]], [[-1, 2]]]), E).tolist() == [[1, 0, 1, 0, 0], [0, 0, 1, 0, 0]]


def by_token(indices: Tensor, before: Tensor, ids: Tensor, decay: float) -> Tensor:
    """The co-activation average, one token after another."""
    rows = []
    for b, average in enumerate(before):
        previous = None
        for t in range(indices.shape[1]):
            if indices[b, t, 0] < 0:
                continue
            if previous is not None and ids[b, t] != previous:
                average = torch.zeros_like(average)
            previous = ids[b, t]
            fired = torch.zeros(E, dtype=torch.float64)
            fired[indices[b, t]] = 1.0
            average = decay * average + (1 - decay) * torch.outer(fired, fired)
        rows.append(average)
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_coactivation_by_its_definition(packed: bool) -> None:
    thalamus, x = make(hebbian_decay=0.9), inputs()
    state = thalamus.init_state(3)._replace(coactivation=torch.rand(3, E, E))
    ids = torch.arange(T).expand(3, T) // (5 if packed else T)
    mask = torch.rand(3, T) > (0.3 if packed else -1)
    _, routing, after, _ = thalamus(x, state, segment_ids=ids, mask=mask)
    expected = by_token(routing.indices, state.coactivation.double(), ids, 0.9)
    assert_close(after.coactivation, expected)


def with_coactivation(thalamus: Thalamus, matrix: Tensor) -> ThalamusState:
    return thalamus.init_state(len(matrix))._replace(coactivation=matrix)


@pytest.mark.parametrize("read", [1.0, 0.05], ids=["long", "short"])
def test_consolidate_by_its_formula(read: float) -> None:
    """P(j | i) - P(j), averaged over rows, however much was read; nothing for independent or silent experts."""
    thalamus = make(top_k=2)
    alone = torch.tensor([0.9, 0.5, 0.4, 0.0, 0.2])
    independent = torch.outer(alone, alone)
    independent.diagonal().copy_(alone)
    thalamus.consolidate(with_coactivation(thalamus, read * independent[None]))
    assert thalamus.pathways.abs().max() < 1e-6
    paired = independent.clone()
    paired[0, 1] = paired[1, 0] = 0.5  # 1 never fires without 0
    thalamus.consolidate(with_coactivation(thalamus, read * torch.stack([paired, paired])))
    assert thalamus.pathways[1, 0].item() == pytest.approx(1.0 - 0.9)
    assert thalamus.pathways[0, 1].item() == pytest.approx(0.5 / 0.9 - 0.5)
    assert not thalamus.pathways.diagonal().any()
    assert not thalamus.pathways[3].any()


def test_nothing_read_is_consolidated_to_nothing() -> None:
    thalamus = make(top_k=2)
    thalamus.consolidate(thalamus.init_state(1))
    assert not thalamus.pathways.any()


def test_pathways_bias_only_after_consolidation() -> None:
    thalamus, x = make(hebbian_gain=1e3, top_k=2), inputs()
    first = thalamus(x)
    assert torch.equal(thalamus(x, first.state._replace(mamba=thalamus.mamba.init_state(3))).routing.indices,
                       first.routing.indices)  # fmt: skip
    matrix = torch.eye(E) * 0.4
    matrix[0, 4] = matrix[4, 0] = 0.4
    thalamus.consolidate(with_coactivation(thalamus, matrix[None]))
    after = thalamus(x).routing
    led_by_0 = first.routing.indices[..., 0] == 0
    assert led_by_0.any()
    assert (
        (after.indices[led_by_0] == torch.tensor([0, 4]))
        .all(-1)
        .logical_or((after.indices[led_by_0] == torch.tensor([4, 0])).all(-1))
        .all()
    )


def test_without_experts_it_relays() -> None:
    thalamus = Thalamus(D, 0, ThalamusConfig(**SIZES))  # type: ignore[arg-type]
    y, routing, state, _ = thalamus(inputs())
    assert routing is None
    assert y.shape == (3, T, D)
    assert state.coactivation.shape == (3, 0, 0)
    assert {name for name, _ in thalamus.named_parameters()} == {
        f"mamba.{name}" for name, _ in thalamus.mamba.named_parameters()
    }


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="top_k: expected at most 5 experts, got 6"):
        Thalamus(D, E, ThalamusConfig(top_k=6))
    for wrong in (
        {"hebbian_decay": 1.0},
        {"noise": -0.1},
        {"top_k": 0},
        {"mamba": "s4"},
        {"d_state": 0},
        {"context": 1},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("mamba", "mamba|variant")):
            ThalamusConfig(**wrong)  # type: ignore[arg-type]
    thalamus = make()
    with pytest.raises(StateError, match="coactivation: expected"):
        thalamus(inputs(), with_coactivation(thalamus, torch.zeros(3, E + 1, E + 1)))
