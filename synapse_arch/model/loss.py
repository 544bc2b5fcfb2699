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
    """Makes the gradient in the forward pass, out of the log-softmax it has at hand, and hands its memory over."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        counted = targets != IGNORED
        index = targets.masked_fill(~counted, 0)[:, None]
        log_shares = logits.log_softmax(-1)
        nats = -log_shares.gather(-1, index).squeeze(-1)
        ctx.grad = _gradient(log_shares, index, counted) if ctx.needs_input_grad[0] else None
        return torch.where(counted, nats, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        gradient, ctx.grad = ctx.grad, None
        if gradient is None:  # a second backward pass over the same graph
            counted = targets != IGNORED
            gradient = _gradient(logits.log_softmax(-1), targets.masked_fill(~counted, 0)[:, None], counted)
        return gradient.mul_(grad), None


def _gradient(log_shares: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Softmax − one-hot in the rows that count, 0 in the others; made of `log_shares` in place."""
    rows = counted[:, None].to(log_shares.dtype)
    return log_shares.exp_().mul_(rows).scatter_add_(-1, index, -rows)
