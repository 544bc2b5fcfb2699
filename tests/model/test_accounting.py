"""Accounting: every number against the real thing, numel, tensors in memory, a counter of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from synapse_arch import ExpertsConfig, MemoryConfig, SynapseConfig, SynapseModel, ThalamusConfig
from synapse_arch.model import accounting
from synapse_arch.ops import experts
from tests.model.small import VARIANTS, VOCABULARY, read_state, small_config, small_model

CASES: dict[str, dict[str, Any]] = VARIANTS | {
    "shared expert": {"experts": ExpertsConfig(n_experts=4, d_expert=6, d_shared=5)},
    "one expert a token": {"thalamus": ThalamusConfig(d_state=4, head_dim=8, top_k=1)},
    "hebbian memory": {"memory": MemoryConfig(n_heads=2, d_key=4, d_value=6, rule="hebbian")},
    "four writes": {"memory": MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=4)},
    "two hebbian writes": {"memory": MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=2, rule="hebbian")},
    "groups": {"thalamus": ThalamusConfig(d_state=4, head_dim=8, n_groups=2)},
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_parameters_add_up_to_numel(case: str) -> None:
    model = small_model(**CASES[case])
    counts = accounting.parameters(model)
    assert counts == accounting.parameters(model.config)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_by_part() -> None:
    model = small_model()
    expected = {
        part: sum(parameter.numel() for layer in model.layers for parameter in getattr(layer, part).parameters())
        for part in ("xlstm", "thalamus", "experts", "memory")
    }
    norms = [name for name, _ in model.named_modules() if name.endswith("norm") and name.count(".") in (0, 2)]
    expected |= {"embedding": VOCABULARY * 16, "head": VOCABULARY * 16, "norms": len(norms) * 16}
    assert accounting.parameters(model) == expected


@cases
def test_active_parameters_are_those_that_one_token_reaches(case: str) -> None:
    """Counted by the gradient of a single token: an expert that was not chosen has none."""
    model = small_model(**CASES[case])
    model(torch.tensor([[3]]), targets=torch.tensor([[4]])).loss.backward()
    reached = 0
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.w_in", "experts.w_out")):
            used = parameter.grad.flatten(1).abs().sum(1) > 0
            assert used.sum() == model.config.thalamus.top_k
            reached += int(used.sum()) * parameter[0].numel()
        elif name != "embedding.weight" or model.config.tie_embeddings:
            assert parameter.grad is not None, name
            reached += parameter.numel()
    assert accounting.active_parameters(model) == accounting.active_parameters(model.config) == reached


@pytest.mark.parametrize(
    ("changes", "branches"),
    [
        ({}, 8),
        ({"experts": None, "xlstm": None}, 4),
        ({"thalamus": ThalamusConfig(mamba=None)}, 6),
        ({"thalamus": ThalamusConfig(context=False)}, 8),
    ],
)
def test_residual_branches_are_what_is_added(changes: dict[str, Any], branches: int) -> None:
    assert small_config(**changes).residual_branches == branches


@cases
@pytest.mark.parametrize("batch", [1, 3])
def test_state_bytes_are_those_of_a_real_state(case: str, batch: int) -> None:
    model = small_model(**CASES[case])
    expected = read_state(model, batch, 9).nbytes
    assert accounting.state_bytes(model.config, batch) == accounting.state_bytes(model, batch) == expected


@cases
def test_flops_in_chunks_are_those_of_a_counter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "ALIKE", 2**30)  # rows that only fill up pairs are nothing of the model's
    model = small_model(**CASES[case])
    ids = torch.randint(VOCABULARY, (2, 128))  # whole chunks of every mixer
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    by_operation = counter.get_flop_counts()["Global"]
    counted = counter.get_total_flops() - by_operation.get(torch.ops.aten.convolution, 0)  # short ones do not count
    assert accounting.flops_per_token(model.config, chunked=True) == counted / ids.numel()


@cases
def test_flops_without_the_recurrences_are_those_of_a_single_step(case: str) -> None:
    """Defined, a step's recurrences are elementwise, so that a counter sees only projections, experts and head.

    With gradients on, a single position is computed by the definitions.
    """
    model = small_model(**CASES[case])
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[3]]))
    flops, counted = accounting.flops_per_token(model), counter.get_total_flops()
    states = {name: tensor for name, tensor in model.init_state(1).to_tensors().items() if "coactivation" not in name}
    memory = model.config.memory
    writes = memory.n_householder * (2 if memory.rule == "delta" else 1) if memory else 0
    recurrent = sum(
        tensor.numel() * (2 + 2 * writes if "memory" in name else 4)
        for name, tensor in states.items()
        if name.endswith(("cell.C", "cell.n", "ssm", "memory.weights"))
    )
    assert flops == counted + recurrent


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "titan"])
def test_presets_are_counted_without_being_built(preset: str) -> None:
    config = SynapseConfig.preset(preset)
    counts = accounting.parameters(config)
    active = accounting.active_parameters(config)
    assert 0 < active < sum(counts.values())
    assert counts["embedding"] == counts["head"] == config.vocab_size * config.d_model
    projections = 2 * active
    assert projections <= accounting.flops_per_token(config) * 1.01 <= 1.2 * projections


def test_titan_has_the_predecessors_sizes() -> None:
    counts = accounting.parameters(SynapseConfig.preset("titan"))
    assert counts["experts"] == 12 * 8 * 3 * 768 * 3072
    assert 1.0e9 < sum(counts.values()) < 1.1e9


def test_counting_leaves_a_model_as_it_is() -> None:
    model = SynapseModel(small_config())
    before = torch.get_rng_state()
    accounting.flops_by_part(model)
    accounting.parameters(model.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
