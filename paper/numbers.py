"""Results into numbers: what the paper says is taken from here, and from nowhere else.

    results/runs/<task>/*.json    runs of benchmarks.quality, one a task, model, learning rate, weight decay and seed
    results/text/*.json           longer runs on bytes, of the same format, and what compressors reach on the same text
    results/speed/<task>.json     seconds of a training step of each model, by which equal times are made
    results/<name>.json           other experiments, each as its benchmark wrote it: memory, routing,
                                  consolidation

What was not run is None, and printed as such.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.records import Cell, Record, best, read
from paper.goals import Bar, bits, bits_of, equal_time

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "paper" / "results"
CORE = ROOT / "benchmarks" / "results"
OURS = "synapse"
BYTES = "bytes"
DENSE = "synapse:dense-experts"
MAD = ("memorization", "in-context-recall", "compression", "selective-copy")
STRICT = ("memorization", "compression")
"""Tasks whose bar must be exceeded; at the others reaching it is enough."""
SEEDS = 3
MINUTES = {"gzip -9": 5, "xz -9": 30}
"""How long training on bytes may take to get below a compressor."""
MEMORIES = {"delta", "hebbian", "none"}
"""The models of the memory's own experiment."""
LEARNED = 0.05
"""Accuracy below which a model has learned nothing of a task."""
SAME_TIME = 0.15
"""Planned times that differ by less than this share count as equal."""
FAIR_LOADS = 2
"""An expert's largest share of the assignments, over the share it had if all were equal."""


