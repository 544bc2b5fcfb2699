"""The command line of the training program, and what of it a resumed run may change."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.config import RunConfig, read_config
from recipes.tokenizer import BYTES
from recipes.tokens import default_cache
from synapse_arch.errors import ConfigError, explain

EPILOG = """examples:
  accelerate launch recipes/train.py                                  the demo: tiny preset, Python's own source
  accelerate launch recipes/train.py --data my_notes/ --minutes 30    your own text
  accelerate launch recipes/train.py --data pairs.jsonl --field body --tokenizer bpe.json --carry
  accelerate launch recipes/train.py --config run.yaml --lr 1e-3      a file, and what differs from it
  python -m recipes.train --preset small --print-config > run.json    every setting, to change and give to --config
  accelerate launch recipes/train.py --set experts.n_experts=4 --set memory.rule=hebbian
  accelerate launch recipes/train.py --out runs/demo --resume         go on after Ctrl-C
  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train.py    two processes over gloo
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line.

    Attributes:
        given: the fields of `RunConfig` the user named, with their values; the command line's win over the file's.
        config: file of settings, or None.
        print_config: show the settings instead of running.
        cache: folder of token caches.
        out: folder of the run.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace the run in `out`.
        prompt: opening of the sample; None takes one that fits the data.
        sample_tokens: length of the sample; 0 for none.
    """

    given: dict[str, Any]
    config: Path | None
    print_config: bool
    cache: Path
    out: Path
    resume: bool
    overwrite: bool
    prompt: str | None
    sample_tokens: int


# What a resumed run may change: nothing that would make the steps before it those of another run.
RESUMABLE = frozenset(
    {"minutes", "steps", "eval_minutes", "save_minutes", "keep", "keep_best"}
    | {"compile", "recompute", "threads", "trackers"}
)


def parse(argv: list[str] | None = None) -> Command:
    """Reads the command line (`sys.argv` when None); argparse prints its own complaints and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a SynapseModel on text, save it, and show what it learned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for add in (_add_run, _add_model, _add_optimisation, _add_machine):
        add(parser, RunConfig())
    values = vars(parser.parse_args(argv))
    own = ("config", "print_config", "cache", "out", "resume", "overwrite", "prompt", "sample_tokens")
    command = {name: values.pop(name) for name in own}
    if command["resume"] and command["overwrite"]:
        parser.error("--resume goes on with a run, --overwrite throws it away: give one of them")
    if command["sample_tokens"] < 0:
        parser.error("--sample-tokens must be 0 or more")
    return Command(given=values, **command)


def settings(command: Command) -> dict[str, Any]:
    """What the user asked for: the file's settings, and those of the command line over them.

    Raises:
        ConfigError: the file cannot be read, or names what is not known.
    """
    if command.config is None:
        return command.given
    read = read_config(command.config)
    read |= {name: kind(read[name]) for name, kind in PATHS.items() if isinstance(read.get(name), str)}
    given = dict(command.given)
    if "overrides" in read and "overrides" in given:
        given["overrides"] = [*read["overrides"], *given["overrides"]]
    budget = {"minutes", "steps"}
    if budget & given.keys():
        read = {name: value for name, value in read.items() if name not in budget}
    return {**read, **given}


def resumed(stored: RunConfig, given: dict[str, Any]) -> RunConfig:
    """The stored run with what the user may change on the way: budget and cadence.

    Raises:
        ConfigError: another value for anything else.
    """
    values = stored.to_dict()
    typed = RunConfig.from_dict(given).to_dict()  # a file may say 1e-3, which YAML reads as a text
    for name in given:
        value = typed[name]
        if (name, value) == ("mixed_precision", "auto"):
            continue
        if name not in RESUMABLE and value != values[name]:
            flag = "--set" if name == "overrides" else f"--{name.replace('_', '-')}"
            remedy = "leave it away, or start a new run in another --out"
            raise ConfigError(explain(f"{flag} with --resume", values[name], value, remedy))
        values[name] = value
    if given.get("minutes") is not None and given.get("steps") is None:
        values["steps"] = None
    return RunConfig.from_dict(values)


def _path(text: str) -> str:
    return str(Path(text).expanduser().resolve())


def _tokenizer(text: str) -> str:
    return text if text == BYTES else _path(text)


PATHS: dict[str, Callable[[str], str]] = {"data": _path, "tokenizer": _tokenizer}
"""Settings that name files; a run remembers where they are, wherever it was started."""


