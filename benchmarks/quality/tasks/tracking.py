"""State tracking, tested on longer sequences than trained: the parity of bits and products of permutations.

Parity follows Grazzi et al. 2024 (2411.12537), whose score is the scaled accuracy over all lengths from 40 to 256; here
it is the plain accuracy at the longest, and the published scores are put as accuracies too. The word problem of S3
follows Siems et al. 2025 (2502.10297); batch size and learning rates are of this benchmark.
"""

from __future__ import annotations

from functools import partial
from itertools import permutations

import torch
from torch import Tensor

from benchmarks.quality.tasks.base import IGNORED, Batch, Protocol, Task

SHORTEST, LONGEST, TESTED = 3, 40, 256
ELEMENTS: tuple[tuple[int, ...], ...] = tuple(permutations(range(3)))
"""S3: element e moves i to ELEMENTS[e][i]; 0 is the identity."""

# (6, 6): first the row's element, then the column's.
PRODUCTS = torch.tensor([[ELEMENTS.index(tuple(b[i] for i in a)) for b in ELEMENTS] for a in ELEMENTS])


def parity_of_length(n: int, generator: torch.Generator, length: int) -> Batch:
    """Random bits; at the last one the parity of all is due."""
    ids = torch.randint(2, (n, length), generator=generator)
    targets = torch.full_like(ids, IGNORED)
    targets[:, -1] = ids.sum(dim=1) % 2
    return Batch(ids, targets, targets != IGNORED)


def parity(n: int, generator: torch.Generator) -> Batch:
    """Bits of one length from 3 to 40, drawn for the batch, so that nothing is padded."""
    length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
    return parity_of_length(n, generator, length)


def s3(n: int, generator: torch.Generator, length: int = 128) -> Batch:
    """Random permutations of three things; due at each position is the product x_1 x_2 ... x_t, x_1 acting first."""
    ids = torch.randint(len(ELEMENTS), (n, length), generator=generator)
    targets = running_products(ids)
    return Batch(ids, targets, torch.ones_like(ids, dtype=torch.bool))


def running_products(ids: Tensor) -> Tensor:
    """(B, T) products of all elements up to each, by doubling: after k rounds those of the last 2^k elements."""
    products, reach = ids, 1
    while reach < ids.shape[1]:
        joined = PRODUCTS[products[:, :-reach], products[:, reach:]]
        products = torch.cat([products[:, :reach], joined], dim=1)
        reach *= 2
    return products


def _plain(share: float) -> float:
    """Accuracy in percent from a scaled accuracy over two classes."""
    return 50 + 50 * share


_SCALED = {"Transformer": 0.02, "mLSTM": 0.09, "Mamba": 0.0, "sLSTM": 1.0, "DeltaNet[-1,1]": 1.0}

TASKS = (
    Task(
        name="parity",
        vocab_size=2,
        n_classes=2,
        make=parity,
        test_make=partial(parity_of_length, length=TESTED),
        make_length=parity_of_length,
        protocols={
            "cpu": Protocol(
                train_examples=None, test_examples=1024, batch_size=64, steps=5000, lrs=(3e-3,),
                weight_decays=(0.0,), d_model=128, n_layers=2, warmup=0.1, stop_at=1.0, eval_every=100,
                test_lengths=(40, 64, 128, 256),
            ),
            "published": Protocol(
                train_examples=None, test_examples=8190, batch_size=256, steps=20_000, lrs=(1e-3,),
                weight_decays=(0.1,), d_model=128, n_layers=2, warmup=0.1, stop_at=1.0, eval_every=500,
                test_lengths=tuple(range(LONGEST, TESTED + 1, 24)),
            ),
        },
        published={name: _plain(share) for name, share in _SCALED.items()},
        description="parity of 256 bits, trained on 3 to 40, the answer only",
        bar=100.0,
    ),
    Task(
        name="s3",
        vocab_size=len(ELEMENTS),
        n_classes=len(ELEMENTS),
        make=s3,
        test_make=partial(s3, length=512),
        make_length=s3,
        protocols={
            "cpu": Protocol(
                train_examples=None, test_examples=256, batch_size=64, steps=3000, lrs=(3e-3,),
                weight_decays=(0.0,), d_model=128, n_layers=1, warmup=0.05, stop_at=0.999, eval_every=100,
                train_length=32, test_lengths=(32, 128),
            ),
            "published": Protocol(
                train_examples=100_000, test_examples=1024, batch_size=256, steps=20_000, lrs=(3e-4, 1e-3, 3e-3),
                weight_decays=(0.0,), d_model=128, n_layers=1, warmup=0.05, stop_at=0.999, eval_every=500,
            ),
        },
        description="products of permutations of three things, at 4 times the training length",
        bar=99.0,
    ),
)  # fmt: skip
