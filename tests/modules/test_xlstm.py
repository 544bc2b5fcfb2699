"""XLSTM: the layer recomputed step by step, its start, its gates' caps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError
from synapse_arch.modules import XLSTM, XLSTMConfig
from tests.helpers import assert_close


def by_hand(module: XLSTM, x: Tensor) -> Tensor:
    """One row, x (T, D), written from Beck et al. 2024, eq. 19-27, without a stabiliser."""
    c, heads, K, V = module.config, module.config.n_heads, module.d_key, module.d_value
    padded = torch.cat([torch.zeros_like(x[: c.d_conv - 1]), x])
    local = F.silu(sum(padded[w : w + len(x)] * module.conv.weight[:, w] for w in range(c.d_conv)) + module.conv.bias)
    q, k = (local @ module.qk_proj.weight.T).reshape(len(x), 2, heads, K).unbind(1)
    v, o, i, f = (x @ module.in_proj.weight.T).split([heads * V, heads * V, heads, heads], dim=-1)
    i, f = (15 * torch.tanh((g + b) / 15) for g, b in ((i, module.input_gate_bias), (f, module.forget_gate_bias)))
    C, n = torch.zeros(heads, K, V, dtype=x.dtype), torch.zeros(heads, K, dtype=x.dtype)
    rows = []
    for t in range(len(x)):
        write = i[t].exp()[:, None] * k[t]
        C = f[t].sigmoid()[:, None, None] * C + write[..., None] * v[t].reshape(heads, 1, V)
        n = f[t].sigmoid()[:, None] * n + write
        query = q[t] / K**0.5
        h = torch.einsum("hk,hkv->hv", query, C) / (n * query).sum(-1).abs().clamp(min=1)[:, None]
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
        rows.append(h.flatten() * o[t].sigmoid())
    return torch.stack(rows) @ module.out_proj.weight.T


@pytest.mark.parametrize(
    "config", [XLSTMConfig(n_heads=2), XLSTMConfig(d_hidden=12, n_heads=3, qk_ratio=1.0, d_conv=2)]
)
def test_the_equations(config: XLSTMConfig) -> None:
    module = XLSTM(8, config).double()
    x = torch.randn(12, 8, dtype=torch.float64)
    assert_close(module(x[None]).y[0], by_hand(module, x))


def test_initialisation() -> None:
    module = XLSTM(256, XLSTMConfig(n_heads=4, input_gate_bias=-5.0), residual_branches=4)
    assert module.forget_gate_bias.tolist() == pytest.approx([3, 4, 5, 6])
    assert module.input_gate_bias.tolist() == [-5.0] * 4
    assert (module.norm.weight == 1).all()
    assert module.out_proj.weight.std().item() == pytest.approx(256**-0.5 / 2, rel=0.02)
    assert (module.d_key, module.d_value) == (32, 64)


def test_the_caps_hold_whatever_comes_in() -> None:
    """The stabiliser is the largest log weight: it cannot exceed the cap of the input gate."""
    module = XLSTM(8, XLSTMConfig(n_heads=2, gate_cap=3.0))
    state = module(1e6 * torch.randn(2, 50, 8)).state
    assert state.cell.m.max() <= 3.0
    assert state.cell.m.min() >= -3.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_heads": 3}, "n_heads: expected a divisor of the hidden width 8, got 3"),
        ({"n_heads": 8, "qk_ratio": 0.2}, "qk_ratio: expected keys at least 1 wide"),
        ({"d_hidden": 0}, "d_hidden: expected an integer >= 1"),
        ({"gate_cap": 0.0}, "gate_cap: expected"),
        ({"forget_gate_bias": (1.0,)}, "forget_gate_bias: expected"),
    ],
)
def test_wrong_sizes(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XLSTM(8, XLSTMConfig(**wrong))  # type: ignore[arg-type]
