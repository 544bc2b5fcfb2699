"""What memory buys: facts told once, asked after filler, in a later session, overwritten, among many others.

    python -m benchmarks.quality.memory [--seeds 0 1 2] [--out FILE] [--quick]

Small models learn to answer about keys that are kept from training, so that nothing can be recalled but what the state
carried over. Models with a memory are trained with the full state and, every other step, with `memory_only`; the one
without reads every question with its full state, which favours it. Each question is put to four states:

    full          all that was carried over
    memory_only   the fast weights alone, as a later session inherits them
    memory_cut    all but the memory
    all_cut       a fresh state

The file is a pure function of the configuration, the seeds and the machine; it is written after every model, and a
second call goes on where the first was stopped. Its keys:

    commit, machine, config, seeds, axes (what the curves run over), chance
    models.MODEL.{parameters, state_numbers, memory_numbers, final_loss, seen_keys}
    models.MODEL.forgetting.STATE               recall at axes.filler
    models.MODEL.later_session.recall           recall at axes.sessions; .file_equals_state: 1 where the file is exact
    models.MODEL.places.TOKENS                  recall from the memory alone of the fact told first, second, ... last,
                                                cut off so many tokens after the last
    models.MODEL.overwriting.STATE.{last,first,other}   shares at axes.between
    models.MODEL.interference.STATE             recall at axes.facts
        each with median, min and max over the seeds
    capacity                                    see memory_capacity.py: the same without a model around it
    runs                                        what each model of each seed measured, and at which commit
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import ROOT, environment, progress
from benchmarks.quality.memory_capacity import capacity
from benchmarks.quality.memory_facts import VALUES, Facts, filler, keys, make_facts, make_overwritten
from benchmarks.quality.memory_training import MODELS, Training, configuration, train
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.errors import ConfigError, explain
from synapse_arch.model.state import named_tensors

Curves = dict[str, Any]
RESULT = ROOT / "paper" / "results" / "memory.json"
QUICK_RESULT = Path("runs/memory-quick.json")


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured.

    Attributes:
        filler: N, tokens between telling and asking.
        sessions: later sessions that only read `session_filler` tokens before the one that asks.
        cut_after: tokens after the last fact at which the memory is cut off from the rest, told by place.
        between: other facts between two tellings of one key; `after` follow the second.
        facts: told before up to `max_questions` are asked.
        recall_facts: told in the first two experiments.
        answers: a point, at least, where the rows are not given.
        rows: of the first two experiments.
    """

    filler: tuple[int, ...] = (0, 16, 64, 256, 1024, 4096)
    sessions: tuple[int, ...] = (0, 1, 2, 4, 8)
    session_filler: int = 64
    cut_after: tuple[int, ...] = (0, 1)
    between: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    after: int = 2
    facts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    max_questions: int = 16
    recall_facts: int = 8
    answers: int = 512
    rows: int = 48


QUICK_TRAINING = Training(steps=2, answers=16, max_rows=4, max_filler=4)
QUICK_MEASURING = Measuring(
    filler=(0, 4), sessions=(0, 1), session_filler=4, between=(0, 1), facts=(1, 2), recall_facts=2, answers=4, rows=2
)


def _without_memory(model: SynapseModel, state: SynapseState) -> SynapseState:
    fresh = model.init_state(state.batch_size)
    layers = zip(state.layers, fresh.layers, strict=True)
    return replace(state, layers=tuple(old._replace(memory=new.memory) for old, new in layers))


STATES: dict[str, Callable[[SynapseModel, SynapseState], SynapseState]] = {
    "full": lambda _, state: state,
    "memory_only": lambda _, state: state.memory_only(),
    "memory_cut": _without_memory,
    "all_cut": lambda model, state: model.init_state(state.batch_size),
}
"""What of a state a question is put to."""


@torch.no_grad()
def answered(model: SynapseModel, facts: Facts, state: SynapseState) -> Tensor:
    """(B, questions) the tokens predicted after each question."""
    return model(facts.asked, state).logits[:, 1::2].argmax(-1)


def share(answers: Tensor, wanted: Tensor) -> float:
    """How many answers (B, questions) are those wanted (B, 2 questions)."""
    return float((answers == wanted[:, 1::2]).double().mean())


def _recall(model: SynapseModel, facts: Facts, state: SynapseState) -> dict[str, float]:
    return {name: share(answered(model, facts, cut(model, state)), facts.answers) for name, cut in STATES.items()}


