"""Chunks of delta writes in their WY form, forward and backward (Yang et al. 2024a, §3; decays 2024b).

With Γ_ij = exp(G_i − G_j) for j <= i, Y the values as they are to be added, and b = exp(G) from the chunk's start:

    L = tril(diag(β) K Kᵀ ∘ Γ, −1),  U = (I + L)⁻¹ Y,  W = (I + L)⁻¹ diag(β b) K,  V' = U − W S,
    O = (Q Kᵀ ∘ Γ) V' + diag(b) Q S,  S ← b_last S + (K ∘ Γ_last)ᵀ V'

where the M writes of a position share its G and b; only the queries' rows of O are ever formed.
N chunks, R = B · H rows, p positions a chunk, c = p M writes, K key width, V value width. The chunks stand first:
what one of them holds lies in one piece, so that the recurrence over them copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.ops._backends import no_autocast
from synapse_arch.ops._chunking import each_write, fold_writes
from synapse_arch.ops._opaque import opaque, operator


def delta_chunks(
    q: Tensor,
    k: Tensor,
    added: Tensor,
    beta: Tensor,
    gaps: Tensor,
    pairs: Tensor,
    from_start: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes O and the last S of the equations above.

    Args:
        q: (N, R, p, K).
        k: (N, R, c, K).
        added: (N, R, c, V) Y.
        beta: (N, R, c).
        gaps: (N, R, p, p) log Γ between positions.
        pairs: (p, p) or (N, R, p, p) bool: position i may read j.
        from_start: (N, R, p) b, 0 where i may not read the incoming state.
        state: (R, K, V) that enters the first chunk.

    Returns:
        O (N, R, p, V), and the state (R, K, V) that leaves the last chunk.
    """
    return _DeltaChunks.apply(q, k, added, beta, gaps, pairs, from_start, state)  # type: ignore[no-any-return, no-untyped-call]


class _DeltaChunks(torch.autograd.Function):
    """Keeps the triangular inverse, what it solved for, and the states; some 30 passes backward, not 60."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        q, k, added, beta, gaps, pairs, from_start, state = arguments
        steps = k.shape[2] // q.shape[2]
        decays = gaps.exp().mul_(pairs)
        to_writes = each_write(decays, steps)
        overlap = _times_rows(k @ k.transpose(-1, -2), to_writes).tril_(-1)
        inverse = unit_lower_inverse(overlap * beta[..., None])
        u = inverse @ added
        w = inverse @ (k * (beta * each_write(from_start, steps))[..., None])
        scores = (q @ k.transpose(-1, -2)).mul_(to_writes)
        states, writes = _write_chunks(u, w, k * to_writes[..., -1, :, None], from_start[..., -1], state)
        entering, final = states[:-1], states[-1].clone()
        ctx.save_for_backward(q, k, beta, decays, from_start, overlap, inverse, u, w, scores, entering, writes)
        return _add_product(scores @ writes, q * from_start[..., None], entering), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(grad):  # where a caller runs backward() under it
            return _DeltaChunks._gradients(ctx, grad, grad_final)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, beta, decays, from_start, overlap, inverse, u, w, scores, entering, writes = ctx.saved_tensors
        steps, grad = k.shape[2] // q.shape[2], grad.contiguous()  # it is multiplied four times
        to_writes = each_write(decays, steps)
        leaving, grad_u = _write_chunks_backward(
            w,
            k * to_writes[..., -1, :, None],
            from_start[..., -1],
            scores.transpose(-1, -2) @ grad,
            (q * from_start[..., None]).transpose(-1, -2) @ grad,
            grad_final,
        )
        grad_state, leaving = leaving[0].clone(), leaving[1:]  # a view would keep all of them alive
        grad_from_start, grad_q = _read_backward(grad, q, from_start, entering)
        grad_from_start[..., -1] += torch.linalg.vecdot(leaving.flatten(2), entering.flatten(2))
        grad_log, grad_k = _scores_backward(grad @ writes.transpose(-1, -2), q, k, to_writes, scores, grad_q)
        kept = writes @ leaving.transpose(-1, -2)
        grad_log[..., -1, :].addcmul_(torch.linalg.vecdot(kept, k), to_writes[..., -1, :])
        grad_k.addcmul_(kept, to_writes[..., -1, :, None])
        del kept, leaving

        grad_added = inverse.transpose(-1, -2) @ grad_u
        grad_erased = inverse.transpose(-1, -2) @ (grad_u @ entering.transpose(-1, -2))  # W's, but for its sign
        del grad_u
        shared, along = each_write(from_start, steps), torch.linalg.vecdot(grad_erased, k).neg_()
        grad_k.addcmul_(grad_erased, (beta * shared)[..., None], value=-1)
        grad_from_start += fold_writes(beta * along, steps, 2)
        grad_overlap = _add_product(grad_erased @ w.transpose(-1, -2), grad_added, u.transpose(-1, -2), alpha=-1)
        grad_beta = _overlap_backward(grad_overlap.tril_(-1), k, beta, to_writes, overlap, grad_k, grad_log)
        grad_beta.addcmul_(shared, along)
        return grad_q, grad_k, grad_added, grad_beta, fold_writes(grad_log, steps, 3), None, grad_from_start, grad_state


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Adds alpha times left @ right (N, R, ...) to a contiguous `total`, in place."""
    there = total.flatten(0, 1)
    torch.baddbmm(there, left.flatten(0, 1), right.flatten(0, 1), alpha=alpha, out=there)
    return total


