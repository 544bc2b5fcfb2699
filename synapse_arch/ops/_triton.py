"""The backend "triton": linear recurrences and the delta rule by flash-linear-attention's kernels, on CUDA in bfloat16.

    linear   S_t = e^{g_t} S_{t-1} + k_t v_tᵀ                                       o_t = S_tᵀ q_t
    delta    S_t = e^{g_t} (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ                o_t = S_tᵀ q_t

q, k, v are bfloat16, decays, strengths and states float32; products accumulate in float32. Kernels with a decay for
every key channel (GLA, Yang et al. 2024c; KDA, Kimi Team 2025) are given one for all: the backward pass of those with
one a head is wrong on Hopper where Triton is older than 3.7.1. The package is imported on first use.
B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from synapse_arch.ops._backends import LEAST_DECAY, absent
from synapse_arch.ops._opaque import opaque

OLDEST = (0, 6)
"""The first version of flash-linear-attention whose functions are called as here."""

CHUNK = 64
"""Positions the kernels compute side by side."""


def obstacle(values: Tensor, widest: torch.dtype, key: int, value: int) -> str:
    """Why the kernels cannot take these on a CUDA device; empty if they can."""
    if values.dtype != torch.bfloat16 or widest == torch.float64:
        given = values.dtype if values.dtype != torch.bfloat16 else widest
        return f"its kernels multiply in bfloat16, not in {given}: use autocast or a bfloat16 model"
    if key > 256 or key % 16 or value % 16:
        return f"its kernels take key widths up to 256 and widths that are multiples of 16, not {key} and {value}"
    return ""


def missing() -> str:
    """Why this machine has no kernels; empty if it has."""
    return _missing()


# torch.compiler.assume_constant_result sets it too, but imports the compiler, which takes a second.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _missing() -> str:
    modules = ("fla", "fla.ops.gla", "fla.ops.kda")
    return absent("flash-linear-attention", modules, OLDEST, "pip install 'synapse-arch[kernels]'")


def log_decay(g: Tensor, segments: Tensor | None) -> Tensor:
    """Decays (B, T, H) as the kernels take them: nothing is left of a state where a segment (B, T) begins."""
    if segments is not None:
        g = g.masked_fill(begins(segments)[..., None], LEAST_DECAY)
    return g.clamp(min=LEAST_DECAY)


def begins(segments: Tensor) -> Tensor:
    """Where a segment begins that the incoming state does not belong to: (B, T) bool, of numbers (B, T)."""
    return segments.diff(dim=1, prepend=segments[:, :1]) != 0


def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The linear recurrence.

    Args:
        q: (B, T, H, K) bfloat16.
        k: (B, T, H, K) bfloat16.
        v: (B, T, H, V) bfloat16.
        g: (B, T, H) float32, of `log_decay`.
        state: (B, H, K, V) float32.

    Returns:
        o (B, T, H, V) bfloat16 and the final state (B, H, K, V) float32.
    """
    o, final, _ = _linear(*(x.contiguous() for x in (q, k, v, g, state)))
    return o, final


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule; arguments as for `linear`, and strengths beta (B, T, H) float32."""
    o, final, _, _ = _delta(*(x.contiguous() for x in (q, k, v, beta, g, state)))
    return o, final


def _by_channel(g: Tensor, k: Tensor) -> Tensor:
    """(B, T, H) -> (B, T, H, K), the same decay for every key channel."""
    return g[..., None].expand(k.shape).contiguous()


class _Linear(torch.autograd.Function):
    """Keeps the scores inside chunks beside its arguments; states are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(q):
            o, final, scores = gla_forward(q, k, v, _by_channel(g, k), state)
        ctx.save_for_backward(q, k, v, g, state, scores)
        ctx.mark_non_differentiable(scores)
        return o, final, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        q, k, v, g, state, scores = ctx.saved_tensors
        grad, grad_final = grad.contiguous(), grad_final.contiguous()
        with torch.cuda.device_of(q):
            found = gla_backward(q, k, v, _by_channel(g, k), state, scores, grad, grad_final)
        grad_q, grad_k, grad_v, grad_g, grad_state = found
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_g.sum(-1), grad_state


