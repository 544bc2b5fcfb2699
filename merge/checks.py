"""What is checked before and while models are merged: names, shapes, finite numbers, and a common origin."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge.io import Checkpoint, Source
from merge.vectors import Delta, Given
from synapse_arch.errors import CheckpointError, ShapeError, explain

_SAMPLE = 4096
_CONFIG_NOISE = {"_name_or_path", "library_version", "transformers_version", "torch_dtype", "dtype"}
FAR = 1.0
"""A model further from the base than this times the base's norm is remarked upon; unrelated ones are √2 apart."""


def check_same_tensors(base: Checkpoint, model: Source) -> None:
    """Refuses a model that has other tensors than the base.

    Raises:
        ShapeError: names or shapes differ, or floats meet integers; the first ten are listed.
    """
    ours, theirs = base.shapes, model.shapes
    missing, more = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    where = f"{model.label} against {base.label}"
    remedy = "only models of one architecture and vocabulary can be merged"
    if missing or more:
        got = f"{len(missing)} missing {missing[:10]}, {len(more)} more {more[:10]}"
        raise ShapeError(explain(where, f"the same {len(ours)} tensors", got, remedy))
    differing = [f"{name} {ours[name]} and {theirs[name]}" for name in sorted(ours) if ours[name] != theirs[name]]
    if differing:
        raise ShapeError(explain(where, "the same shapes", f"{len(differing)} others {differing[:10]}", remedy))
    kinds = [
        f"{name} {base.dtypes[name]} and {model.dtypes[name]}"
        for name in sorted(ours)
        if base.dtypes[name] != model.dtypes[name]
        and not (base.dtypes[name].is_floating_point and model.dtypes[name].is_floating_point)
    ]
    if kinds:
        raise ShapeError(
            explain(where, "floats where the base has floats", f"{len(kinds)} others {kinds[:10]}", remedy)
        )


