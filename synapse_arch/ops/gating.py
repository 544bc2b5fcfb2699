"""Elementwise pieces every region ends with, keeping for the backward pass only what came in.

B batch, T time, H heads, V head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def gate(x: Tensor, logits: Tensor, activation: Literal["sigmoid", "silu"]) -> Tensor:
    """X · activation(logits), elementwise; the activation is computed again for the gradient.

    Args:
        x: any shape.
        logits: the same shape.
        activation: "sigmoid" or "silu".

    Returns:
        The product, in the wider of both dtypes.
    """
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


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over each head's width (Zhang & Sennrich 2019), x / sqrt(mean x² + eps) · weight.

    Args:
        x: (B, T, H, V).
        weight: (H, V).
        eps: added to the mean square.

    Returns:
        (B, T, H, V), in the wider of both dtypes.
    """
    return _HeadNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], eps=eps) * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            normed = F.rms_norm(leaf, x.shape[-1:], eps=ctx.eps)
        (grad_x,) = torch.autograd.grad(normed, leaf, (grad * weight).to(x.dtype))
        return grad_x, (grad * normed.detach()).sum((0, 1)).to(weight.dtype), None
