"""FastWeightMemory: recomputed step by step, its start, and that it remembers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError
from synapse_arch.modules import FastWeightMemory, FastWeightState, MemoryConfig
from tests.helpers import assert_close

SIZES = MemoryConfig(n_heads=2, d_key=6, d_value=5, n_householder=1)


def by_hand(module: FastWeightMemory, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One row, x (T, D), from fast weights (H, K, V)."""
    c = module.config
    H, K, V, M = c.n_heads, c.d_key, c.d_value, c.n_householder
    sizes = [H * (K + M * (K + V)), H * V, M * H, H, M * H * V * c.write_gate]
    mixed, gate, erase, step, write = (x @ torch.cat([module.in_proj.weight, module.gate_proj.weight]).T).split(
        sizes, dim=-1
    )
    padded = torch.cat([torch.zeros_like(mixed[: c.d_conv - 1]), mixed])
    taps = [padded[w : w + len(x)] * module.conv.weight[:, w] for w in range(c.d_conv)]
    q, k, v = F.silu(sum(taps) + module.conv.bias).split([H * K, M * H * K, M * H * V], dim=-1)
    q, k, v = q.reshape(-1, H, K), k.reshape(-1, M, H, K), v.reshape(-1, M, H, V)
    q, k = (z / (z.square().sum(-1, keepdim=True) + K * 1e-6).sqrt() for z in (q, k))
    beta = c.beta_max * erase.sigmoid().reshape(-1, M, H, 1)
    amount = write.sigmoid().reshape(-1, M, H, V) if c.write_gate else beta
    decay = (-module.A_log.exp() * torch.log1p((step + module.dt_bias).exp())).exp()
    rows = []
    for t in range(len(x)):
        weights = decay[t, :, None, None] * weights
        for m in range(M):
            held = torch.einsum("hkv,hk->hv", weights, k[t, m]) if c.rule == "delta" else 0.0
            weights = weights + k[t, m][..., None] * (amount[t, m] * v[t, m] - beta[t, m] * held)[:, None]
        o = torch.einsum("hkv,hk->hv", weights, q[t])
        o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
        rows.append(o.flatten() * F.silu(gate[t]))
    return torch.stack(rows) @ module.out_proj.weight.T, weights


@pytest.mark.parametrize("options", [{}, {"n_householder": 3}, {"write_gate": True},
                                     {"n_householder": 2, "write_gate": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_the_equations(rule: str, options: dict[str, Any]) -> None:
    module = FastWeightMemory(8, replace(SIZES, rule=rule, beta_max=1.5, **options)).double()  # type: ignore[arg-type]
    x, weights = torch.randn(12, 8, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    y, state, _ = module(x[None], FastWeightState(module.init_state(1).conv, weights[None]))
    expected, final = by_hand(module, x, weights)
    assert_close(y[0], expected)
    assert_close(state.weights[0], final)


def test_one_write_with_one_strength_has_the_parameters_of_old() -> None:
    """Checkpoints hold them: queries, keys, values; output gate, strength, step."""
    shapes = {name: tuple(parameter.shape) for name, parameter in FastWeightMemory(8, SIZES).named_parameters()}
    assert shapes == {
        "A_log": (2,), "dt_bias": (2,), "in_proj.weight": (34, 8), "gate_proj.weight": (14, 8), "norm.weight": (2, 5),
        "conv.weight": (34, 4), "conv.bias": (34,), "out_proj.weight": (8, 10),
    }  # fmt: skip


def test_some_heads_start_by_keeping_and_some_by_forgetting() -> None:
    """Quality notes §3: with all decays below one, strengths near two cannot reflect exactly."""
    module = FastWeightMemory(64, replace(SIZES, n_heads=64))
    decay = (-module.A_log.exp() * F.softplus(module.dt_bias)).exp()
    assert decay.max() > 0.9999
    assert decay.min() < 0.9


def test_the_fast_weights_alone_carry_what_was_written() -> None:
    """A state with the written weights and a fresh convolution changes the next answer; the empty one does not."""
    module = FastWeightMemory(8, SIZES)
    x = torch.randn(1, 4, 8)
    fresh = module.init_state(1)
    written = module(torch.randn(1, 30, 8)).state
    same = module(x, FastWeightState(fresh.conv, torch.zeros_like(written.weights))).y
    assert torch.equal(same, module(x).y)
    assert (module(x, FastWeightState(fresh.conv, written.weights)).y - same).abs().max() > 1e-3


def test_writing_is_learned() -> None:
    """Gradients of a later read reach the projections through what was written earlier."""
    module = FastWeightMemory(8, SIZES)
    first = torch.randn(1, 10, 8, requires_grad=True)
    state = module(first).state
    module(torch.randn(1, 1, 8), FastWeightState(module.init_state(1).conv, state.weights)).y.sum().backward()
    assert first.grad is not None
    assert first.grad[:, :4].abs().max() > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "oja"}, "rule: expected one of delta, hebbian"),
        ({"n_heads": 0}, "n_heads: expected an integer >= 1"),
        ({"beta_max": 0.0}, "beta_max: expected a number"),
        ({"n_householder": 0}, "n_householder: expected an integer >= 1"),
        ({"n_householder": 1.5}, "n_householder: expected an integer >= 1"),
        ({"write_gate": 1}, "write_gate: expected True or False, got 1"),
        ({"decay_min": -1.0}, "decay_min: expected"),
        ({"decay_min": 2.0, "decay_max": 1.0}, "decay_min: expected at most decay_max=1.0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min: expected at most dt_max=0.1"),
    ],
)
def test_wrong_sizes(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**wrong)  # type: ignore[arg-type]
