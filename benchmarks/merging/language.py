"""Merges language models of three domains: python -m benchmarks.merging.language [--seeds 0 1 2].

One base, a specialist for each kind of text (`domains`), and every method with the settings that held-out text of its
own chose; then all are judged on other held-out text, that nothing was chosen by. Models and trials stay in
runs/merging, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, environment, machine_slug
from benchmarks.merging import domains
from merge.candidates import grid, run_grid
from merge.recipe import Recipe
from merge.search import open_search, references, report, texts
from recipes.data import Corpus
from recipes.malloc import keep_freed_memory

METHODS = ("ties", "task_arithmetic")
LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.4)
DENSITIES = (0.2, 0.5, 1.0)
FOLDER = ROOT / "runs" / "merging"


def one_seed(seed: int, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """Trains or finds the models of a seed and searches; the table, each row with "bits" and "test"."""
    folder = FOLDER / f"seed-{seed}"
    places = domains.prepare(folder, corpora, seed=seed)
    paths: dict[str, list[Path]] = {"choice": [], "test": []}
    for name, corpus in corpora.items():
        for side, text in domains.held_out_text(corpus).items():
            path = folder / side / f"{name}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text)
            paths[side].append(path)
    models = tuple(str(places[name]) for name in domains.DOMAINS)
    recipe = Recipe(base=str(places["base"]), models=models)
    search = open_search(recipe, paths["choice"], folder / "search")
    run_grid(search.attempt, list(references(recipe).values()))
    run_grid(search.attempt, grid(METHODS, LAMBDAS, DENSITIES))
    rows = report(search, METHODS, texts(paths["test"], search.judge.tokenizer))
    kept = [{key: row[key] for key in ("name", "candidate", "bits", "test")} for row in rows]
    return {"seed": seed, "trials": len(search.trials), "rows": kept}


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bits per byte of each row on the test texts: means over the seeds, of each text and of all, and their range."""
    found: dict[str, Any] = {}
    for name in [row["name"] for row in results[0]["rows"]]:
        tests = [row["test"] for result in results for row in result["rows"] if row["name"] == name]
        means = [sum(test.values()) / len(test) for test in tests]
        by_text = {text: sum(test[text] for test in tests) / len(tests) for text in tests[0]}
        found[name] = {**by_text, "mean": sum(means) / len(means), "low": min(means), "high": max(means)}
    return dict(sorted(found.items(), key=lambda item: float(item[1]["mean"])))


def main() -> None:
    """Runs the experiment, prints its table and writes benchmarks/results/merging-language-MACHINE.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and windows (0 1 2)")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    keep_freed_memory()
    corpora = domains.corpora()
    results = [one_seed(seed, corpora) for seed in seeds]
    place = environment()
    record: dict[str, Any] = {
        "experiment": "specialists of three domains, merged",
        "environment": place,
        "config": domains.CONFIG,
        "training": domains.TRAINING,
        "held_out_bytes": domains.HELD_OUT_BYTES,
        "corpora": {name: {"source": one.source, "fingerprint": one.fingerprint} for name, one in corpora.items()},
        "grid": {"methods": METHODS, "lambdas": LAMBDAS, "densities": DENSITIES},
        "summary": summary(results),
        "seeds": results,
    }
    out = ROOT / "benchmarks" / "results" / f"merging-language-{machine_slug(place)}.json"
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, row in record["summary"].items():
        print(f"{name:<24}" + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    print(out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out)


if __name__ == "__main__":
    main()
