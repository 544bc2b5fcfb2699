"""The picture of a report: norms of the task vectors by module, their agreement, and their cosines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from merge.report import ROWS_SHOWN, Account

INK, MUTED, PALE = "#1b2733", "#6b7785", "#e3e8ee"
OVERLAP, CONFLICT = "#9db8d2", "#c2571a"


def draw(found: Account, path: Path) -> None:
    """Draws an account: PNG, PDF or SVG by the path's suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = found if len(found.modules) <= ROWS_SHOWN else found.joined()
    rows, models = len(shown.modules), len(shown.models)
    height = max(3.4, 0.27 * rows + 1.3)
    figure = Figure(figsize=(7.4 + 0.62 * models + 0.45 * models, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=[5.4 + 0.62 * models, 2.0 + 0.45 * models])
    left, right = parts
    norms, agreement = left.subplots(1, 2, sharey=True, width_ratios=[0.62 * models, 2.6])
    _norms(norms, shown)
    _agreement(agreement, shown)
    _cosines(right.subplots(), shown)
    figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix == ".png" else {})


def _norms(axis: Any, found: Account) -> None:
    values = [sums.relative_norm for sums in found.modules.values()]
    _matrix(axis, values, [f"{100 * value:.1f}" for row in values for value in row], "Blues", low=0.0)
    axis.set_yticks(range(len(values)), found.modules)
    _names(axis, found.models)
    axis.set_title("how far: ‖τ‖ / ‖θ‖, %", fontsize=9, color=INK, loc="left", pad=8)


def _agreement(axis: Any, found: Account) -> None:
    rows = list(found.modules.values())
    places = range(len(rows))
    for values, colour, label, shift in (
        ([sums.overlap for sums in rows], OVERLAP, "overlap of supports", -0.19),
        ([sums.conflict for sums in rows], CONFLICT, "opposite signs in it", 0.19),
    ):
        widths = [0.0 if math.isnan(value) else 100 * value for value in values]
        axis.barh([place + shift for place in places], widths, height=0.36, color=colour, label=label)
    axis.axvline(50, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0, label="signs at random")
    axis.set_xlim(0, 100)
    axis.set_xticks([0, 25, 50, 75, 100])
    axis.tick_params(axis="y", length=0, labelleft=False)
    axis.tick_params(axis="x", labelsize=8, colors=MUTED)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(PALE)
    axis.set_title("how they agree, %", fontsize=9, color=INK, loc="left", pad=8)
    axis.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, labelcolor=INK)


def _cosines(axis: Any, found: Account) -> None:
    values = found.cosines.tolist()
    _matrix(axis, values, [f"{value:.2f}" for row in values for value in row], "RdBu_r", low=-1.0, high=1.0)
    axis.set_yticks(range(len(values)), found.models)
    axis.set_aspect("equal")
    _names(axis, found.models)
    axis.set_title("cosines of task vectors", fontsize=9, color=INK, loc="left", pad=8)


def _matrix(
    axis: Any, values: list[list[float]], texts: list[str], colours: str, *, low: float, high: float | None = None
) -> None:
    """A heat map with its numbers written in it; NaN is left white."""
    finite = [value for row in values for value in row if math.isfinite(value)]
    top = high if high is not None else max(finite, default=1.0) or 1.0
    axis.imshow(values, cmap=colours, vmin=low, vmax=top, aspect="auto")
    for index, text in enumerate(texts):
        row, column = divmod(index, len(values[0]))
        value = values[row][column]
        far = abs(value) / max(abs(top), 1e-30)
        ink = "white" if far > 0.62 else INK
        axis.text(column, row, text if math.isfinite(value) else "–", ha="center", va="center", fontsize=7.5, color=ink)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0, labelsize=8, labelcolor=INK)


def _names(axis: Any, models: tuple[str, ...]) -> None:
    axis.set_xticks(range(len(models)), models, rotation=40, ha="right", rotation_mode="anchor")
