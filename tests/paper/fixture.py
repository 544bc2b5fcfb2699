"""Made-up tasks, models and results for the tests of the paper's pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.numbers import Numbers, constants

PLACE = {"cpu": "a CPU", "threads": 2, "torch": "2", "python": "3", "dtype": "float32"}
MODELS = {
    "synapse": "ours", "transformer": "attention", "mamba2": "SSD", "mlstm": "mLSTM", "gated-deltanet": "delta rule",
    "hebbian": "outer products", "synapse:no-memory": "without the memory", "synapse:dense-experts": "one dense SwiGLU",
}  # fmt: skip


@dataclass
class Protocol:
    train_examples: int | None = 100
    test_examples: int = 10
    batch_size: int = 4
    steps: int = 40
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    d_model: int = 8
    n_layers: int = 2
    stop_at: float | None = None


@dataclass
class Task:
    bar: float | None
    published: dict[str, float] = field(default_factory=dict)
    metric: str = "micro"
    description: str = "a task"
    protocols: dict[str, Protocol] = field(
        default_factory=lambda: {"cpu": Protocol(), "published": Protocol(steps=400)}
    )


TASKS = {
    "memorization": Task(89.6, {"Mamba": 89.5, "Transformer": 85.2}),
    "memorization-8192": Task(None),
    "in-context-recall": Task(99.9, {"Mamba": 90.4, "Transformer": 94.1}),
    "compression": Task(52.7, {"Mamba": 52.7}),
    "selective-copy": Task(99.9, {"Mamba": 86.3}),
    "mqar-64": Task(99.0, {"attention": 100.0}),
    "mqar-128": Task(99.0),
    "mqar-256": Task(99.0),
    "parity": Task(100.0),
    "s3": Task(99.0),
    "bytes": Task(None),
}


def record(task: str, model: str, seed: int, score: float, *, lr: float = 1e-3, **changes: Any) -> dict[str, Any]:
    bits = task == "bytes"
    return {
        "task": task, "scale": "cpu", "model": model, "seed": seed, "lr": lr, "weight_decay": 0.0, "steps": 40,
        "steps_done": 40, "batch_size": 4, "parameters": 1200, "active_parameters": 1000, "state_numbers": 64,
        "config": {"vocab_size": 16, "d_model": 8}, "score": score, "best": score, "seconds": 12.5,
        "metric": "bits_per_byte" if bits else "accuracy", "commit": "0" * 40, "machine": PLACE,
        "curve": [[10, 2.0, score / 3], [20, 1.0, score / 2], [40, 0.5, score]],
    } | changes  # fmt: skip


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    for number, entry in enumerate(records):
        file = folder / "runs" / entry["task"] / f"{entry['model'].replace(':', '+')}-{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entry))


def everything() -> list[dict[str, Any]]:
    """Every model on every task, three seeds, in a made-up order of merit."""
    found = []
    for rank, model in enumerate(MODELS):
        for place, task in enumerate(TASKS):
            for seed in range(3):
                share = 1.0 - 0.07 * rank - 0.01 * seed - 0.013 * place
                found.append(record(task, model, seed, 2.0 + 0.1 * rank + 0.01 * seed if task == "bytes" else share))
    return found


def routing() -> dict[str, Any]:
    """A report of two layers, three experts and three token classes."""
    information = {
        name: {"label_bits": 1.5, "first": {"bits": bits}} for name, bits in (("token", 0.4), ("package", 0.1))
    }
    known = {"first_bits": [0.4, 0.2], "first_excess": [0.38, 0.17], "first_adjusted": [0.3, 0.1]}
    summary = {
        "information": {"token": known | {"given_byte_excess": [0.05, 0.04]}, "package": known},
        "load": {"largest_over_fair": 1.7, "largest_first_over_fair": 2.5, "dead": 0},
        "stability": {
            "agreement": [0.6, 0.5],
            "agreement_chance": [0.2, 0.2],
            "normalised": [0.3, 0.3],
            "adjusted": [0.3, 0.2],
        },
    }
    layer = {"information": information, "token_counts": [[50, 10, 5], [5, 60, 10], [20, 20, 20]]}
    models = [{"layers": [layer | {"layer": 0}, layer | {"layer": 1}], "bits_per_byte": 2.0}]
    part = {"models": models, "summary": summary}
    return {
        "commit": "0" * 40, "machine": PLACE, "config": {}, "seeds": [0], "trained": part, "untrained": part,
        "text": {"bytes": 200, "classes": {"token": {"name": 0.3, "string": 0.4, "space": 0.3}}},
        "protocol": {"shuffles": 200},
    }  # fmt: skip


def consolidation() -> dict[str, Any]:
    """What two gains did to one model."""
    found = {"off": 2.0, "on": [-0.001, 0.02], "misplaced": [0.002, 0.05], "changed": [0.03, 0.2]}
    return {
        "commit": "0" * 40, "machine": PLACE, "config": {}, "seed": 0, "bytes": 4096, "read": 4096,
        "gains": [0.25, 1.0], "models": [], "summary": found,
    }  # fmt: skip


def memory() -> dict[str, Any]:
    """A report of three memories with two points a curve."""

    def curve(*points: float) -> dict[str, list[float]]:
        return {"median": list(points), "min": [0.9 * point for point in points], "max": list(points)}

    states = ("full", "memory_only", "memory_cut", "all_cut")
    models = {
        name: {
            "forgetting": {state: curve(top, top / 2) for state in states},
            "interference": {state: curve(top, top / 4) for state in states},
            "overwriting": {
                state: {which: curve(top, top / 3) for which in ("last", "first", "other")} for state in states
            },
            "later_session": {"recall": curve(top, top / 2), "file_equals_state": 1.0},
        }
        for name, top in (("delta", 1.0), ("hebbian", 0.8), ("none", 0.4))
    }
    bare = {rule: {"measured": [1.0, 0.5], "predicted": [0.99, 0.52]} for rule in ("delta", "hebbian")}
    return {
        "commit": "0" * 40, "machine": PLACE, "config": {"measuring": {"recall_facts": 8}},
        "seeds": [0, 1, 2], "chance": 1 / 16, "models": models,
        "axes": {"filler": [0, 64], "sessions": [0, 4], "between": [0, 8], "facts": [4, 64]},
        "capacity": {"facts": [4, 64], "d_key": 32, "values": 16, "random_keys": {"1": bare, "2": bare}},
    }  # fmt: skip


def numbers(folder: Path, records: list[dict[str, Any]]) -> Numbers:
    write(folder, records)
    return Numbers(TASKS, MODELS, constants(), results=folder)
