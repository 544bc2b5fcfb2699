"""Short causal depthwise convolution over time, with a carried state.

B batch, T time, D channels, W kernel width. Outside position 0 the kernel reads the state, which holds
the last W-1 inputs, oldest first, so that any split of a sequence gives the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError, ShapeError, explain
from synapse_arch.ops._backends import compute_dtype, is_step
from synapse_arch.ops._checks import Sizes, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._opaque import opaque
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
    dtype = compute_dtype(x, weight, bias, state)
    before = x.new_zeros(sizes["B"], history, sizes["D"], dtype=dtype) if state is None else state.to(dtype)
    if activation not in (None, "silu"):
        raise ConfigError(explain("activation", "None or 'silu'", repr(activation)))
    taps = _Taps(weight.to(dtype), None if bias is None else bias.to(dtype), activation == "silu")
    if is_step(sizes["T"]):
        y, after = _step(x.to(dtype), taps, before, mask)
    elif mask is not None:
        y, after = _masked(x.to(dtype), taps, before, segment_ids, mask)
    else:
        y, numbers = _depthwise(before, x.to(dtype), taps, segment_index(segment_ids, None))
        after = torch.cat([before, x[:, -history:].to(dtype)], dim=1)[:, -history:]
        if numbers is None:
            after = _packed(after)
        else:
            after = torch.where((numbers[:, -history:] == numbers[:, -1:])[..., None], after, 0.0)
    return y.to(x.dtype), after


class _Taps(NamedTuple):
    """What is done at every position: kernel (D, W), bias (D,), and whether SiLU follows."""

    weight: Tensor
    bias: Tensor | None
    silu: bool


def _step(x: Tensor, taps: _Taps, before: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One position: the kernel over the state and it, and both moved on by one; a masked one moves nothing."""
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)
    read = torch.cat([before, x], dim=1)  # (B, W, D)
    y = (read * taps.weight.T).sum(1, keepdim=True)
    if taps.bias is not None:
        y += taps.bias
    after = _packed(read[:, 1:]) if mask is None else torch.where(mask[..., None], read[:, 1:], before)
    return F.silu(y, inplace=True) if taps.silu else y, after


