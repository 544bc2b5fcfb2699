"""The Mamba-1 recurrence: one decay for every channel and state (Gu & Dao 2023, eq. 2).

    h_t = exp(dt_t A) ∘ h_{t-1} + (dt_t u_t) B_t        y_t = h_t · C_t + D u_t

B batch, T time, D channels, N state width, n chunks, c chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.ops._backends import compute_dtype, is_step, no_autocast, resolve
from synapse_arch.ops._checks import Sizes, check_chunk_size, check_float, check_packing, check_shape, check_state
from synapse_arch.ops._opaque import opaque
from synapse_arch.ops._packing import segment_index


def selective_scan(
    u: Tensor,
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
    """Runs the Mamba-1 recurrence over a sequence.

    Args:
        u: (B, T, D) inputs.
        dt: (B, T, D) step sizes, > 0.
        A: (D, N) rates, < 0.
        B: (B, T, N) input maps.
        C: (B, T, N) output maps.
        D: (D,) skip weights, optional.
        state: (B, D, N) float32 or wider, or None for zeros; never modified.
        segment_ids: (B, T) ints; the state does not cross a change of id.
        mask: (B, T) bool; False positions neither write nor decay the state.
        chunk_size: steps a chunk; all chunks step side by side ("chunked").
        backend: "auto", "chunked" or "reference".

    Returns:
        y (B, T, D) in u's dtype and the final state (B, D, N), float32 or wider.

    Raises:
        ShapeError, StateError: arguments that do not fit. ConfigError, BackendUnavailable: the backend.
    """
    sizes = _check(u, dt, A, B, C, D, state, segment_ids, mask, chunk_size)
    chosen = resolve("selective_scan", backend)
    with no_autocast(u):
        dtype = compute_dtype(u, dt, A, B, C, D, state)
        wide, steps = u.to(dtype), dt.to(dtype)
        if mask is not None:
            steps = torch.where(mask[..., None], steps, 0.0)  # dt = 0 neither decays nor writes
        state = wide.new_zeros(sizes["B"], sizes["D"], sizes["N"]) if state is None else state.to(dtype)
        segments = segment_index(segment_ids, mask)
        fresh = None if segments is None else segments != F.pad(segments[:, :-1], (1, 0))
        args = (steps * wide, steps, A.to(dtype), B.to(dtype), C.to(dtype), state, fresh)
        if is_step(sizes["T"]) and chosen != "reference":
            y, final = _step(*args[:-1])
        elif chosen == "reference" or sizes["T"] == 1:
            y, final = _reference(*args)
        else:
            y, final = _chunked(*args, min(chunk_size, sizes["T"]))
        if D is not None:
            y = torch.addcmul(y, wide, D.to(dtype))
    return y.to(u.dtype), final


def _check(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    segment_ids: Tensor | None, mask: Tensor | None, chunk_size: int,
) -> Sizes:  # fmt: skip
    """The sizes of selective_scan's arguments, or the errors that it names."""
    sizes: Sizes = {}
    check_shape("u", u, "B T D", sizes, remedy="a sequence needs at least one position")
    check_shape("dt", dt, "B T D", sizes)
    check_shape("A", A, "D N", sizes)
    check_shape("B", B, "B T N", sizes)
    check_shape("C", C, "B T N", sizes)
    if D is not None:
        check_shape("D", D, "D", sizes)
    check_state("state", state, "B D N", sizes)
    check_float(u=u, dt=dt, A=A, B=B, C=C, D=D)
    check_packing(segment_ids, mask, sizes)
    check_chunk_size(chunk_size)
    return sizes


def _reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after another; x = dt u, and where `fresh` (B, T) the state restarts at 0."""
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()
        if fresh is not None:
            decay = torch.where(fresh[:, t, None, None], 0.0, decay)
        state = decay * state + x[:, t, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def _step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: the states decay and are written in one pass, and read by one product."""
    decay = (dt[:, 0, :, None] * A).exp_()
    after = (decay * state).addcmul_(x[:, 0, :, None], B)
    return (after @ C.transpose(1, 2)).transpose(1, 2), after


