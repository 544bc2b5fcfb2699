"""Task vectors of one tensor, a block at a time: float32 arithmetic in the cache, nothing whole but what was given.

A model's task vector τ is its tensor less the base's (Ilharco et al. 2023). M models, n numbers of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge.select import NOTHING_CUT, SAMPLE, Cut, cut, kept
from synapse_arch.errors import ConfigError, ShapeError, explain

BLOCK = 1 << 17
"""Numbers of a block: a few of them lie in a core's cache."""


class Delta(NamedTuple):
    """A task vector given as such, where a model's tensor is expected: of an adapter it is known exactly."""

    value: Tensor


Given = Tensor | Delta
"""What a model contributes to a tensor."""


class TaskVectors:
    """The task vectors of M models from one base.

    Args:
        base: the base's tensor.
        given: of each model its tensor of the same shape, or its task vector as a `Delta`.
        row: length of the rows that no block may split.

    Raises:
        ShapeError: shapes differ, or a dtype is not real and floating.
    """

    def __init__(self, base: Tensor, given: Sequence[Given], *, row: int = 1) -> None:
        tensors = [one.value if isinstance(one, Delta) else one for one in given]
        for index, tensor in enumerate([base, *tensors]):
            name = f"tensor of model {index - 1}" if index else "base"
            if tensor.shape != base.shape:
                raise ShapeError(explain(name, f"shape {tuple(base.shape)} as the base", tuple(tensor.shape)))
            if not tensor.is_floating_point():
                raise ShapeError(explain(name, "a floating dtype", tensor.dtype, "copy it, it cannot be merged"))
        self.n, self.models, self.shape = base.numel(), len(tensors), base.shape
        self._base = base.detach().reshape(-1)
        self._given = [tensor.detach().reshape(-1) for tensor in tensors]
        self._is_delta = [isinstance(one, Delta) for one in given]
        self._step = max(1, BLOCK // row) * row
        self._scratch = torch.empty(self.models + 1, min(self._step, self.n))

    def blocks(self) -> Iterator[slice]:
        """The whole tensor in order."""
        for start in range(0, self.n, self._step):
            yield slice(start, min(start + self._step, self.n))

    def base(self, at: slice) -> Tensor:
        """A block of the base in float32; not to be changed."""
        block = self._base[at]
        return block if block.dtype == torch.float32 else self._room(self.models, at).copy_(block)

    def delta(self, index: int, at: slice) -> Tensor:
        """A block of a task vector, in memory that is the caller's until the next call with this index."""
        own = self._room(index, at)
        if self._is_delta[index]:
            return own.copy_(self._given[index][at])
        tensor, base = self._given[index][at], self.base(at)
        if tensor.dtype == torch.float32:
            return torch.sub(tensor, base, out=own)
        return own.copy_(tensor).sub_(base)

    def tensor(self, index: int, at: slice) -> Tensor:
        """A block of a model's own numbers, in the same memory."""
        own = self._room(index, at).copy_(self._given[index][at])
        return own.add_(self.base(at)) if self._is_delta[index] else own

    def _room(self, index: int, at: slice) -> Tensor:
        return self._scratch[index, : at.stop - at.start]

    def magnitudes(self, index: int) -> Iterator[Tensor]:
        """|τ| in blocks."""
        for at in self.blocks():
            yield self.delta(index, at).abs_()

    def cut(self, index: int, count: int) -> Cut:
        """The cut that keeps exactly the `count` largest magnitudes of a task vector."""
        if count >= self.n:
            return NOTHING_CUT
        return cut(lambda: self.magnitudes(index), self.n, count, self._sample(index))

    def _sample(self, index: int) -> Tensor:
        """Magnitudes at a regular distance; it is odd, so that it does not fall in with the length of rows."""
        every = slice(None, None, max(1, self.n // SAMPLE) | 1)
        sample = self._given[index][every].float()
        return (sample if self._is_delta[index] else sample - self._base[every].float()).abs()


def per_model(name: str, values: float | Sequence[float], models: int) -> tuple[float, ...]:
    """One value for each model: one number is everyone's.

    Raises:
        ConfigError: another count of values than models.
    """
    numbers = (float(values),) if isinstance(values, int | float) else tuple(map(float, values))
    if len(numbers) not in (1, models):
        raise ConfigError(explain(name, f"1 value or {models}, one a model", f"{len(numbers)}: {list(numbers)}"))
    return numbers * models if len(numbers) == 1 else numbers


Sparsifier = Callable[[int, slice, Tensor], None]
"""Zeroes numbers of a block of a task vector in place; called for every block in order."""


def untouched(index: int, at: slice, delta: Tensor) -> None:
    """Zeroes nothing."""


class Trim:
    """Zeroes what a cut does not keep; ties are broken by index.

    Args:
        cuts: one a model.
    """

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self.cuts, self.left = cuts, [one.equals for one in cuts]

    def __call__(self, index: int, at: slice, delta: Tensor) -> None:
        """Zeroes in a block, in place; blocks come in order."""
        value, left = self.cuts[index].value, self.left[index]
        if not left:
            torch.nn.functional.hardshrink(delta, value, out=delta)
            return
        magnitude = delta.abs()
        tied = (magnitude == value).nonzero().flatten()[:left]
        self.left[index] -= len(tied)
        keep = magnitude > value
        keep[tied] = True
        delta.mul_(keep)


def trimming(vectors: TaskVectors, density: float | Sequence[float]) -> Trim:
    """Keeps the share `density` of each task vector that is largest in magnitude."""
    densities = per_model("density", density, vectors.models)
    return Trim([vectors.cut(index, kept(vectors.n, share)) for index, share in enumerate(densities)])
