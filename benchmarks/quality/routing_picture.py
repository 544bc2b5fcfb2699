"""The picture of a routing report: what each expert takes, and a stretch of text coloured by expert.

Everything drawn stands in the report, so that it can be drawn again without the models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import routing_statistics as stats
from benchmarks.quality.routing_labels import TOKEN_CLASSES
from recipes.data import Document

LINES = 12
COLUMNS = 72
EMPTY_LINES = 2
PER_ROW = 3


def snippet(documents: Sequence[Document], tokens: Tensor, layers: Mapping[int, stats.Choices]) -> dict[str, Any]:
    """The lines of text with the most even mix of token classes, and the experts of each of their characters.

    Returns:
        document, line (counted from 1), text (list of lines), experts ({layer: lists of first choices, one a line}).
    """
    best, found, begin = -1.0, None, 0
    for document in documents:
        starts, lines = [], document.data.split(b"\n")
        place = begin
        for line in lines:
            starts.append(place)
            place += len(line) + 1
        for top in range(max(1, len(lines) - LINES)):
            shown = lines[top : top + LINES]
            if not _fits(shown):
                continue
            classes = torch.bincount(tokens[starts[top] : starts[top] + sum(map(len, shown)) + len(shown) - 1])
            if len(classes) and (mix := stats.entropy(classes)) > best:
                best, found = mix, (document.name, top, starts[top : top + LINES], shown)
        begin += len(document.data)
    if found is None:
        return {"document": None, "line": None, "text": [], "experts": {}}
    name, top, starts, shown = found
    ends = [start + len(line) for start, line in zip(starts, shown, strict=True)]
    experts = {
        str(layer): [choices.experts[a:b, 0].tolist() for a, b in zip(starts, ends, strict=True)]
        for layer, choices in layers.items()
    }
    return {"document": name, "line": top + 1, "text": [line.decode() for line in shown], "experts": experts}


def _fits(lines: Sequence[bytes]) -> bool:
    """Whether lines can be shown a character a byte."""
    empty = sum(not line.strip() for line in lines)
    return (
        empty <= EMPTY_LINES
        and all(len(line) <= COLUMNS and (not line or line.isascii()) for line in lines)
        and all(32 <= byte < 127 for line in lines for byte in line)
    )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Heat maps of expert against token class, a layer each, above text coloured by first choice; PNG, PDF or SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    model = report["trained"]["models"][0]
    layers, text = model["layers"], report["picture"]
    shown = _strip_layers(layers) if text["text"] else []
    columns = min(PER_ROW, len(layers))
    rows = math.ceil(len(layers) / columns)
    heights = [2.9] * rows + [0.165 * len(text["text"]) + 0.35] * len(shown)
    figure = Figure(figsize=(8.5, sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row in range(rows):
        some = layers[row * columns : (row + 1) * columns]
        axes = parts[row].subplots(1, columns, squeeze=False)[0]
        for axis, layer in zip(axes, some, strict=False):
            _heat_map(axis, layer)
        for axis in axes[len(some) :]:
            axis.set_axis_off()
    for part, layer in zip(parts[rows:], shown, strict=True):
        _strip(part.subplots(), text, layer, len(layers[0]["token_counts"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={} if path.suffix != ".png" else {"Software": None})


def lift(layer: Mapping[str, Any]) -> tuple[Tensor, tuple[str, ...]]:
    """P(expert | class) / P(expert), (E, C), and the classes that occur in at least 1 of 1,000 bytes."""
    counts = torch.tensor(layer["token_counts"], dtype=torch.float64)
    kept = counts.sum(0) >= counts.sum() / 1000
    share = counts[:, kept] / counts[:, kept].sum(0)
    base = counts.sum(1, keepdim=True) / counts.sum()
    names = tuple(name for name, keep in zip(TOKEN_CLASSES, kept.tolist(), strict=True) if keep)
    return torch.where(base > 0, share / base, 0.0), names


def _strip_layers(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers whose experts say least and most about token classes."""
    order = sorted(layers, key=lambda layer: layer["information"]["token"]["first"]["bits"])
    return sorted({id(one): one for one in (order[0], order[-1])}.values(), key=lambda layer: int(layer["layer"]))


def _heat_map(axis: Any, layer: Mapping[str, Any]) -> None:
    values, names = lift(layer)
    most = max(2.0, float(values.max()))
    axis.imshow(values.tolist(), cmap="Greys", vmin=0, vmax=most, aspect="auto")
    for row, numbers in enumerate(values.tolist()):
        for column, value in enumerate(numbers):
            ink = "white" if value > most / 2 else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6, color=ink)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(values)))
    bits = layer["information"]["token"]["first"]["bits"]
    axis.set_title(f"layer {layer['layer']}: lift P(expert | class) / P(expert); {bits:.2f} bits", fontsize=7)
    axis.set_ylabel("expert", fontsize=7)
    axis.tick_params(axis="y", labelsize=7)


def _strip(axis: Any, text: Mapping[str, Any], layer: Mapping[str, Any], n_experts: int) -> None:
    """The text, a cell a character, behind each character the shade of its first choice; below it the key."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shades = [colormaps["viridis"](0.1 + 0.9 * e / max(1, n_experts - 1)) for e in range(n_experts)]

    def cell(row: float, column: float, expert: int, character: str, width: int = 1) -> None:
        shade = shades[expert]
        dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
        axis.add_patch(Rectangle((column, row), width, 1, color=shade, linewidth=0))
        ink = "white" if dark else "black"
        middle = column + width / 2, row + 0.5
        axis.text(*middle, character, color=ink, family="monospace", fontsize=6.5, ha="center", va="center_baseline")

    for row, (line, experts) in enumerate(zip(text["text"], text["experts"][str(layer["layer"])], strict=True)):
        for column, (character, expert) in enumerate(zip(line, experts, strict=True)):
            cell(row, column, expert, character)
    for expert in range(n_experts):
        cell(len(text["text"]) + 0.5, 3 * expert, expert, str(expert), 2)
    axis.set_xlim(0, max(3 * n_experts, *map(len, text["text"])))
    axis.set_ylim(len(text["text"]) + 1.6, -0.1)
    axis.set_axis_off()
    where = f"{text['document']}, from line {text['line']}"
    axis.set_title(f"layer {layer['layer']}: first choice at each byte of {where}; key below", fontsize=7, loc="left")
