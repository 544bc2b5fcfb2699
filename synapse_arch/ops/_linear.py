"""Chunks of a decaying linear recurrence, forward and backward (Dao & Gu 2024, §6).

    S_t = α_t S_{t-1} + w_t v_t k_tᵀ        y_t = S_t q_t + D v_t

With Γ_ij the decay between two positions, Π_{j < s <= i} α_s for j <= i, and b_i = Π_{s <= i} α_s from the chunk's
start:

    Y = (Q Kᵀ ∘ Γ diag(w) + D I) V + diag(b) Q Sᵀ,  S ← b_last S + (diag(Γ_last w) V)ᵀ K

where the M writes of a position share its α. B batch, T time, G groups of r heads that share q and k, H = G r heads;
N chunks, R = B · G rows, p positions a chunk, c = p M writes, K key width, V value width, V' = V or, with a
normaliser, V + 1. The chunks stand first, each in one piece, so that the recurrence over them copies nothing; products
with q and k take a group's heads side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from synapse_arch.ops._backends import no_autocast
from synapse_arch.ops._chunking import Reach, chunks_first, decay_gaps, decay_gaps_backward, each_write, fold_writes
from synapse_arch.ops._opaque import operator


def linear_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    log_decay: Tensor,
    state: Tensor,
    visible: Reach,
    size: int,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes Y and the last S of the equations above, in the dtype of `state`.

    Args:
        q: (B, T, G, K); head h uses group h // (H / G).
        k: (B, T M, G, K).
        v: (B, T M, H, V).
        write: (B, T M, H) w.
        log_decay: (B, T, H) log α, <= 0.
        state: (B, H, V', K) that enters the first chunk; a row V + 1 is the normaliser's, as if v had one more column,
            of ones.
        visible: who may read whom, and the incoming state.
        size: p.
        skip: (H,) D, only where M = 1; None for none.

    Returns:
        y (B, T, H, V), what is read of the normaliser (B, T, H), empty without one, and the state (B, H, V', K) that
        leaves the last chunk.
    """
    pairs, carried = visible.of_heads(q.shape[2])
    pairs = each_write(pairs, k.shape[1] // q.shape[1])
    return _LinearChunks.apply(state, size, q, k, v, write, log_decay, pairs, carried, skip)  # type: ignore[no-any-return, no-untyped-call]


class _Arguments(NamedTuple):
    """What is kept for the gradients, beside the states."""

    q: Tensor
    k: Tensor
    v: Tensor
    write: Tensor
    log_decay: Tensor
    pairs: Tensor  # (p, c) or (N, R, p, c) bool: i may read j
    carried: Tensor | None  # (N, R, p) bool: i may read the incoming state; None = all
    skip: Tensor | None


class _LinearChunks(torch.autograd.Function):
    """Keeps its arguments and the states between chunks; what is square in a chunk is formed again."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, size: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, weight, states = _forward(state, size, *arguments)
        ctx.save_for_backward(states, *arguments)
        ctx.size = size
        return y, weight, states[-1].clone().view(state.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_weight: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        states, *arguments = ctx.saved_tensors
        with no_autocast(grad):  # where a caller runs backward() under it
            grad_state, *found, grad_skip = _backward(grad, grad_weight, grad_final, states, ctx.size, *arguments)
        return grad_state, None, *found, None, None, None if arguments[-1] is None else grad_skip


class _Chunks(NamedTuple):
    """The arguments cut into chunks, and what is square in one."""

    q: Tensor  # (N, R, p, K)
    k: Tensor  # (N, R, c, K)
    v: Tensor  # (N, R, r, c, V)
    write: Tensor  # (N, R, r, c) w
    scores: Tensor  # (N, R, 1, p, c) Q Kᵀ, 0 where i may not read j
    decays: Tensor  # (N, R, r, p, c) Γ
    to_end: Tensor  # (N, R, r, c) Γ_last, 0 where the last position may not read j
    from_start: Tensor  # (N, R, r, p) b, 0 where i may not read the incoming state


def _cut(x: _Arguments, size: int, dtype: torch.dtype) -> _Chunks:
    rows, steps = x.q.shape[0] * x.q.shape[2], x.k.shape[1] // x.q.shape[1]
    q, k = chunks_first(x.q, size, dtype), chunks_first(x.k, size * steps, dtype)
    v, write = (chunks_first(y, size * steps, dtype).unflatten(1, (rows, -1)) for y in (x.v, x.write))
    rates = chunks_first(x.log_decay, size, dtype).unflatten(1, (rows, -1))
    scores = (q @ k.transpose(-1, -2)).mul_(x.pairs)
    decays = each_write(decay_gaps(rates).exp_(), steps)
    to_end = decays[..., -1, :] * x.pairs[..., -1, :].unsqueeze(-2)
    from_start = rates.cumsum(-1).exp_()
    if x.carried is not None:
        from_start.mul_(x.carried[:, :, None])
    return _Chunks(q, k, v, write, scores[:, :, None], decays, to_end, from_start)


def _compute(state: Tensor, size: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Y, what is read of the normaliser, and the states between the chunks (N + 1, R, r, V', K)."""
    x = _Arguments(*arguments)
    z, width = _cut(x, size, state.dtype), x.v.shape[-1]
    normalised = state.shape[2] > width
    states = state.new_empty(len(z.k) + 1, *z.v.shape[1:3], *state.shape[2:])
    states[0] = state.reshape(states.shape[1:])
    _carry(states, z.from_start, _written(z, normalised), z.k)
    read = _apart(z.q @ states[:-1].flatten(2, 3).transpose(-1, -2), states).mul_(z.from_start[..., None])
    strengths = _with_skip(z.decays.mul_(z.write[..., None, :]).mul_(z.scores), x.skip)
    y = _whole(strengths @ z.v, x.q, read[..., :width])
    weight = _whole(strengths.sum(-1).add_(read[..., width])[..., None], x.q) if normalised else y.new_empty(0, 1)
    return y, weight.squeeze(-1), states


def _gradients(
    grad: Tensor, grad_weight: Tensor, grad_final: Tensor, states: Tensor, size: int, *arguments: Any
) -> tuple[Tensor, ...]:
    """Those of state, q, k, v, write, log_decay and skip (empty where there is none)."""
    x = _Arguments(*arguments)
    z, entering, width = _cut(x, size, states.dtype), states[:-1], x.v.shape[-1]
    normalised = states.shape[-2] > width
    strengths, to_end = z.decays * z.write[..., None, :], (z.to_end * z.write)[..., None]
    grad = chunks_first(grad, size, states.dtype).unflatten(1, z.v.shape[1:3])  # (N, R, r, p, V)
    weight = chunks_first(grad_weight, size, states.dtype).view(*grad.shape[:-1], 1) if normalised else None
    grads = _gradients_of_states(grad_final, grad, weight, z)
    leaving = grads[1:]

    read = grad @ entering[..., :width, :]
    if weight is not None:
        read += weight * entering[..., width:, :]
    grad_from_start = torch.linalg.vecdot(read, z.q[:, :, None])
    grad_from_start[..., -1] += torch.linalg.vecdot(leaving.flatten(3), entering.flatten(3))
    grad_q = _over_heads(read.mul_(z.from_start[..., None]))
    grad_k = _written(z, normalised) @ leaving.flatten(2, 3)
    kept = _apart(z.k @ leaving.flatten(2, 3).transpose(-1, -2), states)
    grad_to_end = torch.linalg.vecdot(kept[..., :width], z.v)
    if normalised:
        grad_to_end += kept[..., width]
    del read

    grad_v = _with_skip(strengths * z.scores, x.skip).transpose(-1, -2) @ grad
    grad_v = _whole(grad_v, x.k, kept[..., :width].mul_(to_end)).to(x.v.dtype)
    arriving = grad @ z.v.transpose(-1, -2)
    grad_skip = _of_skip(arriving, x)
    if weight is not None:
        arriving += weight
    del kept, grad
    grad_log = z.decays.mul_(z.scores).mul_(arriving)
    grad_log[..., -1, :].addcmul_(grad_to_end, z.to_end)
    grad_write = grad_log.sum(-2)
    grad_scores = _over_heads(arriving.mul_(strengths)).mul_(x.pairs)
    grad_q += grad_scores @ z.k
    grad_k += grad_scores.transpose(-1, -2) @ z.q
    steps = x.k.shape[1] // x.q.shape[1]
    grad_rates = decay_gaps_backward(fold_writes(grad_log.mul_(z.write[..., None, :]), steps))
    grad_rates += grad_from_start.mul_(z.from_start).flip(-1).cumsum(-1).flip(-1)
    return (
        grads[0].clone().view(grad_final.shape),
        _whole(grad_q[:, :, None], x.q).to(x.q.dtype),
        _whole(grad_k[:, :, None], x.k).to(x.k.dtype),
        grad_v,
        _whole(grad_write[..., None], x.k).squeeze(-1).to(x.write.dtype),
        _whole(grad_rates[..., None], x.q).squeeze(-1).to(x.log_decay.dtype),
        grad_skip,
    )


def _gradients_of_states(grad_final: Tensor, grad: Tensor, weight: Tensor | None, z: _Chunks) -> Tensor:
    """By those of Y (N, R, r, p, V), of what is read of the normaliser, and of the last state: (N + 1, R, r, V', K)."""
    grads = grad.new_empty(len(grad) + 1, *grad.shape[1:3], *grad_final.shape[2:])
    grads[-1] = grad_final.reshape(grads.shape[1:])
    _carry(grads, z.from_start, _side_by_side(grad, z.from_start[..., None], weight), z.q, backward=True)
    return grads


def _carry(states: Tensor, from_start: Tensor, left: Tensor, right: Tensor, *, backward: bool = False) -> None:
    """Fills in S_{n+1} = b_last S_n + leftᵀ right from the first state on, or from the last one down.

    Args:
        states: (N + 1, R, r, V', K).
        from_start: (N, R, r, p) b.
        left: (N, R, c, r V').
        right: (N, R, c, K).
        backward: whether time runs backwards.
    """
    after, before = (states[:-1], states[1:]) if backward else (states[1:], states[:-1])
    torch.bmm(left.flatten(0, 1).transpose(-1, -2), right.flatten(0, 1), out=after.flatten(2, 3).flatten(0, 1))
    steps = list(zip(after.unbind(), before.unbind(), from_start[..., -1, None, None].unbind(), strict=True))
    for ours, theirs, decay in reversed(steps) if backward else steps:
        ours.addcmul_(theirs, decay)


def _with_skip(weights: Tensor, skip: Tensor | None) -> Tensor:
    """Adds D to the diagonals of weights (N, R, r, c, c), in place."""
    if skip is not None:
        weights.unflatten(1, (-1, len(skip) // weights.shape[2])).diagonal(dim1=-2, dim2=-1).add_(
            skip.view(-1, weights.shape[2], 1)
        )
    return weights


def _of_skip(arriving: Tensor, x: _Arguments) -> Tensor:
    """The gradient of D, by that of the weights (N, R, r, c, c)."""
    if x.skip is None:
        return arriving.new_empty(0)
    diagonals = arriving.diagonal(dim1=-2, dim2=-1).sum((0, -1))  # (R, r)
    return diagonals.view(-1, len(x.skip)).sum(0).to(x.skip.dtype)


def _written(z: _Chunks, normalised: bool) -> Tensor:
    """What is added to the state at the end of a chunk: (N, R, c, r V')."""
    weights = (z.to_end * z.write)[..., None]
    return _side_by_side(z.v, weights, torch.ones_like(weights) if normalised else None)


def _side_by_side(x: Tensor, weights: Tensor, last: Tensor | None) -> Tensor:
    """The columns x (N, R, r, c, V) and `last` (N, R, r, c, 1), times weights (N, R, r, c, 1) -> (N, R, c, r V')."""
    chunks, rows, heads, size, width = x.shape
    found = x.new_empty(chunks, rows, size, heads, width if last is None else width + 1)
    there = found.transpose(2, 3)
    torch.mul(x, weights, out=there[..., :width])
    if last is not None:
        torch.mul(last, weights, out=there[..., width:])
    return found.flatten(3)


def _apart(x: Tensor, states: Tensor) -> Tensor:
    """(N, R, c, r V') -> (N, R, r, c, V'), a view."""
    parts: Tensor = x.unflatten(-1, states.shape[2:4])
    return parts.transpose(2, 3)


def _over_heads(x: Tensor) -> Tensor:
    """(N, R, r, ...) -> (N, R, ...): what a group's heads add up to."""
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)


def _whole(x: Tensor, like: Tensor, more: Tensor | None = None) -> Tensor:
    """The sum of both, (N, R, r, c, V) -> (B, T, H, V), in one pass; B and T as in `like`."""
    rows, length = like.shape[:2]
    chunks, _, heads, size, width = x.shape
    found = x.new_empty(rows, chunks, size, x.shape[1] // rows, heads, width)
    there = found.permute(1, 0, 3, 4, 2, 5)
    if more is None:
        there.copy_(x.unflatten(1, (rows, -1)))
    else:
        torch.add(x.unflatten(1, (rows, -1)), more.unflatten(1, (rows, -1)), out=there)
    return found.flatten(3, 4).flatten(1, 2)[:, :length]


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor write, Tensor log_decay, Tensor pairs, Tensor? carried, Tensor? skip"
_forward = operator(_compute, f"linear_chunks(Tensor state, int size, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_backward = operator(
    _gradients,
    "linear_chunks_backward(Tensor grad, Tensor grad_weight, Tensor grad_final, Tensor states, int size,"
    f" {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
