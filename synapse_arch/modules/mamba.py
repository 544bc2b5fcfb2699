"""Mamba: a selective state-space mixer, Mamba-2 ("ssd") or Mamba-1 ("s6").

B batch, T time, D model width, I inner width (expand · D), H heads, P head width, G groups, N SSM state, W conv width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, explain
from synapse_arch.introspection.trace import TraceSpec
from synapse_arch.modules.common import (
    HeadNorm,
    MixerOutput,
    ShortConv,
    check_choice,
    check_input,
    check_positive,
    check_range,
    check_state,
    dt_bias,
    keep_float32,
    linear,
    wide,
)
from synapse_arch.ops import selective_scan, ssd
from synapse_arch.ops._backends import compute_dtype
from synapse_arch.ops.gating import gate


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Sizes of a Mamba mixer.

    Attributes:
        variant: "ssd" (Mamba-2, Dao & Gu 2024) or "s6" (Mamba-1, Gu & Dao 2023).
        d_state: N, numbers kept a channel.
        expand: inner width over model width.
        d_conv: W, positions the short convolution sees.
        head_dim: P, width of a head ("ssd").
        n_groups: G, groups of heads that share B and C ("ssd").
        dt_rank: width of the step-size bottleneck ("s6"); None means ceil(D / 16).
        dt_min, dt_max: range of the step sizes at initialisation.
        norm_eps: added to the mean square in the gated norm, one a group ("ssd").
    """

    variant: Literal["ssd", "s6"] = "ssd"
    d_state: int = 64
    expand: int = 2
    d_conv: int = 4
    head_dim: int = 64
    n_groups: int = 1
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choice(self, "variant", ("ssd", "s6"))
        check_positive(self, d_state=1, expand=1, d_conv=2, head_dim=1, n_groups=1, dt_min=1e-6, dt_max=1e-6)
        if self.dt_rank is not None:
            check_positive(self, dt_rank=1)
        check_range(self, "dt_min", "dt_max")


class MambaState(NamedTuple):
    """What a Mamba remembers: the convolution's last inputs and the recurrent state."""

    conv: Tensor
    """(B, W-1, I + 2GN) for "ssd", (B, W-1, I) for "s6"."""
    ssm: Tensor
    """(B, H, P, N) for "ssd", (B, I, N) for "s6"; float32 or wider."""


