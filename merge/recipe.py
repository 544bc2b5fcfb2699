"""What a merge is: `Recipe`, from YAML, JSON or the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Override:
    """What is done otherwise with the tensors whose names match a pattern; of several matches the last counts.

    Attributes:
        pattern: of names, as the shell's: * any text, ? any letter, [ab] one of them.
        density: instead of the recipe's, one for all models or one each.
        weights: instead of the recipe's.
        skip: the base's tensor is kept.
        copy: index of the model, from 0, whose tensor is taken as it is.
    """

    pattern: str
    density: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    skip: bool = False
    copy: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a merge computes.

    `dataclasses.replace(recipe, lam=0.5)` is another recipe; `Recipe.load(path)` reads YAML or JSON;
    `recipe.to_dict()` and `Recipe.from_dict()` are inverse to each other ("lambda" is the key of `lam`).
    """

    models: tuple[str, ...]
    base: str | None = None
    method: str = "ties"
    density: tuple[float, ...] = (0.2,)
    weights: tuple[float, ...] = (1.0,)
    lam: float = 1.0
    election: str = "mass"
    normalize: str = "count"
    trim: str = "tensor"
    epsilon: float = 0.1
    gamma: float = 0.01
    seed: int = 0
    align: str | None = None
    calibration: str | None = None
    dtype: str | None = None
    overrides: tuple[Override, ...] = ()
