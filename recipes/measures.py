"""How fast a model reads and writes, and what a longer context is worth to it. B rows, T positions, V vocabulary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch import Sampling, SynapseModel, SynapseState
from synapse_arch.errors import DataError, explain

WINDOW = 512
"""Positions whose logits are held at a time."""


@dataclass(frozen=True)
class Stretch:
    """The positions `first` up to, not including, `last` of every row, and what they cost.

    Attributes:
        first: how many tokens the model had read before the first of them, itself included: 1 at the start.
        last: one more than the highest.
        bits: of all the tokens predicted there.
        bytes: of text they stand for.
    """

    first: int
    last: int
    bits: float
    bytes: int

    @property
    def per_byte(self) -> float:
        """Bits per byte; not a number where no text is."""
        return self.bits / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class Speed:
    """Tokens a second.

    Attributes:
        reading: of a batch of texts, all rows together.
        writing: one token after the other, one row.
    """

    reading: float
    writing: float


@torch.no_grad()
def loss_by_position(
    model: SynapseModel,
    stream: Tensor,
    *,
    length: int,
    rows: int,
    sizes: Tensor,
    update: Callable[[int], object] = lambda positions: None,
) -> list[Stretch]:
    """What predictions cost after 1, 2 to 3, 4 to 7, ... tokens of context, the state carried over the whole length.

    Rows are neighbouring parts of the stream; nothing is forgotten where a document ends, so that the last positions
    have read `length` tokens. A curve that rises with the position shows a state that long texts spoil.

    Args:
        model: in evaluation mode; its device is used.
        stream: (n,) ids.
        length: T, tokens a row.
        rows: B, at most; as many as the stream holds are read.
        sizes: (V,) bytes of text each id stands for.
        update: is told how many positions more have been read.

    Raises:
        DataError: the stream is shorter than one row and its next token.
    """
    count = min(rows, (len(stream) - 1) // length)
    if count < 1:
        remedy = "lower --context or give more text with --data"
        raise DataError(explain("text for the context curve", f"more than {length} tokens", len(stream), remedy))
    device = next(model.parameters()).device
    ids = stream[: count * length].long().view(count, length)
    targets = stream[1 : count * length + 1].long().view(count, length)
    bits, weight = torch.zeros(length, dtype=torch.float64), sizes[targets].sum(0)
    state: SynapseState | None = None
    for start in range(0, length, WINDOW):
        window = slice(start, start + WINDOW)
        out = model(ids[:, window].to(device), state)
        target = targets[:, window].to(device)
        nats = F.cross_entropy(out.logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        bits[window] = nats.cpu().double().view(target.shape).sum(0) / math.log(2)
        state = out.state
        update(target.shape[1])
    edges = [2**power for power in range(max(1, (length - 1).bit_length()))] + [length + 1]
    spans = [(first, last) for first, last in pairwise(edges) if last > first]
    return [
        Stretch(first, last, float(bits[first - 1 : last - 1].sum()), int(weight[first - 1 : last - 1].sum()))
        for first, last in spans
    ]


@torch.no_grad()
def throughput(model: SynapseModel, *, batch_size: int, length: int, tokens: int, repeats: int = 3) -> Speed:
    """Tokens a second, the best of some repeats, after one that does not count.

    Args:
        model: in evaluation mode.
        batch_size: rows that are read side by side.
        length: tokens of each.
        tokens: written in one go.
        repeats: measurements.
    """
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (batch_size, length), device=device)
    sampling = Sampling(max_tokens=tokens, seed=0)

    def read() -> None:
        model(ids, logits_to_keep=1)

    def write() -> None:
        for _ in model.stream(ids[:1, :1], sampling=sampling):
            pass

    seconds = []
    for action in (read, write):
        times = []
        for _ in range(repeats + 1):
            _wait(device)
            start = time.perf_counter()
            action()
            _wait(device)
            times.append(time.perf_counter() - start)
        seconds.append(min(times[1:]))
    return Speed(batch_size * length / seconds[0], tokens / seconds[1])


def _wait(device: torch.device) -> None:
    """Until everything asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