def _depthwise(before: Tensor, x: Tensor, taps: _Taps, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Convolves x (B, T, D) behind before (B, W-1, D), each tap dropped where it would read another segment.

    Also returns the segment numbers of before and x (B, W-1+T): the incoming state belongs to segment 0.
    """
    numbers = None if segments is None else F.pad(segments, (before.shape[1], 0))
    fused = torch.compiler.is_compiling() and x.device.type != "cpu"
    y: Tensor = (_fusible if fused else _shifted)(before, x, taps.weight, taps.bias, numbers, taps.silu)
    return y, numbers


def _fusible(
    before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor | None, silu: bool
) -> Tensor:
    """The same as one expression, which a compiler for a GPU makes one kernel of; eagerly it would keep every tap."""
    length, history = x.shape[1], before.shape[1]
    read = torch.cat([before, x], dim=1)
    y = x * weight[:, -1]
    for w in range(history):
        y = y + _same_segment(read[:, w : w + length], numbers, history, slice(0, length), w) * weight[:, w]
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y


class _ShiftedSum(torch.autograd.Function):
    """Depthwise convolution, by oneDNN where it can or else as W shifted multiply-adds.

    Keeps its input only, and runs again for SiLU's gradient. oneDNN knows no segments: what it got wrong, a few rows
    at each change of segment, is put right afterwards by overwriting, so nothing crosses, not even a NaN.
    """

    @staticmethod
    def forward(
        ctx: Any, before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor | None, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(before, x, weight, bias, numbers)
        ctx.silu = silu
        y = _filtered(before, x, weight, bias, numbers)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, x, weight, bias, numbers = ctx.saved_tensors
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _filtered(before, x, weight, bias, numbers))
        wants_before, wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        by_onednn, history = _by_onednn(x), before.shape[1]
        grad_before = torch.zeros_like(before) if wants_before else None
        grad_x = None
        if wants_x:  # the gradient of a convolution is one with the kernel turned round
            grad_x = _convolved(grad, weight.flip(1), None)[:, history:] if by_onednn else grad * weight[:, -1]
            if by_onednn and numbers is not None:
                _mend_backward(grad_x, grad, weight, numbers)
        product = grad * x if wants_weight else None  # one buffer for the weight's gradient, tap after tap
        columns = [] if product is None else [product.sum((0, 1))]
        for w in reversed(range(history)):
            for rows, source, span in _reads(before, x, w):
                known = by_onednn and source is x  # its gradient is there, and few of its products are to be dropped
                arriving = grad[:, rows] if known else _same_segment(grad[:, rows], numbers, history, rows, w)
                target = grad_x if source is x else grad_before
                if target is not None and not known:
                    target[:, span].addcmul_(arriving, weight[:, w])
                if product is not None:
                    torch.mul(arriving, source[:, span], out=product[:, rows])
            if product is not None:
                if by_onednn and numbers is not None:
                    product[_changes(numbers, history, w)] = 0.0
                columns.insert(0, product.sum((0, 1)))
        grad_weight = torch.stack(columns, dim=1) if columns else None
        grad_bias = grad.sum((0, 1)) if wants_bias else None
        return grad_before, grad_x, grad_weight, grad_bias, None, None


LEAST_FOR_ONEDNN = 16
"""Positions from which on oneDNN's convolution beats W shifted multiply-adds; by much, up to three times."""


def _by_onednn(x: Tensor) -> bool:
    """Whether there is a library for it: oneDNN convolves float32 on CPUs."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] >= LEAST_FOR_ONEDNN
    return fits and torch.backends.mkldnn.is_available()


def _filtered(before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor | None) -> Tensor:
    """(B, W-1, D) and (B, T, D) -> (B, T, D), the convolution without what follows it."""
    if not _by_onednn(x):
        return _shifted_sum(before, x, weight, bias, numbers)
    y = _convolved(x, weight, bias)[:, : x.shape[1]]
    for w in range(weight.shape[1] - 1):  # the library saw zeros where the state stands
        rows, source, span = next(_reads(before, x, w))
        y[:, rows].addcmul_(source[:, span], weight[:, w])
    if numbers is not None:
        _mend(y, before, x, weight, bias, numbers)
    return y


def _changes(numbers: Tensor, history: int, w: int) -> tuple[Tensor, ...]:
    """Rows and positions (N,) whose tap w would read another segment; those of tap 0 are all that any tap has."""
    length = numbers.shape[1] - history
    return (numbers[:, history:] != numbers[:, w : w + length]).nonzero(as_tuple=True)


def _mend(y: Tensor, before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor) -> None:
    """Computes anew the outputs whose kernel would read another segment."""
    history = before.shape[1]
    row, at = (found[:, None] for found in _changes(numbers, history, 0))  # (N, 1)
    read = at + torch.arange(history + 1, device=x.device)  # (N, W) counted from the oldest of before
    taps = x[row, (read - history).clamp(min=0)]  # (N, W, D)
    taps = torch.where((read < history)[..., None], before[row, read.clamp(max=history - 1)], taps)
    other = numbers[row, read] != numbers[row, at + history]
    anew = taps.masked_fill_(other[..., None], 0.0).mul_(weight.T).sum(1, keepdim=True)
    y[row, at] = anew if bias is None else anew + bias


def _mend_backward(grad_x: Tensor, grad: Tensor, weight: Tensor, numbers: Tensor) -> None:
    """Computes anew the gradients of inputs that another segment's kernel would read."""
    history, last = weight.shape[1] - 1, grad.shape[1] - 1
    own, positions = numbers[:, history:], torch.arange(last + 1 + history, device=grad.device)
    furthest = positions[history:].clamp(max=last)
    row, at = (found[:, None] for found in (own != own[:, furthest]).nonzero(as_tuple=True))  # (N, 1)
    # (N, W); the last position is of another segment than these inputs: what is clamped to it adds nothing
    reader = (at + positions[: history + 1]).clamp(max=last)
    arriving = grad[row, reader].masked_fill_((own[row, reader] != own[row, at])[..., None], 0.0)
    grad_x[row, at] = arriving.mul_(weight.T.flip(0)).sum(1, keepdim=True)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, T, D) between W-1 zeros on both sides -> (B, T+W-1, D), a view of channels that lie side by side."""
    image, padding = x.transpose(1, 2).unsqueeze(2), [0, weight.shape[1] - 1]
    y = torch.convolution(image, weight[:, None, None], bias, [1, 1], padding, [1, 1], False, [0, 0], x.shape[2])
    return y.squeeze(2).transpose(1, 2)


def _shifted_sum(before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, numbers: Tensor | None) -> Tensor:
    """(B, W-1, D) and (B, T, D) -> (B, T, D), see `_depthwise`."""
    y = x * weight[:, -1]
    if bias is not None:
        y += bias
    for w in range(weight.shape[1] - 1):
        for rows, source, span in _reads(before, x, w):
            tap = _same_segment(source[:, span], numbers, before.shape[1], rows, w)
            y[:, rows].addcmul_(tap, weight[:, w])
    return y


def _reads(before: Tensor, x: Tensor, w: int) -> Iterator[tuple[slice, Tensor, slice]]:
    """What tap w reads: for which positions, from before or from x, and where there."""
    length, back = x.shape[1], before.shape[1] - w
    head = min(back, length)
    yield slice(0, head), before, slice(w, w + head)
    if back < length:
        yield slice(back, length), x, slice(0, length - back)


def _same_segment(z: Tensor, numbers: Tensor | None, history: int, rows: slice, w: int) -> Tensor:
    """Gives z (B, rows, D) with zeros at the positions whose tap w would read another segment; history = W-1."""
    if numbers is None:
        return z
    own = numbers[:, history + rows.start : history + rows.stop]
    return torch.where((numbers[:, rows.start + w : rows.stop + w] == own)[..., None], z, 0.0)


def _packed(state: Tensor) -> Tensor:
    """A copy with the strides of a fresh state: what is compiled for one serves the others."""
    return state.clone(memory_format=torch.contiguous_format)


def _masked(x: Tensor, taps: _Taps, state: Tensor, segment_ids: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real positions to the front, convolves, moves them back."""
    history = state.shape[1]
    if x.shape[1] == 1:  # a step: there is nothing to move
        x = torch.where(mask[..., None], x, 0.0)
        after = torch.where(mask[..., None], torch.cat([state[:, 1:], x], dim=1), state)
        return _depthwise(state, x, taps, None)[0], after
    order, inverse = compaction(mask)
    packed = x.gather(1, order[..., None].expand_as(x))
    packed = torch.where(mask.gather(1, order)[..., None], packed, 0.0)
    padded = torch.cat([state, packed], dim=1)
    real = mask.sum(dim=1, keepdim=True)
    last = real + torch.arange(history, device=x.device)  # (B, W-1) positions in padded
    after = padded.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
    packed_ids = None if segment_ids is None else segment_ids.gather(1, order)
    y, numbers = _depthwise(state, packed, taps, segment_index(packed_ids, None))
    if numbers is not None:
        same = numbers.gather(1, last) == numbers.gather(1, last[:, -1:])
        after = torch.where(same[..., None], after, 0.0)
    return y.gather(1, inverse[..., None].expand_as(y)), after


_shifted = opaque(
    _ShiftedSum,
    "shifted_sum(Tensor before, Tensor x, Tensor weight, Tensor? bias, Tensor? numbers, bool silu) -> (Tensor y)",
    keep=("before", "x", "weight", "bias", "numbers"),
    fake=lambda before, x, weight, bias, numbers, silu: torch.empty_like(x, memory_format=torch.contiguous_format),
)
