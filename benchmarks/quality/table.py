"""The records as one Markdown table: a row a task, a column a model, published scores beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.records import Cell, best, read
from benchmarks.quality.tasks import TASKS


def table(results: Path, tasks: Sequence[str] = ()) -> str:
    """Median score of each task and model, with the least and the largest of the seeds, and what was published."""
    found = read(results)
    rows = sorted({(record["task"], record["scale"]) for record in found if not tasks or record["task"] in tasks})
    rows.sort(key=lambda row: list(TASKS).index(row[0]))
    models = sorted({record["model"] for record in found if (record["task"], record["scale"]) in rows})
    models.sort(key=lambda name: (name != "synapse", ":" in name))
    lines = [["task", *models, "bar", "published"], ["---"] * (len(models) + 3)]
    for task, scale in rows:
        cells = [
            best(r for r in found if (r["task"], r["scale"], r["model"]) == (task, scale, model)) for model in models
        ]
        published = ", ".join(f"{name} {score:g}" for name, score in TASKS[task].published.items())
        bar = TASKS[task].bar
        lines.append([f"{task} ({scale})", *map(_score, cells), "" if bar is None else f"{bar:g}", published])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _score(cell: Cell) -> str:
    if cell.median is None:
        return ""
    scale, digits = (1, 3) if cell.bits else (100, 1)
    scores = [scale * score for score in cell.scores]
    spread = f" ({min(scores):.{digits}f}–{max(scores):.{digits}f})" if len(scores) > 1 else ""
    return f"{scale * cell.median:.{digits}f}{spread}"
