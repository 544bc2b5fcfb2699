"""Fast-weight memory: a key-value matrix written by the delta rule or by outer products.

    delta    S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + k_t (w_t ∘ v_t)ᵀ    (Schlag et al. 2021; Yang et al. 2024a, 2024b)
    hebbian  S_t = α_t S_{t-1} + k_t (w_t ∘ v_t)ᵀ                        (Schmidhuber 1992)
    o_t = S_tᵀ q_t,  α = exp(log_decay),  w = β where no strength of its own is given

A position may write several times, one after another; it decays before the first and reads after the last
(DeltaProduct, Siems et al. 2025). q and k are used as given: the caller normalises.
B batch, T time, M writes a position, H heads, K key width, V value width, N chunks, p positions a chunk, c = p M.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError, explain
from synapse_arch.ops import _kernels, _triton
from synapse_arch.ops._backends import compute_dtype, finite_log, is_step, no_autocast, widen
from synapse_arch.ops._checks import Sizes, check_chunk_size, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._chunking import Reach, chunks_first, decay_gaps, reach, unchunk_first
from synapse_arch.ops._linear import linear_chunks
from synapse_arch.ops._packing import segment_index
from synapse_arch.ops._wy import delta_chunks

Rule = Literal["delta", "hebbian"]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    write: Tensor | None = None,
    rule: Rule = "delta",
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Writes and reads a fast-weight memory over a sequence; position t reads what it has just written.

    Args:
        q: (B, T, H, K) queries.
        k: (B, T, H, K) keys; of unit length and beta in (0, 2) for a stable delta rule. Or (B, T, M, H, K), M writes
            a position in order; v, beta and write then have the axis M too.
        v: (B, T, H, V) values.
        beta: (B, T, H) strengths: how much of what the key held is erased, and of the value written.
        log_decay: (B, T, H) log of the decay α, <= 0; None means no decay.
        state: (B, H, K, V) float32 or wider, or None for zeros; never modified.
        write: (B, T, H, V) strengths w of the value alone, channel by channel; beta then only erases. None means beta.
        rule: "delta" or "hebbian".
        segment_ids: (B, T) ints; the state does not cross a change of id.
        mask: (B, T) bool; False positions neither write nor decay the state.
        chunk_size: writes computed side by side ("chunked").
        backend: "auto", "triton" (no `write`; q, k and v are taken in bfloat16 where v is, on a CUDA device), "chunked"
            or "reference".

    Returns:
        o (B, T, H, V) in v's dtype and the final state (B, H, K, V), float32 or wider.

    Raises:
        ShapeError, StateError: arguments that do not fit. ConfigError, BackendUnavailable: rule or backend.
    """
    sizes = _check(q, k, v, beta, log_decay, state, write, rule, segment_ids, mask, chunk_size)
    dtype = compute_dtype(q, k, v, beta, log_decay, state, write)
    lacking = "" if write is None else "its kernels have no strengths of the value alone (write)"
    chosen = _kernels.choose("delta_rule", backend, v, dtype, sizes["K"], sizes["V"], lacking)
    with no_autocast(v):
        narrow = v.dtype if chosen == "triton" and sizes["T"] > 1 else dtype
        segments = segment_index(segment_ids, mask)
        inputs = _prepare(q, k, v, beta, write, log_decay, state, segments, mask, dtype, narrow)
        if is_step(sizes["T"]) and chosen != "reference":
            o, final = _step(inputs, rule)
        elif chosen == "reference" or sizes["T"] == 1:
            o, final = _reference(inputs, rule)
        elif chosen == "triton":
            o, final = _by_kernel(inputs, rule)
        else:
            o, final = _chunked(inputs, rule, min(max(chunk_size // sizes.get("M", 1), 1), sizes["T"]))
    return o.to(v.dtype), final


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None,
    write: Tensor | None, rule: Rule, segment_ids: Tensor | None, mask: Tensor | None, chunk_size: int,
) -> Sizes:  # fmt: skip
    """The sizes of delta_rule's arguments, M among them where k has it, or the errors that it names."""
    sizes: Sizes = {}
    steps = "M " if isinstance(k, Tensor) and k.dim() == 5 else ""
    check_shape("q", q, "B T H K", sizes, remedy="a sequence needs at least one position")
    check_shape("k", k, f"B T {steps}H K", sizes, remedy="check n_heads")
    check_shape("v", v, f"B T {steps}H V", sizes, remedy="check n_heads")
    check_shape("beta", beta, f"B T {steps}H", sizes)
    if write is not None:
        check_shape("write", write, f"B T {steps}H V", sizes)
    if log_decay is not None:
        check_shape("log_decay", log_decay, "B T H", sizes)
    check_state("state", state, "B H K V", sizes)
    check_float(q=q, k=k, v=v, beta=beta, log_decay=log_decay, write=write)
    check_packing(segment_ids, mask, sizes)
    check_chunk_size(chunk_size)
    if rule not in ("delta", "hebbian"):
        raise ConfigError(explain("rule", "'delta' or 'hebbian'", repr(rule)))
    return sizes


class _Inputs(NamedTuple):
    """The arguments in one dtype, with the writes of all positions one after another."""

    q: Tensor  # (B, T, H, K)
    k: Tensor  # (B, T M, H, K)
    v: Tensor  # (B, T M, H, V)
    beta: Tensor  # (B, T M, H)
    write: Tensor | None  # (B, T M, H, V)
    log_decay: Tensor  # (B, T, H)
    state: Tensor  # (B, H, K, V)
    segments: Tensor | None  # (B, T)
    steps: int  # M


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    write: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    narrow: torch.dtype,
) -> _Inputs:
    """Queries, keys, values in `narrow`, all else in `dtype`; masked positions are silent, the writes in one line."""
    q, k, v = widen(narrow, (q, k, v))
    beta = beta.to(dtype)
    decay = q.new_zeros(q.shape[:-1], dtype=dtype) if log_decay is None else finite_log(log_decay.to(dtype))
    write = None if write is None else write.to(dtype)
    if mask is not None:
        beta, decay = _silence(beta, mask), _silence(decay, mask)
        write = None if write is None else _silence(write, mask)
    if k.dim() == 5:
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        write = None if write is None else write.flatten(1, 2)
    if state is None:
        state = beta.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    state = state.to(dtype)
    return _Inputs(q, k, v, beta, write, decay, state, segments, k.shape[1] // q.shape[1])


def _silence(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros where mask (B, T) is False."""
    return x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), 0.0)


def _reference(z: _Inputs, rule: Rule) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after another."""
    outputs, state, steps = [], z.state, z.steps
    for t in range(z.q.shape[1]):
        if z.segments is not None and t > 0:
            state = torch.where((z.segments[:, t] == z.segments[:, t - 1])[:, None, None, None], state, 0.0)
        state = z.log_decay[:, t].exp()[..., None, None] * state
        for s in range(t * steps, (t + 1) * steps):
            k, target, beta = z.k[:, s], z.v[:, s], z.beta[:, s, :, None]
            held = (k[..., None] * state).sum(-2) if rule == "delta" else 0.0
            if z.write is None:
                state = state + (beta * k)[..., None] * (target - held)[..., None, :]
            else:
                state = state + k[..., None] * (z.write[:, s] * target - beta * held)[..., None, :]
        outputs.append((z.q[:, t, ..., None] * state).sum(-2))
    return torch.stack(outputs, dim=1), state


def _step(z: _Inputs, rule: Rule) -> tuple[Tensor, Tensor]:
    """One position: each write is one product with what its key holds, and one pass over the memory."""
    state = z.state * z.log_decay[:, 0].exp()[..., None, None]
    keys, beta = z.k[:, :, :, None], z.beta[..., None, None]  # (B, M, H, 1, K), (B, M, H, 1, 1)
    strength = beta if z.write is None else z.write[..., None, :]
    for s in range(z.steps):
        written = strength[:, s] * z.v[:, s, :, None]
        if rule == "delta":
            written = written - beta[:, s] * (keys[:, s] @ state)
        state.addcmul_(keys[:, s].transpose(-1, -2), written)  # its own since it decayed
    return (z.q[:, 0, :, None] @ state).transpose(1, 2), state


def _by_kernel(z: _Inputs, rule: Rule) -> tuple[Tensor, Tensor]:
    """Every write is a step of the kernels: the first one decays, the last one reads."""
    more = z.steps - 1
    g = _triton.log_decay(z.log_decay, z.segments)
    g = F.pad(g[:, :, None], (0, 0, 0, more)).flatten(1, 2)  # (B, T M, H)
    q = F.pad(z.q[:, :, None], (0, 0, 0, 0, more, 0)).flatten(1, 2)  # (B, T M, H, K)
    if rule == "hebbian":
        o, final = _triton.linear(q, z.k, (z.beta[..., None] * z.v).to(z.v.dtype), g, z.state)
    else:
        o, final = _triton.delta(q, z.k, z.v, z.beta, g, z.state)
    return o[:, more :: z.steps], final


def _chunked(z: _Inputs, rule: Rule, size: int) -> tuple[Tensor, Tensor]:
    """Chunks of `size` positions with their writes, side by side; a carried state between them."""
    form = _chunked_delta if rule == "delta" else _chunked_hebbian
    return form(z, reach(z.segments, size, z.q.shape[1], z.q.device), size)


def _chunked_delta(z: _Inputs, visible: Reach, size: int) -> tuple[Tensor, Tensor]:
    """One triangular system a chunk, see `_wy`."""
    dtype, rows = z.state.dtype, z.state.shape[:2]
    added = z.v * (z.beta[..., None] if z.write is None else z.write)
    pairs, carried = visible.of_heads(rows[1])
    rates = chunks_first(z.log_decay, size, dtype)  # (N, B H, p)
    from_start = rates.cumsum(-1).exp()
    if carried is not None:
        from_start = from_start * carried
    q = chunks_first(z.q, size, dtype)  # (N, B H, p, K)
    k, added, beta = (chunks_first(x, size * z.steps, dtype) for x in (z.k, added, z.beta))  # (N, B H, c, ...)
    o, final = delta_chunks(q, k, added, beta, decay_gaps(rates), pairs, from_start, z.state.flatten(0, 1))
    return unchunk_first(o, *z.q.shape[:2]), final.unflatten(0, rows)


def _chunked_hebbian(z: _Inputs, visible: Reach, size: int) -> tuple[Tensor, Tensor]:
    """A linear recurrence, see `_linear`."""
    v, write = (z.v, z.beta) if z.write is None else (z.v * z.write, torch.ones_like(z.beta))
    o, _, final = linear_chunks(z.q, z.k, v, write, z.log_decay, z.state.transpose(-1, -2), visible, size)
    return o, final.transpose(-1, -2).contiguous()
