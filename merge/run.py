"""The merge itself: inputs opened and checked, one tensor after the other merged and written, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from merge.io import Checkpoint, Source
from merge.recipe import Recipe


class Inputs(NamedTuple):
    """What a recipe names, opened.

    Attributes:
        base: whose names, shapes, dtypes and configuration the result has: the recipe's base, or else the first model.
        models: in the recipe's order, experts aligned where the recipe says so.
        notes: what the user should know about these inputs, a line each.
    """

    base: Checkpoint
    models: tuple[Source, ...]
    notes: tuple[str, ...] = ()


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens the base and the models, and checks that they can be merged (no tensor is read)."""
    raise NotImplementedError


def stream(recipe: Recipe, inputs: Inputs, *, progress: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the result by name, in the order in which they are written; for use without files."""
    raise NotImplementedError


def merge(recipe: Recipe, out: Path, *, overwrite: bool = False, progress: bool = True) -> Path:
    """Merges into a new folder."""
    raise NotImplementedError


Align = Callable[[Checkpoint, Source], Source]
