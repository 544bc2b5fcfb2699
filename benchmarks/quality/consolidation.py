"""What Hebbian consolidation is worth: held-out bits per byte with pathways off, on, and put in the wrong places.

    python -m benchmarks.quality.consolidation MODEL_DIR [MODEL_DIR ...] [--bytes 200000] [--out FILE]

Each model reads training text, its state is consolidated, and it reads held-out text with the pathways at several
gains. As a control the same pathways are given to other experts: rows and columns permuted alike, so that only what
fired together with what is lost. What a gain changes at all is told by the share of tokens whose experts differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import ROOT, environment, progress
from recipes.data import Corpus, load_corpus, to_stream
from recipes.evaluation import ROWS, WINDOW, held_out_bits
from synapse_arch import SynapseModel, TraceSpec
from synapse_arch.errors import ConfigError, SynapseError, explain

RESULT = ROOT / "paper" / "results" / "consolidation.json"
BYTES = 200_000
GAINS = (0.5, 1.0, 2.0, 4.0)
READ = 65_536
"""Bytes of training text that are read before consolidating; the co-activation forgets all but the last of them."""


@torch.no_grad()
def consolidated(model: SynapseModel, stream: Tensor) -> list[Tensor]:
    """The pathways (E, E) of each layer, after reading a stream in `ROWS` rows; the model's own are written."""
    length = len(stream) // ROWS
    rows = stream[: ROWS * length].view(ROWS, length).long()
    state = None
    for window in rows.split(WINDOW, dim=1):
        state = model(window, state, logits_to_keep=1).state
    model.consolidate(state)
    return [layer.thalamus.pathways.clone() for layer in model.layers]


def give(model: SynapseModel, pathways: Sequence[Tensor], gain: float) -> None:
    """Sets a model's pathways to `gain` times these; 0 switches them off."""
    for layer, values in zip(model.layers, pathways, strict=True):
        layer.thalamus.pathways.copy_(gain * values)


def misplaced(pathways: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same pathways between other experts; of two or more, none keeps its place."""
    found = []
    for values in pathways:
        places = torch.arange(len(values))
        order = torch.randperm(len(values), generator=generator)
        while len(values) > 1 and bool((order == places).any()):
            order = torch.randperm(len(values), generator=generator)
        found.append(values[order][:, order])
    return found


@torch.no_grad()
def visited(model: SynapseModel, stream: Tensor) -> Tensor:
    """(layers, n, k) the experts of the stream's first tokens, in rising order."""
    ids = stream[: ROWS * WINDOW].view(ROWS, -1).long()
    trace = model(ids, trace=TraceSpec(level="routes")).trace
    assert trace is not None
    return torch.stack([layer.routing.experts.flatten(0, 1).sort(-1).values for layer in trace.layers])


def measure(model: SynapseModel, corpus: Corpus, limit: int, generator: torch.Generator) -> dict[str, Any]:
    """Bits per byte and changed tokens of one model: off, and at each gain with true and with misplaced pathways."""
    held_out = to_stream(corpus.held_out)[:limit]
    own = consolidated(model, to_stream(corpus.train)[:READ])
    give(model, own, 0.0)
    before = visited(model, held_out)
    report: dict[str, Any] = {"off": held_out_bits(model, held_out).per_byte, "gains": list(GAINS)}
    for name, pathways in (("on", own), ("misplaced", misplaced(own, generator))):
        bits, changed = [], []
        for gain in GAINS:
            give(model, pathways, gain)
            bits.append(held_out_bits(model, held_out).per_byte)
            changed.append(float((visited(model, held_out) != before).any(-1).float().mean()))
        report[name] = {"bits": bits, "changed": changed}
    report["largest_pathway"] = max(float(values.abs().max()) for values in own)
    return report


def summary(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the models: what each gain adds to the bits per byte, and the tokens it sends elsewhere."""
    added = {
        name: [statistics.median(m[name]["bits"][i] - m["off"] for m in models) for i in range(len(GAINS))]
        for name in ("on", "misplaced")
    }
    changed = [statistics.median(m["on"]["changed"][i] for m in models) for i in range(len(GAINS))]
    return {"off": statistics.median(m["off"] for m in models), **added, "changed": changed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the medians, writes the report; 2 where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.consolidation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR", help="folders of byte models")
    parser.add_argument("--bytes", type=int, default=BYTES, help="of held-out text (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the misplaced pathways (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the report (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.bytes < ROWS * WINDOW:
            raise ConfigError(explain("--bytes", f"{ROWS * WINDOW} or more", options.bytes))
        corpus = load_corpus()
        generator = torch.Generator().manual_seed(options.seed)
        loaded = [SynapseModel.from_pretrained(folder).eval() for folder in options.models]
        for folder, model in zip(options.models, loaded, strict=True):
            if model.config.n_experts < 2:
                raise ConfigError(explain(str(folder), "a model with experts to choose from", "none"))
        bar = progress(loaded, "consolidating")
        models = [measure(model, corpus, options.bytes, generator) for model in bar]
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place = environment()
    report = {
        "commit": place.pop("commit"),
        "machine": place,
        "config": loaded[0].config.to_dict(),
        "seed": options.seed,
        "bytes": options.bytes,
        "read": READ,
        "gains": list(GAINS),
        "models": models,
        "summary": summary(models),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(report["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
