"""Learning on other people's tasks: this library's model beside its peers, at equal parameters, state and data.

    python -m benchmarks.quality --task parity --model synapse                 grid of learning rates, then three seeds
    python -m benchmarks.quality --task all --model synapse transformer mamba2 --jobs 2
    python -m benchmarks.quality --task s3 --model synapse:hebbian --lr 3e-3 --seeds 0
    python -m benchmarks.quality --task memorization --scale published --device cuda
    python -m benchmarks.quality --task bytes --model synapse transformer --time          how fast each is here
    python -m benchmarks.quality --task bytes --model synapse transformer --seconds 120   equal wall time
    python -m benchmarks.quality --task bytes --model synapse synapse:no-memory --steps 180 --lr 2e-3 --bf16
    python -m benchmarks.quality --table                                       what is known, beside published scores
    python -m benchmarks.quality --list                                        tasks and models

Every finished run is a JSON file under paper/results/runs and is not run again; an interrupted one goes on from its
last test. With --jobs 2 two models train side by side, each on its share of the cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.processes import processes
from benchmarks.quality import budget, runs
from benchmarks.quality.models import MODELS
from benchmarks.quality.table import table
from benchmarks.quality.tasks import TASKS
from recipes.malloc import keep_freed_memory
from synapse_arch.errors import ConfigError, SynapseError, explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; 2 where it makes no sense."""
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            print(_listing())
        elif options.table:
            print(table(options.results))
        else:
            _run(options)
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses what would be ignored or could not run."""
    if not options.task:
        raise ConfigError(explain("--task", "one or more tasks, or all", "none", "--list shows them"))
    if options.jobs < 1:
        raise ConfigError(explain("--jobs", "1 or more", options.jobs))
    if options.seconds is not None and not options.seconds > 0:
        raise ConfigError(explain("--seconds", "a positive number", options.seconds))
    if options.steps is not None and options.steps < 1:
        raise ConfigError(explain("--steps", "1 or more", options.steps))
    if not all(0 < lr < math.inf for lr in options.lr):
        raise ConfigError(explain("--lr", "positive numbers", options.lr))
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        got = f"{options.device}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(explain("--device", "a device of this machine", got, "try cpu")) from error
    if options.weight_decay and not options.lr:
        raise ConfigError(explain("--weight-decay", "--lr beside it", "none", "both replace the task's grid"))
    if (options.time or options.seconds is not None) and (options.scale, options.device) != ("cpu", "cpu"):
        got = f"--scale {options.scale} --device {options.device}"
        raise ConfigError(explain("--time and --seconds", "the cpu scale on the cpu", got))
    if options.time and options.results != runs.RESULTS:
        remedy = f"the times that --seconds reads are kept in {budget.SPEEDS}"
        raise ConfigError(explain("--time", "no --results", options.results, remedy))


def _run(options: argparse.Namespace) -> None:
    _check(options)
    tasks = list(TASKS) if "all" in options.task else options.task
    if options.time:
        for task in tasks:
            for name, seconds in budget.measure(task, options.model, bf16=options.bf16)["step_seconds"].items():
                print(f"{task} · {name}: {seconds:.3f} s a step")
        return
    cells = tuple(itertools.product(options.lr, options.weight_decay or (0.0,))) if options.lr else ()
    work = [(task, model) for task in tasks for model in options.model]
    lengths = [options.steps or _steps(*pair, options) for pair in work]  # before anything is trained
    threads = max(1, torch.get_num_threads() // options.jobs)
    with processes(options.jobs, threads=threads, prepare=keep_freed_memory) as pool:
        common = {"results": options.results, "device": options.device, "bf16": options.bf16}
        futures = [
            pool.submit(
                runs.experiment, task, model, scale=options.scale, seeds=tuple(options.seeds), cells=cells,
                steps=steps, **common,
            )
            for (task, model), steps in zip(work, lengths, strict=True)
        ]  # fmt: skip
        for future in futures:
            future.result()
    print(table(options.results, tasks))


def _steps(task: str, model: str, options: argparse.Namespace) -> int | None:
    if options.seconds is None:
        return None
    return budget.steps(task, [model], seconds=options.seconds, bf16=options.bf16)[model]


def _listing() -> str:
    tasks = [f"  {name:<18} {task.description}" for name, task in TASKS.items()]
    models = [f"  {name:<28} {spec.description}" for name, spec in MODELS.items()]
    return "\n".join(["tasks", *tasks, "models", *models])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="tasks and models")
    parser.add_argument("--table", action="store_true", help="the results so far, nothing is run")
    parser.add_argument("--task", nargs="+", default=[], metavar="TASK", choices=[*TASKS, "all"], help="tasks, or all")
    parser.add_argument(
        "--model", nargs="+", default=["synapse"], metavar="MODEL", choices=MODELS, help="models (synapse)"
    )
    parser.add_argument("--scale", choices=("cpu", "published"), default="cpu", help="how much is trained (cpu)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first chooses the learning rate (0 1 2)"
    )
    parser.add_argument(
        "--lr", nargs="+", type=float, default=[], help="learning rates to try, instead of the task's grid"
    )
    parser.add_argument("--weight-decay", nargs="+", type=float, default=[], help="with --lr: weight decays to try (0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="equal training time of every model, instead of equal steps")
    length.add_argument("--steps", type=int, help="optimizer steps of every model, instead of the task's")
    parser.add_argument(
        "--time", action="store_true", help="time a step of each model, for --seconds; nothing is trained"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models trained side by side (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    parser.add_argument("--results", type=Path, default=runs.RESULTS, help="folder of the records")
    return parser


if __name__ == "__main__":
    sys.exit(main())