def _chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, fresh: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """A two-level scan: all chunks step side by side, the chunk ends are carried one after another."""
    batch, length, channels = x.shape
    padding = -length % size
    x, dt, B, C = (F.pad(z, (0, 0, 0, padding)).unflatten(1, (-1, size)) for z in (x, dt, B, C))
    restart = torch.zeros(1, dtype=torch.bool, device=x.device)
    if fresh is not None:
        restart = F.pad(fresh, (0, padding)).unflatten(1, (-1, size))
    y, final, _ = _scan(x, dt, A, B, C, state, restart)
    return y.reshape(batch, -1, channels)[:, :length], final


class _TwoLevelScan(torch.autograd.Function):
    """Forward keeps the state entering each chunk; backward runs each chunk again from it.

    x, dt (B, n, c, D); B, C (B, n, c, N); restart (B, n, c) bool or a single False.
    Every exponent is dt A <= 0, so nothing overflows and nothing is divided out.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, restart: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks, size = x.shape[1:3]
        local = x.new_zeros(*x.shape[:2], *A.shape)  # (B, n, D, N): each chunk from zero
        through = torch.ones_like(local)
        for c in range(size):
            decay = _decay(dt, A, restart, c)
            local = torch.addcmul(_write(x, B, c), decay, local)
            through *= decay
        entering = torch.empty_like(local)
        for n in range(chunks):
            entering[:, n] = state
            state = torch.addcmul(local[:, n], through[:, n], state)
        y = torch.empty_like(x)
        h = entering
        for c in range(size):
            h = torch.addcmul(_write(x, B, c), _decay(dt, A, restart, c), h)
            y[:, :, c] = (h @ C[:, :, c, :, None]).squeeze(-1)
        ctx.save_for_backward(x, dt, A, B, C, entering, restart)
        ctx.mark_non_differentiable(entering)
        return y, state, entering

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(grad_y):  # where a caller runs backward() under it
            return _TwoLevelScan._gradients(ctx, grad_y, grad_final)

    @staticmethod
    def _gradients(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, entering, restart = ctx.saved_tensors
        chunks, size = x.shape[1:3]
        h, history = entering, [entering]
        for c in range(size):
            h = torch.addcmul(_write(x, B, c), _decay(dt, A, restart, c), h)
            history.append(h)
        # the gradient of each chunk's final state: local part from zero, then carried from the right
        local, through = torch.zeros_like(entering), torch.ones_like(entering)
        for c in reversed(range(size)):
            decay = _decay(dt, A, restart, c)
            local = decay * torch.addcmul(local, grad_y[:, :, c, :, None], C[:, :, c, None, :])
            through *= decay
        leaving = torch.empty_like(entering)
        carried = grad_final
        for n in reversed(range(chunks)):
            leaving[:, n] = carried
            carried = torch.addcmul(local[:, n], through[:, n], carried)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
        grad_b, grad_c = torch.empty_like(B), torch.empty_like(C)
        grad_a = torch.zeros_like(A)
        grad = leaving
        for c in reversed(range(size)):
            grad = torch.addcmul(grad, grad_y[:, :, c, :, None], C[:, :, c, None, :])
            grad_c[:, :, c] = (grad_y[:, :, c, None, :] @ history[c + 1]).squeeze(-2)
            grad_x[:, :, c] = (grad @ B[:, :, c, :, None]).squeeze(-1)
            grad_b[:, :, c] = (x[:, :, c, None, :] @ grad).squeeze(-2)
            grad = grad * _decay(dt, A, restart, c)
            exponent = grad * history[c]  # gradient of dt A
            grad_dt[:, :, c] = (exponent * A).sum(-1)
            grad_a += (exponent * dt[:, :, c, :, None]).sum((0, 1))
        return grad_x, grad_dt, grad_a, grad_b, grad_c, carried, None


def _decay(dt: Tensor, A: Tensor, restart: Tensor, c: int) -> Tensor:
    """exp(dt A) at step c of every chunk, 0 where a segment begins: (B, n, D, N)."""
    decay = (dt[:, :, c, :, None] * A).exp_()
    return decay.masked_fill_(restart[:, :, c, None, None], 0.0) if restart.dim() == 3 else decay


def _write(x: Tensor, B: Tensor, c: int) -> Tensor:
    """What step c of every chunk adds to the state: (B, n, D, N)."""
    return x[:, :, c, :, None] * B[:, :, c, None, :]


_scan = opaque(
    _TwoLevelScan,
    "two_level_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state, Tensor restart)"
    " -> (Tensor y, Tensor final, Tensor entering)",
    keep=("x", "dt", "A", "B", "C", "entering", "restart"),
)
