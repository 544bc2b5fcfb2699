"""The merge itself: inputs opened and checked, one tensor after the other merged and written, all or nothing."""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge.adapters import Adapter, is_adapter
from merge.align import align, by_activations, check_pools
from merge.card import model_card
from merge.checks import Lineage, check_finite, check_same_tensors, check_tokenizers, config_notes, json_object
from merge.io import Checkpoint, Reordered, Source, sha256
from merge.kit import merge_with_mergekit
from merge.methods import METHODS
from merge.recipe import DTYPES, SETTINGS, Recipe
from merge.trim import global_cuts
from merge.vectors import Delta, Given, Trim
from merge.writer import Entry, check_room, check_target, copy_companions, whole_folder, write_weights
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import ConfigError, ShapeError, explain
from synapse_arch.model._files import write_text
from synapse_arch.model.checkpoint import CONFIG, SCHEMA, never_narrowed

HF_TYPE, HF_PREFIX = "synapse", "model."
"""What synapse_arch.hf calls its models in config.json, and puts before the names of their tensors."""


class Inputs(NamedTuple):
    """What a recipe names, opened.

    Attributes:
        base: the recipe's base, or else the first model: its names, shapes, dtypes and configuration are the result's.
        models: in the recipe's order, experts in the base's order where the recipe says so.
    """

    base: Checkpoint
    models: tuple[Source, ...]


@dataclass(frozen=True)
class Step:
    """What happens to one tensor.

    Attributes:
        name, shape: of the tensor.
        dtype: in the result.
        action: "merge", "base" (the base's is kept), "equal" (no floats, or empty: copied, if all agree), or "copy".
        model: place of the model that is copied.
        settings: of the method, for this tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    model: int | None = None
    settings: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in (self.settings or {}).items())
        what = {
            "merge": f"merged{' with ' + settings if settings else ''}",
            "base": "the base's, kept",
            "equal": "copied, refused if the models differ",
            "copy": f"copied from model {self.model}",
        }[self.action]
        return f"{self.name}  {tuple(self.shape)}  {str(self.dtype).removeprefix('torch.')}  {what}"


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens the base and the models and checks that they can be merged; tensors are read only to align experts.

    Raises:
        CheckpointError: an input cannot be read, or is a pickle, or its token ids stand for another text.
        ShapeError: names or shapes differ.
        ConfigError: an adapter without a base.
    """
    base = Checkpoint(recipe.base if recipe.base is not None else _first_whole(recipe))
    models: list[Source] = [Adapter(path, base) if is_adapter(path) else Checkpoint(path) for path in recipe.models]
    for model in models:
        if recipe.align is not None:
            check_pools(base, model)
        check_same_tensors(base, model)
    check_tokenizers(base, tuple(models))
    if recipe.align is not None:
        models = [Reordered(model, align(base, model, _similarity(recipe, base, model))) for model in models]
    return Inputs(base, tuple(models))


def _similarity(recipe: Recipe, base: Checkpoint, model: Source) -> dict[str, Tensor] | None:
    """What experts are matched by: None for their weights, else their answers to the calibration text, as bytes."""
    if recipe.calibration is None:
        return None
    if not isinstance(model, Checkpoint):
        raise ConfigError(
            explain(f"align=activations of {model.label}", "whole models", "an adapter", "align by weights")
        )
    text = calibration_text(recipe.calibration)
    reference, other = (SynapseModel.from_pretrained(one.path) for one in (base, model))
    vocabulary, own = reference.config.vocab_size, (Path(base.path) / "tokenizer.json").is_file()
    if vocabulary != 256 or own or not text:
        got = f"{len(text)} bytes and a vocabulary of {vocabulary}{' with a tokenizer of its own' if own else ''}"
        raise ConfigError(explain("calibration", "some text, and models that read bytes", got, "align by weights"))
    return by_activations(reference, other, torch.tensor([list(text)]))


