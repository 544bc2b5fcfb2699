"""Four tasks of MAD (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures").

Inputs, answers, macro average and the published scale are those of the paper's baseline settings.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.quality.tasks.base import IGNORED, Batch, Protocol, Task

MAP_SEED = 12345
TO_COPY = 16

_PUBLISHED = Protocol(
    train_examples=12_800, test_examples=1280, batch_size=128, steps=20_000, lrs=(1e-4, 5e-4, 1e-3),
    weight_decays=(0.0, 0.1), d_model=128, n_layers=2, stop_at=None, eval_every=1000,
)  # fmt: skip
_SHORT = replace(
    _PUBLISHED, batch_size=32, steps=600, test_examples=320, lrs=(1e-3, 3e-3), weight_decays=(0.0,), stop_at=0.9999,
    eval_every=50,
)  # fmt: skip


@cache
def value_of_key(vocab_size: int) -> Tensor:
    """The values that memorization asks for: ((V − 1) // 2,) int64, of key k the value at k; the same for ever."""
    generator = torch.Generator().manual_seed(MAP_SEED)
    n_keys = (vocab_size - 1) // 2
    return n_keys + torch.randperm(vocab_size - 1 - n_keys, generator=generator)[:n_keys]


def memorization(n: int, generator: torch.Generator, *, vocab_size: int = 256, length: int = 32) -> Batch:
    """Keys, each followed by the insert token V − 1, where the value of the key is due.

    Which value belongs to which key never changes and stands in no input: only weights can hold it.
    """
    values = value_of_key(vocab_size)
    ids = torch.full((n, length), vocab_size - 1)
    targets = torch.full((n, length), IGNORED)
    ids[:, 0::2] = torch.randint(len(values), (n, length // 2), generator=generator)
    targets[:, 1::2] = values[ids[:, 0::2]]
    return Batch(ids, targets, targets != IGNORED)


def in_context_recall(n: int, generator: torch.Generator, *, vocab_size: int = 16, length: int = 128) -> Batch:
    """Pairs of a key and its value, which differs from sequence to sequence.

    Every next token is trained; scored are the values of keys seen before. The key of the last pair is drawn from
    those seen before, and its value is only a target, so that T is `length` − 1.
    """
    pairs, n_keys = length // 2, vocab_size // 2
    values = torch.randint(n_keys, vocab_size, (n, n_keys), generator=generator)
    keys = torch.randint(n_keys, (n, pairs), generator=generator)
    seen = torch.zeros(n, n_keys).scatter_(1, keys[:, :-1], 1.0)
    keys[:, -1:] = torch.multinomial(seen, 1, generator=generator)
    sequence = torch.stack([keys, values.gather(1, keys)], dim=-1).flatten(1)
    ids, targets = sequence[:, :-1], sequence[:, 1:]
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[:, 0::2] = _repeated(keys, n_keys)
    return Batch(ids, targets, scored)


def _repeated(keys: Tensor, n_keys: int) -> Tensor:
    """(n, pairs) bool: whether the same key stands further left."""
    n, pairs = keys.shape
    places = torch.arange(pairs).expand(n, pairs)
    first = torch.full((n, n_keys), pairs).scatter_reduce_(1, keys, places, "amin")
    return places > first.gather(1, keys)


def selective_copy(n: int, generator: torch.Generator, length: int = 256, *, vocab_size: int = 16) -> Batch:
    """Tokens strewn among blanks, then the copy token, then blanks where the tokens are due in their order.

    Tokens are 0 to V − 3, V − 2 is blank, V − 1 says copy. Each blank falls into one of the 16 gaps before the tokens,
    all as likely, so that the last token always stands right before the copy token.
    """
    blank, copy = vocab_size - 2, vocab_size - 1
    blanks = length - 2 * TO_COPY - 1
    tokens = torch.randint(blank, (n, TO_COPY), generator=generator)
    gaps = torch.randint(TO_COPY, (n, blanks), generator=generator)
    sizes = torch.zeros(n, TO_COPY, dtype=torch.int64).scatter_add_(1, gaps, torch.ones_like(gaps))
    ids = torch.full((n, length), blank)
    ids.scatter_(1, sizes.cumsum(1) + torch.arange(TO_COPY), tokens)
    ids[:, -TO_COPY - 1] = copy
    targets = torch.full((n, length), IGNORED)
    targets[:, -TO_COPY:] = tokens
    return Batch(ids, targets, targets != IGNORED)


def compression(n: int, generator: torch.Generator, *, vocab_size: int = 16, length: int = 32) -> Batch:
    """Random tokens and the compression token V − 1; all of them are to be rebuilt from the last position."""
    ids = torch.randint(vocab_size - 1, (n, length), generator=generator)
    ids[:, -1] = vocab_size - 1
    return Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))


_MEMORIZATION = replace(_PUBLISHED, train_examples=256, steps=400, eval_every=100)

TASKS = (
    Task(
        name="memorization",
        vocab_size=256,
        n_classes=256,
        make=memorization,
        protocols={
            "cpu": replace(
                _MEMORIZATION, lrs=(1e-3, 3e-3), weight_decays=(0.0,), test_examples=640, stop_at=0.9999, eval_every=50
            ),
            "published": _MEMORIZATION,
        },
        metric="macro",
        published={"Transformer": 85.2, "Mamba": 89.5, "DeltaNet": 52.8, "RWKV-7": 89.1},
        description="values of 127 keys that only the weights can hold (MAD)",
        bar=89.6,
    ),
    Task(
        name="memorization-8192",
        vocab_size=8192,
        n_classes=8192,
        make=partial(memorization, vocab_size=8192),
        protocols={
            "cpu": replace(_MEMORIZATION, lrs=(1e-3, 3e-3), weight_decays=(0.0,)),
            "published": _MEMORIZATION,
        },
        metric="macro",
        description="the same with 4095 keys, about a third of which no training example holds (MAD)",
    ),
    Task(
        name="in-context-recall",
        vocab_size=16,
        n_classes=16,
        make=in_context_recall,
        protocols={"cpu": _SHORT, "published": _PUBLISHED},
        metric="macro",
        published={"Transformer": 94.1, "Mamba": 90.4, "DeltaNet": 100.0},
        description="values of keys given earlier in the sequence (MAD)",
        bar=99.9,
    ),
    Task(
        name="compression",
        vocab_size=16,
        n_classes=16,
        make=compression,
        protocols={"cpu": replace(_SHORT, steps=5000, eval_every=500), "published": _PUBLISHED},
        metric="macro",
        autoencodes=True,
        published={"Transformer": 51.6, "Mamba": 52.7, "DeltaNet": 42.2, "RWKV-7": 44.5},
        description="31 random tokens rebuilt from one feature (MAD)",
        bar=52.7,
    ),
    Task(
        name="selective-copy",
        vocab_size=16,
        n_classes=16,
        make=selective_copy,
        make_length=selective_copy,
        protocols={
            "cpu": replace(
                _SHORT, train_examples=None, steps=2200, eval_every=100, train_length=96, test_lengths=(96,)
            ),
            "published": _PUBLISHED,
        },
        metric="macro",
        published={"Transformer": 99.6, "Mamba": 86.3, "DeltaNet": 100.0},
        description="16 tokens among blanks, to be repeated in order (MAD)",
        bar=99.9,
    ),
)
