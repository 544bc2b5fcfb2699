"""State-space duality: the Mamba-2 recurrence with one scalar decay a head (Dao & Gu 2024).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ        y_t = S_t C_t + D x_t

B batch, T time, H heads, P head width, G groups sharing B and C, N state width, c chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from synapse_arch.errors import ShapeError, explain
from synapse_arch.ops import _kernels, _mamba_ssm, _triton
from synapse_arch.ops._backends import compute_dtype, is_step, no_autocast, widen
from synapse_arch.ops._checks import Sizes, check_chunk_size, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._chunking import reach
from synapse_arch.ops._fusible import linear
from synapse_arch.ops._linear import linear_chunks
from synapse_arch.ops._packing import segment_index


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the Mamba-2 recurrence over a sequence.

    Args:
        x: (B, T, H, P) inputs.
        dt: (B, T, H) step sizes, > 0.
        A: (H,) rates, < 0.
        B: (B, T, G, N) input maps; head h uses group h // (H / G).
        C: (B, T, G, N) output maps.
        D: (H,) skip weights, optional.
        state: (B, H, P, N) float32 or wider, or None for zeros; never modified.
        segment_ids: (B, T) ints; the state does not cross a change of id.
        mask: (B, T) bool; False positions neither write nor decay the state.
        chunk_size: positions computed side by side ("chunked").
        backend: "auto", "triton" or "mamba_ssm" (bfloat16 x, B and C on a CUDA device), "chunked", "fusible" (for
            torch.compile, which "auto" takes where it compiles bfloat16 for a GPU) or "reference".

    Returns:
        y (B, T, H, P) in x's dtype and the final state (B, H, P, N), float32 or wider.

    Raises:
        ShapeError, StateError: arguments that do not fit. ConfigError, BackendUnavailable: the backend.
    """
    sizes = _check(x, dt, A, B, C, D, state, segment_ids, mask, chunk_size)
    dtype = compute_dtype(x, dt, A, B, C, D, state)
    chosen = _kernels.choose("ssd", backend, x, dtype, sizes["N"], sizes["P"])
    with no_autocast(x):
        steps = dt.to(dtype)
        if mask is not None:
            steps = torch.where(mask[..., None], steps, 0.0)  # dt = 0 neither decays nor writes
        if state is None:
            state = x.new_zeros(sizes["B"], sizes["H"], sizes["P"], sizes["N"], dtype=dtype)
        segments = segment_index(segment_ids, mask)
        A, state = A.to(dtype), state.to(dtype)
        if sizes["T"] > 1 and chosen == "chunked":
            return _chunked(x, steps, A, B, C, D, state, segments, min(chunk_size, sizes["T"]))
        form = _FORMS.get(chosen, _reference) if sizes["T"] > 1 else _reference
        wide, B, C = widen(dtype if form is _reference else x.dtype, (x, B, C))
        if is_step(sizes["T"]) and chosen != "reference":
            form = _step
        y, final = form(wide, steps, A, B, C, state, segments)
        if D is not None:
            y = torch.addcmul(y, wide, D.to(wide.dtype)[:, None])
    return y.to(x.dtype), final


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    segment_ids: Tensor | None, mask: Tensor | None, chunk_size: int,
) -> Sizes:  # fmt: skip
    """The sizes of ssd's arguments, or the errors that it names."""
    sizes: Sizes = {}
    check_shape("x", x, "B T H P", sizes, remedy="a sequence needs at least one position")
    check_shape("dt", dt, "B T H", sizes)
    check_shape("A", A, "H", sizes)
    check_shape("B", B, "B T G N", sizes)
    check_shape("C", C, "B T G N", sizes)
    if D is not None:
        check_shape("D", D, "H", sizes)
    check_state("state", state, "B H P N", sizes)
    check_float(x=x, dt=dt, A=A, B=B, C=C, D=D)
    check_packing(segment_ids, mask, sizes)
    check_chunk_size(chunk_size)
    if sizes["H"] % sizes["G"]:
        raise ShapeError(explain("B", f"a number of groups that divides H={sizes['H']}", sizes["G"]))
    return sizes


def _reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after another."""
    log_decay, heads, groups = dt * A, x.shape[2], B.shape[2]
    B, C = (z.repeat_interleave(heads // groups, dim=2) for z in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        if segments is not None and t > 0:
            state = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], state, 0.0)
        write = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        state = log_decay[:, t].exp()[..., None, None] * state + write
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One position: the heads of a group stand side by side in the product with their C."""
    before = state.unflatten(1, (B.shape[2], -1))  # (B, G, R, P, N), R = H / G heads
    written = (dt[..., None] * x).view(before.shape[:-1])[..., None]
    decay = (dt * A).exp().view(before.shape[:3])[..., None, None]
    after = (before * decay).addcmul_(written, B[:, 0, :, None, None])
    y = after.flatten(2, 3) @ C[:, 0, :, :, None]
    return y.reshape(x.shape), after.flatten(1, 2)


def _by_kernel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The linear recurrence with keys B, values dt x and queries C; its state is the transpose of ours."""
    repeats = x.shape[2] // B.shape[2]
    B, C = (z.repeat_interleave(repeats, dim=2) for z in (B, C))
    writes = (dt[..., None] * x).to(x.dtype)
    y, final = _triton.linear(C, B, writes, _triton.log_decay(dt * A, segments), state.transpose(-1, -2))
    return y, final.transpose(-1, -2).contiguous()


def _fusible(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, but the heads of a group share keys and queries."""
    y, final = linear(C, B, x, dt, _triton.log_decay(dt * A, segments), state.transpose(-1, -2))
    return y, final.transpose(-1, -2).contiguous()


_FORMS = {"triton": _by_kernel, "mamba_ssm": _mamba_ssm.ssd, "fusible": _fusible}


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """A linear recurrence, see `_linear`; the heads of a group share B and C."""
    visible = reach(segments, size, x.shape[1], x.device)
    y, _, final = linear_chunks(C, B, x, dt, dt * A, state, visible, size, D)
    return y.to(x.dtype), final