class Numbers:
    """All that the paper may say.

    Args:
        tasks: the benchmark's tasks by name.
        models: descriptions of the benchmark's models by name.
        constants: what the code has as constants: "defaults" of the library, "training", "hebbian".
        results: folder of the results.
        core: folder with what `make bench` wrote, as core-<machine>.json; the newest counts.
    """

    minutes = MINUTES

    def __init__(
        self,
        tasks: Mapping[str, Any],
        models: Mapping[str, str],
        constants: Mapping[str, Any],
        *,
        results: Path = RESULTS,
        core: Path = CORE,
    ) -> None:
        self.tasks, self.models, self.constants = tasks, models, constants
        self.runs = [record for record in read(results / "runs") if record["scale"] == "cpu"]
        self.texts = read(results / "text")
        self.speeds = {record["task"]: record["step_seconds"] for record in read(results / "speed")}
        self.memory: Record | None = _optional(results / "memory.json")
        if self.memory is not None and not self.memory["models"].keys() >= MEMORIES:
            self.memory = None  # it is written after every model; an unfinished one says nothing yet
        self.routing: Record | None = _optional(results / "routing.json")
        self.consolidation: Record | None = _optional(results / "consolidation.json")
        benches = [json.loads(file.read_text(encoding="utf-8")) for file in core.glob("core-*.json")]
        self.bench: Record = max(benches, key=lambda bench: bench["environment"]["time"])

    def cell(self, task: str, model: str = OURS) -> Cell:
        """What a model reached on a task.

        Raises:
            KeyError: no such task or model; one that was not run is no error.
        """
        if task not in self.tasks or (model not in self.models):
            raise KeyError(f"no task {task!r} with a model {model!r}")
        runs = self._at_equal_time() if task == BYTES else self._of(task)
        return best(run for run in runs if run["model"] == model)

    def pair(self, task: str, model: str) -> tuple[Cell, Cell]:
        """This library's model and one with a part changed: after as many steps, or else as much time; else none."""
        changed = best(run for run in self._of(task) if run["model"] == model)
        ours = [run for run in self._of(task) if run["model"] == OURS]
        if not changed.found:
            return self.cell(task), changed
        other = changed.records[0]
        alike = [run for run in ours if run["steps"] == other["steps"]]
        return best(alike or [run for run in ours if self._near(run, other)]), changed

    def pairs(self, task: str, model: str) -> dict[int, tuple[Cell, Cell]]:
        """This library's model and one with a part changed, by the steps after which both were measured."""
        runs = [run for run in self._of(task) if run["model"] in (OURS, model)]
        found = {}
        for steps in sorted({run["steps"] for run in runs}):
            then = [run for run in runs if run["steps"] == steps]
            ours, changed = (best(run for run in then if run["model"] == name) for name in (OURS, model))
            if ours.found and changed.found:
                found[steps] = ours, changed
        return found

    def _of(self, task: str) -> list[Record]:
        return [run for run in self.runs if run["task"] == task]

    def _at_equal_time(self) -> list[Record]:
        """The runs on bytes that were planned for one time: that of the most models, the longest of equals."""
        runs = self._of(BYTES)
        if BYTES not in self.speeds:
            return runs
        return max(self._groups(), key=lambda group: len({run["model"] for run in group}), default=runs)

    def _groups(self) -> list[list[Record]]:
        """The runs on bytes by the time they were planned for, around those of this library's model, longest first."""
        runs = self._of(BYTES)
        ours = {run["steps"]: run for run in runs if run["model"] == OURS}
        return [[run for run in runs if self._near(run, ours[steps])] for steps in sorted(ours, reverse=True)]

    @property
    def longer(self) -> dict[float, dict[str, Cell]]:
        """By planned seconds: what this library's model and fewer peers reached on bytes when trained longer."""
        found, main = {}, self._at_equal_time()
        for group in self._groups():
            if not group or group == main:  # no step was timed, or what follows was trained no longer
                break
            cells = {name: best(run for run in group if run["model"] == name) for name in (OURS, *self.peers)}
            known = {name: cell for name, cell in cells.items() if cell.found}
            seconds = self._planned(known[OURS].records[0])
            if seconds is not None and len(known) > 1:
                found[seconds] = known
        return dict(sorted(found.items()))

    @property
    def seconds(self) -> float | None:
        """What this library's model was planned to take on bytes, where all models are compared."""
        return self.planned(self.cell(BYTES))

    def planned(self, cell: Cell) -> float | None:
        """Seconds that a cell's steps take on a quiet machine; None where no step was timed."""
        return self._planned(cell.records[0]) if cell.found else None

    def _near(self, one: Record, other: Record) -> bool:
        """Whether two runs were planned for about the same time; a model whose steps were not timed was not."""
        first, second = (self._planned(record) for record in (one, other))
        return first is not None and second is not None and abs(first / second - 1) < SAME_TIME

    def _planned(self, record: Record) -> float | None:
        """Seconds that a run's steps take on a quiet machine."""
        seconds = self.speeds.get(record["task"], {}).get(record["model"])
        return None if seconds is None else float(seconds) * int(record["steps"])

    def core(self, start: str) -> Record:
        """The one figure of `make bench` whose line starts like this.

        Raises:
            KeyError: none or several do.
        """
        found: list[Record] = [figure for figure in self.bench["figures"] if figure["what"].startswith(start)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} figures of make bench start with {start!r}")
        return found[0]

    @property
    def peers(self) -> list[str]:
        """The other models."""
        return [name for name in self.models if not name.startswith(OURS)]

    @property
    def equal_data(self) -> dict[str, Cell]:
        """What this library's model and peers reached on bytes after as many steps, so as much text: the most steps."""
        pairs = {peer: self.pairs(BYTES, peer) for peer in self.peers}
        most = max((steps for found in pairs.values() for steps in found), default=0)
        cells: dict[str, Cell] = {}
        for peer, found in pairs.items():
            if most in found:
                ours, other = found[most]
                cells |= {OURS: ours, peer: other}
        return cells

    @property
    def ablations(self) -> list[str]:
        """This library's model with a part changed, those that were run."""
        run = {record["model"] for record in self.runs}
        return [name for name in self.models if name.startswith(f"{OURS}:") and name in run]

    @property
    def compared(self) -> list[str]:
        """The tasks on which this library's model and at least one peer were run."""
        return [task for task in self.tasks if self.cell(task).found and self.best_peer(task)]

    @property
    def led(self) -> list[str]:
        """Those of them where this library's median is ahead of every peer's, and not level with it."""
        apart = {*self.compared} - {*self.tied, *self.unlearned}
        return [task for task in self.compared if task in apart and self._lead(task) > 0]

    @property
    def unlearned(self) -> list[str]:
        """Those of them where no peer learned anything, which compares learning rates rather than models."""
        best = {task: self.cell(task, self.best_peer(task) or OURS) for task in self.compared}
        return [task for task, cell in best.items() if not cell.bits and (cell.median or 0.0) < LEARNED]

    @property
    def tied(self) -> list[str]:
        """Those of them where this library's median is level with the best peer's.

        That is: within the spread over seeds, or both where training stops.
        """
        return [task for task in self.compared if abs(self._lead(task)) <= self._spread(task) or self._finished(task)]

    def _finished(self, task: str) -> bool:
        """Whether the medians of this library's model and of the best peer both reached what ends the training."""
        goal, cells = self.stops.get(task), (self.cell(task), self.cell(task, self.best_peer(task) or OURS))
        return goal is not None and all((cell.median or 0.0) >= goal for cell in cells)

    @property
    def stops(self) -> dict[str, float]:
        """The tasks whose training ends at the first test that reaches an accuracy, and that accuracy."""
        goals = {task: self.tasks[task].protocols["cpu"].stop_at for task in self.ran([OURS, *self.peers])}
        return {task: goal for task, goal in goals.items() if goal is not None}

    def _lead(self, task: str) -> float:
        """By how much this library's median is better than the best peer's."""
        ours, peer = self.cell(task), self.cell(task, self.best_peer(task) or OURS)
        gain = (ours.median or 0.0) - (peer.median or 0.0)
        return -gain if ours.bits else gain

    def _spread(self, task: str) -> float:
        """By how much seeds of this library's model, or else of the best peer, differ at most; 0 of one seed."""
        cells = (self.cell(task), self.cell(task, self.best_peer(task) or OURS))
        return max(max(cell.scores) - min(cell.scores) for cell in cells)

    def best_peer(self, task: str) -> str | None:
        """The peer with the best median on a task."""
        known = [(name, cell) for name in self.peers if (cell := self.cell(task, name)).found]
        if not known:
            return None
        return min(known, key=lambda pair: (pair[1].median or 0.0) * (1 if pair[1].bits else -1))[0]

    def published(self, task: str) -> str:
        """The published scores of a task in percent, in words."""
        return ", ".join(f"{model} {score:.1f}" for model, score in self.tasks[task].published.items())

    @property
    def seeds(self) -> int:
        """The largest number of seeds of a cell."""
        return max((len(self.cell(task).scores) for task in self.tasks), default=0)

    @property
    def searched(self) -> tuple[int, int]:
        """Combinations of task, model and steps: those trained in several cells of the grid, and all."""
        cells: dict[tuple[str, str, int], set[tuple[float, float]]] = {}
        for run in self.runs:
            cells.setdefault((run["task"], run["model"], run["steps"]), set()).add((run["lr"], run["weight_decay"]))
        return sum(len(tried) > 1 for tried in cells.values()), len(cells)

    @property
    def costliest(self) -> str | None:
        """The changed part that costs most bits per byte."""
        costs = {}
        for name in self.ablations:
            ours, changed = self.pair(BYTES, name)
            if ours.median is not None and changed.median is not None:
                costs[name] = changed.median - ours.median
        worst = max(costs, key=lambda name: costs[name], default=None)
        return worst if worst and costs[worst] > 0 else None

    def ran(self, models: Sequence[str]) -> list[str]:
        """The tasks, in order, on which at least one of the models was run."""
        found = {record["task"] for record in self.runs if record["model"] in models}
        return [task for task in self.tasks if task in found]

    def spread(self, field: str, task: str) -> float | None:
        """Largest over smallest value of a field among this library's model and the peers that were run on a task."""
        cells = (self.cell(task, model) for model in (OURS, *self.peers))
        values = [getattr(cell, field) for cell in cells if cell.found]
        return max(values) / min(values) if values else None

    def compressor(self, name: str) -> float | None:
        """Bits per byte of "gzip -9" or "xz -9" on the held-out text of the byte task."""
        found = [record["compressors"][name] for record in self.texts if "compressors" in record]
        return float(found[0]) if found else None

    def read_in(self, minutes: float) -> Record | None:
        """The best run on bytes of this library's model that took at most so many minutes."""
        texts = [record for record in self.texts if record.get("task") == BYTES and record.get("scale") == "cpu"]
        runs = [run for run in (*texts, *self._of(BYTES)) if run["model"] == OURS and run["seconds"] <= 60 * minutes]
        return min(runs, key=lambda record: float(record["score"]), default=None)

    @property
    def bf16(self) -> list[str]:
        """The tasks on which matrices were multiplied in bfloat16."""
        found = {record["task"] for record in self.runs if record["machine"].get("autocast") == "bf16"}
        return [task for task in self.tasks if task in found]

    @property
    def machines(self) -> list[str]:
        """The processors of all runs, each with the threads that were used of it."""
        threads: dict[str, set[int]] = {}
        for record in (*self.runs, *self.texts):
            threads.setdefault(record["machine"]["cpu"], set()).add(record["machine"]["threads"])
        return [
            f"{cpu} ({' or '.join(str(n) for n in sorted(used))} thread{'s' if max(used) > 1 else ''})"
            for cpu, used in sorted(threads.items())
        ]

    @property
    def bars(self) -> list[Bar]:
        """What the issue asks for, and whether it was reached."""
        tasks = [self._task_bar(name) for name, task in self.tasks.items() if task.bar is not None]
        return [*tasks, self.one_configuration, *self._text_bars(), *self._sparse_bars()]

    def bars_that_are(self, met: bool | None) -> list[Bar]:
        """The bars that were met, missed (False), or not run (None)."""
        return [bar for bar in self.bars if bar.met is met]

    def _task_bar(self, task: str) -> Bar:
        goal, cell = float(self.tasks[task].bar), self.cell(task)
        sign = "above" if task in STRICT else "at least"
        if cell.median is None:
            return Bar(task, None, f"{sign} {goal:.1f}\u00a0%", None)
        reached = round(100 * cell.median, 6)
        met = reached > goal if task in STRICT else reached >= goal
        return Bar(task, f"{reached:.1f}\u00a0%", f"{sign} {goal:.1f}\u00a0%", met)

    @property
    def one_configuration(self) -> Bar:
        """Whether the four tasks of MAD were run with one configuration."""
        shapes = [_shape(cell.config) for cell in map(self.cell, MAD) if cell.found]
        met = all(shape == shapes[0] for shape in shapes) if len(shapes) == len(MAD) else None
        value = None if met is None else ("one" if met else "several")
        return Bar("configurations on the four MAD tasks", value, "one", met)

    def _text_bars(self) -> list[Bar]:
        names = (OURS, *self.peers)
        bars = [equal_time("bytes, equal wall time", {name: self.cell(BYTES, name) for name in names}, of=OURS)]
        bars += [
            equal_time(f"bytes, {seconds:.0f} seconds each", cells, of=OURS) for seconds, cells in self.longer.items()
        ]
        for name, minutes in MINUTES.items():
            run, limit = self.read_in(minutes), self.compressor(name)
            reached = None if run is None else float(run["score"])
            met = None if reached is None or limit is None else reached < limit
            goal = f"below {name}" if limit is None else f"below {limit:.2f}, {name}"
            bars.append(Bar(f"bytes, at most {minutes} minutes of training, bits per byte", bits(reached), goal, met))
        return bars

    def _sparse_bars(self) -> list[Bar]:
        bars = []
        if DENSE in self.models:
            ours, dense = self.pair(BYTES, DENSE)
            goal = "below dense" if dense.median is None else f"below {dense.median:.3f}, dense"
            value = bits_of(ours) if dense.found else None
            bars.append(Bar("bytes, sparse experts, bits per byte", value, goal, ours.better_than(dense)))
        value, met = None, None
        if self.routing is not None:
            load = float(self.routing["trained"]["summary"]["load"]["largest_over_fair"])
            value, met = f"{load:.2f}", load <= FAIR_LOADS
        return [*bars, Bar("largest load of an expert, in fair shares", value, f"at most {FAIR_LOADS}", met)]


def _optional(file: Path) -> Record | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _shape(config: Any) -> str:
    """A configuration without the sizes that a task decides."""
    return json.dumps({key: value for key, value in dict(config).items() if key != "vocab_size"}, sort_keys=True)


def gather(*, results: Path = RESULTS) -> Numbers:
    """The numbers of the benchmark's own tasks and models."""
    from benchmarks.quality.models import MODELS
    from benchmarks.quality.tasks import TASKS

    return Numbers(TASKS, {name: spec.description for name, spec in MODELS.items()}, constants(), results=results)


def constants() -> dict[str, Any]:
    """Constants of the code that the text names."""
    from benchmarks.quality.peers import HebbianConfig
    from benchmarks.quality.training import BETAS, CLIP
    from synapse_arch import SynapseConfig

    return {
        "defaults": SynapseConfig().to_dict(),
        "training": {"betas": BETAS, "clip": CLIP},
        "hebbian": {"decay": HebbianConfig().decay},
    }
