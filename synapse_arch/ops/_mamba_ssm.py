"""The backend "mamba_ssm": the two state-space recurrences by the kernels of the package of that name, on CUDA.

    scan     h_t = exp(dt_t A) ∘ h_{t-1} + (dt_t u_t) B_t        y_t = h_t · C_t
    ssd      S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ           y_t = S_t C_t

The scan is float32 throughout; ssd multiplies in bfloat16, its steps, rates and states are float32. The package needs
CUDA to be built, so no extra has it; it is imported on first use.
B batch, T time, D channels, H heads, P head width, G groups sharing B and C, N state width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from synapse_arch.ops._backends import LEAST_DECAY, absent
from synapse_arch.ops._opaque import opaque

OLDEST = (2, 2)
"""The first version of mamba_ssm whose functions are called as here."""

CHUNK = 128
"""Positions of ssd computed side by side."""

SCANNED = 2048
"""Positions after each of which the scan's kernel keeps a state."""

STILL = 2.0**-60
"""A step so short that exp(STILL A) is 1 in float32; a power of two, so that dividing by it costs no digit."""


def obstacle(op: str, values: Tensor, widest: torch.dtype, width: int) -> str:
    """Why the kernels cannot take values on a CUDA device and states of this width; empty if they can."""
    if widest == torch.float64:
        return "its kernels have no float64"
    if op == "ssd" and values.dtype != torch.bfloat16:
        return f"its kernels multiply in bfloat16, not in {values.dtype}: use autocast or a bfloat16 model"
    return "" if width <= 256 else f"its kernels take states up to 256 wide, not {width}"


def missing(op: str) -> str:
    """Why this machine has no kernels of `op`; empty if it has."""
    return _missing(op)


missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in _triton.py


@functools.cache
def _missing(op: str) -> str:
    kernels = "mamba_ssm.ops.triton.ssd_combined" if op == "ssd" else "selective_scan_cuda"
    remedy = "MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm, where nvcc is"
    return absent("mamba_ssm", ("mamba_ssm", kernels), OLDEST, remedy)


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The Mamba-1 recurrence.

    The kernel begins at zero and gives no gradient to the state it ends in. So N still positions in front write the
    incoming state, one column each, and N behind read the final one.

    Args:
        u: (B, T, D) float32, as all others.
        dt: (B, T, D) >= 0.
        A: (D, N).
        B: (B, T, N).
        C: (B, T, N).
        state: (B, D, N).
        fresh: (B, T) bool, where the state restarts at 0; or None.

    Returns:
        y (B, T, D) and the final state (B, D, N).
    """
    if fresh is not None:
        u, dt = _restarted(u, dt, A, fresh)
    width = A.shape[1]
    columns = torch.eye(width, dtype=u.dtype, device=u.device).expand(len(u), -1, -1)
    none, still = torch.zeros_like(state), torch.full_like(state, STILL)
    y, _ = _scan(
        torch.cat([state / STILL, u.transpose(1, 2), none], 2),
        torch.cat([still, dt.transpose(1, 2), none], 2),
        A.contiguous(),
        torch.cat([columns, B.transpose(1, 2), torch.zeros_like(columns)], 2),
        torch.cat([torch.zeros_like(columns), C.transpose(1, 2), columns], 2),
    )
    return y[..., width:-width].transpose(1, 2), y[..., -width:]


def _restarted(u: Tensor, dt: Tensor, A: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and steps that write the same, with steps so long where `fresh` that nothing is left of the state."""
    longer = torch.maximum(dt, (LEAST_DECAY / A.amax(1).clamp(max=-1e-30)).detach())
    fresh = fresh[..., None]
    return torch.where(fresh, u * (dt / longer), u), torch.where(fresh, longer, dt)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 recurrence.

    Args:
        x: (B, T, H, P) bfloat16.
        dt: (B, T, H) float32, >= 0.
        A: (H,) float32.
        B: (B, T, G, N) bfloat16.
        C: (B, T, G, N) bfloat16.
        state: (B, H, P, N) float32.
        segments: (B, T) numbers, 0 for the segment of the incoming state; or None.

    Returns:
        y (B, T, H, P) bfloat16 and the final state (B, H, P, N) float32.
    """
    excess = (dt * A / LEAST_DECAY).clamp(min=1.0)  # what is beyond an exponent's end only writes
    x, dt = (x * excess[..., None]).to(x.dtype), dt / excess
    numbers = None if segments is None else segments.int()
    y, final = _ssd(*(z.contiguous() for z in (x, dt, A, B, C, state)), numbers)
    return y, final


class _Scan(torch.autograd.Function):
    """u, dt (B, D, T), A (D, N), B, C (B, N, T) -> y (B, D, T), and the states that the kernel keeps."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        y, kept = scan_forward(u, dt, A, B, C)
        ctx.save_for_backward(u, dt, A, B, C, kept)
        ctx.mark_non_differentiable(kept)
        return y, kept

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        u, dt, A, B, C, kept = ctx.saved_tensors
        return scan_backward(u, dt, A, B, C, kept, grad.contiguous())


class _SSD(torch.autograd.Function):
    """Keeps its arguments alone; all else is computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, final = ssd_forward(x, dt, A, B, C, state, segments)
        ctx.save_for_backward(x, dt, A, B, C, state, segments)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, segments = ctx.saved_tensors
        x, dt, A, B, C, state = arguments
        found = ssd_backward(x, dt, A, B, C, state, segments, grad.contiguous(), grad_final.contiguous())
        return *(gradient.to(like.dtype) for gradient, like in zip(found, arguments, strict=True)), None


def scan_forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of the scan; without skip, gate, bias and softplus."""
    import selective_scan_cuda

    y, kept = selective_scan_cuda.fwd(u, dt, A, B[:, None], C[:, None], None, None, None, False)
    return y, kept


def scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, dt, A, B and C."""
    import selective_scan_cuda

    grad_u, grad_dt, grad_A, grad_B, grad_C, *_ = selective_scan_cuda.bwd(
        u, dt, A, B[:, None], C[:, None], None, None, None, grad, kept, None, None, False, False
    )
    return grad_u, grad_dt, grad_A, grad_B[:, 0], grad_C[:, 0]


def ssd_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The kernels of ssd: y in x's dtype and the final state."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    y, _, _, _, _, final = _mamba_chunk_scan_combined_fwd(
        x, dt, A, B, C, CHUNK, initial_states=state, seq_idx=segments
    )  # fmt: skip
    return y, final


def ssd_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None, grad: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, dt, A, B, C and state; where it asks for the output, which only a gate reads, it gets x."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd

    grad_x, grad_dt, grad_A, grad_B, grad_C, _, _, _, grad_state = _mamba_chunk_scan_combined_bwd(
        grad, x, dt, A, B, C, x, CHUNK, initial_states=state, dfinal_states=grad_final, seq_idx=segments
    )
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_state


def _kept(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    rounds = -(-u.shape[2] // SCANNED)
    return torch.empty_like(u), u.new_empty(*u.shape[:2], rounds, 2 * A.shape[1])


_scan = opaque(
    _Scan,
    "mamba_scan_kernel(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C) -> (Tensor y, Tensor kept)",
    keep=("u", "dt", "A", "B", "C", "kept"),
    fake=_kept,
)
_ssd = opaque(
    _SSD,
    "mamba_ssd_kernels(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state, Tensor? segments)"
    " -> (Tensor y, Tensor final)",
    keep=("x", "dt", "A", "B", "C", "state", "segments"),
    fake=lambda x, dt, A, B, C, state, segments: (torch.empty_like(x), torch.empty_like(state)),
)
