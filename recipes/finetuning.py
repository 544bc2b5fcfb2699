"""What a fine-tuning is: `FinetuneConfig`, and the command line that sets it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.checkpoint import STEP_FOLDER
from recipes.optim import SHAPES, Schedule
from recipes.pairs import PREFERENCE, SUPERVISED
from synapse_arch.errors import ConfigError, explain

EPILOG = """examples:
  accelerate launch recipes/finetune.py --base runs/demo/step-00000480 --data answers.jsonl
  accelerate launch recipes/finetune.py --base model/ --data pairs.jsonl --task dpo --beta 0.1
  accelerate launch recipes/finetune.py --base model/ --data pairs.jsonl --task orpo --method full --lr 1e-4
  accelerate launch recipes/finetune.py --base model/ --data a.jsonl --lora-modules in_proj qk_proj --rank 4
  accelerate launch recipes/finetune.py --out runs/finetune --resume

a line of data: {"prompt": "2+2=", "completion": "4"}, or {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
"""
TASKS = ("sft", "dpo", "orpo")
METHODS = ("lora", "full")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides what a fine-tuning computes.

    Attributes:
        base: folder of the model to start from, as `SynapseModel.save_pretrained` wrote it.
        data: JSON lines; see `recipes.pairs`.
        held_out: more of them that are only judged; None for none.
        task: "sft", "dpo" or "orpo".
        method: "lora", adapters alone, or "full", all weights.
        rank: width of the adapters.
        alpha: their product is scaled by alpha / rank.
        lora_modules: projections that get one; with `lora_parameters` empty too, all but router and head.
        lora_parameters: stacked weights that get one a layer of the stack; likewise, those of the experts.
        beta: DPO's β.
        odds_weight: ORPO's λ.
        epochs: times the data is gone through.
        batch_size: examples a step, over all processes; a preference is one example.
        length: most tokens of prompt and answer; nothing is cut off, longer ones are refused.
        lr: peak learning rate.
        warmup: share of the steps until `lr` is reached.
        schedule: "cosine", "wsd" or "linear".
        weight_decay: of matrices.
        clip: the gradient's largest norm.
        seed: of the order, the adapters and the router's noise.
        save_steps: steps between two checkpoints.
        mixed_precision: "no" or "bf16".
    """

    base: str
    data: str
    held_out: str | None = None
    task: str = "sft"
    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    lora_modules: tuple[str, ...] = ()
    lora_parameters: tuple[str, ...] = ()
    beta: float = 0.1
    odds_weight: float = 0.1
    epochs: float = 3.0
    batch_size: int = 8
    length: int = 2048
    lr: float = 2e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_steps: int = 500
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        precisions = ("mixed_precision", ("no", "bf16"))
        for name, known in (("task", TASKS), ("method", METHODS), ("schedule", tuple(SHAPES)), precisions):
            if getattr(self, name) not in known:
                raise ConfigError(explain(name, f"one of {', '.join(known)}", repr(getattr(self, name))))
        for name in ("rank", "batch_size", "length", "save_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(explain(name, "1 or more", getattr(self, name)))
        for name in ("alpha", "beta", "odds_weight", "epochs", "clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(explain(name, "a positive number", getattr(self, name)))
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ConfigError(explain("weight_decay", "0 or more", self.weight_decay))
        if self.seed < 0:
            raise ConfigError(explain("seed", "0 or more", self.seed))
        if self.method == "full" and (self.lora_modules or self.lora_parameters):
            remedy = "leave --lora-modules and --lora-parameters away"
            raise ConfigError(explain("method full", "no targets of adapters", "some", remedy))
        self.learning_rate()

    def learning_rate(self) -> Schedule:
        """The schedule these values describe."""
        return Schedule(peak=self.lr, warmup=self.warmup, shape=self.schedule)

    @property
    def fields(self) -> tuple[str, ...]:
        """What a line of data must hold."""
        return SUPERVISED if self.task == "sft" else PREFERENCE

    def steps(self, examples: int) -> int:
        """Optimizer steps of the whole run."""
        return max(1, math.ceil(self.epochs * examples / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line.

    Attributes:
        given: the fields of `FinetuneConfig` the user named, with their values.
        out: folder of the run.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace the run in `out`.
    """

    given: dict[str, Any]
    out: Path
    resume: bool
    overwrite: bool


RESUMABLE = frozenset({"epochs", "save_steps", "held_out"})
"""What a resumed run may change: nothing that would make the steps before it those of another run."""
HELP = {
    "base": "folder of the model to start from",
    "data": "JSON lines of prompts and answers",
    "held_out": "more of them, judged at the end",
    "task": "sft, dpo or orpo",
    "method": "lora or full",
    "rank": "width of the adapters",
    "alpha": "their product is scaled by alpha / rank",
    "lora_modules": "projections with an adapter; by default all but router and head",
    "lora_parameters": "stacked weights with adapters; by default those of the experts",
    "beta": "how closely DPO holds to the base",
    "odds_weight": "weight of ORPO's odds-ratio term",
    "epochs": "times through the data",
    "batch_size": "examples a step, over all processes",
    "length": "most tokens of prompt and answer",
    "lr": "peak learning rate",
    "warmup": "share of the steps spent warming up",
    "schedule": "cosine, wsd or linear",
    "weight_decay": "AdamW's decay of the matrices",
    "clip": "largest norm of the gradient",
    "seed": "of order, adapters and noise",
    "save_steps": "steps between checkpoints",
    "mixed_precision": "no or bf16; unless given, the launcher's",
}
PATHS = frozenset({"base", "data", "held_out"})


def parse(argv: list[str] | None = None) -> Command:
    """Reads the command line (`sys.argv` when None); argparse prints its own complaints and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Teach a trained SynapseModel from examples, supervised or by preference.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the run (runs/finetune)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on from the last checkpoint in --out")
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace the run that --out holds")
    hints = typing.get_type_hints(FinetuneConfig)
    for field in dataclasses.fields(FinetuneConfig):
        hint, several = hints[field.name], field.name.startswith("lora_")
        kind: Any = _path if field.name in PATHS else hint if hint in (int, float) else str
        more: dict[str, Any] = {"nargs": "+"} if several else {}
        shown = field.default not in (dataclasses.MISSING, None, ())
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            metavar="NAME" if several else "FILE" if field.name in PATHS else kind.__name__.upper(),
            help=HELP[field.name] + (f" ({field.default})" if shown else ""),
            **more,
        )
    values = vars(parser.parse_args(argv))
    out, resume, overwrite = (values.pop(name) for name in ("out", "resume", "overwrite"))
    if resume and overwrite:
        parser.error("--resume goes on with a run, --overwrite throws it away: give one of them")
    if not resume and (missing := [f"--{name}" for name in ("base", "data") if name not in values]):
        parser.error(f"give {' and '.join(missing)}, or --resume with the --out of a run")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Command(given=given, out=out, resume=resume, overwrite=overwrite)


def from_dict(values: dict[str, Any]) -> FinetuneConfig:
    """The configuration that `dataclasses.asdict` gave, through JSON.

    Raises:
        ConfigError: an unknown key, with the nearest known one.
    """
    known = [field.name for field in dataclasses.fields(FinetuneConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else ""
            raise ConfigError(explain("fine-tuning configuration", "known keys", repr(key), remedy))
    fields: dict[str, Any] = {}
    for name, item in values.items():
        fields[name] = tuple(item) if isinstance(item, list) else item
    return FinetuneConfig(**fields)


def resumed(stored: dict[str, Any], given: dict[str, Any]) -> FinetuneConfig:
    """The stored run with what the user may change on the way.

    Raises:
        ConfigError: another value for anything else.
    """
    config = from_dict(stored)
    base = Path(config.base)
    if STEP_FOLDER.fullmatch(base.name) and given.get("base") == str(base.parent):  # the run it was the newest of
        given = {**given, "base": config.base}
    for name, value in given.items():
        if name not in RESUMABLE and value != getattr(config, name):
            remedy = "leave it away, or start a new run in another --out"
            flag = f"--{name.replace('_', '-')} with --resume"
            raise ConfigError(explain(flag, getattr(config, name), value, remedy))
    return dataclasses.replace(config, **given)


def _path(text: str) -> str:
    return str(Path(text).expanduser().resolve())
