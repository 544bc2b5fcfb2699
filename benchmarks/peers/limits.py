"""The machine's limits: how fast it multiplies matrices, and how fast it reads memory."""

from __future__ import annotations

import statistics

import torch

from benchmarks.measure import seconds

STREAMED = 256 * 2**20
"""Bytes read at a time: far more than any cache."""


def matrix_rate(size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a float32 matrix product (size, size) @ (size, size)."""
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    torch.mm(a, b, out=out)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(rounds))


def bandwidth(rounds: int = 5) -> float:
    """Bytes/s at which numbers that fit no cache are read by a sum."""
    numbers, out = torch.ones(STREAMED // 4), torch.empty(())
    torch.sum(numbers, 0, out=out)
    return STREAMED / statistics.median(seconds(lambda: torch.sum(numbers, 0, out=out)) for _ in range(rounds))
