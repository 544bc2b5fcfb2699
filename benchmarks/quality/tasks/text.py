"""Bytes of real text: the source of Python's standard library, as the training recipe splits it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from benchmarks.quality.tasks.base import Batch, Protocol, Task
from recipes.data import load_corpus, to_stream

LENGTH = 256


@cache
def _streams() -> tuple[Tensor, Tensor]:
    corpus = load_corpus()
    return to_stream(corpus.train), to_stream(corpus.held_out)


def _windows(stream: Tensor, n: int, generator: torch.Generator) -> Batch:
    """Windows from anywhere in the stream, every byte of them predicted from those before it."""
    starts = torch.randint(len(stream) - LENGTH, (n,), generator=generator)
    window = stream[starts[:, None] + torch.arange(LENGTH + 1)].long()
    targets = window[:, 1:]
    return Batch(window[:, :-1], targets, torch.ones_like(targets, dtype=torch.bool))


def _train(n: int, generator: torch.Generator) -> Batch:
    return _windows(_streams()[0], n, generator)


def _held_out(n: int, generator: torch.Generator) -> Batch:
    return _windows(_streams()[1], n, generator)


BYTES = Task(
    name="bytes",
    vocab_size=256,
    n_classes=256,
    make=_train,
    test_make=_held_out,
    metric="bits",
    protocols={
        "cpu": Protocol(
            train_examples=None, test_examples=512, batch_size=4, steps=600, lrs=(1e-3, 2e-3, 4e-3),
            weight_decays=(0.1,), d_model=256, n_layers=3, min_lr=1e-6, warmup=0.05, stop_at=None, eval_every=10_000,
        ),
        "published": Protocol(
            train_examples=None, test_examples=4096, batch_size=64, steps=20_000, lrs=(5e-4, 1e-3, 2e-3),
            weight_decays=(0.1,), d_model=512, n_layers=8, min_lr=1e-6, warmup=0.02, stop_at=None, eval_every=2000,
        ),
    },
    published={},
    description="bits per byte of held-out text, windows of 256 bytes",
    bar=None,
)  # fmt: skip
