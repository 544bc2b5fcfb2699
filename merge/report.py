"""What a merge has to work with: how far each model went from the base, where, and whether the models agree.

M models, n numbers of a tensor. A model's task vector is its weights less the base's (Ilharco et al. 2023). Its support
after trimming is where its largest share `density` by magnitude lies (Yadav et al. 2023, §3).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge.io import Source, short_name
from merge.recipe import Recipe
from merge.run import open_inputs, used_settings
from merge.vectors import TaskVectors, per_model, trimming
from synapse_arch.errors import BackendUnavailable, ConfigError, explain

ROWS_SHOWN = 40
"""Modules in the picture; of more, those of all layers are joined."""
TEXT, PICTURE = "report.md", "report.png"
DENSITY = 0.2
"""Of supports where the method knows none."""


@dataclass(frozen=True)
class Sums:
    """What was counted over some tensors; sums over others can be added.

    Attributes:
        numbers: n.
        base: Σ θ².
        vectors: (M,) Σ τ² of each task vector.
        trimmed: (M,) the same over its support.
        kept: (M,) size of each support.
        touched: numbers in at least one support.
        shared: numbers in at least two.
        opposed: numbers where two supports have opposite signs.
    """

    numbers: int
    base: float
    vectors: Tensor
    trimmed: Tensor
    kept: Tensor
    touched: int
    shared: int
    opposed: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    @property
    def relative_norm(self) -> list[float]:
        """‖τ‖ / ‖θ‖ of each model; NaN where the base is zero."""
        return [float(value) ** 0.5 / self.base**0.5 if self.base else float("nan") for value in self.vectors]

    @property
    def energy_kept(self) -> list[float]:
        """Share of ‖τ‖² that lies in the support, of each model; NaN where a model did not move."""
        return (self.trimmed / self.vectors).tolist()

    @property
    def overlap(self) -> float:
        """Of the numbers that any support holds, the share that two or more hold; NaN where none does."""
        return self.shared / self.touched if self.touched else float("nan")

    @property
    def conflict(self) -> float:
        """Of the numbers that two or more supports hold, the share with opposite signs; NaN where there are none."""
        return self.opposed / self.shared if self.shared else float("nan")


def _values(sums: Sums) -> list[Any]:
    return [getattr(sums, name) for name in Sums.__dataclass_fields__]


@dataclass(frozen=True)
class Account:
    """Task vectors, counted.

    Attributes:
        models: the models' names, M of them.
        density: share of each tensor that a model's support holds, one a model.
        modules: sums of each module, by name and number of the layer.
        gram: (M, M) float64, inner products of the task vectors.
    """

    models: tuple[str, ...]
    density: tuple[float, ...]
    modules: dict[str, Sums]
    gram: Tensor

    @property
    def total(self) -> Sums:
        """Over all modules."""
        first, *rest = self.modules.values()
        return sum(rest, first)

    @property
    def cosines(self) -> Tensor:
        """(M, M) cosines between task vectors; NaN beside one that is zero."""
        norms = self.gram.diagonal().sqrt()
        return self.gram / (norms[:, None] * norms)

    def joined(self) -> Account:
        """The same with the modules of all layers joined: "layers.*.experts"."""
        modules: dict[str, Sums] = {}
        for name, sums in self.modules.items():
            key = ".".join("*" if part.isdecimal() else part for part in name.split("."))
            modules[key] = modules[key] + sums if key in modules else sums
        return replace(self, modules=modules)


def module_of(name: str) -> str:
    """The module a tensor is counted under: its layer and the part of the layer, the part's norm included.

    >>> module_of("layers.3.thalamus.router.weight"), module_of("layers.3.thalamus_norm.weight")
    ('layers.3.thalamus', 'layers.3.thalamus')
    >>> module_of("model.layers.10.self_attn.q_proj.weight"), module_of("lm_head.weight")
    ('model.layers.10.self_attn', 'lm_head')
    """
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    kept = parts[: number + 2] if number is not None else parts[:-1] or parts
    return ".".join(kept).removesuffix("_norm")


def account(
    base: Source, models: Mapping[str, Source], density: float | Sequence[float], *, bar: Any = None
) -> Account:
    """Counts task vectors tensor by tensor, holding one tensor of each model at a time.

    Args:
        base: the common ancestor.
        models: by name, at least one.
        density: of the supports, one for all models or one each; every tensor is trimmed to it by itself.
        bar: a progress bar; it is advanced by one a tensor.
    """
    densities = per_model("density", density, len(models))
    modules: dict[str, Sums] = {}
    gram = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name in base.shapes:
        weights = base.tensor(name)
        if weights.is_floating_point() and weights.numel():
            vectors = TaskVectors(weights, [model.given(name, weights) for model in models.values()])
            trim = trimming(vectors, densities)
            for at in vectors.blocks():
                moved = torch.stack([vectors.delta(index, at) for index in range(vectors.models)])
                trimmed = moved.clone()
                for index in range(vectors.models):
                    trim(index, at, trimmed[index])
                sums, module = count(vectors.base(at), moved, trimmed), module_of(name)
                modules[module] = modules[module] + sums if module in modules else sums
                gram += moved.double() @ moved.double().T
        if bar is not None:
            bar.update(1)
    ordered = {module: modules[module] for module in sorted(modules, key=_place)}
    return Account(tuple(models), densities, ordered, gram)


def _place(module: str) -> list[tuple[int, str]]:
    """Sorts layers by their numbers, and what is in none by its name."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]


