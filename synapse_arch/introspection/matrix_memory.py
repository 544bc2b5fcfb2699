"""What happens inside a matrix memory at every token, without ever forming the memory of every token.

Serves the fast-weight memory and the mLSTM cell. B rows, T tokens, H heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.ops._backends import exact_dtype
from synapse_arch.ops._packing import segment_index
from synapse_arch.ops.delta_rule import Rule, delta_rule
from synapse_arch.ops.mlstm import MLSTMState


class _Packing(TypedDict):
    """The two arguments that every op takes."""

    segment_ids: Tensor | None
    mask: Tensor | None


class MemoryProbe(NamedTuple):
    """See MemoryTrace; all (B, T, H), unspecified where mask is False."""

    collision: Tensor
    read_conf: Tensor
    norm: Tensor


def memory_probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    o: Tensor,
    state: Tensor | None,
    final: Tensor,
    *,
    rule: Rule,
    write: Tensor | None = None,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> MemoryProbe:
    """Collision, read confidence and norm of a fast-weight memory at every token (arguments: `memory_trace`).

    The memories W_t are never formed. Each token becomes two virtual ones, a bare read of k_t and the true
    write, so one pass yields r_t = W_{t-1}^T k_t. With the effective write w_t (hebbian: w v; delta:
    w v - beta a r) W_t = a W_{t-1} + k w^T, hence
        ||W_t||^2 = a^2 ||W_{t-1}||^2 + 2 a <r_t, w_t> + ||k_t||^2 ||w_t||^2,
    a scalar recurrence that the same op runs, with the same segments and mask. A token that writes M times is
    M tokens of which only the first decays.
    """
    q, k, v, beta, log_decay, o, final = (wide(x) for x in (q, k, v, beta, log_decay, o, final))
    write = None if write is None else wide(write)
    state = torch.zeros_like(final) if state is None else wide(state)
    norm_0 = torch.linalg.vector_norm(state, dim=(-2, -1))  # (B, H)
    if q.shape[1] == 1:
        return _step_probe(q, k, v, beta, write, log_decay, o, state, final, norm_0, rule)
    steps = 1
    if k.dim() == 5:
        steps = k.shape[2]
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        write = None if write is None else write.flatten(1, 2)
        log_decay = _interleave(log_decay, *[torch.zeros_like(log_decay)] * (steps - 1))
        segment_ids, mask = _each(segment_ids, steps), _each(mask, steps)
    doubled, real = _each(segment_ids, 2), _each(mask, 2)
    none = torch.zeros_like(beta)
    keys, decays = _interleave(k, k), _interleave(none, log_decay)
    reads, _ = delta_rule(
        keys, keys, _interleave(v, v), _interleave(none, beta), decays, state,
        write=None if write is None else _interleave(torch.zeros_like(write), write),
        rule=rule, segment_ids=doubled, mask=real,
    )  # fmt: skip
    met = reads[:, ::2]
    kept = log_decay.exp()[..., None] * met
    wrote = _effective(v, beta, write, kept, rule)
    gain = 2 * (kept * wrote).sum(-1) + (k * k).sum(-1) * (wrote * wrote).sum(-1)
    squares, _ = _scalar_recurrence(_interleave(none, gain), 2 * decays, norm_0**2, segment_ids=doubled, mask=real)
    norms = squares.clamp(min=0).sqrt()
    before, after = norms[:, ::2], norms[:, 2 * steps - 1 :: 2 * steps]
    # where the norm has cancelled to 0, what a read still shows is rounding
    met, o = torch.where(before[..., None] > 0, met, 0), torch.where(after[..., None] > 0, o, 0)
    collision = _alignment(met, before, k)
    if steps > 1:
        collision = collision.unflatten(1, (-1, steps)).nanmean(2)
    return MemoryProbe(collision, _alignment(o, after, q), after)


def _step_probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    write: Tensor | None,
    log_decay: Tensor,
    o: Tensor,
    state: Tensor,
    final: Tensor,
    norm: Tensor,
    rule: Rule,
) -> MemoryProbe:
    """The probe of a single token, whose memory after it is there; norm (B, H): that of the memory before it."""
    after = torch.linalg.vector_norm(final, dim=(-2, -1))[:, None]
    if k.dim() == 5:
        k, v, beta, write = k[:, 0], v[:, 0], beta[:, 0], None if write is None else write[:, 0]
    collision = _step_collision(k, v, beta, write, log_decay[:, 0].exp(), state, norm, rule)
    return MemoryProbe(collision[:, None], _alignment(o, after, q), after)


def _step_collision(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    write: Tensor | None,
    decay: Tensor,
    state: Tensor,
    norm: Tensor,
    rule: Rule,
) -> Tensor:
    """(B, H): the collision of a single token's M writes, from one read of the memory.

    The s-th write meets a Wᵀ k_s + Σ_{j<s} (k_j · k_s) w_j, w_j the effective writes before it; the norms follow
    the recurrence of `memory_probe`.

    Args:
        k: (B, M, H, K) keys; v, beta and write alike.
        v: (B, M, H, V).
        beta: (B, M, H).
        write: (B, M, H, V) or None.
        decay: (B, H) a.
        state: (B, H, K, V) the memory before the token.
        norm: (B, H) of it.
        rule: as given to the op.
    """
    held = (k.transpose(1, 2) @ state).transpose(1, 2)  # (B, M, H, V)
    found = [_alignment(held[:, 0], norm, k[:, 0])]
    if k.shape[1] == 1:
        return found[0]
    held, square = decay[:, None, :, None] * held, (decay * norm) ** 2
    wrote: list[Tensor] = []
    lengths = (k * k).sum(-1)
    for s in range(k.shape[1]):
        met = held[:, s]
        for j, earlier in enumerate(wrote):
            met = met + (k[:, j] * k[:, s]).sum(-1, keepdim=True) * earlier
        if s:
            before = square.clamp(min=0).sqrt()
            found.append(_alignment(torch.where(before[..., None] > 0, met, 0), before, k[:, s]))
        wrote.append(_effective(v[:, s], beta[:, s], None if write is None else write[:, s], met, rule))
        square = square + 2 * (met * wrote[s]).sum(-1) + lengths[:, s] * (wrote[s] * wrote[s]).sum(-1)
    return torch.stack(found).nanmean(0)


def _effective(v: Tensor, beta: Tensor, write: Tensor | None, met: Tensor, rule: Rule) -> Tensor:
    """What a write adds along its key, where the decayed memory answers `met` to it."""
    erased = met if rule == "delta" else torch.zeros_like(met)
    return beta[..., None] * (v - erased) if write is None else write * v - beta[..., None] * erased


class MLSTMProbe(NamedTuple):
    """See GateTrace; (B, T, H), unspecified where mask is False, and the final mass and age (B, H)."""

    log_norm: Tensor
    age: Tensor
    final_mass: Tensor
    final_age: Tensor


def mlstm_probe(
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    state: MLSTMState | None,
    final: MLSTMState,
    *,
    mass: Tensor | None = None,
    age: Tensor | None = None,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> MLSTMProbe:
    """Norm and age of the mLSTM's matrix memory at every token (arguments: `gate_trace`).

    Everything runs relative to exp(m_t), as the cell does: f' = exp(log_f + m_{t-1} - m_t) and
    i' = exp(log_i - m_t). With r_t = C_t^T k_t, ||C_t||^2 = f'^2 ||C_{t-1}||^2 + 2 i' <r_t, v> - i'^2 ||k||^2 ||v||^2;
    mass and age follow GateTrace.age_tokens. Final mass is relative to exp(final.m).
    """
    k, v, log_i, log_f = (wide(x) for x in (k, v, log_i, log_f))
    zero = torch.zeros_like(final.m)
    m_0 = zero if state is None else state.m
    if mass is None or age is None:
        mass, age = (zero if state is None else torch.linalg.vector_norm(state.C, dim=(-2, -1))), zero
    if k.shape[1] == 1:
        return _mlstm_step(k, v, log_i, log_f, m_0, final, mass, age, mask)
    packing = _Packing(segment_ids=segment_ids, mask=mask)
    m, previous = mlstm_stabilizer(log_i, log_f, m_0, **packing)
    write = (log_i - m).exp()
    decay = log_f + previous - m
    start = None if state is None else wide(state.C)
    reads, _ = delta_rule(k, k, v, write, decay, start, rule="hebbian", **packing)
    size_k, size_v = torch.linalg.vector_norm(k, dim=-1), torch.linalg.vector_norm(v, dim=-1)
    added = write * size_k * size_v
    gain = 2 * write * (reads * v).sum(-1) - added**2
    square_0 = zero if start is None else (start * start).sum((-2, -1))
    both, final_both = _scalar_recurrence(
        torch.cat([gain, added], -1), torch.cat([2 * decay, decay], -1), torch.cat([square_0, mass], -1), **packing
    )
    squares, masses = both.chunk(2, -1)
    # what stands of the mass before the write has aged by one token
    aged, final_aged = _scalar_recurrence((masses - added).clamp(min=0), decay, age * mass, **packing)
    final_mass = final_both.chunk(2, -1)[1]
    last = m[:, -1]
    return MLSTMProbe(
        log_norm=squares.clamp(min=0).log() / 2 + m,
        age=aged / masses,
        final_mass=final_mass * (last - final.m).exp(),
        final_age=torch.where(final_mass > 0, final_aged / final_mass, 0),
    )


def mlstm_stabilizer(
    log_i: Tensor,
    log_f: Tensor,
    m_0: Tensor,
    *,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The running maximum m_t = max(log_f_t + m_{t-1}, log_i_t) of the mLSTM, without a loop.

    Args:
        log_i: (B, T, H) log of the input gate.
        log_f: (B, T, H) log of the forget gate, <= 0.
        m_0: (B, H) the stabiliser before the first token.
        segment_ids: (B, T) ints; a new segment begins at m_t = log_i_t.
        mask: (B, T) bool; m does not change where it is False.

    Returns:
        m_t and m_{t-1}, both (B, T, H). Where a segment begins m_{t-1} is set to m_t - log_f_t,
        so that log_f + m_{t-1} - m_t <= 0 everywhere.
    """
    kind = log_i.dtype
    exact = exact_dtype(log_i)
    log_i, log_f, m_0 = log_i.to(exact), log_f.to(exact), m_0.to(exact)
    if mask is not None:
        log_f = torch.where(mask[..., None], log_f, 0)
    total = log_f.cumsum(1)
    level = log_i - total
    segments = segment_index(segment_ids, mask)
    shift = torch.zeros_like(level)
    if segments is not None:  # lift each segment above all before it: the running maximum then starts anew
        finite = level if mask is None else torch.where(mask[..., None], level, 0)
        low, high = torch.minimum(finite.amin(1), m_0), torch.maximum(finite.amax(1), m_0)
        shift = segments[..., None] * (high - low + 1)[:, None]
    level = level + shift
    if mask is not None:
        level = torch.where(mask[..., None], level, -torch.inf)
    peak = torch.cat([m_0[:, None], level], 1).cummax(1).values
    m = total + peak[:, 1:] - shift
    previous = torch.cat([m_0[:, None], m[:, :-1]], 1)
    if segments is not None:
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))[..., None]
        previous = torch.where(begins, m - log_f, previous)
    return m.to(kind), previous.to(kind)


