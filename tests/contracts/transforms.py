"""Other ways to compute what a mixer computes: in pieces, segment by segment, without the padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.contracts.cases import Case
from tests.helpers import Tensors

PACKING = ("segment_ids", "mask")


def is_state(name: str) -> bool:
    return name.startswith("state")


def sliced(case: Case, tensors: Tensors, rows: slice, times: slice | Tensor) -> Tensors:
    """The given rows and positions of the inputs, with the same rows of the state."""
    picked = {}
    for name, x in tensors.items():
        if name in case.sequence:
            picked[name] = x[rows][:, times]
        else:
            picked[name] = x[rows] if is_state(name) else x
    return picked


def with_state(tensors: Tensors, outputs: Tensors | None) -> Tensors:
    """The inputs with the state that stands in `outputs`; with None, a fresh one."""
    kept = {name: x for name, x in tensors.items() if not is_state(name)}
    return kept | {name: x for name, x in (outputs or {}).items() if is_state(name)}


def joined(pieces: list[Tensors], dim: int) -> Tensors:
    """Outputs one after another along `dim`; along time (1) the last state stays."""
    return {
        name: pieces[-1][name] if dim == 1 and is_state(name) else torch.cat([piece[name] for piece in pieces], dim)
        for name in pieces[0]
    }


def in_pieces(case: Case, tensors: Tensors, bounds: list[int], **options: Any) -> Tensors:
    """One call between each two neighbours in `bounds`, the state handed on."""
    outputs: list[Tensors] = []
    for start, stop in pairwise(bounds):
        times = slice(start, stop)
        piece = sliced(case, tensors, slice(None), times)
        if outputs:
            piece = with_state(piece, outputs[-1])
        local = {key: x[:, times] if key in PACKING else x for key, x in options.items()}
        outputs.append(case.call(piece, **local))
    return joined(outputs, 1)


def segment_by_segment(case: Case, tensors: Tensors, segment_ids: Tensor) -> Tensors:
    """Each run of equal ids in a call of its own; the incoming state goes to the first, the others start fresh."""
    rows = []
    for b, ids in enumerate(segment_ids):
        changes = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
        pieces: list[Tensors] = []
        for start, stop in pairwise([0, *changes.tolist(), len(ids)]):
            piece = sliced(case, tensors, slice(b, b + 1), slice(start, stop))
            pieces.append(case.call(with_state(piece, None) if pieces else piece))
        rows.append(joined(pieces, 1))
    return joined(rows, 0)


def without_padding(case: Case, tensors: Tensors, mask: Tensor, segment_ids: Tensor | None = None) -> Tensors:
    """Each row's unmasked positions alone; outputs of all rows one after another, (unmasked positions, ...)."""
    rows = []
    for b, real in enumerate(mask):
        times = real.nonzero().flatten()
        piece = sliced(case, tensors, slice(b, b + 1), times)
        if len(times):
            rows.append(
                case.call(piece)
                if segment_ids is None
                else segment_by_segment(case, piece, segment_ids[b, times][None])
            )
        else:
            like = case.call(sliced(case, tensors, slice(b, b + 1), slice(0, 1)))
            state = {n: x if like[n].requires_grad else x.detach() for n, x in piece.items() if is_state(n)}
            rows.append({name: x[:, :0] for name, x in like.items() if not is_state(name)} | state)
    return unpadded({name: torch.cat([row[name] for row in rows], dim=int(not is_state(name))) for name in rows[0]})


def unpadded(outputs: Tensors, mask: Tensor | None = None) -> Tensors:
    """The outputs at unmasked positions, (positions, ...), and the states as they are."""
    if mask is None:
        return {name: x if is_state(name) else x.flatten(0, 1) for name, x in outputs.items()}
    return {name: x if is_state(name) else x[mask] for name, x in outputs.items()}
