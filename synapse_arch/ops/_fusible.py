"""The backend "fusible": linear recurrences as plain products over chunks, which torch.compile can fuse.

    S_t = e^{g_t} S_{t-1} + w_t k_t v_tᵀ        o_t = S_tᵀ q_t        (Dao & Gu 2024, §6)

What lies between the products is left to the compiler: decays and casts become parts of a kernel each, forward and
backward. Not compiled it keeps all of that in memory, and "chunked" is better. Products are taken in the dtype of the
values (bfloat16 in a bfloat16 model), decays, their sums and the states in float32 or wider.
B batch, T time, G groups of r heads that share q and k, H = G r heads, N chunks of C positions, K key width, V value
width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.ops._backends import exact_dtype
from synapse_arch.ops._opaque import opaque

CHUNK = 128
"""C: as wide as the products that a GPU's tensor cores like, and wider than keys and values usually are."""


def linear(q: Tensor, k: Tensor, v: Tensor, write: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The linear recurrence.

    Args:
        q: (B, T, G, K); head h uses group h // r.
        k: (B, T, G, K).
        v: (B, T, H, V), of the same dtype.
        write: (B, T, H) float32 or wider, what v_t is written with.
        g: (B, T, H) of the same dtype, of `_triton.log_decay`.
        state: (B, H, K, V), of g's dtype.

    Returns:
        o (B, T, H, V) in v's dtype and the final state (B, H, K, V) in g's.
    """
    length, groups = v.shape[1], q.shape[2]
    size = min(CHUNK, length)
    q, k, v = (_chunks(x, size) for x in (q, k, v))  # (B, N, C, G or H, K or V)
    q, k = q.transpose(2, 3), k.transpose(2, 3)
    write, g = (_chunks(x, size).transpose(2, 3) for x in (write, g))  # (B, N, H, C)
    total = g.to(exact_dtype(g)).cumsum(-1)  # so that differences of sums keep their digits

    later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    gaps = (total[..., :, None] - total[..., None, :]).to(g.dtype).masked_fill(later, -torch.inf)
    scores = (q.to(g.dtype) @ k.to(g.dtype).transpose(-1, -2))[:, :, :, None]  # (B, N, G, 1, C, C)
    strengths = (scores * (gaps.exp() * write[..., None, :]).unflatten(2, (groups, -1))).to(v.dtype)
    inside = strengths.flatten(2, 3) @ v.transpose(2, 3)  # (B, N, H, C, V)

    kept = ((total[..., -1:] - total).to(g.dtype).exp() * write).transpose(2, 3)[..., None]
    written = (v * kept).to(v.dtype).unflatten(3, (groups, -1)).transpose(2, 3)  # (B, N, G, C, r, V)
    updates = (k.transpose(-1, -2) @ written.flatten(4)).unflatten(-1, written.shape[4:])  # (B, N, G, K, r, V)
    before = state.unflatten(1, (groups, -1)).transpose(2, 3)
    from_start = total.to(g.dtype).exp()  # (B, N, H, C)
    states = _carry(updates.to(state.dtype), from_start[..., -1].unflatten(2, (groups, -1)), before)
    read = q @ states[:, :-1].to(v.dtype).flatten(4)  # (B, N, G, C, r V)
    read = read.transpose(2, 3).unflatten(-1, written.shape[4:]).flatten(3, 4)  # (B, N, C, H, V)
    o = inside.transpose(2, 3) + read * from_start.transpose(2, 3)[..., None]
    return o.to(v.dtype).flatten(1, 2)[:, :length], states[:, -1].transpose(2, 3).flatten(1, 2)


def _chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (B, N, C, ...), filled up with zeros."""
    missing = -x.shape[1] % size
    filled = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x
    chunks: Tensor = filled.unflatten(1, (-1, size))
    return chunks


class _Carry(torch.autograd.Function):
    """S_{n+1} = d_n S_n + U_n from chunk to chunk: all N + 1 states, (B, N + 1, G, K, r, V)."""

    @staticmethod
    def forward(ctx: Any, updates: Tensor, decay: Tensor, state: Tensor) -> Tensor:
        """Of updates (B, N, G, K, r, V), decay (B, N, G, r), state (B, G, K, r, V)."""
        states = torch.cat([state[:, None], updates], dim=1)
        _walk(list(states.unbind(1)), list(_broadcast(decay).unbind(1)))
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        grads = grad.clone(memory_format=torch.contiguous_format)
        _walk(list(grads.unbind(1))[::-1], list(_broadcast(decay).unbind(1))[::-1])
        grad_decay = (grads[:, 1:] * states[:, :-1]).sum((3, 5))
        return grads[:, 1:].clone(), grad_decay, grads[:, 0].clone()


def _broadcast(decay: Tensor) -> Tensor:
    """(B, N, G, r) -> (B, N, G, 1, r, 1)."""
    return decay[:, :, :, None, :, None]


def _walk(states: list[Tensor], decays: list[Tensor]) -> None:
    """Adds to each state, in place, what is left of the one before it."""
    for before, after, decay in zip(states, states[1:], decays, strict=False):
        after.addcmul_(before, decay)


_carry = opaque(
    _Carry, "carry_states(Tensor updates, Tensor decay, Tensor state) -> (Tensor states)", keep=("decay", "states")
)
