"""What the chunk-parallel forms share: cutting time into chunks, and carrying a state from chunk to chunk.

B batch, T time, H heads, C chunk, N = ceil(T / C) chunks. A chunk form computes all chunks side by side
with matrix products and runs a recurrence over the N chunk states only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from synapse_arch.ops._opaque import opaque


def chunk_heads(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) -> contiguous (B, H, N, C, ...), the last chunk padded with zeros."""
    padding = -x.shape[1] % size
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return rearrange(x, "b (n c) h ... -> b h n c ...", c=size).contiguous()


def unchunk_heads(x: Tensor, length: int) -> Tensor:
    """(B, H, N, C, K) -> (B, T, H, K)."""
    return rearrange(x, "b h n c k -> b (n c) h k")[:, :length]


class Reach(NamedTuple):
    """Who may read whom inside a chunk, and who may read the state that enters it."""

    pairs: Tensor  # (C, C) or (B, 1, N, C, C) bool: i may read j (j <= i, same segment)
    carried: Tensor | None  # (B, 1, N, C) bool: i still belongs to the segment of the incoming state; None = all


def reach(segments: Tensor | None, size: int, length: int, device: torch.device) -> Reach:
    """The Reach of every chunk, from segment numbers (B, T) or None."""
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if segments is None:
        return Reach(causal, None)
    chunks = -(-length // size)
    numbers = torch.cat([segments, segments[:, -1:].expand(-1, chunks * size - length)], dim=1)
    numbers = numbers.unflatten(1, (chunks, size))  # (B, N, C)
    pairs = (numbers[..., :, None] == numbers[..., None, :]) & causal
    entering = F.pad(numbers[:, :-1, -1], (1, 0))  # the state entering chunk 0 belongs to segment 0
    carried = numbers == entering[..., None]
    return Reach(pairs[:, None], carried[:, None])


def decay_gaps(log_decay: Tensor) -> Tensor:
    """Log of the decay between two positions of a chunk: gaps_ij = Σ_{j < s <= i} log_decay_s, 0 above the diagonal.

    Summed as a product with a triangle of ones, never as a difference of running sums, whose cancellation
    would cost digits after a strong decay, in the gradient too.

    Args:
        log_decay: (B, H, N, c).

    Returns:
        (B, H, N, c, c).
    """
    ones = torch.ones(log_decay.shape[-1], log_decay.shape[-1], dtype=log_decay.dtype, device=log_decay.device)
    return (log_decay[..., None, :] * ones.tril()) @ ones.tril(-1)


def carry(decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = decay_n · S_n + update_n.

    Args:
        decay: (B, H, N).
        update: (B, H, N, K, V).
        state: (B, H, K, V) the state that enters chunk 0.

    Returns:
        The states that enter each chunk (B, H, N, K, V), and the one that leaves the last (B, H, K, V).
    """
    entering, final = _carry(decay, update, state)
    return entering, final


class _Carry(torch.autograd.Function):
    """The recurrence over chunks, one multiply-add a step in both directions."""

    @staticmethod
    def forward(ctx, decay: Tensor, update: Tensor, state: Tensor):  # type: ignore[no-untyped-def]
        entering = torch.empty_like(update)
        current = state
        for n in range(update.shape[2]):
            entering[:, :, n] = current
            current = torch.addcmul(update[:, :, n], current, decay[:, :, n, None, None])
        ctx.save_for_backward(decay, entering)
        return entering, current

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_entering: Tensor, grad_final: Tensor):  # type: ignore[no-untyped-def]
        decay, entering = ctx.saved_tensors
        grad_update = torch.empty_like(entering)
        grad = grad_final
        for n in reversed(range(decay.shape[2])):
            grad_update[:, :, n] = grad
            grad = torch.addcmul(grad_entering[:, :, n], grad, decay[:, :, n, None, None])
        return (grad_update * entering).sum((-2, -1)), grad_update, grad


_carry = opaque(
    _Carry,
    "carry(Tensor decay, Tensor update, Tensor state) -> (Tensor entering, Tensor final)",
    keep=("decay", "entering"),
)
