"""Which tokens an answer of the fast-weight memory comes from.

The memory is linear in what was written, S_t = Σ_s P_{t←s} k_s (w_s ∘ v_s)ᵀ + P_{t←0} S_0, where P_{t←s} is the
product of the later transitions, decays α and (delta rule) erasures I − β k kᵀ. So a read S_tᵀ q splits without rest:
the write s gives (k̃_s · q) (w_s ∘ v_s) with the effective key k̃_s = P_{t←s} k_s, what was there before gives
S_0ᵀ P_{t←0}ᵀ q. Pulling the query back through the transitions, r_s = P_{t←s}ᵀ q, takes O(K) a write and forms no S.
B rows, T tokens, M writes a token, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from synapse_arch.introspection.matrix_memory import wide
from synapse_arch.ops.delta_rule import Rule


class ReadSources(NamedTuple):
    """Where one read comes from: contributions.sum(1) + residual is the read."""

    contributions: Tensor
    """(B, T, H, V): what each token's writes add to the read."""
    overlaps: Tensor
    """(B, T, M, H): k̃ · q, the query's overlap with each write's effective key."""
    residual: Tensor
    """(B, H, V): what the memory held before the first token."""


@torch.no_grad()
def read_sources(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    write: Tensor | None = None,
    rule: Rule = "delta",
) -> ReadSources:
    """Splits the read of the last token of a sequence.

    Args:
        q: (B, H, K) the last token's query.
        k: (B, T, H, K) keys, or (B, T, M, H, K); v, beta, write alike. As given to ops.delta_rule.
        v: (B, T, H, V) values.
        beta: (B, T, H) strengths.
        log_decay: (B, T, H).
        state: (B, H, K, V) the memory before the first token; None for an empty one.
        write: (B, T, H, V), or None for beta.
        rule: as given to ops.delta_rule.

    >>> q, k, v = torch.ones(1, 1, 1), torch.ones(1, 2, 1, 1), torch.tensor([4.0, 2.0]).view(1, 2, 1, 1)
    >>> half = torch.full((1, 2, 1), 0.5)
    >>> read_sources(q, k, v, half, 0 * half).contributions.flatten().tolist()  # the second write erases half
    [1.0, 1.0]
    """
    q, k, v, beta, log_decay = (wide(x) for x in (q, k, v, beta, log_decay))
    if k.dim() == 4:
        k, v, beta = (x[:, :, None] for x in (k, v, beta))
        write = None if write is None else write[:, :, None]
    added = v * (beta[..., None] if write is None else wide(write))  # (B, T, M, H, V)
    overlaps = torch.empty_like(beta)
    pulled = q  # r: what the query is to the memory of the moment
    for t in reversed(range(k.shape[1])):
        for m in reversed(range(k.shape[2])):
            overlap = (pulled * k[:, t, m]).sum(-1)
            overlaps[:, t, m] = overlap
            if rule == "delta":
                pulled = pulled - (beta[:, t, m] * overlap)[..., None] * k[:, t, m]
        pulled = log_decay[:, t].exp()[..., None] * pulled
    residual = v.new_zeros(*q.shape[:2], v.shape[-1])
    if state is not None:
        residual = (wide(state) * pulled[..., None]).sum(-2)
    return ReadSources((overlaps[..., None] * added).sum(2), overlaps, residual)
