"""The paper's tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.quality.records import Cell
from paper.document import NBSP, NOT_RUN, each, fixed, percent, plain, result, spread, whole
from paper.document import model_name as name
from paper.numbers import BYTES, MAD, OURS, Numbers

RECALL = ("mqar-64", "mqar-128", "mqar-256")
SHORT = {
    "memorization": "memor.",
    "memorization-8192": "memor. 8192",
    "in-context-recall": "recall",
    "compression": "compr.",
    "selective-copy": "copy",
}
"""Names of tasks where there is little room."""
TRACKING = ("parity", "s3")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A pipe table; the first `left` columns are set left, the others in the middle."""
    marks = [":---" if column < left else ":---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))


def scores(numbers: Numbers, tasks: Sequence[str], *, published: bool = True) -> str:
    """A row a model, a column a task; the best median of a column, as it is printed, is bold.

    Below: the goals, and published scores.
    """
    tasks = [task for task in tasks if task in numbers.tasks]
    models = shown(numbers, tasks)
    cells = {(model, task): numbers.cell(task, model) for model in models for task in tasks}
    leading = {task: _leaders({model: cells[model, task] for model in models}) for task in tasks}
    rows = []
    for model in models:
        line = [spread(cells[model, task]) for task in tasks]
        rows.append(
            [
                name(model),
                *(f"**{text}**" if model in leading[task] else text for task, text in zip(tasks, line, strict=True)),
            ]
        )
    goals = [numbers.tasks[task].bar for task in tasks]
    rows.append(["*Goal*", *("" if goal is None else f"*{goal:.1f}*" for goal in goals)])
    if published:
        rows += _published(numbers, tasks)
    return markdown(["Model", *tasks], rows)


def shown(numbers: Numbers, tasks: Sequence[str]) -> list[str]:
    """This library's model and the peers that were run on one of the tasks; all peers where none was."""
    run = [model for model in numbers.peers if any(numbers.cell(task, model).found for task in tasks)]
    return [OURS, *(run or numbers.peers)]


def _published(numbers: Numbers, tasks: Sequence[str]) -> list[list[str]]:
    said = list(dict.fromkeys(model for task in tasks for model in numbers.tasks[task].published))
    return [
        [
            f"*{model}, published*",
            *(f"*{s:.1f}*" if (s := numbers.tasks[task].published.get(model)) is not None else "" for task in tasks),
        ]
        for model in said
    ]


def _leaders(cells: dict[str, Cell]) -> list[str]:
    """The models whose medians are printed as the best one is."""
    known = {model: cell for model, cell in cells.items() if cell.median is not None}
    if len(known) < 2:
        return []
    lower = any(cell.bits for cell in known.values())
    best = min(known.values(), key=lambda cell: (cell.median or 0.0) * (1 if lower else -1))
    return [model for model, cell in known.items() if result(cell) == result(best)]


def protocol(numbers: Numbers) -> str:
    """How each task was trained at this scale, or would be, and at the published one."""
    rows = []
    for task in numbers.ran([OURS, *numbers.peers]) or list(numbers.tasks):
        ours, theirs = (numbers.tasks[task].protocols[scale] for scale in ("cpu", "published"))
        runs = [run for run in numbers.runs if run["task"] == task]
        rates = sorted({run["lr"] for run in runs} or ours.lrs)
        steps = {run["steps"] for run in runs} or {ours.steps}
        rows.append(
            [task, f"{ours.d_model} × {ours.n_layers}", _examples(ours.train_examples), str(ours.batch_size),
             " to ".join(map(whole, sorted({min(steps), max(steps)}))),
             f"{_examples(theirs.train_examples)}, {whole(theirs.steps)}", ", ".join(map(plain, rates))]
        )  # fmt: skip
    head = ["Task", "Width × blocks", "Examples", "Batch", "Steps", "Published: examples, steps", "Learning rates"]
    return markdown(head, rows)


def _examples(count: int | None) -> str:
    return "fresh" if count is None else whole(count)


def sizes(numbers: Numbers) -> str:
    """Parameters and state of each model on a few tasks."""
    tasks = [task for task in ("in-context-recall", "mqar-64", "s3", BYTES) if task in numbers.tasks]
    rows = []
    for model in shown(numbers, tasks):
        cells = [numbers.cell(task, model) for task in tasks]
        rows.append([name(model), *(_size(cell) for cell in cells)])
    return markdown(["Model", *tasks], rows)


def _size(cell: Cell) -> str:
    if not cell.found:
        return NOT_RUN
    return f"{whole(cell.active_parameters)} of {whole(cell.parameters)} / {whole(cell.state_numbers)}"


def text(numbers: Numbers) -> str:
    """Bits per byte of every model that was run on bytes, of those trained longer, and of the compressors."""
    rows = [_text_row(name(model), numbers.cell(BYTES, model), numbers) for model in shown(numbers, [BYTES])]
    for cells in numbers.longer.values():
        rows += [_text_row(f"{name(model)}, longer", cell, numbers) for model, cell in cells.items()]
    rows += [[packer, fixed(numbers.compressor(packer), 3), "", "", "", ""] for packer in ("gzip -9", "xz -9")]
    head = ["Model", "Bits per byte", "Active parameters", "Parameters", "Steps", "Planned seconds"]
    return markdown(head, rows)


def _text_row(title: str, cell: Cell, numbers: Numbers) -> list[str]:
    sizes = (cell.active_parameters, cell.parameters, cell.steps, numbers.planned(cell))
    return [title, spread(cell), *map(whole, sizes)]


def ablations(numbers: Numbers) -> str:
    """A row a changed part, a column a task: what the median gains or loses against the default after as many steps.

    The default's row is the one most changes are beside; a change beside another says after how many steps.
    """
    tasks = numbers.ran(numbers.ablations)
    if not tasks:
        return ""
    defaults = {task: _usual([numbers.pair(task, model)[0] for model in numbers.ablations]) for task in tasks}
    rows = [["*default*", *(f"*{spread(defaults[task])}*" for task in tasks)]]
    for model in numbers.ablations:
        changes = []
        for task in tasks:
            default, changed = numbers.pair(task, model)
            then = "" if default.steps == defaults[task].steps else f" ({whole(default.steps)} steps)"
            changes.append(_change(default, changed) + (then if default.found and changed.found else ""))
        rows.append([name(model).replace(" ", NBSP), *changes])
    return markdown([f"Changed{NBSP}part", *(SHORT.get(task, task) for task in tasks)], rows)


def _usual(cells: Sequence[Cell]) -> Cell:
    """The cell that most are, by their steps."""
    known = [cell for cell in cells if cell.found]
    steps = [cell.steps for cell in known]
    return max(known, key=lambda cell: steps.count(cell.steps), default=Cell())


def _change(default: Cell, changed: Cell) -> str:
    if changed.median is None or default.median is None:
        return "–"
    gain = changed.median - default.median
    shown = fixed(gain, 3) if changed.bits else percent(gain)
    signed = _signed(shown)
    if len(changed.scores) == 1 or len(default.scores) == 1:
        return f"{signed}\\*"
    return f"**{signed}**" if default.ahead_of(changed) or changed.ahead_of(default) else signed


def _signed(shown: str) -> str:
    if not float(shown):
        return shown.removeprefix("-")
    return f"−{shown[1:]}" if shown.startswith("-") else f"+{shown}"


def bars(numbers: Numbers) -> str:
    """What was asked for, what was reached."""
    words = {True: "met", False: "missed", None: NOT_RUN}
    rows = [[bar.what, bar.value or NOT_RUN, bar.goal, words[bar.met]] for bar in numbers.bars]
    return markdown(["What", "Reached", "Asked for", ""], rows)


def memory(numbers: Numbers) -> str:
    """Recall of a few facts after a while, of many facts, and of a fact told twice, by what of the state is kept."""
    report = numbers.memory
    if report is None:
        return ""
    axes, width = report["axes"], report["capacity"]["d_key"]
    near = min(range(len(axes["facts"])), key=lambda place: abs(axes["facts"][place] - width))
    rows = []
    for model, found in report["models"].items():
        for state, title in STATES.items():
            if model == "none" and state != "full":
                continue
            forgetting, many, twice = (found[kind][state] for kind in ("forgetting", "interference", "overwriting"))
            shares = [
                forgetting["median"][0],
                forgetting["median"][-1],
                many["median"][near],
                many["median"][-1],
                twice["last"]["median"][-1],
            ]
            rows.append([MEMORIES.get(model, model), title, *map(percent, shares)])
    head = [
        "Memory", "Kept of the state", f"{axes['filler'][0]} tokens later", f"{axes['filler'][-1]:,} tokens later",
        f"of {axes['facts'][near]} facts", f"of {axes['facts'][-1]} facts", "retold: the last",
    ]  # fmt: skip
    return markdown(head, rows, left=2)


def routing(numbers: Numbers) -> str:
    """What experts and labels of the text say about each other, layer by layer, and what is left by chance."""
    report = numbers.routing
    if report is None:
        return ""
    trained, untrained = (report[kind]["summary"]["information"] for kind in ("trained", "untrained"))
    layers = report["trained"]["models"][0]["layers"]
    rows = []
    for label, found in trained.items():
        bits = fixed(layers[0]["information"][label]["label_bits"])
        chance = [bit - excess for bit, excess in zip(found["first_bits"], found["first_excess"], strict=True)]
        beyond = each(found["given_byte_excess"], 3) if "given_byte_excess" in found else ""
        rows.append(
            [
                label.replace("_", " "),
                bits,
                each(found["first_bits"]),
                each(chance, 3),
                beyond,
                each(untrained[label]["first_bits"]),
            ]
        )
    head = ["Label", "Its entropy", "Shared with the expert", "By chance", "Beyond the byte itself", "Untrained"]
    return markdown(head, rows)


def consolidation(numbers: Numbers) -> str:
    """What pathways add to the bits per byte, a column a gain."""
    report = numbers.consolidation
    if report is None:
        return ""
    found = report["summary"]
    rows = [[title, *(_signed(fixed(value, 4)) for value in found[key])] for key, title in PATHWAYS.items()]
    rows.append(["tokens with other experts, percent", *map(percent, found["changed"])])
    return markdown(["Pathways", *(plain(gain) for gain in report["gains"])], rows)


MEMORIES = {"delta": "delta rule", "hebbian": "Hebbian", "none": "none"}
STATES = {"full": "all", "memory_only": "the memory alone", "memory_cut": "all but the memory"}
"""What of a state answers, as the report names it and as the table does."""
PATHWAYS = {"on": "where they belong", "misplaced": "between other experts"}
TABLES: dict[str, Callable[[Numbers], str]] = {
    "protocol": protocol,
    "sizes": sizes,
    "mad": lambda numbers: scores(numbers, ["memorization", "memorization-8192", *MAD[1:]]),
    "recall": lambda numbers: scores(numbers, (*RECALL, *TRACKING), published=False),
    "text": text,
    "ablations": ablations,
    "memory": memory,
    "routing": routing,
    "consolidation": consolidation,
    "bars": bars,
}
"""By the name that the template calls them."""