def _read_backward(grad: Tensor, q: Tensor, from_start: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Of diag(b) Q S: the gradients of b, and of q."""
    read = grad @ entering.transpose(-1, -2)
    return torch.linalg.vecdot(q, read), read.mul_(from_start[..., None])


def _scores_backward(
    grad: Tensor, q: Tensor, k: Tensor, to_writes: Tensor, scores: Tensor, grad_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Of Q Kᵀ ∘ Γ, by its gradient: those of log Γ (N, R, p, c) and k; that of q is added to `grad_q`."""
    grad_log = grad * scores
    grad.mul_(to_writes)
    grad_q += grad @ k
    return grad_log, grad.transpose(-1, -2) @ q


def _overlap_backward(
    grad: Tensor, k: Tensor, beta: Tensor, to_writes: Tensor, overlap: Tensor, grad_k: Tensor, grad_log: Tensor
) -> Tensor:
    """Of L, by its gradient, which is used up: that of β; those of k and log Γ are added to theirs."""
    felt = grad * overlap
    grad_beta = felt.sum(-1)
    grad_log += fold_writes(felt.mul_(beta[..., None]), k.shape[2] // grad_log.shape[2], 2)
    del felt
    grad_pairs = _times_rows(grad.mul_(beta[..., None]), to_writes)
    grad_k += (grad_pairs + grad_pairs.transpose(-1, -2)) @ k
    return grad_beta


def _times_rows(x: Tensor, weights: Tensor) -> Tensor:
    """Multiplies x (N, R, c, c) weights (N, R, p, c), one row for all writes of a position; in place."""
    x.unflatten(2, (weights.shape[2], -1)).mul_(weights[:, :, :, None])
    return x


def _write(u: Tensor, w: Tensor, keys: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: V' = U − W S, S ← decay · S + keysᵀ V'.

    Returns:
        The states between the chunks (N + 1, R, K, V), and V' (N, R, c, V).
    """
    states, writes = state.new_empty(len(u) + 1, *state.shape), torch.empty_like(u)
    states[0] = state
    before, *others = states.unbind()
    steps = (u, w, keys.transpose(-1, -2), decay[..., None, None], writes)
    for after, added, erasing, k, kept, written in zip(others, *(x.unbind() for x in steps), strict=True):
        torch.baddbmm(added, erasing, before, alpha=-1, out=written)
        torch.mul(before, kept, out=after)
        torch.baddbmm(after, k, written, out=after)
        before = after
    return states, writes


def _write_backward(
    w: Tensor, keys: Tensor, decay: Tensor, grad_writes: Tensor, grad_entering: Tensor, grad_final: Tensor
) -> tuple[Tensor, Tensor]:
    """The same backwards: gradients of the states (N + 1, R, K, V), and of V' and U (N, R, c, V)."""
    grads, grad_u = grad_final.new_empty(len(w) + 1, *grad_final.shape), torch.empty_like(grad_writes)
    grads[-1] = grad_final
    *others, after = grads.unbind()
    steps = (grad_writes, grad_entering, w.transpose(-1, -2), keys, decay[..., None, None], grad_u)
    chunks = list(zip(others, *(x.unbind() for x in steps), strict=True))
    for before, written, read, erasing, k, kept, added in reversed(chunks):
        torch.baddbmm(written, k, after, out=added)
        torch.addcmul(read, after, kept, out=before)
        torch.baddbmm(before, erasing, added, alpha=-1, out=before)
        after = before
    return grads, grad_u


_write_chunks = operator(
    _write, "write_chunks(Tensor u, Tensor w, Tensor keys, Tensor decay, Tensor state) -> (Tensor, Tensor)"
)
_write_chunks_backward = operator(
    _write_backward,
    "write_chunks_backward(Tensor w, Tensor keys, Tensor decay, Tensor grad_writes, Tensor grad_entering,"
    " Tensor grad_final) -> (Tensor, Tensor)",
)


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + L)⁻¹ of strictly lower triangular matrices, by doubling the inverted diagonal blocks.

    As stable as forward substitution: only true inverses of diagonal blocks are ever multiplied.

    Args:
        strict: (..., c, c) matrices L; what stands on and above the diagonal must be zero.

    Returns:
        (..., c, c), unit lower triangular.
    """
    return _inverse(strict)  # type: ignore[no-any-return]


class _UnitLowerInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        size = strict.shape[-1]
        width = 1 << (size - 1).bit_length()  # the next power of two; the rest is padded with identity
        lower = F.pad(strict, (0, width - size, 0, width - size)).flatten(0, -3)
        inverse = torch.eye(width, dtype=strict.dtype, device=strict.device).repeat(lower.shape[0], 1, 1)
        half = 1
        while half < width:
            blocks = width // (2 * half)
            corner = _diagonal_blocks(lower, blocks)[:, :, half:, :half]
            inverted = _diagonal_blocks(inverse, blocks)
            first, second = inverted[:, :, :half, :half], inverted[:, :, half:, half:]
            inverted[:, :, half:, :half] = -(second @ corner @ first)
            half *= 2
        inverse = inverse[:, :size, :size].reshape(strict.shape)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)  # type: ignore[no-any-return]


def _diagonal_blocks(x: Tensor, blocks: int) -> Tensor:
    """(M, c, c) -> a view (M, blocks, c / blocks, c / blocks) of the blocks on the diagonal."""
    size = x.shape[-1] // blocks
    rows = x.unflatten(1, (blocks, size)).unflatten(3, (blocks, size))  # (M, blocks, size, blocks, size)
    return rows.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # type: ignore[no-any-return]


_inverse = opaque(_UnitLowerInverse, "unit_lower_inverse(Tensor strict) -> (Tensor inverse)", keep=("inverse",))
