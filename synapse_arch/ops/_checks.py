"""Argument checks of the ops: shapes by letters, dtypes, and what they say when they fail."""

from __future__ import annotations

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, ShapeError, StateError, explain

Sizes = dict[str, int]


def check_shape(
    name: str,
    x: Tensor,
    letters: str,
    sizes: Sizes,
    *,
    remedy: str = "",
    error: type[ShapeError] | type[StateError] = ShapeError,
) -> None:
    """Checks `x` against `letters` ("B T H K") and records the sizes that are met for the first time.

    Args:
        name: what the message calls the tensor.
        x: the tensor.
        letters: one letter or number a dimension, separated by blanks; a letter already in `sizes`
            must have that size, a number must be met as it is.
        sizes: sizes known so far; letters that are new are added.
        remedy: what the message advises.
        error: what is raised.

    Raises:
        ShapeError: (or `error`) when the rank or a size differs, or a new letter has size 0.
    """
    if not isinstance(x, Tensor):
        raise error(explain(name, "a tensor", type(x).__name__, remedy))
    wanted = letters.split()
    known = {letter: sizes[letter] for letter in wanted if letter in sizes}
    fits = x.dim() == len(wanted)
    if fits:
        for letter, size in zip(wanted, x.shape, strict=True):
            if letter.isdigit():
                fits = fits and size == int(letter)
            else:
                fits = fits and size == sizes.setdefault(letter, size) and size > 0
    if not fits:
        note = ", ".join(f"{letter}={size}" for letter, size in known.items())
        expected = f"({', '.join(wanted)})" + (f" with {note}" if note else "")
        if x.dim() == len(wanted) and 0 in x.shape:
            expected += ", no size 0"
        raise error(explain(name, expected, tuple(x.shape), remedy))


def check_float(*, error: type[ShapeError] | type[StateError] = ShapeError, **tensors: Tensor | None) -> None:
    """Raises ShapeError (or `error`) unless every given tensor is of a floating dtype."""
    for name, x in tensors.items():
        if x is not None and not x.dtype.is_floating_point:
            raise error(explain(name, "a floating dtype", x.dtype, f"convert it with {name}.float()"))


def check_state(name: str, state: Tensor | None, letters: str, sizes: Sizes) -> None:
    """Raises StateError unless `state` is None or a floating tensor that fits `letters`."""
    if state is not None:
        check_shape(name, state, letters, sizes, error=StateError, remedy="use init_state(batch_size)")
        check_float(error=StateError, **{name: state})


def check_chunk_size(chunk_size: int) -> None:
    """Raises ConfigError unless `chunk_size` is a positive integer."""
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ConfigError(explain("chunk_size", "an integer >= 1", repr(chunk_size)))


def check_packing(segment_ids: Tensor | None, mask: Tensor | None, sizes: Sizes) -> None:
    """Checks the optional `segment_ids` (B, T) ints and `mask` (B, T) bool that every mixer takes."""
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, "B T", sizes)
        if segment_ids.dtype.is_floating_point or segment_ids.dtype == torch.bool:
            raise ShapeError(explain("segment_ids", "an integer dtype", segment_ids.dtype))
    if mask is not None:
        check_shape("mask", mask, "B T", sizes)
        if mask.dtype != torch.bool:
            raise ShapeError(explain("mask", "torch.bool", mask.dtype, "use mask.bool(): True means a real token"))
