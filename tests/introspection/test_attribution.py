"""A read split into its sources, against the reference recurrence run on one source at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch import FastWeightMemory, MemoryConfig
from synapse_arch.introspection.attribution import read_sources
from synapse_arch.ops import delta_rule
from tests.helpers import assert_close

B, T, H, K, V = 2, 9, 3, 4, 5


def inputs(writes: int, gated: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    many = (writes,) if writes > 1 else ()
    values = {
        "q": F.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1),
        "k": F.normalize(torch.randn(B, T, *many, H, K, dtype=torch.float64), dim=-1),
        "v": torch.randn(B, T, *many, H, V, dtype=torch.float64),
        "beta": 2 * torch.rand(B, T, *many, H, dtype=torch.float64),
        "log_decay": -torch.rand(B, T, H, dtype=torch.float64),
        "state": torch.randn(B, H, K, V, dtype=torch.float64),
    }
    if gated:
        values["write"] = torch.rand(B, T, *many, H, V, dtype=torch.float64)
    return {name: x.to(dtype) for name, x in values.items()}


CASES = pytest.mark.parametrize(
    ("rule", "writes", "gated", "dtype"),
    [
        ("delta", 1, False, torch.float64),
        ("delta", 3, True, torch.float64),
        ("delta", 2, False, torch.float32),
        ("hebbian", 1, False, torch.float64),
        ("hebbian", 2, True, torch.float32),
    ],
)


@CASES
def test_sources_and_residual_are_the_read(rule: str, writes: int, gated: bool, dtype: torch.dtype) -> None:
    x = inputs(writes, gated, dtype)
    o, _ = delta_rule(**x, rule=rule, backend="reference")
    x["q"] = x["q"][:, -1]
    found = read_sources(**x, rule=rule)
    assert_close(found.contributions.sum(1) + found.residual, o[:, -1], "read")
    assert found.overlaps.shape == (B, T, writes, H)


@CASES
def test_each_source_is_the_read_of_a_memory_that_it_alone_wrote(
    rule: str, writes: int, gated: bool, dtype: torch.dtype
) -> None:
    """Later erasures and decays stay; every other value is taken away."""
    x = inputs(writes, gated, dtype)
    found = read_sources(**(x | {"q": x["q"][:, -1]}), rule=rule)
    for source in range(T):
        alone = torch.zeros_like(x["v"])
        alone[:, source] = x["v"][:, source]
        o, _ = delta_rule(**(x | {"v": alone, "state": torch.zeros_like(x["state"])}), rule=rule, backend="reference")
        assert_close(found.contributions[:, source], o[:, -1], f"source {source}", least=1e-2)
    o, _ = delta_rule(**(x | {"v": torch.zeros_like(x["v"])}), rule=rule, backend="reference")
    assert_close(found.residual, o[:, -1], "residual", least=1e-2)


def test_without_a_state_nothing_is_left_over() -> None:
    x = inputs(1, False, torch.float64)
    del x["state"]
    found = read_sources(**(x | {"q": x["q"][:, -1]}))
    assert not found.residual.any()
    o, _ = delta_rule(**x)
    assert_close(found.contributions.sum(1), o[:, -1], "read")


@pytest.mark.parametrize("gated", [False, True])
def test_signals_are_what_the_memory_gives_to_the_rule(gated: bool) -> None:
    memory = FastWeightMemory(16, MemoryConfig(n_heads=2, d_key=4, d_value=4, write_gate=gated)).double()
    x, plasticity = torch.randn(2, 7, 16, dtype=torch.float64), torch.tensor([1.0, 0.25])
    with torch.no_grad():
        state = memory(torch.randn(2, 5, 16, dtype=torch.float64)).state
        after = memory(x, state, plasticity=plasticity).state
        *inputs, write = memory.signals(x, state, plasticity=plasticity)
        _, weights = delta_rule(*inputs, state.weights, write=write, backend="reference")
    assert_close(weights, after.weights, "weights")
