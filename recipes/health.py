"""Figures that say how a run fares: how evenly experts are used, and how much of the machine's arithmetic is.

L layers, E experts.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of each layer's load over log E: 1 when all experts get as much, 0 when one gets all.

    Args:
        load: (L, E) assignments.

    Returns:
        (L,) float64.

    >>> load_entropy(torch.tensor([[5, 5], [10, 0]])).tolist()
    [1.0, 0.0]
    """
    share = load.double() / load.double().sum(-1, keepdim=True).clamp(min=1)
    nats = torch.where(share > 0, -share * share.clamp(min=1e-300).log(), 0.0).sum(-1)
    return nats / math.log(max(load.shape[-1], 2))


def router_health(load: Tensor) -> dict[str, Any]:
    """What the log says of the routing of a step.

    Args:
        load: (L, E) assignments, over all processes.

    Returns:
        "load_entropy": the mean over the layers; "dead_experts": how many of the L · E got nothing; "load": the share
        of its layer's assignments each expert got, L lists of E.
    """
    share = load.double() / load.double().sum(-1, keepdim=True).clamp(min=1)
    return {
        "load_entropy": round(float(load_entropy(load).mean()), 5),
        "dead_experts": int((load == 0).sum()),
        "load": [[round(value, 5) for value in row] for row in share.tolist()],
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] = (2048, 1024, 1024)) -> float:
    """Floating-point operations a second of a matrix product, the best of six.

    Args:
        device: where to measure.
        dtype: of the factors.
        shape: (m, k, n) of an (m, k) @ (k, n) product.
    """
    m, k, n = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best