def check_finite(name: str, tensor: Tensor, whose: str) -> None:
    """Refuses NaN and infinite numbers.

    Raises:
        ShapeError: with the tensor's name and whose it is.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor
    low, high = torch.aminmax(values)  # NaN anywhere makes both NaN
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        count = int((~values.isfinite()).sum())
        got = f"{count} of {tensor.numel()} NaN or infinite"
        raise ShapeError(explain(f"{whose}: {name}", "finite numbers", got, "this model is broken, leave it out"))


class Lineage:
    """Judges while tensors pass by whether the models were trained from the base.

    Two facts are looked at. Where two models agree bit by bit in some tensor that the base has otherwise, though they
    differ in others, neither changed that tensor: the checkpoint they come from is another. And how far a model lies
    from the base, ‖θᵢ − θ₀‖ / ‖θ₀‖, estimated from up to 4096 numbers of each tensor.

    Args:
        labels: of the models.
    """

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self._base, self._vectors = 0.0, [0.0] * len(labels)
        self._agreeing: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._differing: set[tuple[int, int]] = set()

    def see(self, name: str, base: Tensor, given: list[Given]) -> None:
        """Takes in one tensor and what the models give for it."""
        every = slice(None, None, max(1, base.numel() // _SAMPLE))
        here = base.reshape(-1)[every].float()
        samples = [(one.value if isinstance(one, Delta) else one).reshape(-1)[every].float() for one in given]
        self._base += float(here.square().sum())
        for index, (one, sample) in enumerate(zip(given, samples, strict=True)):
            vector = sample if isinstance(one, Delta) else sample - here
            self._vectors[index] += float(vector.square().sum())
        constant = bool((here == here[0]).all()) and all(bool((sample == sample[0]).all()) for sample in samples)
        for pair in () if constant else combinations(range(len(given)), 2):
            one, two = given[pair[0]], given[pair[1]]
            if isinstance(one, Delta) or isinstance(two, Delta) or one is base or two is base:
                continue
            if not torch.equal(samples[pair[0]], samples[pair[1]]) or not torch.equal(one, two):
                self._differing.add(pair)
            elif not torch.equal(one, base.to(one.dtype)):  # a narrower copy of the base's is the base's
                self._agreeing[pair].append(name)

    @property
    def distances(self) -> dict[str, float]:
        """‖θᵢ − θ₀‖ / ‖θ₀‖ of each model, estimated."""
        scale = self._base**0.5 or float("nan")
        return {label: vector**0.5 / scale for label, vector in zip(self.labels, self._vectors, strict=True)}

    def notes(self) -> list[str]:
        """What the user should know, a line each."""
        notes = []
        for label, distance in self.distances.items():
            if distance >= FAR:
                notes.append(
                    f"{label} lies {distance:.2f} times the base's norm away from the base (unrelated models: about "
                    "1.41): make sure that it was trained from it"
                )
            elif distance == 0:
                notes.append(f"{label} does not differ from the base in what was looked at")
        return notes

    def check(self) -> None:
        """Refuses models that must come from another base.

        Raises:
            CheckpointError: two models share tensors that the base has otherwise.
        """
        for pair, names in self._agreeing.items():
            if pair in self._differing:
                one, two = (self.labels[index] for index in pair)
                got = f"{one} and {two} agree bit by bit in {len(names)} tensors that it has otherwise: {names[:10]}"
                remedy = "give the base that both come from, or --trust-base if this one is meant"
                raise CheckpointError(explain("base", "the checkpoint that the models were trained from", got, remedy))


def check_tokenizers(base: Checkpoint, models: tuple[Source, ...]) -> None:
    """Refuses models whose token ids stand for different text; one without a tokenizer says nothing of it.

    Raises:
        CheckpointError: a tokenizer.json cannot be read, or gives an id another token than that of the base (or of the
            first model that has one); the first ten are listed.
    """
    known = [(source.label, tokens) for source in (base, *models) if (tokens := _tokens(source))]
    for label, theirs in known[1:]:
        first, ours = known[0]
        both = sorted(ours.keys() & theirs.keys())
        differing = [f"{token} {ours[token]!r} and {theirs[token]!r}" for token in both if ours[token] != theirs[token]]
        if differing:
            got = f"{len(differing)} others {differing[:10]}"
            remedy = "only models that read text alike can be merged"
            where = f"tokenizer of {label} against {first}"
            raise CheckpointError(explain(where, "the same token for each id", got, remedy))


def _tokens(source: Source) -> dict[int, str]:
    """The tokens of a folder's tokenizer.json by their ids; none where it has no such file, or not of this form."""
    content = json_object(Path(source.label) / "tokenizer.json") or {}
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
            vocabulary = {pair[0]: token for token, pair in enumerate(vocabulary)}
        tokens = {int(token): str(text) for text, token in vocabulary.items()}
        return tokens | {int(one["id"]): str(one["content"]) for one in content.get("added_tokens") or ()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}


def config_notes(base: Checkpoint, models: tuple[Source, ...]) -> list[str]:
    """Where a model's config.json says otherwise than the base's, or its tokenizer has other tokens, a line each."""
    ours = json_object(base.path / "config.json")
    notes = []
    for model in models:
        theirs = json_object(model.path / "config.json") if isinstance(model, Checkpoint) else None
        if ours is not None and theirs is not None:
            keys = sorted(ours.keys() | theirs.keys() - _CONFIG_NOISE)
            differing = [key for key in keys if key not in _CONFIG_NOISE and ours.get(key) != theirs.get(key)]
            if differing:
                fields = ", ".join(differing)
                notes.append(
                    f"the configuration of {model.label} differs from the base's in {fields}; the base's is kept"
                )
    return notes + _tokenizer_notes(base, models)


def _tokenizer_notes(base: Checkpoint, models: tuple[Source, ...]) -> list[str]:
    ours = _tokens(base)
    return [
        f"the tokenizer of {model.label} has {len(theirs)} tokens and the base's {len(ours)}; the base's is kept"
        for model in models
        if ours and (theirs := _tokens(model)) and ours != theirs
    ]


def json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file, or something else in it.

    Raises:
        CheckpointError: the file cannot be read, or is no JSON.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        got = f"{type(cause).__name__}: {cause}"
        raise CheckpointError(explain(str(path), "a readable JSON object", got)) from cause
    return content if isinstance(content, dict) else None
