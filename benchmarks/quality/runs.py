"""Runs and their records: one JSON file a run, written when it ends, so that whatever was interrupted goes on.

A run is a task at a scale, a model, a learning rate, a weight decay and a seed. Its file name says all of that.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import ROOT, environment
from benchmarks.quality import records
from benchmarks.quality.models import Learner, build, description
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.base import Protocol, Task
from benchmarks.quality.training import Progress, Trainer

RESULTS = ROOT / "paper" / "results" / "runs"
UNFINISHED = ROOT / "runs" / "quality"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of an experiment.

    Attributes:
        task: a key of TASKS.
        model: a key of MODELS.
        lr: peak learning rate.
        weight_decay: of the matrices.
        seed: of the initial weights and of the training batches.
        scale: "cpu" or "published".
        steps: instead of the protocol's.
    """

    task: str
    model: str
    lr: float
    weight_decay: float
    seed: int
    scale: str = "cpu"
    steps: int | None = None

    @property
    def path(self) -> Path:
        """Where its record goes, below a folder of results."""
        scale = "" if self.scale == "cpu" else f"__{self.scale}"
        steps = "" if self.steps is None else f"_n{self.steps}"
        name = f"{self.model.replace(':', '+')}__lr{self.lr:g}_wd{self.weight_decay:g}_s{self.seed}{steps}{scale}"
        return Path(self.task) / name

    def known(self, results: Path) -> dict[str, Any] | None:
        """The record of this run, if it was finished."""
        file = results / f"{self.path}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def perform(
    run: Run, *, results: Path = RESULTS, unfinished: Path = UNFINISHED, device: str = "cpu", bf16: bool = False
) -> dict[str, Any]:
    """The record of a run: read if it is finished, gone on with if it was interrupted, or else made.

    What was finished or begun under the same name by another configuration, number of steps or precision is made anew,
    and so is what diverged; that leaves a file that ends in .diverged and is no record.

    Args:
        run: what to train.
        results: folder of finished records.
        unfinished: folder of what is needed to go on.
        device: "cpu" or "cuda".
        bf16: matrix products under autocast.

    Raises:
        FloatingPointError: it diverged.
    """
    task, protocol = TASKS[run.task], TASKS[run.task].protocols[run.scale]
    torch.manual_seed(run.seed)
    learner = build(run.model, task=task, protocol=protocol).to(device)
    trainer = Trainer(
        learner, task, protocol, seed=run.seed, lr=run.lr, weight_decay=run.weight_decay, steps=run.steps, bf16=bf16
    )
    known = run.known(results)
    autocast = "bf16" if bf16 else "no"
    plan = json.loads(json.dumps(_plan(protocol, trainer, learner)))
    plan["autocast"] = autocast
    if (
        known is not None
        and records.scored(known)
        and plan.items() <= {**known, "autocast": known["machine"]["autocast"]}.items()
    ):
        return known
    kept = unfinished / f"{run.path}.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True, map_location=device)
        if state.pop("plan") == plan:
            trainer.restore(state)
    diverged = results / f"{run.path}.diverged"
    try:
        with tqdm(total=trainer.steps, initial=trainer.progress.step, desc=str(run.path), leave=False) as bar:
            trainer.run(partial(_show, bar), partial(_keep, trainer, plan, kept))
        record = _record(run, task, protocol, trainer, learner)
        if not records.scored(record):
            raise FloatingPointError(f"{run.task}: a score of {record['score']}")
    except FloatingPointError as error:
        kept.unlink(missing_ok=True)
        _write(diverged, {**asdict(run), **plan, "diverged": str(error), "at_step": trainer.progress.step})
        raise
    record["machine"]["autocast"] = autocast
    _write(results / f"{run.path}.json", record)
    kept.unlink(missing_ok=True)
    diverged.unlink(missing_ok=True)
    return record


def _plan(protocol: Protocol, trainer: Trainer, learner: Learner) -> dict[str, Any]:
    """What is known of a run before it starts."""
    return {"steps": trainer.steps, "batch_size": protocol.batch_size, **description(learner)}


def _show(bar: Any, progress: Progress) -> None:
    if progress.curve:
        bar.set_postfix(loss=f"{progress.curve[-1][1]:.3f}", score=f"{progress.curve[-1][2]:.4f}", refresh=False)
    bar.update(progress.step - bar.n)


def _keep(trainer: Trainer, plan: dict[str, Any], file: Path) -> None:
    """Atomic, so that being killed costs at most what came after the last test."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"plan": plan, **trainer.state()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def _record(run: Run, task: Task, protocol: Protocol, trainer: Trainer, learner: Learner) -> dict[str, Any]:
    progress, place = trainer.progress, environment()
    scores = [entry[2] for entry in progress.curve]
    lower = task.metric == "bits"
    return {
        **asdict(run),
        "metric": records.LOWER_IS_BETTER if lower else "accuracy",
        "score": scores[-1],
        "best": min(scores) if lower else max(scores),
        **_plan(protocol, trainer, learner),
        "steps_done": progress.step,
        "steps_skipped": progress.failures,
        "curve": progress.curve,
        "seconds": round(progress.seconds, 1),
        "commit": place.pop("commit"),
        "machine": place,
    }


def _write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    file.with_suffix(".tmp").write_text(text, encoding="utf-8")
    file.with_suffix(".tmp").replace(file)


def experiment(
    task: str,
    model: str,
    *,
    scale: str,
    seeds: tuple[int, ...],
    cells: tuple[tuple[float, float], ...] = (),
    steps: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One model on one task: the grid with the first seed, then all seeds in its best cell; what diverges is left out.

    Args:
        task: as in Run.
        model: as in Run.
        scale: as in Run.
        steps: as in Run.
        seeds: the first chooses the cell.
        cells: learning rates and weight decays to try; none means the protocol's.
        options: of `perform`.

    Returns:
        The records of the best cell, one a seed; none where every cell diverged.
    """
    protocol = TASKS[task].protocols[scale]
    cells = cells or tuple(itertools.product(protocol.lrs, protocol.weight_decays))

    def run(cell: tuple[float, float], seed: int) -> list[dict[str, Any]]:
        lr, decay = cell
        one = Run(task=task, model=model, lr=lr, weight_decay=decay, seed=seed, scale=scale, steps=steps)
        try:
            return [perform(one, **options)]
        except FloatingPointError as error:
            print(f"{one.path} diverged and is left out: {error}", file=sys.stderr)
            return []

    best = cells[0]
    if len(cells) > 1:
        chosen = records.best(record for cell in cells for record in run(cell, seeds[0]))
        if not chosen.found:
            return []
        best = (chosen.lr, chosen.weight_decay)
    done = [record for seed in seeds for record in run(best, seed)]
    scores = ", ".join(f"{record['score']:.4f}" for record in done)
    print(f"{task} · {model}: lr {best[0]:g}, weight decay {best[1]:g}: {scores or 'diverged'}", file=sys.stderr)
    return done