def count(base: Tensor, vectors: Tensor, trimmed: Tensor) -> Sums:
    """The sums over one tensor.

    Args:
        base: (n,).
        vectors: (M, n) the task vectors.
        trimmed: (M, n) the same, zero outside their supports.
    """
    signs = torch.sign(trimmed)
    holders = signs.abs().sum(0)
    opposed = signs.sum(0).abs() < holders
    return Sums(
        numbers=base.numel(),
        base=float(_squares(base)),
        vectors=_squares(vectors),
        trimmed=_squares(trimmed),
        kept=signs.abs().sum(-1, dtype=torch.float64),
        touched=int((holders > 0).sum()),
        shared=int((holders > 1).sum()),
        opposed=int(opposed.sum()),
    )


def _squares(x: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()
    return squares


def check_reportable(recipe: Recipe) -> None:
    """Refuses before anything is computed what cannot be reported on.

    Raises:
        ConfigError: the recipe has no base. BackendUnavailable: matplotlib is missing.
    """
    if recipe.base is None:
        raise ConfigError(explain("--report", "a base, from which task vectors start", "none", "give it with --base"))
    if importlib.util.find_spec("matplotlib") is None:
        remedy = "pip install 'synapse-arch[merge]'"
        raise BackendUnavailable(explain("--report", "matplotlib", "it is not installed", remedy))


def write_report(recipe: Recipe, folder: Path, *, progress: bool = True) -> None:
    """Writes report.md and report.png about the models of a recipe; what a folder holds besides is left alone.

    Supports are those of the recipe's density, or of `DENSITY`; overrides and trimming as a whole are not followed.

    Args:
        recipe: names the base and the models.
        folder: made where missing.
        progress: shows a bar with the time left.

    Raises:
        ConfigError: the recipe has no base. BackendUnavailable: matplotlib is missing.
        CheckpointError, ShapeError: the models cannot be read or do not fit each other.
    """
    from merge.picture import draw

    check_reportable(recipe)
    inputs = open_inputs(recipe)
    named = {short_name(path, recipe.models): model for path, model in zip(recipe.models, inputs.models, strict=True)}
    density = used_settings(recipe).get("density", DENSITY)
    if progress:
        from tqdm import tqdm

        with tqdm(total=len(inputs.base.shapes), desc="report", unit="tensor", leave=False) as bar:
            found = account(inputs.base, named, density, bar=bar)
    else:
        found = account(inputs.base, named, density)
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder / PICTURE)
    (folder / TEXT).write_text(to_markdown(found, PICTURE), encoding="utf-8")


def to_markdown(found: Account, picture: str) -> str:
    """The account as a text with tables.

    Args:
        found: what was counted.
        picture: file name of the picture, next to the text.
    """
    names = found.models
    rows = [("all", found.total), *found.modules.items()]
    norms = [[module, f"{sums.numbers:,}", *map(_share, sums.relative_norm)] for module, sums in rows]
    agreement = [
        [module, *map(_share, sums.energy_kept), _share(sums.overlap), _share(sums.conflict)] for module, sums in rows
    ]
    cosines = [
        [name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, found.cosines.tolist(), strict=True)
    ]
    held = zip(names, found.density, found.total.kept.tolist(), strict=True)
    kept = ", ".join(f"{name} {_share(d)} ({_share(n / found.total.numbers)} of all numbers)" for name, d, n in held)
    return "\n".join(
        [
            "# What was merged",
            "",
            "Task vectors are weights less the base's. A support is the largest share of each tensor by magnitude:",
            f"{kept}.",
            "",
            f"![norms, agreement and cosines of the task vectors]({picture})",
            "",
            "## How far each model went: ‖τ‖ / ‖θ‖",
            "",
            _table(["module", "numbers", *names], norms),
            "",
            "## What trimming keeps, and whether the models agree",
            "",
            "Of each model the share of ‖τ‖² inside its support; of the numbers in any support the share in two or",
            "more (overlap); of those the share with opposite signs (conflict).",
            "",
            _table(["module", *(f"{name} kept" for name in names), "overlap", "conflict"], agreement),
            "",
            "## Cosines between task vectors",
            "",
            _table(["", *names], cosines),
            "",
        ]
    )


def _share(value: float) -> str:
    return "–" if value != value else f"{100 * value:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
