"""Trimming models as wholes (Yadav et al. 2023): one cut over all tensors of a task vector, found while they stream.

Read once to find the cuts and once to merge; what is drawn beforehand as a sample is a few pages of each file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from merge.io import Checkpoint, Source
from merge.select import Cut, cut, kept
from merge.vectors import Delta, TaskVectors, per_model

_DRAWS = 1 << 14
_RUN = 16
"""A sample is this many runs of so many neighbouring numbers, over all tensors."""


def global_cuts(
    base: Checkpoint, models: Sequence[Source], names: Sequence[str], density: float | Sequence[float], *, bar: Any
) -> list[Cut]:
    """The cut of each model that keeps exactly its share of all the numbers in the named tensors.

    Args:
        base: what the task vectors start from.
        models: the models.
        names: the tensors that count, in the order in which equal magnitudes are kept.
        density: one share for all models or one each.
        bar: a progress bar; it is advanced by the bytes of each tensor of the base that was read.
    """
    total = sum(math.prod(base.shapes[name]) for name in names)
    cuts = []
    for model, share in zip(models, per_model("density", density, len(models)), strict=True):

        def blocks(model: Source = model) -> Iterator[Tensor]:
            for name in names:
                own = base.tensor(name)
                yield from TaskVectors(own, [model.given(name, own)]).magnitudes(0)
                bar.update(own.numel() * own.element_size())

        cuts.append(cut(blocks, total, kept(total, share), _sample(base, model, names, total), draws=_DRAWS))
    return cuts


def _sample(base: Checkpoint, model: Source, names: Sequence[str], total: int) -> Tensor:
    """Magnitudes of runs at regular distances in every tensor, as many as its share of the whole."""
    samples = []
    for name in names:
        n = math.prod(base.shapes[name])
        runs = max(1, _DRAWS * n // total)
        starts = [] if n <= _RUN * runs else [run * (n // runs) for run in range(runs)]
        pieces = [slice(start, start + _RUN) for start in starts] or [slice(0, n)]
        here = torch.cat([piece.float() for piece in base.pieces(name, pieces)])
        if isinstance(model, Checkpoint):
            samples.append(torch.cat([piece.float() for piece in model.pieces(name, pieces)]).sub_(here).abs_())
        else:
            given = model.given(name, base.tensor(name))
            flat = (given.value if isinstance(given, Delta) else given).flatten()
            there = torch.cat([flat[piece].float() for piece in pieces])
            samples.append((there if isinstance(given, Delta) else there - here).abs())
    return torch.cat(samples)
