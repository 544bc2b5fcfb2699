"""The paper's figures: one style, legible in print and without colour. Same results, same bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks.quality.records import Cell
from paper.document import model_name as name
from paper.numbers import BYTES, OURS, Numbers

WIDTH = 6.3
"""Inches of text on a page."""
STYLE: dict[str, Any] = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "xtick.major.size": 3, "ytick.major.size": 3, "lines.linewidth": 1.3, "lines.markersize": 4.5,
    "figure.constrained_layout.use": True, "axes.axisbelow": True, "svg.hashsalt": "paper",
}  # fmt: skip
LOOKS = {
    OURS: ("#0b3c6f", "o", "-"),
    "transformer": ("#c2571a", "s", "--"),
    "mamba2": ("#4c9a6a", "^", "-."),
    "mlstm": ("#8d6cab", "D", ":"),
    "gated-deltanet": ("#b5942b", "v", (0, (5, 1))),
    "hebbian": ("#7a7a7a", "P", (0, (1, 1))),
    "transformer-conv": ("#e09a6b", "p", (0, (3, 1, 1, 1))),
    "deltanet-negative": ("#a8326e", "*", (0, (6, 2, 1, 2))),
}
"""Of each model colour, marker and line; the markers and lines alone tell them apart."""


RULES = {"delta": "delta rule", "hebbian": "Hebbian", "none": "no memory", "least_squares": "least squares"}


def draw(numbers: Numbers, folder: Path, *, dpi: int = 300) -> list[str]:
    """Draws every figure whose results are there, and removes the others'.

    Args:
        numbers: what is drawn.
        folder: where to.
        dpi: dots an inch.

    Returns:
        The names of those drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for label, make in FIGURES.items():
            file, figure = folder / f"{label}.png", make(numbers)
            if figure is None:
                file.unlink(missing_ok=True)
                continue
            figure.savefig(file, dpi=dpi, metadata={"Software": None})
            plt.close(figure)
            drawn.append(label)
    return drawn


def _look(model: str) -> dict[str, Any]:
    colour, marker, line = LOOKS.get(model, ("#333333", "x", "-"))
    return {"color": colour, "marker": marker, "linestyle": line}


