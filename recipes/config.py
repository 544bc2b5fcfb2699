"""What a training run is: `RunConfig`, its defaults, and the command line that changes them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data import ByteTokenizer
from recipes.optim import Schedule
from synapse_arch import SynapseConfig
from synapse_arch.errors import ConfigError, explain

EPILOG = """examples:
  accelerate launch recipes/train.py                                  the demo: tiny preset, Python's own source
  accelerate launch recipes/train.py --data my_notes/ --minutes 30    your own text
  accelerate launch recipes/train.py --set experts.n_experts=4 --set memory.rule=hebbian
  accelerate launch recipes/train.py --out runs/demo --resume         go on after Ctrl-C
  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/train.py    two processes over gloo
"""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, and how often it looks up from it.

    Attributes:
        preset: of `SynapseConfig`; its vocabulary becomes the byte tokenizer's.
        overrides: "experts.n_experts=4" and the like, on top of the preset; values are JSON, or else strings.
        data: text file or folder; None is the built-in corpus.
        minutes: budget of training in wall time, checkpoints and looks at held-out text included.
        steps: budget in optimizer steps, instead of `minutes`; then the whole run can be repeated bit by bit.
        batch_size: windows a step, over all processes together.
        length: tokens in a window.
        lr: peak learning rate.
        final_lr: last learning rate, as a share of `lr`.
        warmup: share of the budget until `lr` is reached.
        schedule: "cosine", "wsd" or "linear".
        weight_decay: of matrices; see `recipes.optim.parameter_groups`.
        beta1: AdamW's average of gradients.
        beta2: AdamW's average of their squares.
        clip: the gradient's largest norm.
        seed: of the initial weights, the windows and the router's noise.
        mixed_precision: "no", "bf16", or "auto": bf16 where a measured matrix product is 1.5 times faster in it.
        eval_minutes: wall time between two looks at the held-out text.
        save_minutes: wall time between two checkpoints.
        threads: of a process on a CPU; 0 shares the cores among the processes.
    """

    preset: str = "tiny"
    overrides: tuple[str, ...] = ()
    data: str | None = None
    minutes: float = 9.5
    steps: int | None = None
    batch_size: int = 4
    length: int = 256
    lr: float = 2e-3
    final_lr: float = 0.0
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    mixed_precision: str = "auto"
    eval_minutes: float = 2.0
    save_minutes: float = 2.0
    threads: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("length", 1), ("threads", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(explain(name, f"{low} or more", value))
        for name in ("minutes", "eval_minutes", "save_minutes", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(explain(name, "a positive number", value))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(explain(name, "0 up to, not including, 1", getattr(self, name)))
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ConfigError(explain("weight_decay", "0 or more", self.weight_decay))
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ConfigError(explain("mixed_precision", "auto, no or bf16", repr(self.mixed_precision)))
        self.learning_rate()

    def learning_rate(self) -> Schedule:
        """The schedule these values describe."""
        return Schedule(peak=self.lr, final=self.final_lr, warmup=self.warmup, shape=self.schedule)

    def model_config(self) -> SynapseConfig:
        """The preset with the overrides applied.

        Raises:
            ConfigError: an unknown preset or key, a value that does not fit, or no "key=value".
        """
        changes = dict(_change(override) for override in self.overrides)
        config = SynapseConfig.preset(self.preset, **{"vocab_size": ByteTokenizer.vocab_size, **changes})
        if config.vocab_size != ByteTokenizer.vocab_size:
            got = config.vocab_size
            raise ConfigError(explain("vocab_size", f"{ByteTokenizer.vocab_size}, the byte tokenizer's", got))
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ConfigError(
                    explain("run configuration", "known keys", repr(key), f"did you mean {near[0]}?" if near else "")
                )
        try:
            return cls(**{**values, "overrides": tuple(values.get("overrides", ()))})
        except TypeError as error:
            raise ConfigError(explain("run configuration", "values of the right types", error)) from error


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line.

    Attributes:
        given: the fields of `RunConfig` the user named, with their values.
        out: folder of the run.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace the run in `out`.
        prompt: opening of the sample; None takes one that fits the data.
        sample_tokens: length of the sample; 0 for none.
    """

    given: dict[str, Any]
    out: Path
    resume: bool
    overwrite: bool
    prompt: str | None
    sample_tokens: int


# What a resumed run may change: nothing that would make the steps before it those of another run.
RESUMABLE = frozenset({"minutes", "steps", "eval_minutes", "save_minutes", "threads"})


def parse(argv: list[str] | None = None) -> Command:
    """Reads the command line (`sys.argv` when None); argparse prints its own complaints and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a SynapseModel on text, save it, and show what it learned.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    default = RunConfig()
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (runs/demo)")
    run.add_argument("--resume", action="store_true", default=False, help="go on from the last checkpoint in --out")
    run.add_argument("--overwrite", action="store_true", default=False, help="replace the run that --out holds")
    run.add_argument("--prompt", default=None, help="what the sample at the end continues")
    run.add_argument("--sample-tokens", type=int, default=400, metavar="INT", help="length of the sample (400)")
    budget = run.add_mutually_exclusive_group()
    _option(budget, default, "minutes", float, "wall time to train for")
    _option(budget, default, "steps", int, "optimizer steps to train for, instead of --minutes")
    what = parser.add_argument_group("model and data")
    _option(what, default, "preset", str, "size of the model: tiny, small, base, titan")
    what.add_argument(
        "--set",
        dest="overrides",
        action="append",
        metavar="KEY=VALUE",
        help="change the preset, as in experts.n_experts=4; may be repeated",
    )
    _option(what, default, "data", _path, "text file or folder; without it, the source of Python's standard library")
    how = parser.add_argument_group("optimisation")
    _option(how, default, "batch_size", int, "windows a step, over all processes")
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
    machine = parser.add_argument_group("machine and cadence")
    _option(machine, default, "mixed_precision", str, "auto, no or bf16")
    _option(machine, default, "eval_minutes", float, "wall time between looks at held-out text")
    _option(machine, default, "save_minutes", float, "wall time between checkpoints")
    _option(machine, default, "threads", int, "of a process on a CPU; 0 shares out the cores")
    values = vars(parser.parse_args(argv))
    command = {name: values.pop(name) for name in ("out", "resume", "overwrite", "prompt", "sample_tokens")}
    if command["resume"] and command["overwrite"]:
        parser.error("--resume goes on with a run, --overwrite throws it away: give one of them")
    if command["sample_tokens"] < 0:
        parser.error("--sample-tokens must be 0 or more")
    return Command(given=values, **command)


def resumed(stored: RunConfig, given: dict[str, Any]) -> RunConfig:
    """The stored run with what the user may change on the way: budget and cadence.

    Raises:
        ConfigError: another value for anything else.
    """
    values = stored.to_dict()
    for name, value in given.items():
        value = tuple(value) if name == "overrides" else value
        if (name, value) == ("mixed_precision", "auto"):
            continue
        if name not in RESUMABLE and value != values[name]:
            flag = "--set" if name == "overrides" else f"--{name.replace('_', '-')}"
            remedy = "leave it away, or start a new run in another --out"
            raise ConfigError(explain(f"{flag} with --resume", values[name], value, remedy))
        values[name] = value
    if "minutes" in given:
        values["steps"] = None
    return RunConfig.from_dict(values)


def _path(text: str) -> str:
    return str(Path(text).expanduser().resolve())


def _option(group: Any, default: RunConfig, name: str, kind: Callable[[str], object], text: str) -> None:
    value = getattr(default, name)
    shown = "" if value is None else f" ({value})"
    metavar = kind.__name__.strip("_").upper()
    group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=metavar, help=text + shown)


def _change(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(explain("--set", "KEY=VALUE", repr(override), "as in --set experts.n_experts=4"))
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text
