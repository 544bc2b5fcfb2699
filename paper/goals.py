"""Goals: what was asked for, what was reached, and how both are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.quality.records import Cell


@dataclass(frozen=True)
class Bar:
    """Something the issue asks for.

    Attributes:
        what: what is measured.
        value: what was reached, as printed; None where it was not run.
        goal: what was asked for, as printed.
        met: None where it was not run.
    """

    what: str
    value: str | None
    goal: str
    met: bool | None


def equal_time(what: str, cells: Mapping[str, Cell], *, of: str) -> Bar:
    """Whether the model named `of` needs fewer bits than every other that was run."""
    reached = cells[of].median
    others = [cell.median for name, cell in cells.items() if name != of and cell.median is not None]
    least = min(others, default=None)
    met = None if reached is None or least is None else reached < least
    goal = "below every peer" if least is None else f"below {least:.3f}, the best peer"
    return Bar(f"{what}, bits per byte", bits_of(cells[of]), goal, met)


def bits_of(cell: Cell) -> str | None:
    """The median, and whether it is one seed's."""
    shown = bits(cell.median)
    return f"{shown} (one seed)" if len(cell.scores) == 1 else shown


def bits(value: float | None) -> str | None:
    """As bits per byte are printed; None where nothing was run."""
    return None if value is None else f"{value:.3f}"
