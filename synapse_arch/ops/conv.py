"""Short causal depthwise convolution over time, with a carried state.

B batch, T time, D channels, W kernel width. Outside position 0 the kernel reads the state, which holds
the last W-1 inputs, oldest first, so that any split of a sequence gives the same outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ShapeError, explain
from synapse_arch.ops._backends import compute_dtype
from synapse_arch.ops._checks import Sizes, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._packing import compaction, segment_index


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_w weight[:, w] · x_{t-W+1+w} + bias, per channel.

    Args:
        x: (B, T, D) inputs.
        weight: (D, W) kernel; the last column meets the current position.
        bias: (D,), optional.
        state: (B, W-1, D) the inputs before this call, oldest first, float32 or wider; None means zeros.
        segment_ids: (B, T) ints; the kernel never reaches across a change of id.
        mask: (B, T) bool; where False the position does not exist: nothing reads it, its output means nothing.

    Returns:
        y (B, T, D) in x's dtype and the new state (B, W-1, D), float32 or wider: the last inputs of the last segment,
        zeros before it. The input state is left as it is.

    Raises:
        ShapeError: x, weight, bias, segment_ids or mask do not fit.
        StateError: the state is of another batch, width or dtype.
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
    if mask is not None:
        y, after = _masked(x.to(dtype), weight, bias, before, segment_ids, mask)
    else:
        padded = torch.cat([before, x.to(dtype)], dim=1)
        segments = segment_index(segment_ids, None)
        if segments is None:
            y, after = _depthwise(padded, weight, bias), padded[:, -history:].clone()
        else:
            y, numbers = _within_segments(padded, weight, bias, segments)
            same = numbers[:, -history:] == numbers[:, -1:]
            after = torch.where(same[..., None], padded[:, -history:], 0.0)
    return y.to(x.dtype), after


def _depthwise(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as W shifted multiply-adds; padded (B, T+W-1, D) -> (B, T, D)."""
    return _ShiftedSum.apply(padded, weight.to(padded.dtype), None if bias is None else bias.to(padded.dtype))  # type: ignore[no-untyped-call, no-any-return]


class _ShiftedSum(torch.autograd.Function):
    """Depthwise convolution that keeps only its input for the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, padded: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        width = weight.shape[1]
        length = padded.shape[1] - width + 1
        ctx.save_for_backward(padded, weight)
        ctx.has_bias = bias is not None  # type: ignore[attr-defined]
        y = padded[:, :length] * weight[:, 0]
        if bias is not None:
            y += bias
        for w in range(1, width):
            y.addcmul_(padded[:, w : w + length], weight[:, w])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        padded, weight = ctx.saved_tensors
        width, length = weight.shape[1], grad.shape[1]
        grad_padded = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_padded = torch.zeros_like(padded)
            for w in range(width):
                grad_padded[:, w : w + length].addcmul_(grad, weight[:, w])
        if ctx.needs_input_grad[1]:
            columns = [(grad * padded[:, w : w + length]).sum((0, 1)) for w in range(width)]
            grad_weight = torch.stack(columns, dim=1)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 1))
        return grad_padded, grad_weight, grad_bias


def _within_segments(padded: Tensor, weight: Tensor, bias: Tensor | None, segments: Tensor) -> tuple[Tensor, Tensor]:
    """The same, each tap dropped where it would read another segment.

    Also returns the segment numbers of `padded`'s positions (B, T+W-1): the incoming state belongs to segment 0.
    """
    width, length = weight.shape[1], segments.shape[1]
    numbers = F.pad(segments, (width - 1, 0))
    y = padded.new_zeros(segments.shape[0], length, padded.shape[2])
    for w in range(width):
        same = numbers[:, w : w + length] == segments
        y = y + torch.where(same[..., None], padded[:, w : w + length] * weight[:, w].to(padded.dtype), 0.0)
    return (y if bias is None else y + bias.to(y.dtype)), numbers


def _masked(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, segment_ids: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Moves the real positions to the front, convolves, moves them back."""
    history = state.shape[1]
    order, inverse = compaction(mask)
    packed = x.gather(1, order[..., None].expand_as(x))
    packed = torch.where(mask.gather(1, order)[..., None], packed, 0.0)
    padded = torch.cat([state, packed], dim=1)
    real = mask.sum(dim=1, keepdim=True)
    last = real + torch.arange(history, device=x.device)  # (B, W-1) positions in padded
    after = padded.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
    if segment_ids is None:
        y = _depthwise(padded, weight, bias)
    else:
        segments = segment_index(segment_ids.gather(1, order), None)
        assert segments is not None
        y, numbers = _within_segments(padded, weight, bias, segments)
        same = numbers.gather(1, last) == numbers.gather(1, last[:, -1:])
        after = torch.where(same[..., None], after, 0.0)
    return y.gather(1, inverse[..., None].expand_as(y)), after
