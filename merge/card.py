"""The model card of a merge: what was merged, how, from which bytes, with which versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata

import torch

from merge.recipe import MERGEKIT, Recipe

_PACKAGES = ("synapse-arch", "torch", "safetensors")


def model_card(
    recipe: Recipe,
    settings: Mapping[str, object],
    inputs: Sequence[tuple[str, str, str | None]],
    distances: Mapping[str, float],
    notes: Sequence[str],
) -> str:
    """README.md of the result.

    Args:
        recipe: what was computed.
        settings: every setting of the method with the value that was used.
        inputs: role, path as given, and SHA-256 or None where it was not asked for.
        distances: ‖θᵢ − θ₀‖ / ‖θ₀‖ by the model's path.
        notes: what was remarked on the way.
    """
    front = ["---", "tags:", "- merge", f"- {recipe.method.replace(':', '-')}", "---", ""]
    about = f"{len(recipe.models)} models merged by `{recipe.method}` with synapse_arch."
    rows = ["| | path | SHA-256 of the weights | distance from the base |", "|---|---|---|---|"]
    for role, path, digest in inputs:
        distance = f"{distances[path]:.4g}" if role != "base" and path in distances else ""
        rows.append(f"| {role} | `{path}` | {f'`{digest}`' if digest else 'not computed'} | {distance} |")
    used = [f"| {'lambda' if name == 'lam' else name} | `{value}` |" for name, value in settings.items()]
    used = ["## Settings", "", "| setting | value |", "|---|---|", *used, ""] if used else []
    remarks = ["## Remarks", "", *(f"- {note}" for note in notes), ""] if notes else []
    recipe_text = json.dumps(recipe.to_dict(), indent=2)
    return "\n".join([
        *front, "# Merged model", "", about, "", *rows, "",
        "Of a sharded model the SHA-256 is that of its files' SHA-256 in order of their names. The distance is",
        "‖θ − θ₀‖ / ‖θ₀‖, estimated from up to 4096 numbers of each merged tensor.", "",
        *used, *remarks, "## Recipe", "", "```json", recipe_text, "```", "",
        "## Versions", "", ", ".join(f"{name} {version}" for name, version in versions(recipe).items()), "",
    ])  # fmt: skip


def versions(recipe: Recipe) -> dict[str, str]:
    """Of what took part."""
    names = [*_PACKAGES, *(["mergekit"] if recipe.method.startswith(MERGEKIT) else [])]
    found = {}
    for name in names:
        try:
            found[name] = torch.__version__ if name == "torch" else metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