def _mlstm_step(
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    m_0: Tensor,
    final: MLSTMState,
    mass: Tensor,
    age: Tensor,
    mask: Tensor | None,
) -> MLSTMProbe:
    """`mlstm_probe` of a single token, straight from the states."""
    forget = (log_f[:, 0] + m_0 - final.m).exp()
    sizes = torch.linalg.vector_norm(k[:, 0], dim=-1) * torch.linalg.vector_norm(v[:, 0], dim=-1)
    kept = forget * mass
    total = kept + (log_i[:, 0] - final.m).exp() * sizes
    aged = kept * (age + 1)
    if mask is not None:
        total, aged = torch.where(mask, total, mass), torch.where(mask, aged, mass * age)
    log_norm = torch.linalg.vector_norm(final.C, dim=(-2, -1)).log() + final.m
    mean = aged / total
    return MLSTMProbe(log_norm[:, None], mean[:, None], total, torch.where(total > 0, mean, 0))


def _scalar_recurrence(
    x: Tensor, log_decay: Tensor, start: Tensor, *, segment_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """s_t = exp(log_decay_t) s_{t-1} + x_t for x (B, T, H), start (B, H): every s_t and the last."""
    one = torch.ones_like(x)
    x = x if mask is None else torch.where(mask[..., None], x, 0)
    s, final = delta_rule(
        one[..., None], one[..., None], x[..., None], one, log_decay, start[..., None, None],
        rule="hebbian", segment_ids=segment_ids, mask=mask,
    )  # fmt: skip
    return s[..., 0], final[..., 0, 0]


def _alignment(read: Tensor, norm: Tensor, key: Tensor) -> Tensor:
    """||read|| / (norm ||key||), at most 1 (Cauchy-Schwarz); NaN where all of them are 0."""
    share: Tensor = torch.linalg.vector_norm(read, dim=-1) / (norm * torch.linalg.vector_norm(key, dim=-1))
    return share.clamp(max=1)


def _interleave(*parts: Tensor) -> Tensor:
    """a_1, b_1, a_2, b_2 ...: M tensors (B, T, ...) to (B, MT, ...)."""
    return torch.stack(parts, 2).flatten(1, 2)


def _each(x: Tensor | None, times: int) -> Tensor | None:
    """Every entry of (B, T) so many times."""
    return None if x is None else x.repeat_interleave(times, 1)


def wide(x: Tensor) -> Tensor:
    """Gives x in float32 or wider."""
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