@torch.no_grad()
def _distances(
    model: SynapseModel, state: SynapseState, lengths: Sequence[int], generator: torch.Generator
) -> Iterator[SynapseState]:
    """The state after each of the growing amounts of filler."""
    read = 0
    for length in lengths:
        if length > read:
            state = model(filler(generator, state.batch_size, length - read), state, logits_to_keep=1).state
            read = length
        yield state


@torch.no_grad()
def measure_forgetting(model: SynapseModel, measuring: Measuring, *, seen: bool = False) -> Curves:
    """Recall after N tokens of filler, of each state."""
    generator = torch.Generator().manual_seed(1)
    facts = make_facts(generator, keys(seen=seen), measuring.rows, measuring.recall_facts)
    states = _distances(model, model(facts.told).state, measuring.filler, generator)
    return _by_name([_recall(model, facts, state) for state in states])


@torch.no_grad()
def measure_later_session(model: SynapseModel, measuring: Measuring) -> Curves:
    """Recall from a file of the memory alone, after further sessions that read, were saved and left only theirs."""
    generator = torch.Generator().manual_seed(2)
    facts = make_facts(generator, keys(seen=False), measuring.rows, measuring.recall_facts)
    state, passed, shares = model(facts.told).state, 0, []
    exact = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.safetensors"
        for sessions in measuring.sessions:
            for _ in range(sessions - passed):
                words = filler(generator, measuring.rows, measuring.session_filler)
                state = model(words, state.memory_only(), logits_to_keep=1).state
            passed = sessions
            state.memory_only().save(file)
            loaded = SynapseState.load(file)
            answers = answered(model, facts, loaded)
            exact &= bool((answers == answered(model, facts, state.memory_only())).all())
            shares.append(share(answers, facts.answers))
            state = loaded
    return {"recall": shares, "file_equals_state": float(exact)}


