"""What a merge is: `Recipe`, from YAML, JSON or the command line, and what it does to each tensor."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from merge.methods import METHODS
from merge.ties import ELECTIONS, NORMALIZATIONS
from synapse_arch.errors import BackendUnavailable, ConfigError, explain

MERGEKIT = "mergekit:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_CHOICES: dict[str, tuple[str, ...]] = {
    "election": ELECTIONS,
    "normalize": NORMALIZATIONS,
    "trim": ("tensor", "global"),
    "align": ("weights", "activations"),
    "dtype": tuple(DTYPES),
}
_LARGEST = torch.finfo(torch.float32).max
_RANGES: dict[str, tuple[str, Any]] = {
    "density": ("above 0, up to 1", lambda value: 0 < value <= 1),
    "weights": ("finite numbers", lambda value: abs(value) <= _LARGEST),
    "lam": ("a finite number", lambda value: abs(value) <= _LARGEST),
    "epsilon": ("0 up to, not including, 1", lambda value: 0 <= value < 1),
    "gamma": ("0 up to, not including, 1", lambda value: 0 <= value < 1),
    "seed": ("an integer, 0 or more", lambda value: isinstance(value, int) and value >= 0),
}
SETTINGS = ("density", "weights", "lam", "election", "normalize", "trim", "epsilon", "gamma", "seed")
"""The fields of a recipe that a method may know or not."""
_MERGEKIT_USES = frozenset({"density", "weights", "lam"})


@dataclass(frozen=True, kw_only=True)
class Override:
    """What is done otherwise with tensors whose names match a pattern; where several match, the last counts.

    Attributes:
        pattern: of names, as the shell's: * any text, ? any character, [ab] one of them.
        density: instead of the recipe's; one number, or one a model.
        weights: instead of the recipe's; one number, or one a model.
        skip: the base's tensor stays.
        copy: place of the model, from 0, whose tensor is taken as it is.
    """

    pattern: str
    density: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    skip: bool = False
    copy: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, f"override {self.pattern!r}: ")
        if not isinstance(self.pattern, str) or not isinstance(self.skip, bool):
            raise ConfigError(
                explain("override", "a pattern, and true or false for skip", f"{self.pattern}, {self.skip}")
            )
        whole = [self.skip, self.copy is not None, self.density is not None or self.weights is not None]
        if sum(whole) != 1:
            expected = "skip, or copy, or density and weights"
            raise ConfigError(explain(f"override {self.pattern!r}", expected, self.settings() or "nothing"))

    def settings(self) -> dict[str, Any]:
        """What it sets."""
        values = {key: getattr(self, key) for key in _fields(Override) if key != "pattern"}
        return {key: value for key, value in values.items() if value is not None and value is not False}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a merge computes. What a method does not know may not be set.

    Attributes:
        models: SynapseModel or Hugging Face folders, .safetensors files, or peft adapters on the base.
        base: what the models were trained from; slerp and linear do without, the first model then stands in.
        method: a key of `METHODS`, or mergekit:NAME.
        density: share of each task vector that is kept; one number, or one a model.
        weights: of the models; one number, or one a model.
        lam: λ, "lambda" in files.
        election: "mass" or "count".
        normalize: "count" or "weights".
        trim: "tensor", each tensor to its density, or "global", each model as a whole (Yadav et al. 2023).
        epsilon: how far DELLA's probabilities spread.
        gamma: share of outliers that breadcrumbs leaves out.
        seed: of random drops.
        align: match experts before merging, by "weights" or by "activations".
        calibration: text file for "activations".
        dtype: of floating tensors in the result; None keeps the base's.
        overrides: for tensors by name.
        parameters: of a method of mergekit's, by its own names.

    None for a setting is the method's own default.
    """

    models: tuple[str, ...]
    base: str | None = None
    method: str = "ties"
    density: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    lam: float | None = None
    election: str | None = None
    normalize: str | None = None
    trim: str | None = None
    epsilon: float | None = None
    gamma: float | None = None
    seed: int | None = None
    align: str | None = None
    calibration: str | None = None
    dtype: str | None = None
    overrides: tuple[Override, ...] = ()
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = (*self.models, *(one for one in (self.base, self.method, self.calibration) if one is not None))
        if not self.models or not all(isinstance(one, str) for one in texts):
            raise ConfigError(explain("models, base, method, calibration", "one model or more, and texts", list(texts)))
        if not isinstance(self.parameters, Mapping):
            raise ConfigError(explain("parameters", "a mapping of names to values", self.parameters))
        _check_numbers(self, "")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ConfigError(explain(name, " or ".join(choices), repr(value)))
        self._check_method()
        for name in ("density", "weights"):
            for holder in (self, *self.overrides):
                values = getattr(holder, name)
                if values is not None and len(values) not in (1, len(self.models)):
                    expected = f"1 value or {len(self.models)}, one a model"
                    raise ConfigError(explain(name, expected, f"{len(values)}: {list(values)}"))
        for override in self.overrides:
            if override.copy is not None and override.copy not in range(len(self.models)):
                expected = f"a model's place, 0 to {len(self.models) - 1}"
                raise ConfigError(explain(f"override {override.pattern!r}: copy", expected, override.copy))
        if (self.align == "activations") != (self.calibration is not None):
            raise ConfigError(explain("calibration", "a text with align=activations and only then", self.calibration))

    def _check_method(self) -> None:
        """Refuses what the method would ignore."""
        known = [*METHODS, f"{MERGEKIT}NAME"]
        if not (self.method in METHODS or (self.mergekit and self.mergekit.strip())):
            near = difflib.get_close_matches(self.method, known, n=1)
            raise ConfigError(
                explain("method", ", ".join(known), repr(self.method), f"did you mean {near[0]}?" if near else "")
            )
        for name in (*SETTINGS, "parameters"):
            given = getattr(self, name) not in (None, {})
            if given and name not in self.uses:
                using = [method for method, entry in METHODS.items() if name in entry.uses]
                remedy = f"leave it away, or take one of {', '.join(using) or 'mergekit:NAME'}"
                raise ConfigError(
                    explain(f"{_key(name)} with method {self.method}", "none", getattr(self, name), remedy)
                )
        for override in self.overrides:
            ignored = sorted(override.settings().keys() & {"density", "weights"} - self.uses)
            if ignored or (override.density and self.trim == "global"):
                expected = f"settings that {self.method} uses on single tensors"
                raise ConfigError(explain(f"override {override.pattern!r}", expected, override.settings()))
        if self.base is None and self.mergekit is None and METHODS[self.method].base:
            raise ConfigError(explain("base", f"a checkpoint, as {self.method} is about changes to it", "none"))
        if self.method == "slerp" and len(self.models) != 2:
            raise ConfigError(explain("models", "2 for slerp", len(self.models), "merge them pair by pair"))

    @property
    def mergekit(self) -> str | None:
        """The name of the method of mergekit's, if it is one."""
        return self.method.removeprefix(MERGEKIT) if self.method.startswith(MERGEKIT) else None

    @property
    def uses(self) -> frozenset[str]:
        """The settings that the method knows."""
        return _MERGEKIT_USES | {"parameters"} if self.mergekit else METHODS[self.method].uses

    def settings(self) -> dict[str, Any]:
        """The settings that are not left to the method."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}

    def override(self, name: str) -> Override | None:
        """The override of a tensor."""
        return next((one for one in reversed(self.overrides) if fnmatchcase(name, one.pattern)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those that are set, as a YAML or JSON file holds them."""
        values = {key: getattr(self, key) for key in _fields(Recipe)}
        values["overrides"] = [{"pattern": one.pattern, **one.settings()} for one in self.overrides]
        values["parameters"] = dict(self.parameters)
        plain = {_key(key): value for key, value in values.items() if value not in (None, [], {})}
        return dict(json.loads(json.dumps(plain)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; single numbers may stand for lists of one.

        Raises:
            ConfigError: an unknown key, or a value of the wrong kind or out of range.
        """
        known = _known("recipe", Recipe, values)
        for name in ("overrides", "parameters"):
            if known.get(name) is None:  # a key with nothing behind it
                known.pop(name, None)
        overrides = known.pop("overrides", ())
        if not isinstance(overrides, list | tuple) or not all(isinstance(one, Mapping) for one in overrides):
            raise ConfigError(explain("overrides", "a list of mappings", overrides))
        built = tuple(_build(Override, _known("override", Override, one)) for one in overrides)
        recipe: Recipe = _build(cls, {**known, "overrides": built})
        return recipe

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe from a .yaml, .yml or .json file; paths in it are as from the current folder.

        Raises:
            ConfigError: the file cannot be read, or is no recipe.
            BackendUnavailable: it is YAML and pyyaml is not installed.
        """
        return cls.from_dict(read_mapping(Path(path)))


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds, which must be a mapping.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
        BackendUnavailable: it is YAML and pyyaml is not installed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            try:
                content = yaml.safe_load(text)
            except yaml.YAMLError as cause:
                raise ValueError(" ".join(str(cause).split())) from cause
    except ImportError as cause:
        remedy = "pip install 'synapse-arch[merge]', or write it as JSON"
        raise BackendUnavailable(explain(str(path), "pyyaml", "it is not installed", remedy)) from cause
    except (OSError, ValueError) as cause:
        raise ConfigError(explain(str(path), "a readable recipe", f"{type(cause).__name__}: {cause}")) from cause
    if not isinstance(content, dict):
        raise ConfigError(explain(str(path), "a mapping, as in 'base: PATH'", type(content).__name__))
    return content


def _key(name: str) -> str:
    return "lambda" if name == "lam" else name


def _fields(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _known(what: str, kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names of the fields, numbers and names as tuples where the field is one."""
    names = {_key(name): name for name in _fields(kind)}
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(explain(what, "known keys", repr(key), f"did you mean {near[0]}?" if near else ""))
    result = {names[key]: value for key, value in values.items()}
    for name in ("density", "weights", "models"):
        if isinstance(value := result.get(name), int | float | str):
            result[name] = (value,)
        elif isinstance(value, list):
            result[name] = tuple(value)
    return result


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except TypeError as cause:
        raise ConfigError(explain(kind.__name__.lower(), "values of the right kinds", cause)) from cause


def _check_numbers(holder: Any, where: str) -> None:
    for name, (expected, fits) in _RANGES.items():
        value = getattr(holder, name, None)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int | float) or not fits(one):
                raise ConfigError(explain(f"{where}{_key(name)}", expected, repr(one)))
