"""Packed documents and padding: what `segment_ids` and `mask` mean, once for every op.

Masked positions do not exist: two positions are neighbours when no unmasked one lies between them.
A new segment begins where an unmasked position's id differs from its unmasked neighbour's on the left.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_index(segment_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Numbers the segments of each row 0, 1, 2 ...; an incoming state belongs to number 0.

    Args:
        segment_ids: (B, T) ints, or None for one segment.
        mask: (B, T) bool, or None for no padding.

    Returns:
        (B, T) int64, non-decreasing along T (a masked position carries its left neighbour's number),
        or None where `segment_ids` is None.
    """
    if segment_ids is None:
        return None
    before = segment_ids.roll(1, dims=1)
    if mask is None:
        starts = segment_ids != before
        starts[:, 0] = False
    else:
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        latest = torch.where(mask, positions, -1).cummax(dim=1).values
        previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
        before = segment_ids.gather(1, previous.clamp(min=0))
        starts = mask & (previous >= 0) & (segment_ids != before)
    return starts.long().cumsum(dim=1)


def compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The order that moves each row's unmasked positions to the front, and its inverse; both (B, T)."""
    order = torch.argsort(~mask, dim=1, stable=True)
    return order, torch.argsort(order, dim=1)
