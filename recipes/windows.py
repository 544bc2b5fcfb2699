"""Streams of tokens to batches: random windows, or rows that are read on from step to step.

n tokens of a stream, B windows a step, T tokens a window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.sources import SEPARATOR
from synapse_arch.errors import DataError, explain


@dataclass(frozen=True)
class Batch:
    """Windows of text with their next tokens.

    Attributes:
        ids: (B, T) int64.
        targets: (B, T) int64, the ids one further on.
        segment_ids: (B, T) int64, which document of its window a token belongs to; None when no window of the batch
            crosses from one document into the next.
    """

    ids: Tensor
    targets: Tensor
    segment_ids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), segments)

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` parts of as many windows each, in order."""
        ids, targets = self.ids.chunk(count), self.targets.chunk(count)
        return [Batch(*pair, segments(pair[0])) for pair in zip(ids, targets, strict=True)]


def segments(ids: Tensor) -> Tensor | None:
    """Document numbers (B, T) int64 of a window, from its separators; None when no row holds more than one document."""
    opens = ids == SEPARATOR
    if not opens[:, 1:].any():
        return None
    return opens.long().cumsum(dim=1)


class Windows:
    """Random windows of a stream; the batch of a step depends on the seed and the step, and on nothing else.

    Args:
        stream: (n,) integer ids.
        length: tokens in a window.
        batch_size: windows in a step, over all processes.
        seed: of the run.

    Raises:
        DataError: the stream is shorter than a window and its next token.
    """

    def __init__(self, stream: Tensor, *, length: int, batch_size: int, seed: int) -> None:
        needed = self._needed(length, batch_size)
        if len(stream) <= needed:
            remedy = "lower --length or give more text with --data"
            raise DataError(explain("training text", f"more than {needed} tokens", len(stream), remedy))
        self.stream, self.length, self.batch_size, self.seed = stream, length, batch_size, seed

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The share of process `rank` of `world` in the batch of `step`; the shares in order are the whole batch."""
        share = self.batch_size // world
        starts = self._starts(step)[rank * share : (rank + 1) * share]
        places = starts[:, None] + torch.arange(self.length + 1)  # (B, T+1)
        window = self.stream[places.remainder_(len(self.stream))].long()
        ids = window[:, :-1]
        return Batch(ids, window[:, 1:], segments(ids))

    def begins(self, step: int) -> bool:
        """Whether the batch of this step has nothing to do with the one before."""
        return True

    def _starts(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, step))
        return torch.randint(len(self.stream) - self.length, (self.batch_size,), generator=generator)

    @staticmethod
    def _needed(length: int, batch_size: int) -> int:
        return length


class Rows(Windows):
    """The stream laid out as B rows that are read on from step to step, for states that go from window to window.

    A row begins where the one before it ends; together they go once around the stream in an epoch of as many steps as a
    row holds whole windows. Each epoch begins at another place, drawn from the seed and its number, so that what falls
    between the last window and the row's end is read in others.
    """

    def begins(self, step: int) -> bool:
        """Whether this is the first step of an epoch; the rows of any other go on with those of the step before."""
        return step % self.steps == 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.stream) // self.batch_size // self.length

    def _starts(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.steps)
        first = mix(self.seed, epoch, self.batch_size) % len(self.stream)
        return first + torch.arange(self.batch_size) * (len(self.stream) // self.batch_size) + index * self.length

    @staticmethod
    def _needed(length: int, batch_size: int) -> int:
        return length * batch_size


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, without the patterns that adding them would leave."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1
