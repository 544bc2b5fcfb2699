"""What routing means: what experts know about the text, whether seeds agree on it, and how even the load is.

    python -m benchmarks.quality.routing MODEL_DIR [MODEL_DIR ...] [--bytes 200000] [--out FILE] [--picture FILE]

Each folder holds a byte model as `SynapseModel.save_pretrained` writes it. They read held-out documents, each from a
fresh state, and so do untrained models of the same configurations: what a router says about the text by chance.
Measured a layer at a time, in bits:

- mutual information of the experts and each labelling of the bytes (`routing_labels.labellings`), against labels that
  lost their place; "given_byte" is what is left of it once the byte itself is known;
- for every two models of one configuration, that of their first choices on the same bytes, and how often they agree
  once the experts are matched;
- load of the experts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, environment
from benchmarks.quality import routing_statistics as stats
from benchmarks.quality.routing_labels import is_python
from benchmarks.quality.routing_measures import WINDOW, describe, read, take
from benchmarks.quality.routing_picture import draw, snippet
from recipes.data import load_corpus
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError, SynapseError, explain

RESULT = ROOT / "paper" / "results" / "routing.json"
BYTES = 200_000
SHUFFLES = 100
BETWEEN = ("bits", "excess", "normalised", "adjusted")
SEED = re.compile(r"(?:^|[-_/])s(?:eed)?[-_=]?(\d+)(?=$|[-_./])")


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians over models or pairs, a list by layer; p-values and loads of the worst."""
    models, pairs = found["models"], [pair["layers"] for pair in found["stability"]]
    labels: dict[str, Any] = {}
    for name, example in models[0]["layers"][0]["information"].items():
        rows = [[layer["information"][name] for layer in model["layers"]] for model in models]
        labels[name] = {}
        for kind in (kind for kind in ("first", "weighted", "given_byte") if kind in example):
            parts = [[one[kind] for one in row] for row in rows]
            for key in (key for key in example[kind] if key != "chance"):
                labels[name][f"{kind}_{key}"] = _median([[part[key] for part in row] for row in parts])
            labels[name][f"{kind}_p_worst"] = _worst_p([[part["chance"] for part in row] for row in parts])
    loads = [layer["load"] for model in models for layer in model["layers"]]
    agreement = [[layer["agreement"] for layer in pair] for pair in pairs]
    beyond = [[layer["given_byte"] for layer in pair] for pair in pairs]
    between = {key: _median([[layer[key] for layer in pair] for pair in pairs]) for key in BETWEEN}
    return {
        "information": labels,
        "load": {
            "largest_over_fair": max(one["assignments"]["largest_over_fair"] for one in loads),
            "largest_first_over_fair": max(one["first"]["largest_over_fair"] for one in loads),
            "least_entropy_of_even": min(one["assignments"]["entropy_of_even"] for one in loads),
            "dead": sum(one["assignments"]["dead"] for one in loads),
        },
        "stability": between
        | {
            "p_worst": _worst_p([[layer["chance"] for layer in pair] for pair in pairs]),
            "agreement": _median([[one["share"] for one in row] for row in agreement]),
            "agreement_chance": _median([[one["chance"]["shifts"]["mean"] for one in row] for row in agreement]),
            "agreement_p_worst": _worst_p([[one["chance"] for one in row] for row in agreement]),
            "given_byte_excess": _median([[one["excess"] for one in row] for row in beyond]),
        },
    }


def _median(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=False)]


def _worst_p(rows: list[list[dict[str, stats.Chance]]]) -> list[float]:
    """The largest p of each column, against the chance that stands first."""
    return [max(float(next(iter(one.values()))["p"] or 0.0) for one in column) for column in zip(*rows, strict=False)]


