"""The Mamba-1 recurrence: one decay for every channel and state (Gu & Dao 2023, eq. 2).

    h_t = exp(dt_t A) ∘ h_{t-1} + (dt_t u_t) B_t        y_t = h_t · C_t + D u_t

B batch, T time, D channels, N state width, n chunks, c chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.ops import _kernels, _mamba_ssm
from synapse_arch.ops._backends import compute_dtype, is_step, no_autocast
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
        chunk_size: steps a chunk; chunks step side by side ("chunked").
        backend: "auto", "mamba_ssm" (on a CUDA device), "chunked" or "reference".

    Returns:
        y (B, T, D) in u's dtype and the final state (B, D, N), float32 or wider.

    Raises:
        ShapeError, StateError: arguments that do not fit. ConfigError, BackendUnavailable: the backend.
    """
    sizes = _check(u, dt, A, B, C, D, state, segment_ids, mask, chunk_size)
    dtype = compute_dtype(u, dt, A, B, C, D, state)
    chosen = _kernels.choose("selective_scan", backend, u, dtype, sizes["N"], sizes["D"])
    with no_autocast(u):
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
        elif chosen == "mamba_ssm":
            y, final = _mamba_ssm.scan(wide, *args[1:])
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
    """A two-level scan: chunks step side by side, their ends are carried one after another."""
    batch, length, channels = x.shape
    padding = -length % size
    x, dt, B, C = (F.pad(z, (0, 0, 0, padding)).unflatten(1, (-1, size)) for z in (x, dt, B, C))
    restart = None if fresh is None else F.pad(fresh, (0, padding)).unflatten(1, (-1, size))
    y, final, _ = _scan(x, dt, A, B, C, state, restart)
    return y.reshape(batch, -1, channels)[:, :length], final


AT_ONCE = 1 << 17
"""How many numbers of states step side by side on a CPU: as many as stay in its cache from one pass to the next."""
FEWEST = 8
"""Fewer chunks do not step side by side: the first pass over them would cost more than it saves."""


class _Steps(NamedTuple):
    """The arguments cut into chunks. Channels stand last in states too: a pass over them runs along channels."""

    x: Tensor  # (B, n, c, D) dt u
    dt: Tensor  # (B, n, c, D)
    A: Tensor  # (N, D)
    B: Tensor  # (B, n, c, N)
    C: Tensor  # (B, n, c, N)
    restart: Tensor | None  # (B, n, c) bool, where a segment begins

    def at(self, chunks: slice) -> _Steps:
        """Some of the chunks."""
        x, dt, B, C = (y[:, chunks] for y in (self.x, self.dt, self.B, self.C))
        return _Steps(x, dt, self.A, B, C, None if self.restart is None else self.restart[:, chunks])

    def decay(self, c: int) -> Tensor:
        """exp(dt A) at step c of every chunk, 0 where a segment begins: (B, n, N, D)."""
        return self._decay(self.dt[:, :, c], None if self.restart is None else self.restart[:, :, c])

    def through(self) -> Tensor:
        """What every chunk leaves of the state that enters it: (B, n, N, D)."""
        return self._decay(self.dt.sum(2), None if self.restart is None else self.restart.any(2))

    def _decay(self, dt: Tensor, restart: Tensor | None) -> Tensor:
        decay = (dt[:, :, None] * self.A).exp_()
        return decay if restart is None else decay.masked_fill_(restart[..., None, None], 0.0)

    def after(self, h: Tensor, c: int) -> Tensor:
        """The states (B, n, N, D) behind step c of every chunk, by those in front of it."""
        return (self.x[:, :, c, None] * self.B[:, :, c, :, None]).addcmul_(self.decay(c), h)


def _side_by_side(z: _Steps) -> list[slice]:
    """The chunks that step side by side: as many as a CPU's cache holds, elsewhere all."""
    chunks = some = z.x.shape[1]
    if z.x.device.type == "cpu":
        some = AT_ONCE // (len(z.x) * z.A.numel())
        some = some if some >= FEWEST else 1
    return [slice(first, first + some) for first in range(0, chunks, some)]


