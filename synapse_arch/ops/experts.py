"""Sparse SwiGLU experts: each token visits the experts it was routed to, none is ever dropped.

    y_n = Σ_j weights[n, j] · (silu(x_n Wg_e) ∘ (x_n Wu_e)) W_out_e,   e = indices[n, j], [Wg, Wu] = w_in_e

n tokens, k slots a token (index -1 = unused slot), E experts, D model width, F expert width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ShapeError, explain
from synapse_arch.ops._backends import autocast_enabled, fall_back, is_step, resolve
from synapse_arch.ops._checks import Sizes, check_float, check_shape
from synapse_arch.ops._opaque import opaque


def expert_swiglu(
    x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor, weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Sends tokens through their experts and adds up what comes back.

    Args:
        x: (n, D) tokens.
        w_in: (E, D, 2F) gate columns first, then up columns.
        w_out: (E, F, D).
        indices: (n, k) integers in -1 .. E-1; -1 marks a slot that is not used, so k may differ by token.
        weights: (n, k) combination weights; an unused slot's weight is ignored.
        backend: "sorted" (tokens grouped by expert, one pair of products an expert), "grouped"
            (the same as grouped matrix products, no host synchronisation; "auto" takes it off the CPU where
            dtype and widths allow, and logs once where they do not),
            "rowwise" (every expert that any token visits on every token: the products' shapes, and with them each
            token's bits, do not depend on where the other tokens go),
            or "reference" (every expert on every token).

    Returns:
        (n, D) in x's dtype (under autocast, in autocast's unless x is float64).

    Raises:
        ShapeError: arguments that do not fit. ConfigError, BackendUnavailable: the backend.
    """
    sizes = _check(x, w_in, w_out, indices, weights)
    chosen = resolve("expert_swiglu", backend)
    if backend == "auto" and x.device.type != "cpu":
        chosen = "grouped"
    dtype = torch.get_autocast_dtype(x.device.type) if _narrowed(x) else x.dtype
    if backend == "auto" and chosen == "grouped" and is_step(sizes["n"]):
        return _gathered_step(x.to(dtype), w_in, w_out, indices, weights)
    x = x.to(dtype)  # weights follow expert by expert
    if chosen == "grouped" and (reason := _ungroupable(x, sizes)):
        chosen = fall_back("expert_swiglu", backend, "grouped", "sorted", reason)
    if chosen == "reference":
        return _reference(x, w_in, w_out, indices, weights)
    if chosen == "rowwise":
        return _rowwise(x, w_in, w_out, indices, weights)
    if chosen == "sorted" and is_step(sizes["n"]):
        step = _gathered_step if torch.compiler.is_compiling() else _step
        return step(x, w_in, w_out, indices, weights)
    order, counts = sort_by_expert(indices, sizes["E"])
    weights = torch.where(indices >= 0, weights, 0.0).to(x.dtype)
    if chosen == "grouped":
        return _grouped(x, w_in, w_out, order, weights.reshape(-1)[order], counts)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _sorted(x, w_in, w_out, order, weights, counts)[0]  # type: ignore[no-any-return]
    return _through(x, w_in, w_out, _place(x, order, counts), weights)


def _narrowed(x: Tensor) -> bool:
    """Whether products of x are autocast's, which leaves float64 alone."""
    return autocast_enabled(x) and x.dtype != torch.float64


def _check(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor, weights: Tensor) -> Sizes:
    """The sizes of expert_swiglu's arguments, or the errors that it names."""
    sizes: Sizes = {}
    check_shape("x", x, "n D", sizes)
    check_shape("w_out", w_out, "E F D", sizes, remedy="stack experts as (E, F, D)")
    check_shape("w_in", w_in, "E D G", sizes, remedy="stack experts as (E, D, 2F)")
    if sizes["G"] != 2 * sizes["F"]:
        raise ShapeError(explain("w_in", f"(E, D, 2F) with F={sizes['F']}", tuple(w_in.shape)))
    check_shape("indices", indices, "n k", sizes)
    check_shape("weights", weights, "n k", sizes)
    check_float(x=x, w_in=w_in, w_out=w_out, weights=weights)
    if indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise ShapeError(explain("indices", "an integer dtype", indices.dtype))
    for name, w in (("w_in", w_in), ("w_out", w_out)):
        if w.dtype != x.dtype and not _narrowed(x):
            raise ShapeError(explain(name, f"x's dtype {x.dtype}", w.dtype, "convert one of them, or use autocast"))
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
        _check_indices(indices, sizes["E"])
    return sizes


def _check_indices(indices: Tensor, experts: int) -> None:
    """Raises ShapeError where an index names no expert."""
    low, high = (int(bound) for bound in indices.aminmax())
    if low < -1 or high >= experts:
        expected = f"-1 (unused) or 0 to {experts - 1}"
        raise ShapeError(explain("indices", expected, low if low < -1 else high, "E is w_in's first dimension"))


