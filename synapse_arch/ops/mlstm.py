"""mLSTM: a matrix memory with exponential input gate and sigmoid forget gate (Beck et al. 2024, eq. 19-27).

    C_t = σ(f_t) C_{t-1} + exp(i_t) k_t v_tᵀ     n_t = σ(f_t) n_{t-1} + exp(i_t) k_t
    h_t = C_tᵀ q_t / max(|n_tᵀ q_t|, 1)          with q scaled by K^-½

stored relative to exp(m), m_t = max(log σ(f_t) + m_{t-1}, i_t), so that nothing overflows. A fresh state has
C = n = m = 0. B batch, T time, H heads, K key width, V value width, N chunks, c chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import StateError, explain
from synapse_arch.ops import _fusible, _kernels, _triton
from synapse_arch.ops._backends import compute_dtype, exact_dtype, finite_log, is_step, no_autocast, widen
from synapse_arch.ops._checks import Sizes, check_chunk_size, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._chunking import reach
from synapse_arch.ops._linear import linear_chunks
from synapse_arch.ops._packing import segment_index


class MLSTMState(NamedTuple):
    """The memory relative to exp(m): the true matrix memory is exp(m) · C, the true normaliser exp(m) · n."""

    C: Tensor  # (B, H, K, V)
    n: Tensor  # (B, H, K)
    m: Tensor  # (B, H)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState | None = None,
    *,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState]:
    """Runs the mLSTM cell over a sequence.

    Args:
        q: (B, T, H, K) queries, scaled by K^-½ inside.
        k: (B, T, H, K) keys.
        v: (B, T, H, V) values.
        i: (B, T, H) input-gate pre-activations (the gate is exp).
        f: (B, T, H) forget-gate pre-activations (the gate is sigmoid).
        state: what an earlier call returned, or None; never modified.
        segment_ids: (B, T) ints; the state does not cross a change of id.
        mask: (B, T) bool; False positions neither write nor decay the state.
        chunk_size: positions computed side by side ("chunked").
        backend: "auto", "triton" (bfloat16 q, k and v on a CUDA device), "chunked", "fusible" (for torch.compile, which
            "auto" takes where it compiles bfloat16 for a GPU) or "reference".

    Returns:
        h (B, T, H, V) in v's dtype and the final MLSTMState, float32 or wider.

    Raises:
        ShapeError, StateError: arguments that do not fit. ConfigError, BackendUnavailable: the backend.
    """
    sizes = _check(q, k, v, i, f, state, segment_ids, mask, chunk_size)
    dtype = compute_dtype(q, k, v, i, f, *(state or ()))
    chosen = _kernels.choose("mlstm", backend, v, dtype, sizes["K"], sizes["V"])
    with no_autocast(v):
        log_i, log_f = _log_gates(i.to(dtype), f.to(dtype), mask)
        if state is None:
            state = fresh_state(sizes["B"], sizes["H"], sizes["K"], sizes["V"], like=log_i)
        state = MLSTMState(*widen(dtype, state))
        segments = segment_index(segment_ids, mask)
        if sizes["T"] > 1 and chosen == "chunked":
            h, final = _chunked(q, k, v, log_i, log_f, state, segments, min(chunk_size, sizes["T"]))
        elif sizes["T"] > 1 and chosen in _LINEAR:
            q, k, vs = widen(v.dtype, (q, k, v))
            h, final = _as_linear(_LINEAR[chosen], q, k, vs, log_i, log_f, state, segments)
        else:
            q, k, vs = widen(dtype, (q, k, v))
            q = q * sizes["K"] ** -0.5
            if is_step(sizes["T"]) and chosen != "reference":
                h, final = _step(q, k, vs, log_i, log_f, state)
            else:
                h, final = _reference(q, k, vs, log_i, log_f, state, segments)
    return h.to(v.dtype), final


def _check(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState | None,
    segment_ids: Tensor | None, mask: Tensor | None, chunk_size: int,
) -> Sizes:  # fmt: skip
    """The sizes of mlstm's arguments, or the errors that it names."""
    sizes: Sizes = {}
    check_shape("q", q, "B T H K", sizes, remedy="a sequence needs at least one position")
    check_shape("k", k, "B T H K", sizes, remedy="check n_heads")
    check_shape("v", v, "B T H V", sizes, remedy="check n_heads")
    check_shape("i", i, "B T H", sizes)
    check_shape("f", f, "B T H", sizes)
    check_float(q=q, k=k, v=v, i=i, f=f)
    check_packing(segment_ids, mask, sizes)
    check_chunk_size(chunk_size)
    if state is not None:
        if not (isinstance(state, tuple) and len(state) == 3):
            raise StateError(explain("state", "an MLSTMState(C, n, m)", type(state).__name__))
        for name, letters, leaf in zip("Cnm", ("B H K V", "B H K", "B H"), state, strict=True):
            if leaf is None:
                raise StateError(explain(f"state.{name}", "a tensor", None))
            check_state(f"state.{name}", leaf, letters, sizes)
    return sizes