class _TwoLevelScan(torch.autograd.Function):
    """Forward keeps the state entering each chunk; backward runs each chunk again from it.

    x, dt (B, n, c, D); A (D, N); B, C (B, n, c, N); state (B, D, N); restart (B, n, c) bool or None.
    Every exponent is dt A <= 0, so nothing overflows and nothing is divided out.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, restart: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = _Steps(x, dt, A.t().contiguous(), B, C, restart)
        entering, y, h = x.new_empty(*x.shape[:2], *z.A.shape), torch.empty_like(x), state.transpose(1, 2)
        for chunks in _side_by_side(z):
            h = _scan_chunks(z.at(chunks), h, entering[:, chunks], y[:, chunks])
        ctx.save_for_backward(x, dt, A, B, C, entering, restart)
        ctx.mark_non_differentiable(entering)
        return y, h.transpose(1, 2).contiguous(), entering

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(grad_y):  # where a caller runs backward() under it
            return _TwoLevelScan._gradients(ctx, grad_y, grad_final)

    @staticmethod
    def _gradients(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, entering, restart = ctx.saved_tensors
        z = _Steps(x, dt, A.t().contiguous(), B, C, restart)
        like = torch.empty_like
        grads = _Steps(like(x), like(dt), torch.zeros_like(z.A), like(B), like(C), None)
        grad_y, carried = grad_y.contiguous(), grad_final.transpose(1, 2)
        for chunks in reversed(_side_by_side(z)):
            carried = _scan_chunks_backward(
                z.at(chunks), entering[:, chunks], grad_y[:, chunks], carried, grads.at(chunks)
            )
        return grads.x, grads.dt, grads.A.t(), grads.B, grads.C, carried.transpose(1, 2), None


def _scan_chunks(z: _Steps, state: Tensor, entering: Tensor, y: Tensor) -> Tensor:
    """Fills in the states that enter the chunks (B, n, N, D), the first by `state` (B, N, D), and y (B, n, c, D).

    Returns:
        The state behind the last chunk (B, N, D).
    """
    steps = range(z.x.shape[2])
    entering[:, 0] = state
    if entering.shape[1] > 1:
        earlier = z.at(slice(-1))
        local = torch.zeros_like(entering[:, 1:])  # each chunk from zero
        for c in steps:
            local = earlier.after(local, c)
        for n, through in enumerate(earlier.through().unbind(1)):
            entering[:, n + 1] = torch.addcmul(local[:, n], through, entering[:, n])
    h = entering
    for c in steps:
        h = z.after(h, c)
        y[:, :, c] = (z.C[:, :, c, None] @ h).squeeze(2)
    return h[:, -1]


def _scan_chunks_backward(z: _Steps, entering: Tensor, grad_y: Tensor, carried: Tensor, grads: _Steps) -> Tensor:
    """Fills in `grads`, that of A adds up; `carried` (B, N, D) is the gradient of the state behind the last chunk.

    Returns:
        The gradient of the state that enters the first chunk (B, N, D).
    """
    steps = range(z.x.shape[2])
    history = [entering]
    for c in steps:
        history.append(z.after(history[-1], c))
    grad = torch.empty_like(entering)  # of the states behind the chunks, then step by step of those in front
    grad[:, -1] = carried
    if entering.shape[1] > 1:
        later = z.at(slice(1, None))
        local = torch.zeros_like(entering[:, 1:])
        for c in reversed(steps):
            local.addcmul_(later.C[:, :, c, :, None], grad_y[:, 1:, c, None]).mul_(later.decay(c))
        for n, through in reversed(list(enumerate(later.through().unbind(1)))):
            grad[:, n] = torch.addcmul(local[:, n], through, grad[:, n + 1])
    rates = torch.zeros_like(grad)
    for c in reversed(steps):
        grad.addcmul_(z.C[:, :, c, :, None], grad_y[:, :, c, None])
        grads.C[:, :, c] = _along_channels(grad_y[:, :, c], history.pop())
        grads.x[:, :, c] = (z.B[:, :, c, None] @ grad).squeeze(2)
        grads.B[:, :, c] = _along_channels(z.x[:, :, c], grad)
        exponent = grad.mul_(z.decay(c)) * history[-1]  # the gradient of dt A
        rates.addcmul_(exponent, z.dt[:, :, c, None])
        grads.dt[:, :, c] = exponent.mul_(z.A).sum(2)
    grads.A.add_(rates.sum((0, 1)))
    return grad[:, 0]


def _along_channels(x: Tensor, h: Tensor) -> Tensor:
    """Sums over D of x (B, n, D) and h (B, n, N, D): (B, n, N); with the row in front, which is faster on a CPU."""
    return (x[:, :, None] @ h.transpose(-1, -2)).squeeze(2)


_scan = opaque(
    _TwoLevelScan,
    "two_level_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor state, Tensor? restart)"
    " -> (Tensor y, Tensor final, Tensor entering)",
    keep=("x", "dt", "A", "B", "C", "entering", "restart"),
)
