"""Mamba: its sizes, its start, and the recurrence recomputed step by step. Parity with transformers: tests/oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError
from synapse_arch.modules import Mamba, MambaConfig
from tests.helpers import assert_close


def by_hand(mixer: Mamba, x: Tensor) -> Tensor:
    """A Mamba-2 of one group and one row, written from the equations: x (T, D)."""
    c, inner, heads = mixer.config, mixer.d_inner, mixer.n_heads
    mixed = x @ mixer.in_proj.weight.T
    z, dt = (x @ mixer.gate_proj.weight.T).split([inner, heads], dim=-1)
    padded = torch.cat([torch.zeros_like(mixed[: c.d_conv - 1]), mixed])
    taps = [padded[w : w + len(x)] * mixer.conv.weight[:, w] for w in range(c.d_conv)]
    u, B, C = F.silu(sum(taps) + mixer.conv.bias).split([inner, c.d_state, c.d_state], dim=-1)
    steps = torch.log1p((dt + mixer.dt_bias).exp())
    state = torch.zeros(heads, c.head_dim, c.d_state, dtype=x.dtype)
    rows = []
    for t in range(len(x)):
        ut = u[t].reshape(heads, c.head_dim)
        decay = (-steps[t] * mixer.A_log.exp()).exp()
        state = decay[:, None, None] * state + (steps[t, :, None] * ut)[..., None] * B[t]
        rows.append((state @ C[t] + mixer.D[:, None] * ut).flatten())
    y = torch.stack(rows) * F.silu(z)
    y = y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * mixer.norm.weight.flatten()
    return y @ mixer.out_proj.weight.T


def test_the_equations() -> None:
    mixer = Mamba(8, MambaConfig(d_state=5, head_dim=4)).double()
    x = torch.randn(12, 8, dtype=torch.float64)
    assert_close(mixer(x[None]).y[0], by_hand(mixer, x))


@pytest.mark.parametrize("variant", ["ssd", "s6"])
def test_initialisation(variant: str) -> None:
    """Steps log-uniform in [dt_min, dt_max], decay rates as published, no skip weight but one, small outputs."""
    config = MambaConfig(variant=variant, head_dim=4, d_state=6, dt_min=0.01, dt_max=0.05)  # type: ignore[arg-type]
    mixer = Mamba(256, config, residual_branches=4)
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 0.00999
    assert steps.max() <= 0.05001
    assert abs(steps.log().mean().exp() - (0.01 * 0.05) ** 0.5) < 0.003
    rates = mixer.A_log.exp()
    if variant == "ssd":
        assert rates.min() >= 1
        assert rates.max() <= 16
        assert 6 < rates.mean() < 11
    else:
        assert torch.allclose(rates, torch.arange(1.0, 7).expand(512, 6))
    assert (mixer.D == 1).all()
    assert mixer.out_proj.weight.std().item() == pytest.approx(512**-0.5 / 2, rel=0.02)


@pytest.mark.parametrize(
    ("variant", "conv", "ssm"), [("ssd", (3, 3, 16 + 2 * 2 * 6), (3, 4, 4, 6)), ("s6", (3, 3, 16), (3, 16, 6))]
)
def test_state_shapes(variant: str, conv: tuple[int, ...], ssm: tuple[int, ...]) -> None:
    mixer = Mamba(8, MambaConfig(variant=variant, head_dim=4, d_state=6, n_groups=2))  # type: ignore[arg-type]
    state = mixer.init_state(3)
    assert (state.conv.shape, state.ssm.shape) == (conv, ssm)
    assert not state.conv.any()
    assert not state.ssm.any()
    assert mixer.init_state(3, device="meta").ssm.device.type == "meta"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "mamba"}, "variant: expected one of ssd, s6, got 'mamba'"),
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_state": 2.0}, "d_state: expected an integer"),
        ({"d_conv": 1}, "d_conv: expected an integer >= 2"),
        ({"expand": True}, "expand: expected an integer"),
        ({"dt_rank": 0}, "dt_rank: expected"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min: expected at most dt_max=0.1"),
        ({"head_dim": 3}, "head_dim: expected a divisor of the inner width 16, got 3"),
        ({"head_dim": 4, "n_groups": 3}, "n_groups: expected a divisor of 4 heads, got 3"),
    ],
)
def test_wrong_sizes(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mamba(8, MambaConfig(**wrong))  # type: ignore[arg-type]