def _switch(group: Any, name: str, text: str) -> None:
    action = argparse.BooleanOptionalAction
    group.add_argument(f"--{name.replace('_', '-')}", dest=name, action=action, help=text)


def _add_run(parser: argparse.ArgumentParser, default: RunConfig) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (runs/demo)")
    run.add_argument("--config", type=Path, default=None, metavar="FILE", help="YAML or JSON file of settings")
    run.add_argument("--print-config", action="store_true", default=False, help="show every setting as JSON, and end")
    run.add_argument("--resume", action="store_true", default=False, help="go on from the last checkpoint in --out")
    run.add_argument("--overwrite", action="store_true", default=False, help="replace the run that --out holds")
    run.add_argument("--prompt", default=None, help="what the sample at the end continues")
    run.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="where tokens are kept")
    run.add_argument("--sample-tokens", type=int, default=400, metavar="INT", help="length of the sample (400)")
    budget = run.add_mutually_exclusive_group()
    _option(budget, default, "minutes", float, "wall time to train for")
    _option(budget, default, "steps", int, "optimizer steps to train for, instead of --minutes")


def _add_model(parser: argparse.ArgumentParser, default: RunConfig) -> None:
    what = parser.add_argument_group("model and data")
    _option(what, default, "preset", str, "size of the model: tiny, small, base, titan, or auto")
    what.add_argument(
        "--set",
        dest="overrides",
        action="append",
        metavar="KEY=VALUE",
        help="change the preset, as in experts.n_experts=4; may be repeated",
    )
    source = "text, .jsonl, .parquet or folder; without it, the source of Python's standard library"
    _option(what, default, "data", _path, source)
    _option(what, default, "field", str, "the field or column that is the text")
    _option(what, default, "tokenizer", _tokenizer, "bytes, or a file that recipes.tokenizer wrote")
    _switch(what, "carry", "read the text on from window to window and carry the state along")


def _add_optimisation(parser: argparse.ArgumentParser, default: RunConfig) -> None:
    how = parser.add_argument_group("optimisation")
    _option(how, default, "batch_size", int, "windows a step, over all processes")
    _option(how, default, "accumulate", int, "parts a process's windows are cut into, to save memory")
    _option(how, default, "length", int, "tokens in a window")
    _option(how, default, "lr", float, "peak learning rate")
    _option(how, default, "final_lr", float, "last learning rate, as a share of the peak")
    _option(how, default, "warmup", float, "share of the budget spent warming up")
    _option(how, default, "schedule", str, "cosine, wsd or linear")
    _option(how, default, "weight_decay", float, "AdamW's decay of the matrices")
    _option(how, default, "beta1", float, "AdamW's average of gradients")
    _option(how, default, "beta2", float, "AdamW's average of their squares")
    _option(how, default, "clip", float, "largest norm of the gradient")
    _option(how, default, "seed", int, "of weights, windows and noise")


def _add_machine(parser: argparse.ArgumentParser, default: RunConfig) -> None:
    machine = parser.add_argument_group("machine and cadence")
    _option(machine, default, "mixed_precision", str, "auto, no or bf16")
    _option(machine, default, "eval_minutes", float, "wall time between looks at held-out text")
    _option(machine, default, "save_minutes", float, "wall time between checkpoints")
    _option(machine, default, "keep", int, "newest checkpoints that are kept")
    _switch(machine, "keep_best", "keep the checkpoint that was best on held-out text, too")
    _switch(
        machine, "shard", "spread weights and optimizer over the processes (FSDP2): models may be larger than a device"
    )
    compiled = (
        "fuse the layers by torch.compile: costs minutes before a size's first step, some 10 %% less a step on CPUs"
    )
    _switch(machine, "compile", compiled)
    _switch(machine, "recompute", "recompute layers in the backward pass, to save memory; the same bits")
    machine.add_argument("--trackers", nargs="*", metavar="NAME", help="also log to tensorboard, trackio")
    _option(machine, default, "threads", int, "of a process on a CPU; 0 shares out the cores")


def _option(group: Any, default: RunConfig, name: str, kind: Callable[[str], object], text: str) -> None:
    value = getattr(default, name)
    shown = "" if value is None else f" ({value})"
    metavar = kind.__name__.strip("_").upper()
    group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=metavar, help=text + shown)