def _ungroupable(x: Tensor, sizes: Sizes) -> str:
    """Why the grouped matrix product cannot take these widths and dtype; empty if it can."""
    if x.dtype == torch.float64:
        return "it has no float64"
    if x.device.type != "cpu" and x.dtype != torch.bfloat16:
        return f"on {x.device.type} it has bfloat16 only, not {x.dtype}, and experts wait for the device: use autocast"
    unit = 16 // x.element_size()
    if sizes["D"] % unit or sizes["F"] % unit:
        return f"in {x.dtype} the widths D={sizes['D']} and F={sizes['F']} must be multiples of {unit}"
    return ""


def _reference(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, which counts where it was chosen."""
    y = torch.zeros_like(x)
    for e in range(w_in.shape[0]):
        here = indices == e
        came = here.any(-1, keepdim=True)  # of the others nothing counts, not even NaN
        gate, up = (torch.where(came, x, 0.0) @ w_in[e].to(x.dtype)).chunk(2, dim=-1)
        share = torch.where(here, weights, 0.0).sum(-1, keepdim=True).to(x.dtype)
        y = y + torch.where(came, share * ((F.silu(gate) * up) @ w_out[e].to(x.dtype)), 0.0)
    return y


def _rowwise(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every visited expert on every token; each token then picks its own results, in its own order."""
    used = sorted(set(indices.flatten().tolist()) - {-1})
    if not used:
        return torch.zeros_like(x)
    visited = indices >= 0
    x = torch.where(visited.any(1, keepdim=True), x, 0.0)
    gate, up = torch.stack([x @ w_in[e].to(x.dtype) for e in used]).chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    rows = torch.stack([hidden[i] @ w_out[e].to(x.dtype) for i, e in enumerate(used)])  # (experts used, n, D)
    place = torch.zeros(w_in.shape[0], dtype=torch.long)
    place[used] = torch.arange(len(used))
    chosen = place.to(x.device)[indices.clamp(min=0)]
    picked = rows[chosen, torch.arange(x.shape[0], device=x.device)[:, None]]  # (n, k, D)
    share = torch.where(visited, weights, 0.0).to(x.dtype)
    return torch.where(visited[..., None], picked * share[..., None], 0.0).sum(1)


def _step(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One token: there is nothing to sort, each of its experts is one pair of products."""
    y = torch.zeros_like(x)
    for slot, e in enumerate(indices[0].tolist()):
        if e >= 0:
            gate, up = torch.mm(x, w_in[e].to(x.dtype)).chunk(2, dim=-1)
            y.addcmul_(torch.mm(F.silu(gate).mul_(up), w_out[e].to(x.dtype)), weights[:, slot, None].to(x.dtype))
    return y


def _gathered_step(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One token where numbers must not be read out of a tensor: the weights of its experts are copied together.

    Compiled for a CPU, they are read where they lie.
    """
    used, chosen = indices[0] >= 0, indices[0].clamp(0, w_in.shape[0] - 1)  # bounds that a compiler sees
    gate, up = (x @ w_in[chosen].to(x.dtype)).chunk(2, dim=-1)  # (k, 1, F)
    rows = ((F.silu(gate) * up) @ w_out[chosen].to(x.dtype))[:, 0]  # (k, D)
    share = torch.where(used, weights[0], 0.0).to(x.dtype)
    return torch.where(used[:, None], rows * share[:, None], 0.0).sum(0, keepdim=True)


def sort_by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Groups the slots of `indices` (n, k) by expert, unused ones last, without host synchronisation.

    Returns:
        order (n·k,) the flat slots sorted by expert, and counts (E,), how many each expert received.
    """
    flat = indices.reshape(-1)
    owner = torch.where(flat < 0, experts, flat)
    owner, order = owner.sort(stable=True)
    bounds = torch.arange(experts + 1, device=flat.device, dtype=flat.dtype)
    return order, torch.searchsorted(owner, bounds).diff()


def _grouped(x: Tensor, w_in: Tensor, w_out: Tensor, order: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    """Two grouped matrix products over the sorted slots; the rows behind the last expert's are unused slots."""
    slots = order.shape[0] // x.shape[0]
    ends = counts.cumsum(0).to(torch.int32)
    used = (torch.arange(order.shape[0], device=x.device) < ends[-1])[:, None]
    share = torch.where(used[:, 0], share, 0.0)
    w_in, w_out = w_in.to(x.dtype).contiguous(), w_out.to(x.dtype).contiguous()
    # What a grouped product leaves behind its last offset, forward and backward, is whatever memory held: cut off.
    hidden = F.grouped_mm(torch.where(used, x[order // slots], 0.0), w_in, offs=ends)
    gate, up = torch.where(used, hidden, 0.0).chunk(2, dim=-1)
    rows = torch.where(used, F.grouped_mm(torch.where(used, F.silu(gate) * up, 0.0), w_out, offs=ends), 0.0)
    rows = rows * share[:, None]
    return rows[torch.argsort(order)].view(-1, slots, x.shape[1]).sum(1)


Group = tuple[tuple[int, ...], int]
"""One expert, or two that are multiplied together, and how many rows each has."""


class _Rows(NamedTuple):
    """Where the slots of all experts stand, group after group.

    What an expert's rows are filled up with is its own first one again, which nobody then picks.
    """

    groups: list[Group]  # of the experts that received slots
    token: Tensor  # (R',) whose token a row holds
    row: Tensor  # (n, k) where a slot stands; R >= R' where it is unused


ALIKE = 16
"""Two experts are multiplied together where their loads differ by at most a sixteenth of the larger one."""


def _in_pairs(x: Tensor) -> bool:
    """Whether experts are multiplied two at a time: a thread each is faster on a CPU than two threads for either."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _row_multiple(x: Tensor, slots: int, experts: int) -> int:
    """What the number of an expert's rows is filled up to: a power of two, an eighth of their mean, 8 to 64.

    oneDNN, which multiplies narrow numbers on CPUs, compiles for every new shape (1 ms, as long as the product itself
    takes) and keeps what it compiled; without filling up there is a new one at every expert of every step.
    """
    if x.device.type != "cpu" or _in_pairs(x):
        return 1
    return min(64, max(8, 1 << (slots // (8 * experts)).bit_length()))


def _most_rows(x: Tensor, slots: int, experts: int) -> int:
    """R, whatever the routing."""
    if _in_pairs(x):
        return slots + slots // (2 * ALIKE - 1)
    return slots + experts * (_row_multiple(x, slots, experts) - 1)


def _groups(counts: list[int], multiple: int, pairs: bool) -> list[Group]:
    """The experts that received slots, by falling load, one or, of like loads, two at a time."""
    loads = sorted((count, e) for e, count in enumerate(counts) if count)
    groups: list[Group] = []
    while loads:
        count, e = loads.pop()
        together: tuple[int, ...] = (e,)
        if pairs and loads and ALIKE * (count - loads[-1][0]) <= count:
            together = tuple(sorted((e, loads.pop()[1])))
        groups.append((together, -(-count // multiple) * multiple))
    return groups


def _place(x: Tensor, order: Tensor, counts: Tensor) -> _Rows:
    """Gives the slots their rows; where the counts lie on a device, it is waited for once."""
    n, slots, experts = x.shape[0], order.shape[0], counts.shape[0]
    known: list[int] = counts.tolist()
    groups = _groups(known, _row_multiple(x, slots, experts), _in_pairs(x))
    ranked = [(e, size) for together, size in groups for e in together]
    ranked += [(e, 0) for e, count in enumerate(known) if not count]
    starts, end = [0] * experts, 0
    for e, size in ranked:
        starts[e], end = end, end + size
    placed = torch.tensor([starts, *zip(*ranked, strict=True)]).to(x.device, non_blocking=True)
    used, offsets = order[: sum(known)], counts.cumsum(0) - counts
    shifts = (placed[0] - offsets).repeat_interleave(counts, output_size=used.shape[0])
    row = order.new_full((slots,), _most_rows(x, slots, experts))
    row[used] = torch.arange(used.shape[0], device=x.device) + shifts
    first = order[offsets.clamp(max=slots - 1)]
    token = first[placed[1]].repeat_interleave(placed[2], output_size=end)
    token[row[used]] = used
    return _Rows(groups, token // (slots // n), row.view(n, -1))


def _by_group(x: Tensor, groups: list[Group]) -> list[Tensor]:
    """The rows x (R, ...) of each group, (m, ...) of one expert and (2, m, ...) of two."""
    sizes = [size * len(together) for together, size in groups]
    parts = x[: sum(sizes)].split(sizes) if sizes else ()
    return [
        part if len(together) == 1 else part.unflatten(0, (2, -1))
        for part, (together, _) in zip(parts, groups, strict=True)
    ]


def _of(stack: Tensor, together: tuple[int, ...]) -> Tensor:
    """The matrix of one expert, or those of two (2, ...), where they lie in the stack (E, ...)."""
    if len(together) == 1:
        return stack[together[0]]
    first, last = together
    return stack[first : last + 1 : last - first]


class _Sorted(torch.autograd.Function):
    """One pair of products an expert. Keeps the first product only; writes each weight gradient where it belongs.

    Weights wider than x are narrowed expert by expert: no copy of the stacks is made or kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor, order: Tensor, weights: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        places = _place(x, order, counts)
        hidden = x.new_empty(_most_rows(x, order.shape[0], w_in.shape[0]), w_in.shape[2])
        y = _through(x, w_in, w_out, places, weights, hidden)
        ctx.save_for_backward(x, w_in, w_out, order, weights, counts, hidden)
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        return y, hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_in, w_out, order, weights, counts, hidden = ctx.saved_tensors
        wants_x, wants_in, wants_out, _, wants_weights, _ = ctx.needs_input_grad
        groups, token, row = _place(x, order, counts)
        scales = weights.new_zeros(hidden.shape[0] + 1, 1)
        scales[row] = weights[..., None]
        grad_in = torch.empty_like(w_in) if wants_in else None
        grad_out = torch.empty_like(w_out) if wants_out else None
        visited = {e for together, _ in groups for e in together}
        for e in set(range(w_in.shape[0])) - visited:  # the others are written whole below
            for unused in (grad_in, grad_out):
                if unused is not None:
                    unused[e] = 0.0
        grad_scales = weights.new_zeros(hidden.shape[0] + 1)
        rows = x.new_empty(hidden.shape[0] + 1, x.shape[1])
        parts = (_by_group(y, groups) for y in (token, scales, hidden, grad_scales, rows))
        for (together, _), tokens, scale, first, grad_scale, grad_row in zip(groups, *parts, strict=True):
            came = F.embedding(tokens, grad)
            gate, up = first.chunk(2, dim=-1)
            lit = F.silu(gate)
            active = lit * up
            back = came @ _of(w_out, together).to(x.dtype).mT
            if wants_weights:
                torch.linalg.vecdot(back, active, out=grad_scale)
            if grad_out is not None:
                _product(active.mT, came * scale, _of(grad_out, together))
            back *= scale
            before = torch.empty_like(first)
            torch.mul(back, lit, out=before[..., lit.shape[-1] :])
            torch.ops.aten.silu_backward(back.mul_(up), gate, grad_input=before[..., : lit.shape[-1]])
            if grad_in is not None:
                _product(F.embedding(tokens, x).mT, before, _of(grad_in, together))
            if wants_x:
                _product(before, _of(w_in, together).to(x.dtype).mT, grad_row)
        grad_x = None
        if wants_x:
            rows[-1] = 0.0
            grad_x = _gathered(rows, row, None)
        return grad_x, grad_in, grad_out, None, grad_scales[row], None


def _through(
    x: Tensor, w_in: Tensor, w_out: Tensor, places: _Rows, weights: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """One pair of products an expert, the first of which is written into `hidden` (R, 2F) where that is given."""
    groups, token, row = places
    rows = x.new_empty(_most_rows(x, row.numel(), w_in.shape[0]) + 1, x.shape[1])
    rows[-1] = 0.0
    kept = [None] * len(groups) if hidden is None else _by_group(hidden, groups)
    parts = zip(groups, _by_group(token, groups), kept, _by_group(rows, groups), strict=True)
    for (together, _), tokens, keep, result in parts:
        first = torch.matmul(F.embedding(tokens, x), _of(w_in, together).to(x.dtype), out=keep)
        gate, up = first.chunk(2, dim=-1)
        torch.matmul(F.silu(gate).mul_(up), _of(w_out, together).to(x.dtype), out=result)
    return _gathered(rows, row, weights)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes a @ b, widened where `out` is wider.

    Two products are copied into a stack, where they do not lie side by side: torch would take one after the other.
    """
    if out.dtype == a.dtype and out.is_contiguous():
        torch.matmul(a, b, out=out)
    else:
        out.copy_(a @ b)


def _gathered(rows: Tensor, row: Tensor, weights: Tensor | None) -> Tensor:
    """(R + 1, D) rows, the last one zeros -> (n, D), each token's sum over its slots."""
    picked = rows.index_select(0, row.flatten()).view(*row.shape, -1)
    if weights is not None:
        picked.mul_(weights[..., None])
    return picked[:, 0] + picked[:, 1] if row.shape[1] == 2 else picked.sum(1)  # one sum over two is ten times slower


_sorted = opaque(
    _Sorted,
    "sorted_experts(Tensor x, Tensor w_in, Tensor w_out, Tensor order, Tensor weights, Tensor counts)"
    " -> (Tensor y, Tensor hidden)",
    keep=("x", "w_in", "w_out", "order", "weights", "counts", "hidden"),
    fake=lambda x, w_in, w_out, order, *_: (
        torch.empty_like(x),
        x.new_empty(_most_rows(x, order.shape[0], w_in.shape[0]), w_in.shape[2]),
    ),
)
