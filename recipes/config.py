"""What a training run is: `RunConfig`, its defaults, and the files it is read from."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.optim import Schedule
from recipes.tokenizer import BYTES, ByteTokenizer
from synapse_arch import SynapseConfig
from synapse_arch.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, and how often it looks up from it.

    Attributes:
        preset: of `SynapseConfig`, or "auto" for one that suits the machine and the text; its vocabulary becomes the
            tokenizer's.
        overrides: "experts.n_experts=4" and the like, on top of the preset; values are JSON, or else strings.
        data: text file, .jsonl, .parquet, or a folder of them; None is the built-in corpus.
        field: which field of a JSON line or column of a table is the text.
        tokenizer: "bytes", or the file of a byte-level BPE from `recipes.tokenizer`.
        carry: windows follow each other and the state goes from one to the next, without its history (truncated
            backpropagation through time); else windows are drawn at random.
        minutes: budget of training in wall time, checkpoints and looks at held-out text included.
        steps: budget in optimizer steps, instead of `minutes`; then the whole run can be repeated bit by bit.
        batch_size: windows a step, over all processes together.
        accumulate: parts into which each process's windows are cut, one after the other, to save memory; the step is
            the same but for the balance loss, which is a part's own.
        length: tokens in a window.
        shard: weights, gradients and AdamW's averages are spread over the processes, each layer whole only while it
            computes (FSDP2); each process writes its part of a checkpoint.
        compile: layers are compiled by torch.compile for training; equal up to rounding.
        recompute: layers are computed a second time in the backward pass instead of being remembered; the same bits.
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
        keep: how many checkpoints are kept, the newest.
        keep_best: a checkpoint is also written and kept where a look at held-out text was the best so far.
        trackers: where figures go besides the log: "tensorboard", "trackio".
        threads: of a process on a CPU; 0 shares the cores among the processes.
    """

    preset: str = "tiny"
    overrides: tuple[str, ...] = ()
    data: str | None = None
    field: str = "text"
    tokenizer: str = BYTES
    carry: bool = False
    minutes: float = 9.5
    steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    length: int = 256
    shard: bool = False
    compile: bool = False
    recompute: bool = False
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
    keep: int = 1
    keep_best: bool = False
    trackers: tuple[str, ...] = ()
    threads: int = 0

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
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
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(_unknown("trackers", name, TRACKERS))
        if self.tokenizer == "":
            raise ConfigError(explain("tokenizer", f'"{BYTES}" or a file', "an empty name"))
        self.learning_rate()

    def learning_rate(self) -> Schedule:
        """The schedule these values describe."""
        return Schedule(peak=self.lr, final=self.final_lr, warmup=self.warmup, shape=self.schedule)

    def model_config(self, vocab_size: int = ByteTokenizer.vocab_size) -> SynapseConfig:
        """The preset with the overrides applied.

        Args:
            vocab_size: the tokenizer's.

        Raises:
            ConfigError: an unknown preset or key, a value that does not fit, or no "key=value".
        """
        changes = dict(_change(override) for override in self.overrides)
        preset = "tiny" if self.preset == AUTO else self.preset  # where overrides name every field
        config = SynapseConfig.preset(preset, **{"vocab_size": vocab_size, **changes})
        if config.vocab_size != vocab_size:
            remedy = "leave vocab_size to the tokenizer"
            raise ConfigError(explain("vocab_size", f"{vocab_size}, the tokenizer's", config.vocab_size, remedy))
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
        hints = typing.get_type_hints(cls)
        for key in values:
            if key not in hints:
                raise ConfigError(_unknown("run configuration", key, hints))
        return cls(**{name: _typed(name, value, hints[name]) for name, value in values.items()})


LOWEST = {"steps": 1, "batch_size": 1, "accumulate": 1, "length": 1, "threads": 0, "seed": 0, "keep": 1}
TRACKERS = ("tensorboard", "trackio")
AUTO = "auto"
"""The preset that `recipes.sizing` fills in once the text has been read."""
MODEL = "model"
"""The key of a configuration file that holds changes to the preset, nested as in `SynapseConfig.to_dict`."""


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file, by the names of `RunConfig`'s fields; what is in `model` becomes overrides.

    Raises:
        ConfigError: missing, unreadable, of another format, or with an unknown key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as error:
        remedy = "give a .yaml or .json file of settings, as --print-config shows them"
        raise ConfigError(explain(f"--config {path}", "a readable file", _one_line(error), remedy)) from error
    if not isinstance(values, dict):
        raise ConfigError(explain(f"--config {path}", "a mapping of settings", type(values).__name__))
    known = [field.name for field in dataclasses.fields(RunConfig)] + [MODEL]
    for key in values:
        if key not in known:
            raise ConfigError(_unknown(f"--config {path}", str(key), known))
    given = values.get("overrides", [])
    if not isinstance(given, list):
        raise ConfigError(explain(f"--config {path}: overrides", "a list of KEY=VALUE", repr(given)))
    if MODEL in values:
        model = values.pop(MODEL)
        if not isinstance(model, Mapping):
            raise ConfigError(explain(f"--config {path}: {MODEL}", "a mapping of fields", type(model).__name__))
        values["overrides"] = [*given, *_flatten(model)]
    return values


def show_config(config: RunConfig, model: SynapseConfig) -> str:
    """Every setting as JSON, the whole model included; `read_config` takes it back."""
    values = {name: value for name, value in config.to_dict().items() if name != "overrides"}
    return json.dumps({**values, MODEL: model.to_dict()}, indent=2)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Nested fields as overrides: {"experts": {"n_experts": 4}} gives "experts.n_experts=4"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={json.dumps(value)}"


def _yaml(text: str) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field's type: whole numbers may stand for others, "1e-3" too (YAML reads it as text)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is kind:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise ConfigError(explain(name, wanted.get(kind, "a list of texts"), repr(value)))


def _unknown(what: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return explain(what, "known keys", repr(key), f"did you mean {near[0]}?" if near else "")


def _change(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(explain("--set", "KEY=VALUE", repr(override), "as in --set experts.n_experts=4"))
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, text