@torch.no_grad()
def measure_places(model: SynapseModel, measuring: Measuring) -> Curves:
    """Recall from the memory alone of the fact told first, second, ... last, cut off at once or a few tokens later."""
    curves = {}
    for length in measuring.cut_after:
        generator = torch.Generator().manual_seed(5)
        facts = make_facts(generator, keys(seen=False), measuring.answers // 2, measuring.recall_facts)
        told = torch.cat([facts.told, filler(generator, len(facts.told), length)], 1)
        right = answered(model, facts, model(told).state.memory_only()) == facts.answers[:, 1::2]
        keys_told = facts.told.view(len(told), 1, -1, 3)[..., :2]
        place = (keys_told == facts.asked.view(len(told), -1, 1, 2)).all(-1).long().argmax(-1)
        in_order = right.gather(1, place.argsort(1))
        curves[str(length)] = in_order.double().mean(0).tolist()
    return curves


@torch.no_grad()
def measure_overwriting(model: SynapseModel, measuring: Measuring) -> Curves:
    """Of a key told twice: how often the last value, the first, or another is answered, of each state."""
    shares = []
    for between in measuring.between:
        generator = torch.Generator().manual_seed(3)
        made = make_overwritten(generator, keys(seen=False), measuring.answers, between=between, after=measuring.after)
        state, point = model(made.told).state, {}
        for name, cut in STATES.items():
            answers = answered(model, made, cut(model, state))
            last, first = share(answers, made.answers), share(answers, made.first)
            point[name] = {"last": last, "first": first, "other": 1 - last - first}
        shares.append(point)
    return {
        name: {which: [point[name][which] for point in shares] for which in ("last", "first", "other")}
        for name in STATES
    }


@torch.no_grad()
def measure_interference(model: SynapseModel, measuring: Measuring) -> Curves:
    """Recall against the number of facts told before the first question, of each state."""
    points = []
    for facts in measuring.facts:
        questions = min(facts, measuring.max_questions)
        rows = -(-measuring.answers // questions)
        generator = torch.Generator().manual_seed(4)
        made = make_facts(generator, keys(seen=False), rows, facts, questions=questions)
        points.append(_recall(model, made, model(made.told).state))
    return _by_name(points)


def _by_name(points: list[dict[str, float]]) -> Curves:
    return {name: [point[name] for point in points] for name in points[0]}


def perform(name: str, seed: int, training: Training, measuring: Measuring) -> dict[str, Any]:
    """Trains one model and measures everything."""
    model, losses = train(configuration(MODELS[name]), seed, training, f"{name}, seed {seed}")
    layers = model.init_state(1).layers
    memories = tuple(layer.memory and layer.memory.weights for layer in layers)
    told = replace(measuring, filler=(0,))
    return {
        "model": name,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "state_numbers": sum(tensor.numel() for _, tensor in named_tensors(layers)),
        "memory_numbers": sum(tensor.numel() for tensor in memories if tensor is not None),
        "loss": losses,
        "final_loss": losses[-1],
        "seen_keys": measure_forgetting(model, told, seen=True)["full"][0],
        "forgetting": measure_forgetting(model, measuring),
        "later_session": measure_later_session(model, measuring),
        "places": measure_places(model, measuring),
        "overwriting": measure_overwriting(model, measuring),
        "interference": measure_interference(model, measuring),
    }


UNJOINED = ("model", "seed", "commit", "loss")


def over_seeds(runs: list[Any]) -> Any:
    """Trees of numbers and curves of one shape -> the same tree of median, min and max."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: over_seeds([run[key] for run in runs]) for key in first if key not in UNJOINED}
    functions = {"median": statistics.median, "min": min, "max": max}
    if isinstance(first, list):
        return {name: [function(point) for point in zip(*runs, strict=True)] for name, function in functions.items()}
    if min(runs) == max(runs) and isinstance(first, int):
        return first
    return {name: function(runs) for name, function in functions.items()}


def record(runs: list[dict[str, Any]], header: dict[str, Any], measuring: Measuring) -> dict[str, Any]:
    """The whole file."""
    axes = {name: list(getattr(measuring, name)) for name in ("filler", "sessions", "between", "facts")}
    models = {
        name: {"seeds": [run["seed"] for run in runs if run["model"] == name]}
        | over_seeds([run for run in runs if run["model"] == name])
        for name in MODELS
        if any(run["model"] == name for run in runs)
    }
    return header | {"axes": axes, "chance": 1 / VALUES, "models": models, "runs": runs}


def run(out: Path, seeds: Sequence[int], training: Training, measuring: Measuring) -> dict[str, Any]:
    """Trains and measures what the file does not hold yet, and writes it after every model; what it holds stays.

    Raises:
        ConfigError: the file holds runs of another configuration, or of another machine.
    """
    place = environment()
    machine = {key: place[key] for key in ("cpu", "threads", "torch", "python", "dtype")}
    config = {
        "training": asdict(training),
        "measuring": asdict(measuring),
        "models": {name: configuration(memory).to_dict() for name, memory in MODELS.items()},
    }
    header = {"commit": place["commit"], "machine": machine, "config": json.loads(json.dumps(config))}
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    same = all(known.get(key) == header[key] for key in ("machine", "config"))
    if known and not same:
        remedy = "choose another --out, or remove the file"
        raise ConfigError(explain(str(out), "runs of this configuration and machine", "others", remedy))
    runs = [{"commit": known["commit"]} | old for old in known.get("runs", [])]
    header["seeds"] = sorted({*seeds, *(old["seed"] for old in runs)})
    found = {(old["model"], old["seed"]) for old in runs}
    header["capacity"] = known.get("capacity") or capacity(measuring.facts, answers=8 * measuring.answers)
    order = [(name, seed) for seed in seeds for name in MODELS if (name, seed) not in found]
    for name, seed in progress(order, "models"):
        runs.append({"commit": place["commit"]} | perform(name, seed, training, measuring))
        runs.sort(key=lambda one: (one["seed"], list(MODELS).index(one["model"])))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record(runs, header, measuring), indent=1) + "\n", encoding="utf-8")
    return record(runs, header, measuring)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.memory", description="What memory buys.")
    parser.add_argument("--out", type=Path, help=f"{RESULT.relative_to(ROOT)}, or with --quick {QUICK_RESULT}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    training, measuring = (QUICK_TRAINING, QUICK_MEASURING) if options.quick else (Training(), Measuring())
    out = options.out or (QUICK_RESULT if options.quick else RESULT)
    try:
        result = run(out, options.seeds, training, measuring)
    except ConfigError as error:
        parser.error(str(error))
    for name, model in result["models"].items():
        for experiment in ("forgetting", "interference"):
            for state in STATES:
                curve = "  ".join(f"{value:.3f}" for value in model[experiment][state]["median"])
                print(f"{name:8} {experiment:13} {state:12} {curve}")
    print(out)


if __name__ == "__main__":
    main()
