"""Records of runs, and what one model reached on one task: the cell of its best learning rate and weight decay."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PROVENANCE = ("commit", "machine", "config")
LOWER_IS_BETTER = "bits_per_byte"


@dataclass(frozen=True)
class Cell:
    """What one model reached on one task: the scores of all seeds at its best learning rate and weight decay.

    Attributes:
        records: one a seed, by seed; empty where nothing was run.
    """

    records: tuple[Record, ...] = ()

    @property
    def found(self) -> bool:
        """Whether anything was run."""
        return bool(self.records)

    @property
    def scores(self) -> list[float]:
        """One a seed."""
        return [float(record["score"]) for record in self.records]

    @property
    def median(self) -> float | None:
        """The median over seeds."""
        return statistics.median(self.scores) if self.records else None

    @property
    def low(self) -> float | None:
        """The least score."""
        return min(self.scores, default=None)

    @property
    def high(self) -> float | None:
        """The largest score."""
        return max(self.scores, default=None)

    @property
    def best(self) -> float | None:
        """The best score of the seeds."""
        return self.low if self.bits else self.high

    @property
    def bits(self) -> bool:
        """Whether the score is in bits per byte, less of which is better."""
        return bool(self.records) and self.records[0]["metric"] == LOWER_IS_BETTER

    def __getattr__(self, name: str) -> Any:
        """A field of the first record (lr, parameters, state_numbers, steps, ...); None where nothing was run."""
        if name.startswith("_"):
            raise AttributeError(name)
        if not self.records:
            return None
        try:
            return self.records[0][name]
        except KeyError as error:
            raise AttributeError(f"the records have no {name!r}") from error

    def better_than(self, other: Cell) -> bool | None:
        """Whether the median is ahead of the other's; None where one of them was not run."""
        if self.median is None or other.median is None:
            return None
        return self.median < other.median if self.bits else self.median > other.median

    def ahead_of(self, other: Cell) -> bool | None:
        """Whether every seed is ahead of every seed of the other."""
        if not (self.found and other.found):
            return None
        return max(self.scores) < min(other.scores) if self.bits else min(self.scores) > max(other.scores)


def read(folder: Path) -> list[Record]:
    """Every JSON file below a folder, by path; each says where it came from in `file`."""
    files = sorted(folder.rglob("*.json"))
    return [
        {**json.loads(file.read_text(encoding="utf-8")), "file": file.relative_to(folder).as_posix()} for file in files
    ]


def unsourced(record: Record) -> list[str]:
    """What a record does not say of where it comes from: its commit, machine, configuration and seed."""
    missing = [field for field in PROVENANCE if record.get(field) in (None, "", {})]
    return missing if "seed" in record or record.get("seeds") else [*missing, "seed"]


def scored(record: Record) -> bool:
    """Whether a record's score is a finite number, as that of a run that diverged is not."""
    return math.isfinite(record["score"])


def best(records: Iterable[Record]) -> Cell:
    """Of the records of one task and model: all seeds in the best cell.

    Runs without a finite score are left out; where some were longer, only those of the most steps count. Among the
    (learning rate, weight decay) with the most seeds the best median wins, the smaller pair of equals: a grid is run
    with one seed and its best cell with all, so a cell that was tried once does not compete with one that was repeated.
    """
    records = list(filter(scored, records))
    most = max((record["steps"] for record in records), default=0)
    cells: dict[tuple[float, float], list[Record]] = {}
    for record in records:
        if record["steps"] == most:
            cells.setdefault((record["lr"], record["weight_decay"]), []).append(record)
    if not cells:
        return Cell()
    seeds = max(map(len, cells.values()))
    full = {cell: runs for cell, runs in cells.items() if len(runs) == seeds}

    def rank(cell: tuple[float, float]) -> tuple[float, float, float]:
        median = statistics.median(float(record["score"]) for record in full[cell])
        return (median if full[cell][0]["metric"] == LOWER_IS_BETTER else -median, *cell)

    return Cell(tuple(sorted(full[min(full, key=rank)], key=lambda record: int(record["seed"]))))
