"""Short causal depthwise convolution over time, with a carried state.

B batch, T time, D channels, W kernel width. Outside position 0 the kernel reads the state, which holds
the last W-1 inputs, oldest first, so that any split of a sequence gives the same outputs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError, ShapeError, explain
from synapse_arch.ops._backends import compute_dtype
from synapse_arch.ops._checks import Sizes, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._packing import compaction, segment_index


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_w weight[:, w] · x_{t-W+1+w} + bias, per channel, and SiLU of it where asked for.

    Args:
        x: (B, T, D) inputs.
        weight: (D, W) kernel; the last column meets the current position.
        bias: (D,), optional.
        state: (B, W-1, D) the inputs before this call, oldest first, float32 or wider; None means zeros.
        activation: "silu" or None.
        segment_ids: (B, T) ints; the kernel never reaches across a change of id.
        mask: (B, T) bool; where False the position does not exist: nothing reads it, its output means nothing.

    Returns:
        y (B, T, D) in x's dtype and the new state (B, W-1, D), float32 or wider: the last inputs of the last segment,
        zeros before it. The input state is left as it is.

    Raises:
        ShapeError: x, weight, bias, segment_ids or mask do not fit.
        StateError: the state is of another batch, width or dtype.
        ConfigError: an unknown activation.
    """
    sizes: Sizes = {}
    check_shape("x", x, "B T D", sizes, remedy="a sequence needs at least one position")
    check_shape("weight", weight, "D W", sizes)
    if sizes["W"] < 2:
        raise ShapeError(explain("weight", "(D, W) with W at least 2", tuple(weight.shape)))
    if bias is not None:
        check_shape("bias", bias, "D", sizes)
    check_float(x=x, weight=weight, bias=bias)
    history = sizes["W"] - 1
    check_state("state", state, f"B {history} D", sizes)
    check_packing(segment_ids, mask, sizes)
    dtype = compute_dtype(x, weight, state)
    before = x.new_zeros(sizes["B"], history, sizes["D"], dtype=dtype) if state is None else state.to(dtype)
    if activation not in (None, "silu"):
        raise ConfigError(explain("activation", "None or 'silu'", repr(activation)))
    taps = _Taps(weight.to(dtype), None if bias is None else bias.to(dtype), activation == "silu")
    if mask is not None:
        y, after = _masked(x.to(dtype), taps, before, segment_ids, mask)
    else:
        padded = torch.cat([before, x.to(dtype)], dim=1)
        segments = segment_index(segment_ids, None)
        y, numbers = _depthwise(padded, taps, segments)
        after = padded[:, -history:]
        if numbers is None:
            after = after.clone()
        else:
            after = torch.where((numbers[:, -history:] == numbers[:, -1:])[..., None], after, 0.0)
    return y.to(x.dtype), after


class _Taps(NamedTuple):
    """What is done at every position: kernel (D, W), bias (D,), and whether SiLU follows."""

    weight: Tensor
    bias: Tensor | None
    silu: bool


def _depthwise(padded: Tensor, taps: _Taps, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Convolves padded (B, T+W-1, D) to (B, T, D), each tap dropped where it would read another segment.

    Also returns the segment numbers of `padded`'s positions (B, T+W-1): the incoming state belongs to segment 0.
    """
    numbers = None if segments is None else F.pad(segments, (taps.weight.shape[1] - 1, 0))
    y: Tensor = _ShiftedSum.apply(padded, taps.weight, taps.bias, numbers, taps.silu)  # type: ignore[no-untyped-call]
    return y, numbers


class _ShiftedSum(torch.autograd.Function):
    """Depthwise convolution as W shifted multiply-adds; keeps its input only, and runs again for SiLU's gradient."""

    @staticmethod
    def forward(
        ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor | None, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(padded, weight, bias, numbers)
        ctx.silu = silu
        y = _shifted_sum(padded, weight, bias, numbers)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias, numbers = ctx.saved_tensors
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _shifted_sum(padded, weight, bias, numbers))
        wants_padded, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        width, length = weight.shape[1], grad.shape[1]
        grad_padded = torch.empty_like(padded) if wants_padded else None
        columns: list[Tensor] = []
        product = torch.empty_like(grad)
        for w in reversed(range(width)):
            arriving = grad if numbers is None else torch.where(_same(numbers, w, length), grad, 0.0)
            if grad_padded is not None and w == width - 1:
                torch.mul(arriving, weight[:, w], out=grad_padded[:, w:])
                grad_padded[:, :w] = 0.0
            elif grad_padded is not None:
                grad_padded[:, w : w + length].addcmul_(arriving, weight[:, w])
            if wants_weight:
                columns.insert(0, torch.mul(arriving, padded[:, w : w + length], out=product).sum((0, 1)))
        grad_weight = torch.stack(columns, dim=1) if wants_weight else None
        return grad_padded, grad_weight, grad.sum((0, 1)) if wants_bias else None, None, None


def _shifted_sum(padded: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor | None) -> Tensor:
    """(B, T+W-1, D) -> (B, T, D), see `_depthwise`."""
    width = weight.shape[1]
    length = padded.shape[1] - width + 1
    y = padded[:, width - 1 :] * weight[:, -1]
    if bias is not None:
        y += bias
    for w in range(width - 1):
        tap = padded[:, w : w + length]
        y.addcmul_(tap if numbers is None else torch.where(_same(numbers, w, length), tap, 0.0), weight[:, w])
    return y


def _same(numbers: Tensor, w: int, length: int) -> Tensor:
    """(B, T, 1): whether tap w of each position reads the position's own segment."""
    return (numbers[:, w : w + length] == numbers[:, -length:])[..., None]


def _masked(x: Tensor, taps: _Taps, state: Tensor, segment_ids: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real positions to the front, convolves, moves them back."""
    history = state.shape[1]
    order, inverse = compaction(mask)
    packed = x.gather(1, order[..., None].expand_as(x))
    packed = torch.where(mask.gather(1, order)[..., None], packed, 0.0)
    padded = torch.cat([state, packed], dim=1)
    real = mask.sum(dim=1, keepdim=True)
    last = real + torch.arange(history, device=x.device)  # (B, W-1) positions in padded
    after = padded.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
    packed_ids = None if segment_ids is None else segment_ids.gather(1, order)
    y, numbers = _depthwise(padded, taps, segment_index(packed_ids, None))
    if numbers is not None:
        same = numbers.gather(1, last) == numbers.gather(1, last[:, -1:])
        after = torch.where(same[..., None], after, 0.0)
    return y.gather(1, inverse[..., None].expand_as(y)), after
