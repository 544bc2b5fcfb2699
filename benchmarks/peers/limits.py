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
    """Bytes/s at which a matrix that fits no cache is read by a product with a vector."""
    matrix, vector = torch.ones(STREAMED // 4096, 1024), torch.ones(1024)
    out = torch.empty(len(matrix))
    torch.mv(matrix, vector, out=out)
    return STREAMED / statistics.median(seconds(lambda: torch.mv(matrix, vector, out=out)) for _ in range(rounds))