def layer(_: Numbers) -> Figure:
    """One layer: regions along the residual stream."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.75), layout="none")
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 126), ylim=(0, 35))
    axes.axis("off")
    _arrow(axes, (1, 6), (125, 6), width=1.6)
    axes.text(1.2, 2.2, "residual stream $x$", fontsize=8, va="center")
    parts = [
        (8, "Language module", "mLSTM\n$C\\in\\mathbb{R}^{K\\times V}$", "#e7eef6"),
        (38, "Thalamus", "SSD (Mamba-2)\nrelay and router", "#f6ecdf"),
        (69, "Experts", "top-$k$ of $E$\nSwiGLU", "#ece6f2"),
        (99, "Fast-weight memory", "delta rule\n$S\\in\\mathbb{R}^{K\\times V}$", "#e4f0e8"),
    ]
    for left, title, inside, colour in parts:
        axes.add_patch(
            FancyBboxPatch(
                (left, 14), 24, 18, boxstyle="round,pad=0,rounding_size=1.6", fc=colour, ec="#333333", lw=0.8
            )
        )
        axes.text(left + 12, 28.4, title, ha="center", va="center", fontsize=9, weight="bold")
        axes.text(left + 12, 20.6, inside, ha="center", va="center", fontsize=8, linespacing=1.45)
        _arrow(axes, (left + 3, 6), (left + 3, 13.8))
        _arrow(axes, (left + 21, 13.8), (left + 21, 7.3))
        axes.plot(left + 21, 6, "o", ms=7, mfc="white", mec="#333333", mew=0.8)
        axes.text(left + 21, 5.9, "+", ha="center", va="center", fontsize=8)
    _arrow(axes, (62.4, 24), (68.7, 24), dashed=True)
    axes.text(65.6, 26, "routing", ha="center", fontsize=7.5, style="italic")
    return figure


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, width: float = 0.9, dashed: bool = False
) -> None:
    style = "--" if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=8,
            lw=width,
            color="#333333",
            linestyle=style,
            shrinkA=0,
            shrinkB=0,
        )
    )


def curves(numbers: Numbers) -> Figure | None:
    """Test score along training, the median over seeds, a panel a task."""
    models = [OURS, *numbers.peers]
    tasks = [
        t for t in numbers.ran(models) if t != BYTES and any(len(numbers.cell(t, m).curve or ()) > 2 for m in models)
    ]
    if not tasks:
        return None
    rows = -(-len(tasks) // 5)
    columns = -(-len(tasks) // rows)
    figure, panels = plt.subplots(rows, columns, figsize=(WIDTH, 1.5 * rows + 0.35), sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for panel, task in zip(panels.flat, tasks, strict=False):
        for model in models:
            points = _median_curve(numbers.cell(task, model))
            if points:
                look = _look(model) | {"marker": ""}
                (handles[name(model)],) = panel.plot(*zip(*points, strict=True), **look)
        if numbers.tasks[task].bar is not None:
            panel.axhline(numbers.tasks[task].bar, color="black", lw=0.6, linestyle=(0, (4, 2)), zorder=0)
        panel.set_title(task, fontsize=8.5)
        panel.set_ylim(0, 102)
        panel.locator_params(axis="x", nbins=3)
        panel.xaxis.set_major_formatter(
            mpl.ticker.FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
        )
    for panel in list(panels.flat)[len(tasks) :]:
        panel.axis("off")
    for panel in panels[:, 0]:
        panel.set_ylabel("accuracy (%)")
    figure.supxlabel("optimizer steps", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), columnspacing=1.2)
    return figure


def _median_curve(cell: Cell) -> list[tuple[float, float]]:
    """Steps and median scores in percent; a run that stopped early keeps its last score."""
    steps = sorted({point[0] for record in cell.records for point in record["curve"]})
    return [(step, 100 * statistics.median(_at(record["curve"], step) for record in cell.records)) for step in steps]


def _at(curve: Sequence[Sequence[float]], step: float) -> float:
    before = [point[2] for point in curve if point[0] <= step]
    return before[-1] if before else curve[0][2]


def text(numbers: Numbers) -> Figure | None:
    """Bits per byte of every model: each seed, and the median."""
    models = [model for model in (OURS, *numbers.peers, *numbers.ablations) if numbers.cell(BYTES, model).found]
    if len(models) < 2:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 0.24 * len(models) + 0.75))
    for row, model in enumerate(models):
        cell = numbers.cell(BYTES, model)
        colour = LOOKS.get(model, ("#333333", "", ""))[0]
        axes.plot(cell.scores, [row] * len(cell.scores), "|", color=colour, ms=8, mew=1.2)
        axes.plot([statistics.median(cell.scores)], [row], "o", color=colour, ms=5)
    for packer, align in (("gzip -9", "center"), ("xz -9", "center")):
        limit = numbers.compressor(packer)
        if limit is not None:
            axes.axvline(limit, color="black", lw=0.8, linestyle=(0, (4, 2)), zorder=0)
            axes.text(limit, -0.75, packer, ha=align, va="bottom", fontsize=8)
    axes.set(xlabel="held-out bits per byte", ylim=(len(models) - 0.5, -0.5))
    axes.set_yticks(range(len(models)), [name(model) for model in models])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="0.9", lw=0.6)
    return figure


def routing(numbers: Numbers) -> Figure | None:
    """What experts share with labels of the text, trained and untrained, and the token classes each expert takes."""
    report = numbers.routing
    if report is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.75), width_ratios=(1, 1.35))
    labels = list(report["trained"]["summary"]["information"])
    for kind, marker, colour in (("untrained", "x", "#7a7a7a"), ("trained", "o", LOOKS[OURS][0])):
        found = report[kind]["summary"]["information"]
        spots = [(value, row) for row, label in enumerate(labels) for value in found[label]["first_adjusted"]]
        left.plot(*zip(*spots, strict=True), marker, color=colour, label=f"{kind}, one a layer", alpha=0.9)
    left.set(xlabel="adjusted mutual information", ylim=(len(labels) - 0.5, -0.5))
    left.set_yticks(range(len(labels)), [label.replace("_", " ") for label in labels])
    left.axvline(0, color="0.6", lw=0.7, zorder=0)
    left.grid(axis="y", color="0.92", lw=0.6)
    left.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=1, handletextpad=0.2)
    layers = report["trained"]["models"][0]["layers"]
    most = max(layers, key=lambda layer: float(layer["information"]["token"]["first"]["bits"]))
    _lift(right, most, list(report["text"]["classes"]["token"]))
    return figure


def _lift(axes: Axes, layer: dict[str, Any], names: list[str]) -> None:
    """P(expert | class) over P(expert), of the classes that a thousandth of the bytes have."""
    counts = layer["token_counts"]
    total = sum(map(sum, counts))
    ofclass = [sum(row[column] for row in counts) for column in range(len(names))]
    kept = [column for column, amount in enumerate(ofclass) if amount >= total / 1000]
    rows = [[row[c] / ofclass[c] / (sum(row) / total) if sum(row) else 0.0 for c in kept] for row in counts]
    axes.imshow(rows, cmap="Greys", vmin=0, vmax=max(2.0, *map(max, rows)), aspect="auto")
    for expert, row in enumerate(rows):
        for column, value in enumerate(row):
            shade = "white" if value > max(2.0, *map(max, rows)) / 2 else "black"
            axes.text(column, expert, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=shade)
    axes.set_xticks(range(len(kept)), [names[column] for column in kept], rotation=45, ha="right", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [str(expert + 1) for expert in range(len(rows))])
    axes.tick_params(length=0)
    axes.set(ylabel="expert", title=f"layer {layer['layer'] + 1}")
    axes.spines[:].set_visible(False)


def memory(numbers: Numbers) -> Figure | None:
    """Recall after a while, in later sessions, of retold and of many facts, and what a bare matrix can hold."""
    report = numbers.memory
    if report is None:
        return None
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH, 3.9), sharey=True)
    axes, models = report["axes"], report["models"]
    for place, (model, found) in enumerate(models.items()):
        _band(panels[0, 0], axes["filler"], found["forgetting"]["full"], place, model)
        _band(panels[0, 1], axes["sessions"], found["later_session"]["recall"], place, model)
        _band(panels[0, 2], axes["between"], found["overwriting"]["full"]["last"], place, model)
        _band(panels[1, 0], axes["facts"], found["interference"]["full"], place, model)
    known = report["capacity"]
    for place, (rule, curve) in enumerate(known["random_keys"][min(known["random_keys"])].items()):
        colour, marker, line = list(LOOKS.values())[place]
        panels[1, 1].plot(known["facts"], _percents(curve["measured"]), marker, color=colour, label=RULES[rule])
        expected = curve.get("predicted", curve["measured"])
        panels[1, 1].plot(known["facts"], _percents(expected), linestyle=line, color=colour, lw=1)
    for panel in panels[1, :2]:
        panel.axvline(known["d_key"], color="0.5", lw=0.7, linestyle=(0, (1, 2)), zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(axes["facts"][::2], axes["facts"][::2])
    near, far = axes["filler"][1], axes["filler"][-1]
    panels[0, 0].set_xscale("symlog", base=2, linthresh=near)
    panels[0, 0].set_xticks(axes["filler"], axes["filler"], fontsize=7)
    panels[0, 0].set_xlim(-near / 4, 1.5 * far)
    for panel in (panels[0, 0], *panels[1, :2]):
        panel.minorticks_off()
    titles = ["tokens since", "sessions since", "facts between two tellings", "facts told", "facts told, bare matrix"]
    for panel, title in zip(panels.flat, titles, strict=False):
        panel.set(xlabel=title, ylim=(-2, 102))
        panel.axhline(100 * report["chance"], color="0.6", lw=0.7, linestyle=(0, (4, 2)), zorder=0)
    for panel in panels[:, 0]:
        panel.set_ylabel("recall (%)")
    panels[1, 2].axis("off")
    for source, title, spot in ((panels[0, 0], "in a model", 1.02), (panels[1, 1], "bare matrix", 0.5)):
        legend = panels[1, 2].legend(
            *source.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.02, spot), title=title,
            title_fontsize=8.5, alignment="left",
        )  # fmt: skip
        if source is panels[0, 0]:
            panels[1, 2].add_artist(legend)  # the next call would take it away
    return figure


def _band(axes: Axes, spots: Sequence[float], curve: dict[str, list[float]], place: int, label: str) -> None:
    """A curve's median, with the range over seeds behind it."""
    colour, marker, line = list(LOOKS.values())[place]
    axes.fill_between(spots, _percents(curve["min"]), _percents(curve["max"]), color=colour, alpha=0.15, lw=0)
    axes.plot(
        spots,
        _percents(curve["median"]),
        marker=marker,
        linestyle=line,
        color=colour,
        label=RULES[label],
        ms=3.5,
    )


def _percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


FIGURES: dict[str, Callable[[Numbers], Figure | None]] = {
    "layer": layer,
    "curves": curves,
    "text": text,
    "memory": memory,
    "routing": routing,
}
"""By the name that the template calls them."""
