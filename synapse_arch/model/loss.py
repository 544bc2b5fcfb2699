"""The language loss: nats of the next tokens, with one buffer of the logits' size instead of three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The target that counts for nothing."""


def next_token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(logits)[target] over the targets that are not ignored.

    Args:
        logits: (..., V), float32 or wider.
        targets: (...) integers below V, or IGNORED.

    Returns:
        () nats.
    """
    return _NextTokenNats.apply(logits.flatten(0, -2), targets.flatten())  # type: ignore[no-any-return, no-untyped-call]


class _NextTokenNats(torch.autograd.Function):
    """Makes the gradient in the forward pass, where the exponentials are at hand, and hands its memory over."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        counted = targets != IGNORED
        peak = logits.amax(-1, keepdim=True)
        shares = torch.sub(logits, peak).exp_()
        total = shares.sum(-1, keepdim=True)
        index = targets.masked_fill(~counted, 0)[:, None]
        nats = (total.log() + peak - logits.gather(-1, index)).squeeze(-1)
        ctx.grad = _gradient(shares, total, index, counted) if ctx.needs_input_grad[0] else None
        return torch.where(counted, nats, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        gradient, ctx.grad = ctx.grad, None
        if gradient is None:  # a second backward pass over the same graph
            counted = targets != IGNORED
            shares = torch.sub(logits, logits.amax(-1, keepdim=True)).exp_()
            index = targets.masked_fill(~counted, 0)[:, None]
            gradient = _gradient(shares, shares.sum(-1, keepdim=True), index, counted)
        return gradient.mul_(grad), None


def _gradient(shares: Tensor, total: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Softmax − one-hot in the rows that count, 0 in the others; made of `shares` in place."""
    shares.mul_(counted[:, None] / total)
    return shares.scatter_add_(-1, index, -counted[:, None].to(shares.dtype))
