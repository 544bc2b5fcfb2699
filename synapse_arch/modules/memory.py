"""FastWeightMemory: a key-value matrix that is written while the model reads.

Delta rule with decay and short convolution (Yang et al. 2024b), writing strengths up to 2 (Grazzi et al. 2024), or
plain Hebbian outer products. B batch, T time, D model width, H heads, K key width, V value width, W conv width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synapse_arch.introspection.probes import memory_trace
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
    unit,
    wide,
)
from synapse_arch.ops import delta_rule
from synapse_arch.ops.delta_rule import Rule
from synapse_arch.ops.gating import gate


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Sizes and rule of the fast-weight memory.

    Attributes:
        n_heads: H.
        d_key: K, width of a key: how many facts a head can hold apart.
        d_value: V.
        rule: "delta" (a write first erases what its key held) or "hebbian" (it adds).
        d_conv: W, positions the short convolution sees.
        beta_max: write strengths lie in (0, beta_max); above 1 the state can be reflected.
        decay_min, decay_max: the heads' decay rates A start log-uniform in this range.
        dt_min, dt_max: range of the step sizes at initialisation.
    """

    n_heads: int = 4
    d_key: int = 64
    d_value: int = 64
    rule: Rule = "delta"
    d_conv: int = 4
    beta_max: float = 2.0
    decay_min: float = 0.01
    decay_max: float = 16.0
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        check_choice(self, "rule", ("delta", "hebbian"))
        check_positive(self, n_heads=1, d_key=1, d_value=1, d_conv=2, beta_max=1e-3)
        check_positive(self, decay_min=1e-9, decay_max=1e-9, dt_min=1e-6, dt_max=1e-6)
        check_range(self, "decay_min", "decay_max")
        check_range(self, "dt_min", "dt_max")


class FastWeightState(NamedTuple):
    """What a memory holds."""

    conv: Tensor
    """(B, W-1, H (2K + V))."""
    weights: Tensor
    """(B, H, K, V) the fast weights, float32 or wider."""


class FastWeightMemory(nn.Module):
    """A memory that learns during inference: keys and values are written into a matrix a head, queries read it.

    Args:
        d_model: D.
        config: sizes and rule.
        residual_branches: the output projection starts 1/sqrt of this smaller.

    >>> memory = FastWeightMemory(32, MemoryConfig(n_heads=2, d_key=8, d_value=8))
    >>> y, state, _ = memory(torch.randn(2, 5, 32))
    >>> tuple(y.shape), tuple(state.weights.shape)
    ((2, 5, 32), (2, 2, 8, 8))
    """

    def __init__(self, d_model: int, config: MemoryConfig | None = None, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config or MemoryConfig()
        c = self.config
        self.mixed = c.n_heads * (2 * c.d_key + c.d_value)  # queries, keys, values
        hidden = c.n_heads * c.d_value
        self.in_proj = linear(d_model, self.mixed)
        self.gate_proj = linear(d_model, hidden + 2 * c.n_heads)  # output gate, write strength, step
        self.conv = ShortConv(self.mixed, c.d_conv)
        rates = torch.empty(c.n_heads).uniform_(math.log(c.decay_min), math.log(c.decay_max))
        self.A_log = keep_float32(nn.Parameter(rates))
        self.dt_bias = dt_bias(c.n_heads, c.dt_min, c.dt_max)
        self.norm = HeadNorm(c.n_heads, c.d_value)
        self.out_proj = linear(hidden, d_model, scale=residual_branches**-0.5)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> FastWeightState:
        """The empty memory."""
        c = self.config
        conv = self.conv.init_state(batch_size, device=device)
        shape = (batch_size, c.n_heads, c.d_key, c.d_value)
        return FastWeightState(conv, torch.zeros(shape, dtype=self.A_log.dtype, device=conv.device))

    def forward(
        self,
        x: Tensor,
        state: FastWeightState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        trace: TraceSpec | None = None,
    ) -> MixerOutput:
        """Writes and reads along a sequence.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, or None; never modified.
            segment_ids: (B, T) ints; nothing crosses a change of id.
            mask: (B, T) bool; False positions neither write nor exist for the others.
            trace: what to record; the memory from level "gates" on.

        Returns:
            MixerOutput with y (B, T, D), a FastWeightState and a MemoryTrace where asked for.

        Raises:
            ShapeError, StateError: arguments that do not fit.
        """
        check_input("FastWeightMemory", x, self.d_model)
        check_state("FastWeightMemory", state, FastWeightState)
        c = self.config
        packing: Any = {"segment_ids": segment_ids, "mask": mask}
        opening, write, step = self.gate_proj(x).split([c.n_heads * c.d_value, c.n_heads, c.n_heads], dim=-1)
        mixed, conv = self.conv(self.in_proj(x), state and state.conv, **packing)
        keys = c.n_heads * c.d_key
        q, k, v = mixed.split([keys, keys, self.mixed - 2 * keys], dim=-1)
        q, k = (unit(wide(z.unflatten(-1, (c.n_heads, c.d_key)))) for z in (q, k))
        v = v.unflatten(-1, (c.n_heads, c.d_value))
        beta = c.beta_max * torch.sigmoid(wide(write))
        log_decay = -self.A_log.exp() * F.softplus(wide(step) + self.dt_bias)
        o, weights = delta_rule(q, k, v, beta, log_decay, state and state.weights, rule=c.rule, **packing)
        record = None
        if trace is not None and trace.wants("gates"):
            before = state and state.weights
            record = memory_trace(q, k, v, beta, log_decay, o, before, weights, trace, rule=c.rule, **packing)
        y = self.out_proj(gate(self.norm(o).flatten(2), opening, "silu"))
        return MixerOutput(y, FastWeightState(conv, weights), record)
