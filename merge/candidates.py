"""What a search tries: every combination of the given settings, or those that Optuna chooses between their bounds."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge.methods import METHODS
from merge.recipe import Recipe
from synapse_arch.errors import BackendUnavailable, ConfigError, explain

Attempt = Callable[[Mapping[str, Any]], float]
"""Tries a candidate and says how good it is; less is better."""
LAMBDAS = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0)
DENSITIES = (0.1, 0.2, 0.5, 1.0)
EPSILON = 0.1
"""Della's own."""


def grid(
    methods: Sequence[str], lambdas: Sequence[float], densities: Sequence[float], *, epsilon: float = EPSILON
) -> list[dict[str, Any]]:
    """Every combination of the settings that each method knows; densities that della's epsilon leaves no room are not.

    >>> grid(["task_arithmetic"], [0.5, 1.0], [0.2])
    [{'method': 'task_arithmetic', 'lambda': 0.5}, {'method': 'task_arithmetic', 'lambda': 1.0}]
    """
    found, half = [], epsilon / 2
    for method in methods:
        uses = METHODS[method].uses
        axes: dict[str, Sequence[float | None]] = {
            "lambda": lambdas if "lam" in uses else (None,),
            "density": densities if "density" in uses else (None,),
        }
        for values in itertools.product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            if method == "della" and not half < (settings["density"] or 0.0) <= 1 - half:
                continue
            found.append({"method": method} | {name: value for name, value in settings.items() if value is not None})
    return found


def epsilon_of(recipe: Recipe) -> float:
    """What della needs, half of it on either side of a density."""
    return EPSILON if recipe.epsilon is None else recipe.epsilon


def run_grid(attempt: Attempt, candidates: Sequence[Mapping[str, Any]]) -> None:
    """Tries every candidate, with a bar."""
    from tqdm import tqdm

    with tqdm(candidates, desc="search", unit="trial", leave=False) as bar:
        for candidate in bar:
            attempt(candidate)


def run_optuna(
    attempt: Attempt,
    methods: Sequence[str],
    trials: int,
    lambdas: Sequence[float],
    densities: Sequence[float],
    *,
    epsilon: float,
    seed: int,
) -> None:
    """Lets Optuna's TPE sampler choose, within the given bounds; the same seed and records choose the same.

    Raises:
        BackendUnavailable: optuna is missing. ConfigError: no density is left for della.
    """
    try:
        import optuna
    except ImportError as cause:
        remedy = "pip install 'synapse-arch[merge]'"
        raise BackendUnavailable(explain("--optuna", "optuna", "it is not installed", remedy)) from cause
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    half = epsilon / 2  # what della needs on either side of a density

    def objective(trial: Any) -> float:
        method = trial.suggest_categorical("method", list(methods))
        uses = METHODS[method].uses
        candidate: dict[str, Any] = {"method": method}
        if "lam" in uses:
            low, high = min(lambdas), max(lambdas)
            candidate["lambda"] = round(trial.suggest_float("lambda", low, high, log=low > 0), 3)
        if "density" in uses:
            low, high = min(densities), max(densities)
            if method == "della":
                low, high = max(low, half + 0.01), min(high, 1 - half)
            if low > high:
                room = f"some from {half + 0.01:g} to {1 - half:g}"
                raise ConfigError(explain("--densities with della", room, list(densities), "widen them"))
            candidate["density"] = round(trial.suggest_float(f"density of {method}", low, high), 3)
        return attempt(candidate)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials, show_progress_bar=sys.stderr.isatty())
