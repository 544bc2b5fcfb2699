"""What every region shares: the output record, norms, the short convolution, initialisation, config checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, ShapeError, StateError, explain
from synapse_arch.ops import causal_conv1d
from synapse_arch.ops._backends import compute_dtype, no_autocast
from synapse_arch.ops.gating import rms_norm


class MixerOutput(NamedTuple):
    """What every sequence mixer returns."""

    y: Tensor
    """(B, T, D), without the residual."""
    state: Any
    """The mixer's state after the last position, a NamedTuple of tensors with one row a sequence."""
    trace: Any = None
    """The mixer's record where a trace was asked for."""


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension.

    Args:
        width: D.
        eps: added to the mean square.
    """

    def __init__(self, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = no_decay(nn.Parameter(torch.ones(width)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm over each head's width, with a weight for every channel of every head.

    Args:
        n_heads: H.
        width: V.
        eps: added to the mean square.
    """

    def __init__(self, n_heads: int, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = no_decay(nn.Parameter(torch.ones(n_heads, width)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, V) -> (B, T, H, V)."""
        return rms_norm(x, self.weight, self.eps)


class ShortConv(nn.Module):
    """Causal depthwise convolution and SiLU, the local mixing in front of each recurrence.

    Args:
        channels: D.
        width: W, positions the kernel sees.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = no_decay(nn.Parameter(torch.zeros(channels)))

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Tensor:
        """(B, W-1, D) zeros, float32 or as wide as the weight."""
        channels, width = self.weight.shape
        device = self.weight.device if device is None else device
        return torch.zeros(batch_size, width - 1, channels, dtype=compute_dtype(self.weight), device=device)

    def forward(
        self, x: Tensor, state: Tensor | None, *, segment_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) and (B, W-1, D) -> the same."""
        return causal_conv1d(x, self.weight, self.bias, state, activation="silu", segment_ids=segment_ids, mask=mask)


def no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Marks a parameter that weight decay must leave alone (decay rates, biases, norms)."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def keep_float32(parameter: nn.Parameter) -> nn.Parameter:
    """Marks a parameter that is never loaded narrower than it was saved (decay rates, routers), and never decayed.

    Calling `.to(dtype)` on a module narrows it as any other.
    """
    parameter._keep_float32 = True  # type: ignore[attr-defined]
    return no_decay(parameter)


def linear(d_in: int, d_out: int, *, scale: float = 1.0, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A bias-free projection with normal weights of standard deviation scale / sqrt(d_in)."""
    layer = kind(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=scale * d_in**-0.5)
    return layer


def wide(x: Tensor) -> Tensor:
    """Gives x in float32 or wider, for gates and decays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear whose gradients autocast leaves alone: torch.compile runs a backward pass under the forward pass's.

    Args:
        x: (..., D).
        weight: (E, D), of x's dtype.

    Returns:
        (..., E).
    """
    return _WideLinear.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with no_autocast(grad):
            return grad @ weight, grad.flatten(0, -2).transpose(0, 1) @ x.flatten(0, -2)


def unit(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Scales to unit length: x / sqrt(Σ x² + K eps) over the last dimension, K wide; safe at 0."""
    y: Tensor = rms_norm(x, None, eps) * x.shape[-1] ** -0.5
    return y


def dt_bias(size: int, dt_min: float, dt_max: float) -> nn.Parameter:
    """Biases whose softplus is log-uniform in [dt_min, dt_max], at least 1e-4 (Gu & Dao 2023, §3.6)."""
    dt = torch.exp(torch.rand(size) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=1e-4)
    return keep_float32(nn.Parameter(dt + torch.log(-torch.expm1(-dt))))


def check_input(name: str, x: Tensor, d_model: int) -> None:
    """Raises ShapeError unless x is (B, T, d_model) with at least one row and one position."""
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != d_model or 0 in x.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(explain(f"{name} input", f"(B, T, {d_model}) with B, T > 0", got, "check d_model"))
    if not x.dtype.is_floating_point:
        raise ShapeError(explain(f"{name} input", "a floating dtype", x.dtype, "convert it with x.float()"))


def check_state(name: str, state: object, kind: type) -> None:
    """Raises StateError unless `state` is None or a `kind`."""
    if state is not None and not isinstance(state, kind):
        got = type(state).__name__
        raise StateError(
            explain(f"{name} state", kind.__name__, got, "pass what init_state or an earlier call returned")
        )


def check_positive(config: object, **fields: float) -> None:
    """Raises ConfigError for every named field that is not above its given bound (int fields must be ints)."""
    for name, least in fields.items():
        value = getattr(config, name)
        wanted = int if isinstance(least, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not least <= value < math.inf:
            kind = "an integer" if isinstance(least, int) else "a number"
            raise ConfigError(explain(f"{type(config).__name__}.{name}", f"{kind} >= {least}", repr(value)))


def check_numbers(config: object, name: str, *values: object) -> None:
    """Raises ConfigError unless all values, those of the named field, are finite numbers."""
    numbers = (isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if not all(numbers):
        raise ConfigError(explain(f"{type(config).__name__}.{name}", "finite numbers", repr(getattr(config, name))))


def check_range(config: object, low: str, high: str) -> None:
    """Raises ConfigError unless the field named `low` is at most the one named `high`."""
    least, most = getattr(config, low), getattr(config, high)
    if least > most:
        raise ConfigError(explain(f"{type(config).__name__}.{low}", f"at most {high}={most}", least))


def check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless the named field is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(explain(f"{type(config).__name__}.{name}", f"one of {', '.join(choices)}", repr(value)))


def check_flag(config: object, name: str) -> None:
    """Raises ConfigError unless the named field is True or False."""
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise ConfigError(explain(f"{type(config).__name__}.{name}", "True or False", repr(value)))
