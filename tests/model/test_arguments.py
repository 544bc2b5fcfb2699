"""What a model is given is checked as a whole, and what it is told to do to its routers happens."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from recipes.optim import parameter_groups
from synapse_arch import (
    ConfigError,
    ExpertsConfig,
    MemoryConfig,
    ShapeError,
    StateError,
    SynapseConfig,
    SynapseModel,
    SynapseState,
    ThalamusConfig,
    TraceSpec,
    XLSTMConfig,
)
from synapse_arch.modules.thalamus import load_balance_loss, router_z_loss
from tests.model.small import small_config, small_model, tokens


@pytest.mark.parametrize("shape", [(2, 14), (2, 8), (1, 10), (10,)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_mask_of_other_sizes_is_refused(shape: tuple[int, ...], grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ShapeError, match="mask"):
        small_model()(tokens(2, 10), mask=torch.ones(shape, dtype=torch.bool))


def test_a_trace_of_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TraceSpec\.layers: expected 0 to 1, got 7"):
        small_model()(tokens(1, 3), trace=TraceSpec(layers=(0, 7)))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda model: model(tokens(1, 3), targets=[[1, 2, 3]]), ShapeError, "targets: expected a tensor, got list"),
        (lambda model: model(tokens(1, 3), trace="gates"), ConfigError, "trace: expected a TraceSpec, got str"),
        (
            lambda model: model(tokens(1, 3), logits_to_keep=torch.tensor([1, 2])),
            ShapeError,
            "logits_to_keep: expected 0",
        ),
        (lambda model: model.balance_router(None), ShapeError, "load: expected a tensor, got NoneType"),
        (lambda model: model.balance_router(torch.ones(1, 2)), ShapeError, r"load: expected \(L, E\)"),
        (lambda model: model.consolidate(None), StateError, "state: expected a SynapseState, got NoneType"),
        (lambda model: model.init_state(2.0), StateError, "batch_size: expected an integer"),
        (lambda model: model.init_state(True), StateError, "batch_size: expected an integer"),
        (
            lambda model: model.init_state(1).where([True], model.init_state(1)),
            StateError,
            r"rows: expected \(1,\) bool, got \[True\]",
        ),
        (lambda model: model.init_state(1).to(torch.float64), StateError, "device: expected a device"),
        (lambda model: SynapseState.cat(iter(())), StateError, "states: expected at least one"),
    ],
)
def test_what_is_no_tensor_state_or_trace_is_refused(
    call: Callable[[SynapseModel], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call(small_model())


@pytest.mark.parametrize(
    "make",
    [
        lambda: SynapseConfig(tie_embeddings="no"),
        lambda: SynapseConfig(norm_eps=float("inf")),
        lambda: XLSTMConfig(gate_cap=float("inf")),
        lambda: XLSTMConfig(forget_gate_bias=3.0),
        lambda: XLSTMConfig(forget_gate_bias=("a", "b")),
        lambda: MemoryConfig(beta_max=float("inf")),
        lambda: ThalamusConfig(noise=float("inf")),
        lambda: ThalamusConfig(hebbian_decay="0.9"),
        lambda: ExpertsConfig(n_experts=8, labels="abcdefgh"),
        lambda: ExpertsConfig(n_experts=8, labels=5),
        lambda: XLSTMConfig(input_gate_bias="x"),
        lambda: XLSTMConfig(input_gate_bias=float("nan")),
        lambda: XLSTMConfig(forget_gate_bias=(float("nan"), 1.0)),
        lambda: SynapseConfig.from_dict({1: 2}),
    ],
)
def test_values_that_no_model_can_have_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_the_router_s_losses_have_their_weights() -> None:
    model = SynapseModel(small_config(thalamus=ThalamusConfig(d_state=4, head_dim=8, load_balance=0.3, z_loss=0.07)))
    routings = []
    for layer in model.layers:
        layer.thalamus.register_forward_hook(lambda *call: routings.append(call[-1].routing))
    ids = tokens(3, 9)
    losses = model(ids, targets=ids).losses
    for name, weight, formula in (("balance", 0.3, load_balance_loss), ("z", 0.07, router_z_loss)):
        expected = weight * torch.stack([formula(routing) for routing in routings]).mean()
        torch.testing.assert_close(losses[name], expected)


def test_each_router_is_balanced_by_its_own_load() -> None:
    model = small_model(thalamus=ThalamusConfig(d_state=4, head_dim=8, bias_rate=0.5))
    model.balance_router(torch.tensor([[9, 1, 2, 0], [0, 0, 0, 8]]))
    assert model.layers[0].thalamus.router_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert model.layers[1].thalamus.router_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    with pytest.raises(ShapeError, match="load"):
        model.balance_router(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_routes_and_balances_in_float32(dtype: torch.dtype) -> None:
    """Steps of 1e-3 are lost in a bfloat16 that stands at 0.5."""
    model = small_model(thalamus=ThalamusConfig(d_state=4, head_dim=8, bias_rate=1e-3)).to(dtype)
    thalamus = model.layers[0].thalamus
    assert thalamus(torch.randn(1, 3, 16, dtype=dtype)).routing.logits.dtype == torch.float32
    for _ in range(1000):
        model.balance_router(torch.tensor([[9, 1, 2, 0], [0, 0, 0, 8]]))
    torch.testing.assert_close(thalamus.router_bias, torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    assert thalamus.pathways.dtype == torch.float32


def test_a_copy_keeps_what_its_parameters_are_marked_with() -> None:
    model = small_model(thalamus=ThalamusConfig(mamba="s6", d_state=4))
    copied = copy.deepcopy(model)
    assert [len(group["params"]) for group in parameter_groups(copied, 0.1)] == [
        len(group["params"]) for group in parameter_groups(model, 0.1)
    ]
    for own, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert theirs.__dict__ == own.__dict__
        assert theirs is not own
        assert torch.equal(theirs, own)


@pytest.mark.parametrize("length", [1, 4])
def test_coactivation_is_gathered_in_float32_under_autocast(length: int) -> None:
    model, ids = small_model(), tokens(1, 600)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        state = None
        for start in range(0, 600, length):
            state = model(ids[:, start : start + length], state).state
        whole = model(ids).state
    assert state is not None
    for one, other in zip(state.layers, whole.layers, strict=True):
        assert one.thalamus.coactivation.dtype == torch.float32
        diagonal = one.thalamus.coactivation.diagonal(dim1=-2, dim2=-1)
        assert diagonal.sum() == pytest.approx(2 * (1 - 0.999**600), rel=1e-4)  # two experts a token
        torch.testing.assert_close(diagonal, other.thalamus.coactivation.diagonal(dim1=-2, dim2=-1), atol=0.1, rtol=0)


def test_choosing_a_size_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    SynapseConfig.auto(tokens=10_000, memory=2**28)
    assert torch.equal(torch.get_rng_state(), before)
