"""XLSTM: the language module, an mLSTM cell between a short convolution and an output gate (Beck et al. 2024).

B batch, T time, D model width, H heads, K key width, V value width, W conv width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, explain
from synapse_arch.introspection.probes import gate_trace
from synapse_arch.introspection.trace import TraceSpec
from synapse_arch.modules.common import (
    HeadNorm,
    MixerOutput,
    ShortConv,
    check_input,
    check_numbers,
    check_positive,
    check_state,
    keep_float32,
    linear,
    wide,
)
from synapse_arch.ops import MLSTMState, mlstm
from synapse_arch.ops._backends import compute_dtype
from synapse_arch.ops.gating import gate


@dataclass(frozen=True, kw_only=True)
class XLSTMConfig:
    """Sizes and gates of the language module.

    Attributes:
        d_hidden: width of the values over all heads; None means the model width.
        n_heads: H.
        qk_ratio: key width over value width (xLSTM-7B: 0.5).
        d_conv: W, positions the short convolution in front of q and k sees.
        gate_cap: input and forget pre-activations pass through cap · tanh(x / cap).
        input_gate_bias: what the input gate starts from.
        forget_gate_bias: the heads' forget gates start evenly spread over this range.
    """

    d_hidden: int | None = None
    n_heads: int = 4
    qk_ratio: float = 0.5
    d_conv: int = 4
    gate_cap: float = 15.0
    input_gate_bias: float = 0.0
    forget_gate_bias: tuple[float, float] = (3.0, 6.0)

    def __post_init__(self) -> None:
        check_positive(self, n_heads=1, d_conv=2, qk_ratio=1e-3, gate_cap=1e-3)
        if self.d_hidden is not None:
            check_positive(self, d_hidden=1)
        check_numbers(self, "input_gate_bias", self.input_gate_bias)
        given = self.forget_gate_bias
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ConfigError(explain("XLSTMConfig.forget_gate_bias", "(first, last), two numbers", repr(given)))
        check_numbers(self, "forget_gate_bias", *given)
        object.__setattr__(self, "forget_gate_bias", tuple(given))


class MLSTMLayerState(NamedTuple):
    """What an XLSTM remembers."""

    conv: Tensor
    """(B, W-1, D)."""
    cell: MLSTMState
    """The matrix memory."""
    mass: Tensor | None = None
    """(B, H) what the memory holds, for the age of its content; only while gates are traced."""
    age: Tensor | None = None
    """(B, H) tokens; only while gates are traced."""


class XLSTM(nn.Module):
    """The language module: an mLSTM with short convolution, per-head norm and output gate.

    Args:
        d_model: D.
        config: sizes and gates.
        residual_branches: the output projection starts 1/sqrt of this smaller.

    Raises:
        ConfigError: the heads do not divide the hidden width, or leave keys of width 0.

    >>> module = XLSTM(32, XLSTMConfig(n_heads=2))
    >>> y, state, _ = module(torch.randn(2, 5, 32))
    >>> tuple(y.shape), tuple(state.cell.C.shape)
    ((2, 5, 32), (2, 2, 8, 16))
    """

    def __init__(self, d_model: int, config: XLSTMConfig | None = None, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config or XLSTMConfig()
        c = self.config
        hidden = c.d_hidden or d_model
        if hidden % c.n_heads:
            raise ConfigError(explain("XLSTMConfig.n_heads", f"a divisor of the hidden width {hidden}", c.n_heads))
        self.d_value = hidden // c.n_heads
        self.d_key = round(self.d_value * c.qk_ratio)
        if self.d_key < 1:
            raise ConfigError(explain("XLSTMConfig.qk_ratio", "keys at least 1 wide", f"{self.d_value} * {c.qk_ratio}"))
        self.conv = ShortConv(d_model, c.d_conv)
        self.qk_proj = linear(d_model, 2 * c.n_heads * self.d_key)
        self.in_proj = linear(d_model, 2 * hidden + 2 * c.n_heads)  # values, output gate, input and forget gates
        self.input_gate_bias = keep_float32(nn.Parameter(torch.full((c.n_heads,), float(c.input_gate_bias))))
        self.forget_gate_bias = keep_float32(nn.Parameter(torch.linspace(*c.forget_gate_bias, c.n_heads)))
        self.norm = HeadNorm(c.n_heads, self.d_value)
        self.out_proj = linear(hidden, d_model, scale=residual_branches**-0.5)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> MLSTMLayerState:
        """The state before the first position."""
        conv = self.conv.init_state(batch_size, device=device)
        heads = (batch_size, self.config.n_heads)
        dtype = compute_dtype(self.input_gate_bias)
        zeros = torch.zeros(*heads, self.d_key, self.d_value + 2, dtype=dtype, device=conv.device)
        C, n, m = zeros[..., :-2].clone(), zeros[..., -2].clone(), zeros[..., 0, -1].clone()
        return MLSTMLayerState(conv, MLSTMState(C, n, m))

    def forward(
        self,
        x: Tensor,
        state: MLSTMLayerState | None = None,
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
            trace: what to record; gates from level "gates" on.

        Returns:
            MixerOutput with y (B, T, D), an MLSTMLayerState and a GateTrace where asked for.

        Raises:
            ShapeError, StateError: arguments that do not fit.
        """
        check_input("XLSTM", x, self.d_model)
        check_state("XLSTM", state, MLSTMLayerState)
        c, hidden = self.config, self.config.n_heads * self.d_value
        packing: Any = {"segment_ids": segment_ids, "mask": mask}
        local, conv = self.conv(x, state and state.conv, **packing)
        q, k = self.qk_proj(local).unflatten(-1, (2 * c.n_heads, self.d_key)).chunk(2, dim=2)
        v, o, i, f = self.in_proj(x).split([hidden, hidden, c.n_heads, c.n_heads], dim=-1)
        v, o = (z.unflatten(-1, (c.n_heads, self.d_value)) for z in (v, o))
        i, f = self._cap(wide(i) + self.input_gate_bias), self._cap(wide(f) + self.forget_gate_bias)
        h, cell = mlstm(q, k, v, i, f, state and state.cell, **packing)
        record, mass, age = None, None, None
        if trace is not None and trace.wants("gates"):
            record, mass, age = gate_trace(
                k, v, i, F.logsigmoid(f), torch.sigmoid(o), state and state.cell, cell, trace,
                mass=state and state.mass, age=state and state.age, **packing,
            )  # fmt: skip
        y = self.out_proj(gate(self.norm(h), o, "sigmoid").flatten(2))
        return MixerOutput(y, MLSTMLayerState(conv, cell, mass, age), record)

    def _cap(self, gate: Tensor) -> Tensor:
        """The soft cap of xLSTM-7B (Beck et al. 2025, §3): no gate can run away."""
        return self.config.gate_cap * torch.tanh(gate / self.config.gate_cap)
