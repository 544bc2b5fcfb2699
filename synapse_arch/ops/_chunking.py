"""What the chunk-parallel forms share: cutting time into chunks, and the decays inside them.

B batch, T time, H heads, C chunk, N = ceil(T / C) chunks. A chunk form computes all chunks side by side
with matrix products and runs a recurrence over the N chunk states only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from synapse_arch.ops._backends import no_autocast


def chunks_first(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, ...) -> a copy (N, B H, C, ...) in `dtype`: each chunk in one piece, the last filled up with zeros."""
    padding = -x.shape[1] % size
    filled = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) if padding else x
    chunks = rearrange(filled, "b (n c) h ... -> n b h c ...", c=size)
    return x.new_empty(chunks.shape, dtype=dtype).copy_(chunks).flatten(1, 2)


def unchunk_first(x: Tensor, rows: int, length: int) -> Tensor:
    """(N, B H, C, ...) -> (B, T, H, ...)."""
    return rearrange(x, "n (b h) c ... -> b (n c) h ...", b=rows)[:, :length]


def each_write(x: Tensor, steps: int) -> Tensor:
    """(..., p) -> (..., p M): every position's entry for each of its M = `steps` writes."""
    if steps == 1:
        return x
    found = x.new_empty(*x.shape, steps)
    for part in found.unbind(-1):  # twice as fast as repeat_interleave
        part.copy_(x)
    whole: Tensor = found.flatten(-2)
    return whole


def fold_writes(x: Tensor, steps: int, dim: int = -1) -> Tensor:
    """From p M to p along `dim`: what each position's M = `steps` writes add up to."""
    first, *others = x.unflatten(dim, (-1, steps)).unbind(dim if dim < 0 else dim + 1)
    total: Tensor = sum(others, start=first)  # several times as fast as one sum over so short an axis
    return total


class Reach(NamedTuple):
    """Who may read whom inside a chunk, and who may read the state that enters it."""

    pairs: Tensor  # (C, C) or (N, B, C, C) bool: i may read j (j <= i, same segment)
    carried: Tensor | None  # (N, B, C) bool: i still belongs to the segment of the incoming state; None = all

    def of_heads(self, heads: int) -> Reach:
        """The same for every head of a row: (N, B H, ...)."""
        if self.carried is None:
            return self
        return Reach(self.pairs.repeat_interleave(heads, 1), self.carried.repeat_interleave(heads, 1))


def reach(segments: Tensor | None, size: int, length: int, device: torch.device) -> Reach:
    """The Reach of every chunk, from segment numbers (B, T) or None."""
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if segments is None:
        return Reach(causal, None)
    chunks = -(-length // size)
    numbers = torch.cat([segments, segments[:, -1:].expand(-1, chunks * size - length)], dim=1)
    numbers = numbers.unflatten(1, (chunks, size)).transpose(0, 1)  # (N, B, C)
    pairs = (numbers[..., :, None] == numbers[..., None, :]) & causal
    entering = F.pad(numbers[:-1, :, -1], (0, 0, 1, 0))  # the state entering chunk 0 belongs to segment 0
    return Reach(pairs, numbers == entering[..., None])


def decay_gaps(log_decay: Tensor) -> Tensor:
    """Log of the decay between two positions of a chunk: gaps_ij = Σ_{j < s <= i} log_decay_s, 0 above the diagonal.

    Summed as a product with a triangle of ones, never as a difference of running sums, whose cancellation
    would cost digits after a strong decay, in the gradient too.

    Args:
        log_decay: (..., C).

    Returns:
        (..., C, C).
    """
    return _DecayGaps.apply(log_decay)  # type: ignore[no-any-return, no-untyped-call]


def decay_gaps_backward(grad: Tensor) -> Tensor:
    """The gradient of the log decays (..., C) by that of `decay_gaps`, (..., C, C)."""
    ones = torch.ones(grad.shape[-1], grad.shape[-1], dtype=grad.dtype, device=grad.device)
    return (grad @ ones.triu(1)).mul_(ones.tril()).sum(-2)


class _DecayGaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_decay: Tensor) -> Tensor:
        ones = torch.ones(log_decay.shape[-1], log_decay.shape[-1], dtype=log_decay.dtype, device=log_decay.device)
        gaps: Tensor = (log_decay[..., None, :] * ones.tril()) @ ones.tril(-1)
        return gaps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with no_autocast(grad):  # where a caller runs backward() under it
            return decay_gaps_backward(grad)
