"""Longer runs on bytes: what `recipes/train.py` reached on the built-in corpus, as a record beside the compressors.

First accelerate launch recipes/train.py --minutes 5 --out runs/five
then  python -m benchmarks.quality.longer runs/five
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, environment
from benchmarks.quality.peers import state_numbers
from recipes.checkpoint import LOG_FILE, RESULT_FILE, latest, read_json, read_run
from recipes.config import RunConfig
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError, SynapseError, explain
from synapse_arch.model.accounting import active_parameters

RESULTS = ROOT / "paper" / "results" / "text"


def record(folder: Path) -> dict[str, Any]:
    """A finished run on the built-in corpus in the format of the byte task's records, and the compressors.

    Raises:
        ConfigError: the run is not finished, diverged, or was on other text. CheckpointError: it is no folder of a run.
    """
    stored, corpus = read_run(folder)
    run = RunConfig.from_dict(stored)
    if run.data is not None or run.tokenizer != "bytes":
        got, remedy = f"{run.data or 'the built-in corpus'}, tokenizer {run.tokenizer}", "leave both options out"
        raise ConfigError(explain(str(folder), "bytes of the built-in corpus", got, remedy))
    if not (folder / RESULT_FILE).exists():
        raise ConfigError(explain(str(folder), f"{RESULT_FILE} of a finished run", "none", "end it with --resume"))
    result, place = read_json(folder / RESULT_FILE), environment()
    model = SynapseModel.from_pretrained(latest(folder))
    bits = dict(result["bits_per_byte"])
    score = bits.pop("model")
    if score is None:
        raise ConfigError(explain(str(folder), "a finite score", "none", "the run diverged: train with a smaller lr"))
    place["threads"] = run.threads or place["threads"]
    return {
        "task": "bytes",
        "model": "synapse",
        "scale": "cpu",
        "metric": "bits_per_byte",
        "seed": run.seed,
        "lr": run.lr,
        "weight_decay": run.weight_decay,
        "steps": result["step"],
        "batch_size": run.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": active_parameters(model),
        "state_numbers": state_numbers(model.init_state(1, device="meta").layers),
        "config": model.config.to_dict(),
        "score": score,
        "seconds": result["seconds"],
        "curve": curve(folder / LOG_FILE),
        "compressors": bits,
        "bytes": result["bytes"],
        "corpus": corpus,
        "commit": place.pop("commit"),
        "machine": place | {"autocast": run.mixed_precision},
    }


def curve(log: Path) -> list[list[float]]:
    """[step, seconds, training bits per byte] of every line of a run's log."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [[line["step"], line["seconds"], line["bits_per_byte"]] for line in lines if "bits_per_byte" in line]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a record for each run; 2 where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.longer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    try:
        records = [record(folder) for folder in options.runs]
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    for found in records:
        file = options.results / f"synapse_s{found['seed']}_n{found['steps']}.json"
        file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"{found['score']:.3f} bits per byte after {found['seconds']:.0f} s: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
