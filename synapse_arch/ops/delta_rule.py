"""Fast-weight memory: a key-value matrix written by the delta rule or by outer products.

    delta    S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ     (Schlag et al. 2021; Yang et al. 2024a, 2024b)
    hebbian  S_t = α_t S_{t-1} + β_t k_t v_tᵀ                         (Schmidhuber 1992)
    o_t = S_tᵀ q_t,  α = exp(log_decay)

q and k are used as given: the caller normalises. B batch, T time, H heads, K key width, V value width,
N chunks, c chunk.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError, explain
from synapse_arch.ops._backends import compute_dtype, no_autocast, resolve, widen
from synapse_arch.ops._checks import Sizes, check_chunk_size, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._chunking import carry, chunk_heads, decay_gaps, reach, unchunk_heads
from synapse_arch.ops._packing import segment_index

Rule = Literal["delta", "hebbian"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    rule: Rule = "delta",
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Writes and reads a fast-weight memory over a sequence; position t reads what it has just written.

    Args:
        q: (B, T, H, K) queries.
        k: (B, T, H, K) keys; of unit length and beta in (0, 2) for a stable delta rule.
        v: (B, T, H, V) values.
        beta: (B, T, H) write strengths.
        log_decay: (B, T, H) log of the decay α, <= 0; None means no decay.
        state: (B, H, K, V) float32 or wider, or None for zeros; never modified.
        rule: "delta" or "hebbian".
        segment_ids: (B, T) ints; the state does not cross a change of id.
        mask: (B, T) bool; False positions neither write nor decay the state.
        chunk_size: positions computed side by side ("chunked").
        backend: "auto", "chunked" or "reference".

    Returns:
        o (B, T, H, V) in v's dtype and the final state (B, H, K, V), float32 or wider.

    Raises:
        ShapeError, StateError: arguments that do not fit. ConfigError, BackendUnavailable: rule or backend.
    """
    sizes: Sizes = {}
    check_shape("q", q, "B T H K", sizes, remedy="a sequence needs at least one position")
    check_shape("k", k, "B T H K", sizes, remedy="check n_heads")
    check_shape("v", v, "B T H V", sizes, remedy="check n_heads")
    check_shape("beta", beta, "B T H", sizes)
    if log_decay is not None:
        check_shape("log_decay", log_decay, "B T H", sizes)
    check_state("state", state, "B H K V", sizes)
    check_float(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    check_packing(segment_ids, mask, sizes)
    check_chunk_size(chunk_size)
    if rule not in ("delta", "hebbian"):
        raise ConfigError(explain("rule", "'delta' or 'hebbian'", repr(rule)))
    chosen = resolve("delta_rule", backend)
    with no_autocast(v):
        dtype = compute_dtype(q, k, v, beta, log_decay, state)
        qs, ks, vs, strength = widen(dtype, (q, k, v, beta))
        decay = torch.zeros_like(strength) if log_decay is None else log_decay.to(dtype)
        if mask is not None:
            strength = strength.masked_fill(~mask[..., None], 0.0)
            decay = decay.masked_fill(~mask[..., None], 0.0)
        state = vs.new_zeros(*ks.shape[:1], *ks.shape[2:], sizes["V"]) if state is None else state.to(dtype)
        segments = segment_index(segment_ids, mask)
        if chosen == "reference" or sizes["T"] == 1:
            o, final = _reference(qs, ks, vs, strength, decay, state, rule, segments)
        else:
            o, final = _chunked(qs, ks, vs, strength, decay, state, rule, segments, min(chunk_size, sizes["T"]))
    return o.to(v.dtype), final


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor,
    rule: Rule,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after another."""
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t > 0:
            state = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], state, 0.0)
        state = log_decay[:, t].exp()[..., None, None] * state
        target = v[:, t]
        if rule == "delta":
            target = target - (k[:, t, ..., None] * state).sum(-2)
        state = state + (beta[:, t, :, None] * k[:, t])[..., None] * target[..., None, :]
        outputs.append((q[:, t, ..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1), state


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor,
    rule: Rule,
    segments: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The WY form: a chunk of delta writes is one triangular system (Yang et al. 2024a, §3; decays 2024b).

    With Γ_ij = exp(G_i − G_j) for j <= i:  A = I + tril(diag(β) K Kᵀ ∘ Γ, −1),  [U, W] = A⁻¹ [β V, β e^G K];
    the effective writes are V' = U − W S, the output (e^G Q) S + tril(Q Kᵀ ∘ Γ) V'.
    """
    length = q.shape[1]
    visible = reach(segments, size, length, q.device)
    k = chunk_heads(k, size)  # (B, H, N, c, K)
    q = chunk_heads(q, size)
    v = chunk_heads(v, size)
    beta = chunk_heads(beta, size)  # (B, H, N, c)
    log_decay = chunk_heads(log_decay, size)  # (B, H, N, c)
    decays = decay_gaps(log_decay).exp().masked_fill(~visible.pairs, 0.0)  # Γ
    from_start = log_decay.cumsum(-1).exp()
    if visible.carried is not None:
        from_start = from_start * visible.carried
    scores = (q @ k.transpose(-1, -2)) * decays
    keys_out = (k * decays[..., -1, :, None]).transpose(-1, -2)  # (B, H, N, K, c)
    through = from_start[..., -1]
    if rule == "hebbian":
        writes = beta[..., None] * v
        entering, final = carry(through, keys_out @ writes, state)
    else:
        overlap = (k @ k.transpose(-1, -2)) * (decays * beta[..., None])
        solve = unit_lower_inverse(overlap.tril(-1)) * beta[..., None, :]  # A⁻¹ diag(β)
        erased = (solve * from_start[..., None, :]) @ k  # W
        entering, writes, final = _Corrected.apply(solve @ v, erased, keys_out, through, state)  # type: ignore[no-untyped-call]
    o = torch.addcmul(scores @ writes, q @ entering, from_start[..., None])
    return unchunk_heads(o, length), final


class _Corrected(torch.autograd.Function):
    """The recurrence over chunks of the delta rule: V' = U − W S, S ← decay · S + keysᵀ V'."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, w: Tensor, keys: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        entering = torch.empty(*u.shape[:3], *state.shape[2:], dtype=u.dtype, device=u.device)
        writes = torch.empty_like(u)
        for n in range(u.shape[2]):
            entering[:, :, n] = state
            written = u[:, :, n] - w[:, :, n] @ state
            writes[:, :, n] = written
            state = torch.addcmul(keys[:, :, n] @ written, state, decay[:, :, n, None, None])
        ctx.save_for_backward(w, keys, decay, entering, writes)
        return entering, writes, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_entering: Tensor, grad_writes: Tensor, grad_final: Tensor) -> tuple[Tensor, ...]:
        w, keys, decay, entering, writes = ctx.saved_tensors
        grad_u = torch.empty_like(writes)
        leaving = torch.empty_like(entering)  # the gradient of each chunk's outgoing state
        grad = grad_final
        for n in reversed(range(decay.shape[2])):
            leaving[:, :, n] = grad
            written = grad_writes[:, :, n] + keys[:, :, n].transpose(-1, -2) @ grad
            grad_u[:, :, n] = written
            grad = torch.addcmul(grad_entering[:, :, n], grad, decay[:, :, n, None, None])
            grad = grad - w[:, :, n].transpose(-1, -2) @ written
        grad_w = -grad_u @ entering.transpose(-1, -2)
        grad_keys = leaving @ writes.transpose(-1, -2)
        return grad_u, grad_w, grad_keys, (leaving * entering).sum((-2, -1)), grad


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + L)⁻¹ of strictly lower triangular matrices, by doubling the inverted diagonal blocks.

    As stable as forward substitution: only true inverses of diagonal blocks are ever multiplied.

    Args:
        strict: (..., c, c) matrices L; what stands on and above the diagonal must be zero.

    Returns:
        (..., c, c), unit lower triangular.
    """
    return _UnitLowerInverse.apply(strict)  # type: ignore[no-untyped-call, no-any-return]


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
