"""Elementwise pieces every region ends with, keeping for the backward pass only what came in.

B batch, T time, H heads, V head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.ops._backends import no_autocast


def gate(x: Tensor, logits: Tensor, activation: Literal["sigmoid", "silu"]) -> Tensor:
    """Computes x · activation(logits) elementwise; the activation is computed again for the gradient.

    Args:
        x: any shape.
        logits: the same shape.
        activation: "sigmoid" or "silu".

    Returns:
        The product, in the wider of both dtypes.
    """
    if not torch.is_grad_enabled():
        return x * (F.silu(logits) if activation == "silu" else torch.sigmoid(logits))
    return _Gate.apply(x, logits, activation == "silu")  # type: ignore[no-any-return, no-untyped-call]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, logits)
        ctx.silu = silu
        return x * (F.silu(logits) if silu else torch.sigmoid(logits))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, logits = ctx.saved_tensors
        opened = F.silu(logits) if ctx.silu else torch.sigmoid(logits)
        arriving = (grad * x).to(logits.dtype)
        if ctx.silu:
            grad_logits = torch.ops.aten.silu_backward(arriving, logits)
        else:
            grad_logits = torch.ops.aten.sigmoid_backward(arriving, opened)
        return (grad * opened).to(x.dtype), grad_logits, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Computes x / sqrt(mean x² + eps) · weight over the last dimension (Zhang & Sennrich 2019).

    Args:
        x: (..., V).
        weight: (V,), or (H, V) for an x of (..., H, V); None for none.
        eps: added to the mean square.

    Returns:
        x's shape, in the wider of both dtypes.
    """
    if not torch.is_grad_enabled() and (weight is None or weight.dtype == x.dtype):
        y = F.rms_norm(x, x.shape[-1:], None, eps)
        return y if weight is None else y.mul_(weight)
    if weight is not None and weight.dim() == 2 and weight.shape[0] == 1:
        weight = weight[0]  # torch 2.11 returns a gradient of this shape whatever it was, where it compiles for a GPU
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """In fewer passes over memory than torch's composite form takes on the CPU, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = _wide(x)
        y = (wide * _scale(wide, eps)).to(x.dtype)
        if torch.compiler.is_compiling():
            # torch 2.11 loses the gradient of what was changed in place, or cast to the dtype it had.
            return y * (1.0 if weight is None else weight)
        if weight is None:
            return y
        return y.mul_(weight) if y.dtype == weight.dtype else y * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wide, arriving = _wide(x), _wide(grad)
        scale = _scale(wide, ctx.eps)
        normed = wide * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            product = arriving * normed
            grad_weight = product.flatten(0, product.dim() - weight.dim() - 1).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = arriving if weight is None else arriving * weight
            with no_autocast(x):
                along = torch.linalg.vecdot(inner, normed).unsqueeze(-1) / x.shape[-1]
            grad_x = torch.addcmul(inner, normed, along, value=-1).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean x² + eps) over the last dimension, kept as 1."""
    mean: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return (mean + eps).rsqrt()