def _log_gates(i: Tensor, f: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logs of the input and forget gates (B, T, H); masked positions neither write nor decay."""
    log_i, log_f = i, finite_log(F.logsigmoid(f))
    if mask is not None:
        log_i = log_i.masked_fill(~mask[..., None], -torch.inf)
        log_f = log_f.masked_fill(~mask[..., None], 0.0)
    return log_i, log_f


def fresh_state(batch: int, heads: int, key_width: int, value_width: int, *, like: Tensor) -> MLSTMState:
    """The state before the first position, of `like`'s dtype and device."""
    return MLSTMState(
        like.new_zeros(batch, heads, key_width, value_width),
        like.new_zeros(batch, heads, key_width),
        like.new_zeros(batch, heads),
    )


def _reference(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: MLSTMState, segments: Tensor | None
) -> tuple[Tensor, MLSTMState]:
    """The recurrence, one position after another."""
    C, n, m = state
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t > 0:
            same = (segments[:, t] == segments[:, t - 1])[:, None]
            C, n, m = (torch.where(same[(..., *[None] * (z.dim() - 2))], z, 0.0) for z in (C, n, m))
        stabiliser = torch.maximum(log_f[:, t] + m, log_i[:, t])
        forget = (log_f[:, t] + m - stabiliser).exp()
        write = (log_i[:, t] - stabiliser).exp()[..., None] * k[:, t]
        C = forget[..., None, None] * C + write[..., None] * v[:, t, :, None, :]
        n = forget[..., None] * n + write
        m = stabiliser
        weight = (n * q[:, t]).sum(-1)
        read = (C * q[:, t, ..., None]).sum(-2)
        outputs.append(_normalised(read, weight, m))
    return torch.stack(outputs, dim=1), MLSTMState(C, n, m)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: MLSTMState
) -> tuple[Tensor, MLSTMState]:
    """One position: the memory decays and is written in one pass, and read by one product."""
    before, log_i = log_f[:, 0] + state.m, log_i[:, 0]
    m = torch.maximum(before, log_i)
    forget = (before - m).exp()[..., None]  # (B, H, 1)
    write = (log_i - m).exp()[..., None] * k[:, 0]  # (B, H, K)
    C = (state.C * forget[..., None]).addcmul_(write[..., None], v[:, 0, :, None])
    n = torch.addcmul(write, state.n, forget)
    read = (q[:, 0, :, None] @ C).squeeze(2)
    return _normalised(read, torch.linalg.vecdot(n, q[:, 0]), m)[:, None], MLSTMState(C, n, m)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: MLSTMState, segments: Tensor | None, size: int
) -> tuple[Tensor, MLSTMState]:
    """A linear recurrence relative to exp(m), see `_relative`, whose normaliser is n."""
    decay, write, m, m_final = _relative(log_i, log_f, state.m, segments)
    memory = torch.cat([state.C.transpose(-1, -2), state.n[:, :, None]], dim=2)  # (B, H, V + 1, K)
    memory = memory * (state.m - state.m.detach()).exp()[..., None, None]  # 1, but it lets state.m's gradient in
    visible = reach(segments, size, q.shape[1], q.device)
    read, weight, final = linear_chunks(q, k, v, write.exp(), decay, memory, visible, size)
    h = _normalised(read, weight, m - 0.5 * math.log(q.shape[-1]))  # q is not scaled here
    final = final * (m[:, -1] - m_final).exp()[..., None, None]
    # copies: views of one tensor could not be saved, and would keep each other alive
    return h, MLSTMState(final[..., :-1, :].transpose(-1, -2).contiguous(), final[..., -1, :].clone(), m_final)


COLUMNS = 16
"""What the kernels' value width grows by: a column of ones, whose memory is the normaliser n, and zeros to align it."""


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, write: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return _triton.linear(q, (write[..., None] * k).to(k.dtype), v, g, state)


_LINEAR: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"triton": _by_kernel, "fusible": _fusible.linear}


