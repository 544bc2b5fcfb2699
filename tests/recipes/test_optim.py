"""Which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from recipes.optim import SHAPES, Schedule, adamw, optimizer_tensors, parameter_groups, restore_optimizer, set_lr
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import ConfigError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.A_log = nn.Parameter(torch.zeros(4, 3))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.linear(self.embedding(ids)))
        return (x @ self.experts.sum(0)).pow(2).mean() + self.A_log.exp().mean()


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}  # type: ignore[attr-defined]
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_only_matrices_decay() -> None:
    model = Model()
    decayed, spared = parameter_groups(model, 0.1)
    assert names(model, decayed) == {"linear.weight", "experts"}
    assert names(model, spared) == {"embedding.weight", "linear.bias", "norm.weight", "A_log"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("mamba", ["ssd", "s6"])
def test_of_the_real_model_only_projections_convolutions_and_experts_decay(mamba: str) -> None:
    with torch.device("meta"):
        model = SynapseModel(SynapseConfig.preset("tiny", **{"n_layers": 1, "thalamus.mamba": mamba}))
    decayed, spared = (names(model, group) for group in parameter_groups(model, 0.1))
    assert decayed | spared == dict(model.named_parameters()).keys()
    endings = ("proj.weight", "conv.weight", "w_in", "w_out", "head.weight")
    assert all(name.endswith(endings) for name in decayed)
    assert not any(name.endswith(endings) for name in spared)


@pytest.mark.parametrize("shape", SHAPES)
def test_schedule_rises_falls_and_ends_where_it_should(shape: str) -> None:
    schedule = Schedule(peak=2.0, final=0.1, warmup=0.2, shape=shape)
    rates = [schedule.lr(step / 1000) for step in range(1001)]
    assert rates[0] == 0
    assert rates[100] == pytest.approx(1.0)
    assert rates[200] == pytest.approx(2.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[200:]))
    assert schedule.lr(1.5) == rates[-1]


def test_wsd_stays_until_its_decay_begins() -> None:
    schedule = Schedule(peak=1.0, warmup=0.0, shape="wsd", decay=0.25)
    assert schedule.lr(0.74) == 1.0
    assert schedule.lr(0.8) < 1.0


@pytest.mark.parametrize(
    "values",
    [{"peak": 0.0}, {"peak": float("nan")}, {"shape": "step"}, {"warmup": 1.0}, {"final": -0.1}, {"decay": 0.0}],
)
def test_senseless_schedules_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Schedule(**{"peak": 1.0, **values})  # type: ignore[arg-type]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    set_lr(optimizer, 0.01)
    model(torch.arange(10)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_restored_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    model, copy = Model(), Model()
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    step(model, optimizer)
    copy.load_state_dict(model.state_dict())
    second = adamw(copy, weight_decay=0.1, betas=(0.9, 0.95))
    restore_optimizer(
        copy, second, {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    )
    for trained, again in ((model, optimizer), (copy, second)):
        step(trained, again)
    for (name, parameter), other in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("tensors", [{"other/exp_avg": torch.zeros(4)}, {"linear.weight/exp_avg": torch.zeros(3, 3)}])
def test_a_foreign_optimizer_state_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    model = Model()
    with pytest.raises(ConfigError):
        restore_optimizer(model, adamw(model, weight_decay=0.1, betas=(0.9, 0.95)), tensors)