class Mamba(nn.Module):
    """A selective state-space mixer.

    Args:
        d_model: D.
        config: sizes and variant.
        residual_branches: the output projection starts 1/sqrt of this smaller.

    Raises:
        ConfigError: head_dim does not divide the inner width, or n_groups not the heads.

    >>> mixer = Mamba(32, MambaConfig(head_dim=16, d_state=8))
    >>> y, state, _ = mixer(torch.randn(2, 5, 32))
    >>> tuple(y.shape), tuple(state.ssm.shape)
    ((2, 5, 32), (2, 4, 16, 8))
    """

    def __init__(self, d_model: int, config: MambaConfig | None = None, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config or MambaConfig()
        self.d_inner = self.config.expand * d_model
        if self.config.variant == "ssd":
            self._init_ssd()
        else:
            self._init_s6()
        self.D = keep_float32(nn.Parameter(torch.ones(self.n_heads)))
        self.out_proj = linear(self.d_inner, d_model, scale=residual_branches**-0.5)

    def _init_ssd(self) -> None:
        c = self.config
        if self.d_inner % c.head_dim:
            expected = f"a divisor of the inner width {self.d_inner}"
            raise ConfigError(explain("MambaConfig.head_dim", expected, c.head_dim, "change head_dim or expand"))
        self.n_heads = self.d_inner // c.head_dim
        if self.n_heads % c.n_groups:
            raise ConfigError(explain("MambaConfig.n_groups", f"a divisor of {self.n_heads} heads", c.n_groups))
        mixed = self.d_inner + 2 * c.n_groups * c.d_state
        self.in_proj = linear(self.d_model, mixed)  # u, B, C
        self.gate_proj = linear(self.d_model, self.d_inner + self.n_heads)  # z, dt
        self.conv = ShortConv(mixed, c.d_conv)
        self.A_log = keep_float32(nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log()))
        self.dt_bias = dt_bias(self.n_heads, c.dt_min, c.dt_max)
        self.norm = HeadNorm(c.n_groups, self.d_inner // c.n_groups, eps=c.norm_eps)

    def _init_s6(self) -> None:
        c = self.config
        self.n_heads = self.d_inner  # every channel has its own decay
        self.dt_rank = c.dt_rank or math.ceil(self.d_model / 16)
        self.in_proj = linear(self.d_model, self.d_inner)  # u
        self.gate_proj = linear(self.d_model, self.d_inner)  # z
        self.conv = ShortConv(self.d_inner, c.d_conv)
        self.x_proj = linear(self.d_inner, self.dt_rank + 2 * c.d_state)
        self.dt_proj = linear(self.dt_rank, self.d_inner)
        steps = torch.arange(1.0, c.d_state + 1).repeat(self.d_inner, 1)
        self.A_log = keep_float32(nn.Parameter(steps.log()))
        self.dt_bias = dt_bias(self.d_inner, c.dt_min, c.dt_max)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> MambaState:
        """The state before the first position."""
        c = self.config
        shape = (self.n_heads, c.head_dim, c.d_state) if c.variant == "ssd" else (self.d_inner, c.d_state)
        device = self.A_log.device if device is None else device
        ssm = torch.zeros(batch_size, *shape, dtype=compute_dtype(self.A_log), device=device)
        return MambaState(self.conv.init_state(batch_size, device=device), ssm)

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        trace: TraceSpec | None = None,
    ) -> MixerOutput:
        """Mixes a sequence.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, or None; never modified.
            segment_ids: (B, T) ints; nothing crosses a change of id.
            mask: (B, T) bool; False positions do not exist for the others.
            trace: accepted for the contract; a Mamba has no record of its own.

        Returns:
            MixerOutput with y (B, T, D) and a MambaState.

        Raises:
            ShapeError, StateError: arguments that do not fit.
        """
        check_input("Mamba", x, self.d_model)
        check_state("Mamba", state, MambaState)
        mix = self._ssd if self.config.variant == "ssd" else self._s6
        y, state = mix(x, state, segment_ids, mask)
        return MixerOutput(self.out_proj(y), state)

    def _ssd(
        self, x: Tensor, state: MambaState | None, segment_ids: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        c = self.config
        maps = c.n_groups * c.d_state
        z, dt = self.gate_proj(x).split([self.d_inner, self.n_heads], dim=-1)
        mixed, conv = self.conv(self.in_proj(x), state and state.conv, segment_ids=segment_ids, mask=mask)
        u, B, C = mixed.split([self.d_inner, maps, maps], dim=-1)
        y, ssm = ssd(
            u.unflatten(-1, (self.n_heads, c.head_dim)),
            F.softplus(wide(dt) + self.dt_bias),
            -self.A_log.exp(),
            B.unflatten(-1, (c.n_groups, c.d_state)),
            C.unflatten(-1, (c.n_groups, c.d_state)),
            self.D,
            state and state.ssm,
            segment_ids=segment_ids,
            mask=mask,
        )
        gated = gate(y.flatten(2), z, "silu").unflatten(-1, (c.n_groups, -1))
        return self.norm(gated).flatten(2), MambaState(conv, ssm)

    def _s6(
        self, x: Tensor, state: MambaState | None, segment_ids: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        n = self.config.d_state
        z = self.gate_proj(x)
        u, conv = self.conv(self.in_proj(x), state and state.conv, segment_ids=segment_ids, mask=mask)
        low, B, C = self.x_proj(u).split([self.dt_rank, n, n], dim=-1)
        dt = F.softplus(wide(self.dt_proj(low)) + self.dt_bias)
        A = -self.A_log.exp()
        y, ssm = selective_scan(u, dt, A, B, C, self.D, state and state.ssm, segment_ids=segment_ids, mask=mask)
        return gate(y, z, "silu"), MambaState(conv, ssm)