def measure(
    folders: Sequence[Path], *, limit: int, shuffles: int, seeds: Sequence[int] | None, data: Path | None
) -> dict[str, Any]:
    """The whole report; see the module's docstring.

    Raises:
        SynapseError: a folder without a model, a model without experts, text that cannot be read.
    """
    corpus = load_corpus(data)
    text = take(corpus, limit)
    trained, untrained = [], []
    for index, folder in enumerate(folders):
        name = "/".join(folder.resolve().parts[-2:])
        seed = seeds[index] if seeds else _seed(folder)
        model = SynapseModel.from_pretrained(folder)
        trained.append(read(model, text, name, seed))
        torch.manual_seed(index if seed is None else seed)
        untrained.append(read(SynapseModel(model.config), text, "untrained", index if seed is None else seed))
    parts = {
        name: describe(readings, text, shuffles) for name, readings in (("trained", trained), ("untrained", untrained))
    }
    place = environment()
    return {
        "commit": place.pop("commit"),
        "machine": place,
        "config": trained[0].config,
        "seeds": [one.seed for one in trained],
        "protocol": {"shuffles": shuffles, "window": WINDOW, "least_shift": stats.NEAR},
        "text": {
            "source": corpus.source if data is None else data.name,
            "fingerprint": corpus.fingerprint,
            "bytes": len(text.data),
            "documents": [document.name for document in text.documents],
            "no_python": [one.name for one in corpus.held_out[: len(text.documents)] if not is_python(one.data)],
            "classes": {name: one.shares for name, one in text.labels.items() if name != "byte_value"},
        },
        **{name: part | {"summary": summary(part)} for name, part in parts.items()},
        "picture": snippet(text.documents, text.labels["token"].ids, trained[0].layers),
    }


def _short(value: Any) -> Any:
    """The same with six digits a number."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _seed(folder: Path) -> int | None:
    """The seed that a folder's name holds, as in "synapse_s2" or "seed-2"; the innermost counts."""
    found = SEED.findall("/".join(folder.resolve().parts[-2:]))
    return int(found[-1]) if found else None


def table(report: dict[str, Any]) -> str:
    """The summary, a line a labelling and layer: trained beside untrained."""
    lines = [f"{report['text']['bytes']:,} held-out bytes; first choices; medians over models: trained | untrained", ""]
    lines.append(f"{'label':12} layer  bits of I          adjusted           bits beyond the byte   worst p")
    both = [report[name]["summary"] for name in ("trained", "untrained")]
    for name in both[0]["information"]:
        one, other = (part["information"][name] for part in both)
        for layer, p in enumerate(one["first_p_worst"]):
            cells = [
                f"{one[key][layer]:.3f} | {other[key][layer]:.3f}" if key in one else ""
                for key in ("first_bits", "first_adjusted", "given_byte_excess")
            ]
            lines.append(f"{name:12} {layer:5}  {cells[0]:18} {cells[1]:18} {cells[2]:22} {p:.3f}")
    for key in ("normalised", "adjusted", "agreement", "agreement_chance"):
        one, other = ([f"{value:.3f}" for value in part["stability"][key]] for part in both)
        lines.append(f"between seeds, {key}, by layer: {' '.join(one)} | {' '.join(other)}")
    lines.extend(f"{key}: {both[0]['load'][key]:.3f} | {both[1]['load'][key]:.3f}" for key in both[0]["load"])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the summary, writes the report and the picture; 2 where it cannot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.routing", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR", help="folders of byte models")
    parser.add_argument("--bytes", type=int, default=BYTES, help="of held-out text (%(default)s)")
    parser.add_argument("--shuffles", type=int, default=SHUFFLES, help="label sequences without a place (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the models, where the folders' names do not hold them")
    parser.add_argument("--data", type=Path, help="other text: a file or folder (Python's standard library)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the report")
    parser.add_argument("--picture", type=Path, help="a PNG or PDF of the first model")
    options = parser.parse_args(arguments)
    try:
        if options.seeds and len(options.seeds) != len(options.models):
            raise ConfigError(explain("--seeds", f"{len(options.models)}, one a model", len(options.seeds)))
        for name, low in (("bytes", 2), ("shuffles", 1)):
            if getattr(options, name) < low:
                raise ConfigError(explain(f"--{name}", f"{low} or more", getattr(options, name)))
        report = measure(
            options.models, limit=options.bytes, shuffles=options.shuffles, seeds=options.seeds, data=options.data
        )
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(_short(report), allow_nan=False) + "\n", encoding="utf-8")
    print(table(report))
    if options.picture:
        draw(report, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