def calibration_text(path: str) -> bytes:
    """What experts are matched on by their answers.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as cause:
        raise ConfigError(explain("calibration", "a readable text", f"{type(cause).__name__}: {cause}")) from cause


def _first_whole(recipe: Recipe) -> str:
    if is_adapter(recipe.models[0]):
        raise ConfigError(explain("base", "the checkpoint that the adapters are for", "none"))
    return recipe.models[0]


def plan(recipe: Recipe, inputs: Inputs) -> tuple[Step, ...]:
    """What happens to each tensor, in the order in which they are written: wider dtypes first, then by name.

    Raises:
        ConfigError: a pattern of an override matches no tensor.
    """
    steps, wide = [], _not_narrowed(inputs.base) if recipe.dtype else frozenset()
    for name, shape in inputs.base.shapes.items():
        kept = inputs.base.dtypes[name]
        dtype = DTYPES[recipe.dtype] if recipe.dtype and kept.is_floating_point else kept
        if name in wide and kept.is_floating_point:
            dtype = torch.promote_types(kept, dtype)
        steps.append(_step(recipe, name, shape, dtype))
    unused = [one.pattern for one in recipe.overrides if all(recipe.override(step.name) is not one for step in steps)]
    if unused:
        remedy = "patterns match whole names, as in '*.experts.*'; the last one that matches counts"
        raise ConfigError(explain("overrides", "patterns that decide on a tensor at least", unused, remedy))
    return tuple(sorted(steps, key=lambda step: (-step.dtype.itemsize, step.name)))


def _not_narrowed(base: Checkpoint) -> frozenset[str]:
    """The tensors of a SynapseModel that loading it does not narrow either, as they are called in this folder."""
    config, prefix = base.metadata.get("config", "{}"), ""
    if base.metadata.get("schema") != SCHEMA:
        beside = json_object(base.path / CONFIG) or {}
        if beside.get("model_type") != HF_TYPE:
            return frozenset()
        config, prefix = json.dumps(beside.get("synapse") or {}), HF_PREFIX
    with torch.device("meta"):
        model = SynapseModel(SynapseConfig.from_dict(json.loads(config)))
    return frozenset(f"{prefix}{name}" for name in never_narrowed(model))


def _step(recipe: Recipe, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Step:
    override = recipe.override(name)
    if override is not None and override.skip:
        return Step(name, shape, dtype, "base")
    if override is not None and override.copy is not None:
        return Step(name, shape, dtype, "copy", override.copy)
    if not dtype.is_floating_point or not math.prod(shape):
        return Step(name, shape, dtype, "equal")
    return Step(name, shape, dtype, "merge", None, recipe.settings() | (override.settings() if override else {}))


def stream(
    recipe: Recipe, inputs: Inputs, *, lineage: Lineage | None = None, progress: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the result by name, in the order of `plan`; a merge in memory is `dict(stream(recipe, inputs))`.

    Args:
        recipe: what to compute.
        inputs: of the recipe.
        lineage: is shown every tensor that is merged, to judge whether the models come from the base.
        progress: shows a bar with the time left.

    Raises:
        ConfigError: an override decides on no tensor, or mergekit refuses its parameters.
        ShapeError: NaN or infinite numbers, named, in an input or the result; or integers that differ.
    """
    steps = plan(recipe, inputs)
    sizes = {step.name: math.prod(step.shape) * inputs.base.dtypes[step.name].itemsize for step in steps}
    trimmed = [step.name for step in steps if step.action == "merge" and math.prod(step.shape) > 1]
    trim, total = None, sum(sizes.values())
    as_a_whole = recipe.trim == "global" and bool(trimmed)
    if as_a_whole:
        total += len(inputs.models) * sum(sizes[name] for name in trimmed)
    with _bar(total, progress) as bar:
        if as_a_whole:
            density = used_settings(recipe)["density"]
            trim = Trim(global_cuts(inputs.base, inputs.models, trimmed, density, bar=bar))
        for step in steps:
            whole = trim if step.action == "merge" and math.prod(step.shape) > 1 else None
            yield step.name, _carry_out(recipe, inputs, step, whole, lineage)
            bar.update(sizes[step.name])


def _carry_out(recipe: Recipe, inputs: Inputs, step: Step, trim: Trim | None, lineage: Lineage | None) -> Tensor:
    """One tensor of the result."""
    name, base = step.name, inputs.base.tensor(step.name)
    check_finite(name, base, inputs.base.label)
    if step.action == "base":
        return _converted(base, step)
    if step.action == "copy":
        model = inputs.models[step.model or 0]
        tensor = model.tensor(name)
        check_finite(name, tensor, model.label)
        return _converted(tensor, step)
    given = [model.given(name, base) for model in inputs.models]
    if step.action == "equal":
        for model, one in zip(inputs.models, given, strict=True):
            if not isinstance(one, Tensor) or not torch.equal(one, base):
                remedy = "numbers that are no floats cannot be merged: override it with skip or copy"
                raise ShapeError(
                    explain(f"{model.label}: {name}", f"the {base.dtype} values of the base", "others", remedy)
                )
        return _converted(base, step)
    for model, one in zip(inputs.models, given, strict=True):
        if one is not base:
            check_finite(name, one.value if isinstance(one, Delta) else one, model.label)
    if lineage is not None:
        lineage.see(name, base, given)
    merged = _merged(recipe, step, base, given, trim)
    check_finite(name, merged, f"the result in {str(step.dtype).removeprefix('torch.')}")
    return merged