class _Delta(torch.autograd.Function):
    """Keeps the chunks' two matrices, of queries on keys and of keys on keys, beside its arguments."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(q):
            o, final, reads, writes = kda_forward(q, k, v, beta, _by_channel(g, k), state)
        ctx.save_for_backward(q, k, v, beta, g, state, reads, writes)
        ctx.mark_non_differentiable(reads, writes)
        return o, final, reads, writes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        q, k, v, beta, g, state, reads, writes = ctx.saved_tensors
        grad, grad_final = grad.contiguous(), grad_final.contiguous()
        with torch.cuda.device_of(q):
            found = kda_backward(q, k, v, beta, _by_channel(g, k), state, reads, writes, grad, grad_final)
        grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state = found
        narrow = grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
        return *narrow, grad_beta.to(beta.dtype), grad_g.sum(-1), grad_state


def gla_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of the linear recurrence; g (B, T, H, K).

    Returns:
        o, the final state, and the scores inside chunks (B, T, H, CHUNK) float32.
    """
    from fla.ops.gla.chunk import chunk_gla_fwd

    _, scores, _, final, o = chunk_gla_fwd(
        q=q, k=k, v=v, g=g, g_cumsum=None, scale=1.0, initial_state=state, output_final_state=True, chunk_size=CHUNK
    )
    return o, final, scores


def gla_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scores: Tensor, grad: Tensor, grad_final: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g and state."""
    from fla.ops.gla.chunk import chunk_gla_bwd

    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = chunk_gla_bwd(
        q=q, k=k, v=v, g=g, g_cumsum=None, scale=1.0, initial_state=state, h=None, A=scores, do=grad, dht=grad_final,
        chunk_size=CHUNK,
    )  # fmt: skip
    return found


def kda_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernels of the delta rule; g (B, T, H, K).

    Returns:
        o, the final state, and two matrices a chunk (B, T, H, CHUNK) in q's dtype.
    """
    from fla.ops.kda.chunk_fwd import chunk_kda_fwd

    o, final, _, reads, writes, *_ = chunk_kda_fwd(
        q=q, k=k, v=v, g=g, beta=beta, scale=1.0, initial_state=state, output_final_state=True, chunk_size=CHUNK
    )
    return o, final, reads, writes


def kda_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, reads: Tensor, writes: Tensor,
    grad: Tensor, grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, beta, g and state."""
    from fla.ops.kda.chunk_bwd import chunk_kda_bwd
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state, _, _ = chunk_kda_bwd(
        q=q, k=k, v=v, beta=beta, Aqk=reads, Akk=writes, scale=1.0, initial_state=state, do=grad, dht=grad_final,
        g=chunk_local_cumsum(g, chunk_size=CHUNK, scale=RCP_LN2), chunk_size=CHUNK,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state


def _per_chunk(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:3], CHUNK, dtype=dtype)


_linear = opaque(
    _Linear,
    "linear_kernels(Tensor q, Tensor k, Tensor v, Tensor g, Tensor state) -> (Tensor o, Tensor final, Tensor scores)",
    keep=("q", "k", "v", "g", "state", "scores"),
    fake=lambda q, k, v, g, state: (torch.empty_like(v), torch.empty_like(state), _per_chunk(q, torch.float32)),
)
_delta = opaque(
    _Delta,
    "delta_kernels(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor state)"
    " -> (Tensor o, Tensor final, Tensor reads, Tensor writes)",
    keep=("q", "k", "v", "beta", "g", "state", "reads", "writes"),
    fake=lambda q, k, v, beta, g, state: (
        torch.empty_like(v), torch.empty_like(state), _per_chunk(q, q.dtype), _per_chunk(q, q.dtype)
    ),
)  # fmt: skip
