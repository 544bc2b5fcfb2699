"""How well a model predicts held-out text: bits per byte, beside general compressors on the very same bytes."""

from __future__ import annotations

import gzip
import lzma
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.data import SEPARATOR, segments
from synapse_arch import SynapseModel, SynapseState

ROWS = 16
WINDOW = 256
IGNORED = -100


@dataclass(frozen=True)
class Bits:
    """What it costs a model to write a text down.

    Attributes:
        bits: of every byte and of the mark at each document's end.
        count: bytes of text; the marks are not counted.
    """

    bits: float
    count: int

    @property
    def per_byte(self) -> float:
        """Bits per byte of text."""
        return self.bits / self.count


@torch.no_grad()
def held_out_bits(
    model: SynapseModel,
    stream: Tensor,
    *,
    sizes: Tensor | None = None,
    windows: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Bits:
    """Bits the model needs for a stream of documents, reading each one from its start with its state carried along.

    The stream is cut into `ROWS` rows of equal length, read side by side in windows of `WINDOW` tokens; the state goes
    from window to window and is fresh at each document's start. Every token but the stream's first is predicted once.
    Only the start of a row inside a document costs the model its context, so the figure is never too low.

    Args:
        model: the model, in evaluation mode; its device is used.
        stream: (n,) ids with separators, from `recipes.data.to_stream`.
        sizes: (V,) bytes of text each id stands for, as `Tokenizer.sizes`; None is one for all but the separator.
        windows: how many windows of each row to read; None reads all.
        rank: this process, which reads every `world`-th row from here.
        world: number of processes; the sums over them are the whole.

    Returns:
        The bits and bytes of this process's share.
    """
    device = next(model.parameters()).device
    ids, targets = _rows(stream)
    if rank >= ROWS:  # nothing is left for it, but where weights are shared out every process must take part
        targets = torch.full_like(targets, IGNORED)
    ids, targets = ids[rank % ROWS :: world].to(device), targets[rank % ROWS :: world].to(device)
    state: SynapseState | None = None
    bits, count = torch.zeros((), dtype=torch.float64), 0
    for index, start in enumerate(range(0, ids.shape[1], WINDOW)):
        if index == windows:
            break
        window, target = ids[:, start : start + WINDOW], targets[:, start : start + WINDOW]
        if state is not None:
            state = state.where(window[:, 0] != SEPARATOR, model.init_state(len(window), device=device))
        out = model(window, state, segment_ids=segments(window))
        nats = F.cross_entropy(
            out.logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORED, reduction="none"
        )
        bits += nats.cpu().double().sum() / math.log(2)
        read = target[target != IGNORED]
        count += int((read != SEPARATOR).sum() if sizes is None else sizes[read.cpu()].sum())
        state = out.state
    return Bits(float(bits), count)


def compressors(data: bytes) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 reach on `data`, headers included."""
    packed = {"gzip -9": gzip.compress(data, 9, mtime=0), "xz -9": lzma.compress(data, preset=9)}
    return {name: 8 * len(result) / len(data) for name, result in packed.items()}


def _rows(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and targets (ROWS, L), int64; the last row is filled up with tokens whose targets are ignored."""
    stream = stream.long()
    length = -(-(len(stream) - 1) // ROWS)
    missing = ROWS * length - (len(stream) - 1)
    ids = F.pad(stream[:-1], (0, missing), value=SEPARATOR)
    targets = F.pad(stream[1:], (0, missing), value=IGNORED)
    return ids.view(ROWS, length), targets.view(ROWS, length)