def _merged(recipe: Recipe, step: Step, base: Tensor, given: list[Given], trim: Trim | None) -> Tensor:
    settings = dict(step.settings or {})
    if recipe.mergekit is not None:
        return merge_with_mergekit(
            recipe.mergekit, base, given, name=step.name, settings=settings, parameters=recipe.parameters,
            with_base=recipe.base is not None, dtype=step.dtype,
        )  # fmt: skip
    method = METHODS[recipe.method]
    settings.pop("trim", None)
    if trim is not None:
        settings["trim"] = trim
    if "seed" in method.uses:
        settings["name"] = step.name
    return method.merge(base, given, dtype=step.dtype, **settings)


def _converted(tensor: Tensor, step: Step) -> Tensor:
    converted = tensor.to(step.dtype)
    check_finite(step.name, converted, f"the result in {str(step.dtype).removeprefix('torch.')}")
    return converted


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    """A progress bar in bytes of the base, with the time left; a silent one where tqdm is missing or not wanted."""
    if not progress:
        yield _Silent()
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="merging", unit="B", unit_scale=True, unit_divisor=1000, leave=False) as bar:
        yield bar


class _Silent:
    def update(self, count: int) -> None:
        """Shows nothing."""


def merge(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    trust_base: bool = False,
    hashes: bool = True,
    progress: bool = True,
    max_shard_bytes: int = 4 * 2**30,
) -> tuple[str, ...]:
    """Merges into a new model folder, which appears whole or not at all.

    Args:
        recipe: what to compute.
        out: the folder: weights, the base's configuration and tokenizer files, and a model card.
        overwrite: replaces a model folder that is there.
        trust_base: goes on where models share tensors that the base has otherwise.
        hashes: puts the SHA-256 of the inputs into the card; they are computed in a thread of their own.
        progress: shows a bar with the time left.
        max_shard_bytes: no shard of the weights is larger but for a single larger tensor.

    Returns:
        What the user should know, a line each.

    Raises:
        SynapseError: of the kind that says what is wrong; nothing is left at `out` that was not there.
    """
    inputs = open_inputs(recipe)
    roles = [
        *([("base", inputs.base)] if recipe.base is not None else []),
        *(("model", model) for model in inputs.models),
    ]
    check_target(out, [Path(source.label) for _, source in roles], overwrite=overwrite)
    entries = [
        Entry(step.name, step.dtype, step.shape, math.prod(step.shape) * step.dtype.itemsize)
        for step in plan(recipe, inputs)
    ]
    check_room(out, sum(entry.bytes for entry in entries))
    lineage = Lineage(tuple(model.label for model in inputs.models))
    stop = threading.Event()
    with whole_folder(out) as folder, ThreadPoolExecutor(1) as pool:
        digests = [pool.submit(sha256, source.files, stop) if hashes else None for _, source in roles]
        try:
            seeing = lineage if recipe.base is not None else None
            tensors = stream(recipe, inputs, lineage=seeing, progress=progress)
            write_weights(folder, entries, tensors, inputs.base.metadata, max_shard_bytes=max_shard_bytes)
            if not trust_base:
                lineage.check()
        except BaseException:
            stop.set()
            raise
        notes = (*config_notes(inputs.base, inputs.models), *(lineage.notes() if recipe.base is not None else ()))
        distances = lineage.distances if recipe.base is not None else {}
        copy_companions(inputs.base.path, folder, dtype=recipe.dtype)
        rows = [
            (role, source.label, digest.result() if digest else None)
            for (role, source), digest in zip(roles, digests, strict=True)
        ]
        write_text(folder / "README.md", model_card(recipe, used_settings(recipe), rows, distances, notes))
    return notes


def used_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting that the method knows with its value, the method's own defaults included."""
    if recipe.mergekit is not None:
        return recipe.settings() | dict(recipe.parameters)
    parameters = inspect.signature(METHODS[recipe.method].merge).parameters
    defaults = {name: parameters[name].default for name in SETTINGS if name in parameters and name != "trim"}
    return {
        name: value for name, value in (defaults | recipe.settings()).items() if name in METHODS[recipe.method].uses
    }
