"""Equal wall time: how many optimizer steps each model gets for the same number of seconds on this machine.

The steps of all models are timed in turn, in one run, so that whatever else the machine does meets them all; training
then counts steps, not seconds, and its result does not depend on what else the machine does.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measure import ROOT, environment, interleaved, progress
from benchmarks.quality.models import build, description
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import Trainer
from recipes.malloc import keep_freed_memory
from synapse_arch.errors import ConfigError, explain

SPEEDS = ROOT / "paper" / "results" / "speed"
WARM, ROUNDS = 12, 12
"""Steps before and while it is timed: what is compiled and what memory is kept comes with the first ones."""


def measure(task: str, models: Sequence[str], *, bf16: bool) -> dict[str, Any]:
    """Times a training step of each model, in turn, and keeps the medians; `steps` reads them.

    Raises:
        ConfigError: models that were timed before are not among them: only what was timed together is compared.
    """
    file = SPEEDS / f"{task}.json"
    if lost := sorted(_known(task).get("step_seconds", {}).keys() - set(models)):
        remedy = f"name them too, or remove {file}"
        raise ConfigError(explain(f"--time on {task}", f"also {', '.join(lost)}, timed before", "others", remedy))
    keep_freed_memory()
    protocol, seed = TASKS[task].protocols["cpu"], 0
    trainers = {}
    for name in models:
        torch.manual_seed(seed)
        learner = build(name, task=TASKS[task], protocol=protocol)
        trainers[name] = Trainer(learner, TASKS[task], protocol, seed=seed, lr=1e-3, weight_decay=0.1, bf16=bf16)
    for trainer in progress(trainers.values(), "warming up"):
        for _ in range(WARM):
            trainer.step()
    times = interleaved({name: trainer.step for name, trainer in trainers.items()}, ROUNDS, "timing a step of each")
    place = environment()
    record = {
        "task": task,
        "step_seconds": {name: statistics.median(values) for name, values in times.items()},
        "bf16": bf16,
        "threads": place["threads"],
        "rounds": ROUNDS,
        "seed": seed,
        "config": {name: description(trainer.learner)["config"] for name, trainer in trainers.items()},
    }
    record |= {"commit": place.pop("commit"), "machine": place}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def steps(task: str, models: Sequence[str], *, seconds: float, bf16: bool = False) -> dict[str, int]:
    """Optimizer steps that fit into `seconds`, by the record of `measure`.

    Raises:
        ConfigError: there is no record, a model is missing in it, or it was made in another precision.
    """
    record = _known(task)
    known = record.get("step_seconds", {})
    for name in models:
        if name not in known:
            remedy = f"on a quiet machine: python -m benchmarks.quality --task {task} --model ... --time"
            raise ConfigError(explain(f"the time of a step of {name} on {task}", "a record", "none", remedy))
    if record["bf16"] != bf16:
        expected, got = (f"{'with' if flag else 'without'} --bf16" for flag in (record["bf16"], bf16))
        raise ConfigError(explain(f"--seconds on {task}", f"{expected}, as the steps were timed", got))
    return {name: max(1, round(seconds / known[name])) for name in models}


def _known(task: str) -> dict[str, Any]:
    """The record of `measure`, or nothing."""
    file = SPEEDS / f"{task}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
