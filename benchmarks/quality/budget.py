"""Equal wall time: how many optimizer steps each model gets for the same number of seconds on this machine.

The steps of all models are timed in turn, in one run, so that whatever else the machine does meets them all; training
then counts steps, not seconds, and its result does not depend on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure import ROOT, environment, interleaved
from benchmarks.quality.models import build
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import Trainer
from recipes.malloc import keep_freed_memory
from synapse_arch.errors import ConfigError, explain

SPEEDS = ROOT / "paper" / "results" / "speed"
ROUNDS = 8


def step_seconds(task: str, models: Sequence[str], *, scale: str = "cpu", bf16: bool = False) -> dict[str, float]:
    """Median seconds of a training step of each model, timed in turn."""
    keep_freed_memory()
    protocol = TASKS[task].protocols[scale]
    trainers = {}
    for name in models:
        torch.manual_seed(0)
        learner = build(name, task=TASKS[task], protocol=protocol)
        trainers[name] = Trainer(learner, TASKS[task], protocol, seed=0, lr=1e-3, weight_decay=0.1, bf16=bf16)
    times = interleaved({name: trainer.step for name, trainer in trainers.items()}, ROUNDS, "timing a step of each")
    return {name: statistics.median(values) for name, values in times.items()}


def measure(task: str, models: Sequence[str], *, bf16: bool) -> dict[str, Any]:
    """Times the models and keeps the record; `steps` reads it."""
    threads = torch.get_num_threads()
    file = SPEEDS / f"{task}.json"
    record = {
        "task": task,
        "step_seconds": step_seconds(task, models, bf16=bf16),
        "bf16": bf16,
        "threads": threads,
        "rounds": ROUNDS,
        "seed": 0,
        "config": {name: name for name in models},
        "taken": time.strftime("%Y-%m-%d"),
    }
    place = environment()
    record |= {"commit": place.pop("commit"), "machine": place}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def steps(task: str, models: Sequence[str], *, seconds: float) -> dict[str, int]:
    """Optimizer steps that fit into `seconds`, by the record of `measure`.

    Raises:
        ConfigError: there is no record, or a model is missing in it.
    """
    file = SPEEDS / f"{task}.json"
    known = json.loads(file.read_text(encoding="utf-8"))["step_seconds"] if file.exists() else {}
    for name in models:
        if name not in known:
            remedy = f"on a quiet machine: python -m benchmarks.quality --task {task} --model ... --time"
            raise ConfigError(explain(f"the time of a step of {name} on {task}", "a record", "none", remedy))
    return {name: max(1, round(seconds / known[name])) for name in models}
