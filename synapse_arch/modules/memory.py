"""FastWeightMemory: a key-value matrix that is written while the model reads.

Delta rule with decay and short convolution (Yang et al. 2024b), writing strengths up to 2 (Grazzi et al. 2024), or
plain Hebbian outer products; several writes a token (Siems et al. 2025) and a write gate apart from the erasing one
where asked for. B batch, T time, D model width, H heads, K key width, V value width, W conv width, M writes a token.
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
    check_flag,
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
from synapse_arch.ops._backends import compute_dtype
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
        n_householder: M, delta writes a token makes one after another, each with its own key, value and strength. Two
            can rotate the state, which one cannot: a single layer follows permutations of three things further (paper).
        write_gate: strengths apart for what a write erases (a head's, in (0, beta_max)) and for what it adds (each
            value channel's, in (0, 1)); with the hebbian rule only the latter act.
        d_conv: W, positions the short convolution sees.
        beta_max: write strengths lie in (0, beta_max); above 1 the state can be reflected.
        decay_min, decay_max: the heads' decay rates A start log-uniform in this range.
        dt_min, dt_max: range of the step sizes at initialisation.
    """

    n_heads: int = 2
    d_key: int = 64
    d_value: int = 64
    rule: Rule = "delta"
    n_householder: int = 2
    write_gate: bool = False
    d_conv: int = 4
    beta_max: float = 2.0
    decay_min: float = 0.01
    decay_max: float = 16.0
    dt_min: float = 1e-3
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        check_choice(self, "rule", ("delta", "hebbian"))
        check_flag(self, "write_gate")
        check_positive(self, n_heads=1, d_key=1, d_value=1, n_householder=1, d_conv=2, beta_max=1e-3)
        check_positive(self, decay_min=1e-9, decay_max=1e-9, dt_min=1e-6, dt_max=1e-6)
        check_range(self, "decay_min", "decay_max")
        check_range(self, "dt_min", "dt_max")


class FastWeightState(NamedTuple):
    """What a memory holds."""

    conv: Tensor
    """(B, W-1, H (K + M (K + V)))."""
    weights: Tensor
    """(B, H, K, V) the fast weights, float32 or wider."""


class MemorySignals(NamedTuple):
    """What a sequence does to the memory, as `ops.delta_rule` takes it; with M > 1 the axis M stands behind T."""

    q: Tensor
    """(B, T, H, K) queries."""
    k: Tensor
    """(B, T, [M,] H, K) keys."""
    v: Tensor
    """(B, T, [M,] H, V) values."""
    beta: Tensor
    """(B, T, [M,] H) strengths."""
    log_decay: Tensor
    """(B, T, H)."""
    write: Tensor | None
    """(B, T, [M,] H, V) strengths of the values, None where they are beta."""


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
        keys, hidden = c.n_heads * c.d_key, c.n_heads * c.d_value
        steps = c.n_householder
        self.mixed = [keys, steps * keys, steps * hidden]  # queries, keys, values
        self.gates = [hidden, steps * c.n_heads, c.n_heads]  # output gate, strength, step
        if c.write_gate:
            self.gates.append(steps * hidden)
        self.in_proj = linear(d_model, sum(self.mixed))
        self.gate_proj = linear(d_model, sum(self.gates))
        self.conv = ShortConv(sum(self.mixed), c.d_conv)
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
        return FastWeightState(conv, torch.zeros(shape, dtype=compute_dtype(self.A_log), device=conv.device))

    def forward(
        self,
        x: Tensor,
        state: FastWeightState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        trace: TraceSpec | None = None,
        plasticity: Tensor | None = None,
    ) -> MixerOutput:
        """Writes and reads along a sequence.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, or None; never modified.
            segment_ids: (B, T) ints; nothing crosses a change of id.
            mask: (B, T) bool; False positions neither write nor exist for the others.
            trace: what to record; the memory from level "gates" on.
            plasticity: (B,) multiplies each row's writing strengths and log decays; at 0 the memory stays as it is.

        Returns:
            MixerOutput with y (B, T, D), a FastWeightState and a MemoryTrace where asked for.

        Raises:
            ShapeError, StateError: arguments that do not fit.
        """
        check_input("FastWeightMemory", x, self.d_model)
        check_state("FastWeightMemory", state, FastWeightState)
        packing: Any = {"segment_ids": segment_ids, "mask": mask}
        signals, opening, conv = self._signals(x, state, plasticity, packing)
        how: Any = {**signals._asdict(), "state": state and state.weights, "rule": self.config.rule, **packing}
        o, weights = delta_rule(**how)
        record = None
        if trace is not None and trace.wants("gates"):
            record = trace.record(lambda: memory_trace(o=o, final=weights, spec=trace, **how))
        y = self.out_proj(gate(self.norm(o).flatten(2), opening, "silu"))
        return MixerOutput(y, FastWeightState(conv, weights), record)

    def signals(
        self,
        x: Tensor,
        state: FastWeightState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        plasticity: Tensor | None = None,
    ) -> MemorySignals:
        """What `forward` of the same arguments does to the memory and asks of it."""
        return self._signals(x, state, plasticity, {"segment_ids": segment_ids, "mask": mask})[0]

    def _signals(
        self, x: Tensor, state: FastWeightState | None, plasticity: Tensor | None, packing: dict[str, Any]
    ) -> tuple[MemorySignals, Tensor, Tensor]:
        """The signals, the output gate's pre-activation (B, T, H V), and the convolution's state."""
        c = self.config
        opening, strength, step, *amount = self.gate_proj(x).split(self.gates, dim=-1)
        mixed, conv = self.conv(self.in_proj(x), state and state.conv, **packing)
        q, k, v = mixed.split(self.mixed, dim=-1)
        q, k = unit(wide(q.unflatten(-1, (c.n_heads, c.d_key)))), unit(wide(self._by_write(k, c.d_key)))
        v = self._by_write(v, c.d_value)
        beta = c.beta_max * torch.sigmoid(wide(self._by_write(strength)))
        log_decay = -self.A_log.exp() * F.softplus(wide(step) + self.dt_bias)
        write = torch.sigmoid(wide(self._by_write(amount[0], c.d_value))) if amount else None
        if plasticity is not None:
            beta, log_decay = _by_row(beta, plasticity), _by_row(log_decay, plasticity)
            write = None if write is None else _by_row(write, plasticity)
        return MemorySignals(q, k, v, beta, log_decay, write), opening, conv

    def _by_write(self, x: Tensor, *width: int) -> Tensor:
        """(B, T, M H ...) -> (B, T, M, H, ...), without the axis M where a token writes once."""
        steps = self.config.n_householder
        sizes = (self.config.n_heads, *width)
        y: Tensor = x.unflatten(-1, sizes if steps == 1 else (steps, *sizes))
        return y


def _by_row(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplies each row of x (B, ...) by its own factor (B,)."""
    return x * factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
