"""The records as Markdown, a row a model and number of steps: only what was trained as long is compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.quality.records import Cell, Record, best, read, scored
from benchmarks.quality.tasks import TASKS

COLUMNS = ("model", "steps", "score", "seeds", "learning rate", "tried")


def table(results: Path, tasks: Sequence[str] = ()) -> str:
    """Of every task the bar, what was published, and each model's median score with the least and largest of its seeds.

    `tried` counts the learning rates and weight decays that the row's were chosen from.
    """
    known = (record for record in read(results) if record["task"] in (tasks or TASKS))  # there may be older ones
    found = list(filter(scored, known))
    kinds = sorted({(record["task"], record["scale"]) for record in found}, key=lambda kind: list(TASKS).index(kind[0]))
    return "\n\n".join(
        _of_task(*kind, [record for record in found if (record["task"], record["scale"]) == kind]) for kind in kinds
    )


def _of_task(task: str, scale: str, found: Iterable[Record]) -> str:
    rows: dict[tuple[str, int], list[Record]] = {}
    for record in found:
        rows.setdefault((record["model"], record["steps"]), []).append(record)
    order = sorted(rows, key=lambda row: (row[0] != "synapse", ":" in row[0], *row))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(_row(*row, rows[row]) for row in order)]
    return "\n".join([_heading(task, scale), "", *("| " + " | ".join(line) + " |" for line in lines)])


def _heading(task: str, scale: str) -> str:
    bar = TASKS[task].bar
    published = ", ".join(f"{name} {score:g}" for name, score in TASKS[task].published.items())
    parts = [f"{task} ({scale})", "" if bar is None else f"bar {bar:g}", published and f"published: {published}"]
    return "; ".join(part for part in parts if part)


def _row(model: str, steps: int, found: Sequence[Record]) -> list[str]:
    cell = best(found)
    tried = len({(record["lr"], record["weight_decay"]) for record in found})
    return [model, f"{steps:,}", _score(cell), str(len(cell.records)), f"{cell.lr:g}", str(tried)]


def _score(cell: Cell) -> str:
    scale, digits = (1, 3) if cell.bits else (100, 1)
    scores = [scale * score for score in cell.scores]
    spread = f" ({min(scores):.{digits}f}–{max(scores):.{digits}f})" if len(scores) > 1 else ""
    return f"{scale * (cell.median or 0.0):.{digits}f}{spread}"
