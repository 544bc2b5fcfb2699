"""A picture of a run from its log: what it learned, how its experts were used.

python -m recipes.curves runs/demo
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

from recipes.checkpoint import CURVES_FILE, LOG_FILE, RESULT_FILE
from synapse_arch.errors import DataError, SynapseError, explain

MISSING = "pip install 'synapse-arch[train]' brings matplotlib"
SMOOTHING = 40
"""The averaged curves reach over a fortieth of the log to each side."""
INK, FAINT, MARK = "#20456e", "#a9bfd6", "#b5441f"
EPILOG = """examples:
  python -m recipes.curves runs/demo             writes runs/demo/curves.png, also while the run goes on
"""


def draw(out: Path) -> Path | None:
    """Draws a run's log into `curves.png` beside it: loss terms, bits per byte, load entropy, use of experts.

    Args:
        out: the run's folder.

    Returns:
        The picture's path; None where matplotlib is not installed.

    Raises:
        DataError: there is no log to draw, or the picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    lines = _log(out / LOG_FILE)
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, fill in zip(panels.flat, (_bits, _terms, _entropy, _experts), strict=True):
        fill(panel, lines, out)
        panel.set_xlabel("optimizer step")
        panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(out / CURVES_FILE, dpi=120)
    except OSError as error:
        raise DataError(explain(str(out / CURVES_FILE), "a picture written", error)) from error
    return out / CURVES_FILE


def draw_context(parts: list[dict[str, Any]], path: Path) -> Path | None:
    """Draws what predictions cost over the length of context.

    Args:
        parts: stretches of positions, each with its first, its last and its bits per byte.
        path: of the picture.

    Returns:
        The picture's path; None where matplotlib is not installed.

    Raises:
        DataError: the picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    shown = [part for part in parts if part["per_byte"] is not None]
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    panel.step(
        [*(part["first"] for part in shown), *(part["last"] for part in shown[-1:])],
        [*(part["per_byte"] for part in shown), *(part["per_byte"] for part in shown[-1:])],
        where="post",
        color=INK,
    )
    panel.set_xscale("log", base=2)
    panel.set_xlabel("tokens of context")
    panel.set_title("bits per byte by length of context", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise DataError(explain(str(path), "a picture written", error)) from error
    return path


def _log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [_numbers(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(explain(str(path), "the log of a run", error, "check the folder")) from error
    if not lines:
        raise DataError(explain(str(path), "lines of a run", "none", "train some steps first"))
    if "bits_per_byte" not in lines[0]:
        raise DataError(explain(str(path), "the log of recipes/train.py", f"one of {', '.join(lines[0])}"))
    return lines


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """What was no finite number when it was written is null in JSON."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def _bits(panel: Any, lines: list[dict[str, Any]], out: Path) -> None:
    """Training loss as bits a byte, held-out looks and results, general compressors."""
    panel.set_title("bits per byte", loc="left")
    steps = [line["step"] for line in lines]
    values = [line["bits_per_byte"] for line in lines]
    panel.plot(steps, values, color=FAINT, linewidth=0.8)
    panel.plot(steps, _smooth(values), color=INK, label="training, averaged")
    looks = [(line["step"], line["held_out_bits_per_byte"]) for line in lines if "held_out_bits_per_byte" in line]
    if looks:
        panel.plot(*zip(*looks, strict=True), "o", markersize=4, color=MARK, label="held-out sample")
    if (out / RESULT_FILE).exists():
        result = json.loads((out / RESULT_FILE).read_text(encoding="utf-8"))
        for (name, value), style in zip(_numbers(result["bits_per_byte"]).items(), ("-", "--", ":"), strict=False):
            label = f"{'held out, whole' if name == 'model' else name}: {value:.2f}"
            panel.axhline(value, color=MARK if name == "model" else "0.45", linestyle=style, linewidth=1, label=label)
    panel.legend(frameon=False, fontsize=8)


def _terms(panel: Any, lines: list[dict[str, Any]], out: Path) -> None:
    """Each term of the loss by name, and the gradient's norm."""
    panel.set_title("loss terms (nats) and gradient norm", loc="left")
    steps = [line["step"] for line in lines]
    terms = {"language": "-", "balance": "--", "z": ":", "norm": "-"}
    for (name, style), color in zip(terms.items(), (INK, "#3f7f4f", "#7a5195", FAINT), strict=True):
        values = [line.get(name, math.nan) for line in lines]
        if any(value > 0 for value in values):
            panel.plot(
                steps, values, style, color=color, linewidth=1.2, label="gradient norm" if name == "norm" else name
            )
    panel.set_yscale("log")
    panel.legend(frameon=False, fontsize=8, ncols=2)


def _entropy(panel: Any, lines: list[dict[str, Any]], out: Path) -> None:
    """Mean entropy of the experts' load, and experts without a token."""
    panel.set_title("entropy of the experts' load (1 = even)", loc="left")
    routed = [line for line in lines if "load_entropy" in line]
    if not routed:
        panel.text(0.5, 0.5, "no experts", ha="center", transform=panel.transAxes)
        return
    steps = [line["step"] for line in routed]
    values = [line["load_entropy"] for line in routed]
    panel.plot(steps, values, color=FAINT, linewidth=0.8)
    panel.plot(steps, _smooth(values), color=INK)
    panel.set_ylim(min(0.9, min(values)) - 0.02, 1.005)
    dead = max(line["dead_experts"] for line in routed)
    panel.text(
        0.98, 0.04, f"most experts without a token in a step: {dead}", ha="right", fontsize=8, transform=panel.transAxes
    )


def _experts(panel: Any, lines: list[dict[str, Any]], out: Path) -> None:
    """Each expert's share of its layer's assignments over the run, relative to an even share."""
    panel.set_title("use of each expert (even = 1)", loc="left")
    routed = [line for line in lines if "load" in line]
    if not routed:
        panel.text(0.5, 0.5, "no experts", ha="center", transform=panel.transAxes)
        return
    layers, experts = len(routed[0]["load"]), len(routed[0]["load"][0])
    rows = [
        [line["load"][layer][expert] * experts for line in routed]
        for layer in range(layers)
        for expert in range(experts)
    ]
    extent = (routed[0]["step"], max(routed[-1]["step"], routed[0]["step"] + 1), layers * experts, 0)
    image = panel.imshow(rows, aspect="auto", extent=extent, vmin=0, vmax=2, cmap="RdBu_r", interpolation="nearest")
    panel.set_yticks(
        [experts * (layer + 0.5) for layer in range(layers)], [f"layer {layer}" for layer in range(layers)]
    )
    panel.tick_params(axis="y", length=0)
    for layer in range(1, layers):
        panel.axhline(layer * experts, color="black", linewidth=0.8)
    panel.figure.colorbar(image, ax=panel, shrink=0.9, extend="max")


def _smooth(values: list[float]) -> list[float]:
    """Means over a window around each value, as wide on both sides, so that the curve does not lag.

    >>> _smooth([4.0, 1.0, 1.0, 4.0])
    [4.0, 2.0, 2.0, 4.0]
    """
    reach, last = max(1, len(values) // SMOOTHING), len(values) - 1
    smoothed = []
    for middle in range(len(values)):
        side = min(reach, middle, last - middle)
        window = values[middle - side : middle + side + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def main(argv: list[str] | None = None) -> int:
    """Draws the run of a folder; returns 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.curves",
        description="Draw a training run from its log.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="the run's folder")
    try:
        picture = draw(parser.parse_args(argv).out)
        if picture is None:
            raise DataError(explain("drawing", "matplotlib", "not installed", MISSING))
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
