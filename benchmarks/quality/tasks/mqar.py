"""Multi-query associative recall (Arora et al. 2023, "Zoology: Measuring and Improving Recall")."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.quality.tasks.base import IGNORED, Batch, Protocol, Task

VOCAB = 8192
POWER = 0.01
SIZES = {64: 4, 128: 8, 256: 16}
"""Of each length the number of pairs."""


def mqar(
    n: int, generator: torch.Generator, *, length: int, pairs: int, vocab_size: int = VOCAB, power: float = POWER
) -> Batch:
    """Pairs of a key and its value, then each key once more among random tokens: there its value is due.

    Behind the pairs every other position can hold a query. The gaps, counted in such places from the end of the pairs,
    are drawn without replacement with p(g) ∝ (g + 1)^(power − 1), those of the first keys first.

    Args:
        n: examples.
        generator: what they are drawn from.
        length: T.
        pairs: keys in an example, all different; their values too.
        vocab_size: keys are 1 to V/2 − 1, values V/2 to V − 1, the tokens between queries 0 to V − 1.
        power: 1 would spread the queries evenly.
    """
    half, context = vocab_size // 2, 2 * pairs
    keys = _distinct(n, pairs, 1, half, generator)
    values = _distinct(n, pairs, half, vocab_size, generator)
    places = torch.arange(1, (length - context) // 2 + 1) ** (power - 1)
    # Of exponential clocks with these rates, the order of ringing is that of drawing without replacement.
    rings = torch.empty(n, len(places)).exponential_(generator=generator) / places
    queries = context + 2 * rings.topk(pairs, largest=False, sorted=True).indices

    ids = torch.randint(vocab_size, (n, length), generator=generator)
    ids[:, :context] = torch.stack([keys, values], dim=-1).flatten(1)
    ids.scatter_(1, queries, keys)
    targets = torch.full((n, length), IGNORED).scatter_(1, queries, values)
    return Batch(ids, targets, targets != IGNORED)


def _distinct(n: int, k: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """(n, k) int64 from low to high − 1, no number twice in a row; rows with repeats are drawn again."""
    drawn = torch.randint(low, high, (n, k), generator=generator)
    while True:
        again = (drawn.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
        if not again.any():
            return drawn
        drawn[again] = torch.randint(low, high, (int(again.sum()), k), generator=generator)


def _task(length: int, pairs: int, published: dict[str, float], bar: float | None = None) -> Task:
    batch_size = 512 if length < 256 else 256
    return Task(
        name=f"mqar-{length}",
        vocab_size=VOCAB,
        n_classes=VOCAB,
        make=partial(mqar, length=length, pairs=pairs),
        protocols={
            "cpu": Protocol(
                train_examples=None, test_examples=500, batch_size=32, steps=3000, lrs=(3e-3, 1e-2),
                weight_decays=(0.1,), d_model=64, n_layers=2, warmup=0.05, stop_at=0.995, eval_every=100,
            ),
            "published": Protocol(
                train_examples=100_000, test_examples=3000, batch_size=batch_size, steps=64 * (100_000 // batch_size),
                lrs=(1e-4, 4.64e-4, 2.15e-3, 1e-2), weight_decays=(0.1,), d_model=64, n_layers=2, min_lr=0.0,
                stop_at=0.99, eval_every=100_000 // batch_size,
            ),
        },
        tied=True,
        published=published,
        description=f"values of {pairs} keys given earlier, in {length} tokens out of {VOCAB} (Zoology)",
        bar=bar,
    )  # fmt: skip


TASKS = (
    _task(64, SIZES[64], {"attention": 100.0, "H3": 92.0, "RWKV": 75.0}),
    _task(128, SIZES[128], {"H3": 25.0, "RWKV": 18.0}),
    _task(256, SIZES[256], {}, bar=99.0),
)