def _as_linear(
    linear: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, v: Tensor, log_i: Tensor, log_f: Tensor, state: MLSTMState, segments: Tensor | None,
) -> tuple[Tensor, MLSTMState]:  # fmt: skip
    """A linear recurrence relative to exp(m), see `_relative`."""
    decay, write, m, m_final = _relative(log_i, log_f, state.m, segments)
    g = _triton.log_decay(decay, segments)
    values = torch.cat([F.pad(v, (0, 1), value=1.0), v.new_zeros(*v.shape[:-1], COLUMNS - 1)], dim=-1)
    memory = F.pad(torch.cat([state.C, state.n[..., None]], dim=-1), (0, COLUMNS - 1))
    memory = memory * (state.m - state.m.detach()).exp()[..., None, None]  # 1, but it lets state.m's gradient in
    read, final = linear(q, k, values, write.exp(), g, memory)
    read = read[..., : v.shape[-1] + 1].to(m.dtype) * q.shape[-1] ** -0.5
    h = _normalised(read[..., :-1], read[..., -1], m)
    final = final * (m[:, -1] - m_final).exp()[..., None, None]
    return h, MLSTMState(final[..., : v.shape[-1]].clone(), final[..., v.shape[-1]].clone(), m_final)


def _relative(
    log_i: Tensor, log_f: Tensor, m: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence relative to exp(m): C_t = exp(log f_t + m_{t-1} − m_t) C_{t-1} + exp(i_t − m_t) k_t v_tᵀ.

    The stabiliser cancels in h, so it is a constant to the gradient everywhere but in the state returned.

    Returns:
        log decays, 0 where a segment begins, and log strengths of the writes (B, T, H), none above 0; the stabiliser at
        every position (B, T, H), without gradient, and the last one (B, H), with it.
    """
    every, last = _running_stabiliser(log_i, log_f, m, segments)
    before = torch.cat([m.detach()[:, None], every[:, :-1]], dim=1)
    decay = log_f + (before - every)  # what is close is subtracted first
    if segments is not None:  # where m starts again it may fall, and nothing decays from before it
        decay = decay.masked_fill(_triton.begins(segments)[..., None], 0.0)
    return decay, log_i - every, every, last


def _running_stabiliser(log_i: Tensor, log_f: Tensor, m: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The stabiliser at every position (B, T, H), without gradient, and the last one (B, H), with it.

    With F the running sum of log f, m_t = F_t + max(m_0, max_{s <= t} (i_s − F_s)): summed in float64, so that nothing
    is lost behind strong forgetting.
    """
    exact = exact_dtype(log_i)
    i, f, m_0 = log_i.to(exact), log_f.to(exact), m.to(exact)
    if segments is not None:
        begins = _triton.begins(segments)[..., None]
        i = torch.where(begins, torch.maximum(i, f), i)  # from m = 0
        with torch.no_grad():
            farthest = torch.where(i.isfinite(), i, 0.0).abs().amax(1) + m.abs()
            beyond = 1.0 + 2.0 * farthest - f.sum(1)  # more than any two weights are apart
        f = torch.where(begins, f - beyond[:, None], f)
    total = _scan(f, torch.cumsum, torch.add, 0.0)
    with torch.no_grad():
        largest = _scan(i - total, _largest, torch.maximum, -torch.inf)
        every = (total + torch.maximum(largest, m_0[:, None])).to(m.dtype)
    last = total[:, -1] + torch.maximum((i - total).amax(1), m_0)
    return every, last.to(m.dtype)


BLOCK = 64
"""Positions that compiled code scans at once."""


def _scan(x: Tensor, scan: Callable[..., Tensor], join: Callable[..., Tensor], neutral: float) -> Tensor:
    """scan(x, 1) of x (B, T, H): in blocks where it is compiled for a GPU.

    There torch 2.11 cannot translate a long sum over what it fuses, and scans for maxima position by position.
    """
    if x.device.type == "cpu" or not torch.compiler.is_compiling():
        return scan(x, 1)
    return _blocked_scan(x, scan, join, neutral)


def _blocked_scan(x: Tensor, scan: Callable[..., Tensor], join: Callable[..., Tensor], neutral: float) -> Tensor:
    length = x.shape[1]
    blocks = F.pad(x, (0, 0, 0, -length % BLOCK)).unflatten(1, (-1, BLOCK))  # behind the end: nobody reads it
    within = scan(blocks, 2)
    before = F.pad(scan(within[:, :-1, -1], 1), (0, 0, 1, 0), value=neutral)
    joined: Tensor = join(within, before[:, :, None])
    return joined.flatten(1, 2)[:, :length]


def _largest(x: Tensor, dim: int) -> Tensor:
    return x.cummax(dim).values


def _normalised(read: Tensor, weight: Tensor, m: Tensor) -> Tensor:
    """The quotient read / max(|weight|, e^-m), where read and weight are relative to e^m.

    The exponent stops where e^±m leaves the dtype's range: h is 0 there but for rounding, and never 0 / 0.
    """
    limit = -math.log(torch.finfo(m.dtype).tiny)
    floor = (-m).clamp(-limit, limit).exp()
    return read / torch.maximum(weight.abs(), floor)[..., None]
