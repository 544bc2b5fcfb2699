"""What the chunk-parallel forms share: cutting time into chunks, and carrying a state from chunk to chunk.

B batch, T time, H heads, C chunk, N = ceil(T / C) chunks. A chunk form computes all chunks side by side
with matrix products and runs a recurrence over the N chunk states only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from synapse_arch.ops._opaque import opaque


def chunk_heads(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) -> contiguous (B, H, N, C, ...), the last chunk padded with zeros."""
    return rearrange(_filled_up(x, size), "b (n c) h ... -> b h n c ...", c=size).contiguous()


def chunks_first(x: Tensor, size: int) -> Tensor:
    """The same as contiguous (N, B H, C, ...): each chunk in one piece."""
    return rearrange(_filled_up(x, size), "b (n c) h ... -> n (b h) c ...", c=size).contiguous()


def _filled_up(x: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (B, N C, ...), with zeros behind the end."""
    padding = -x.shape[1] % size
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) if padding else x


def unchunk_heads(x: Tensor, length: int) -> Tensor:
    """(B, H, N, C, K) -> (B, T, H, K)."""
    return rearrange(x, "b h n c k -> b (n c) h k")[:, :length]


def unchunk_first(x: Tensor, rows: int, length: int) -> Tensor:
    """(N, B H, C, K) -> (B, T, H, K)."""
    return rearrange(x, "n (b h) c k -> b (n c) h k", b=rows)[:, :length]


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


def gated_scores(
    q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor, pairs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes y = (q kᵀ ∘ W) v with W = exp(log_weights): what a chunk reads of its own writes.

    Args:
        q: (B, G, N, p, K), p readers of c writes; head h uses group h // (H / G).
        k: (B, G, N, c, K).
        v: (B, H, N, c, V).
        log_weights: (B, H, N, p, c) how much of j's write is left at i.
        pairs: who may read whom, see `Reach`; None where the log weights say it, by -inf.

    Returns:
        y (B, H, N, p, V), and the last row of W (B, H, N, c): what is left of each write at the chunk's end.
    """
    return _GatedScores.apply(q, k, v, log_weights, pairs)  # type: ignore[no-any-return, no-untyped-call]


class _GatedScores(torch.autograd.Function):
    """Keeps the weights and forms the scores again; three passes over (c, c) matrices backward instead of eight."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor, pairs: Tensor | None) -> Any:
        weights = log_weights.exp()
        ctx.save_for_backward(q, k, v, weights, pairs)
        ctx.set_materialize_grads(False)
        return _by_group(_scores(q, k, pairs), weights) @ v, weights[..., -1, :].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, weights, pairs = ctx.saved_tensors
        if grad is None:
            grad = v.new_zeros(*v.shape[:3], q.shape[3], v.shape[4])
        scores = _by_group(_scores(q, k, pairs), weights)
        grad_v = scores.transpose(-1, -2) @ grad
        arriving = grad @ v.transpose(-1, -2)
        grad_log = scores.mul_(arriving)
        if grad_last is not None:
            grad_log[..., -1, :].addcmul_(grad_last, weights[..., -1, :])
        grad_scores = arriving.mul_(weights)
        if q.shape[1] != v.shape[1]:
            grad_scores = grad_scores.unflatten(1, (q.shape[1], -1)).sum(2)
        if pairs is not None:
            grad_scores.masked_fill_(~pairs, 0.0)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v, grad_log, None


def _scores(q: Tensor, k: Tensor, pairs: Tensor | None) -> Tensor:
    scores: Tensor = q @ k.transpose(-1, -2)
    return scores if pairs is None else scores.masked_fill_(~pairs, 0.0)


def _by_group(scores: Tensor, weights: Tensor) -> Tensor:
    """(B, G, N, c, c) times (B, H, N, c, c)."""
    if scores.shape == weights.shape:
        return scores.mul_(weights)
    weighted: Tensor = scores[:, :, None] * weights.unflatten(1, (scores.shape[1], -1))
    return weighted.flatten(1, 2)


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
