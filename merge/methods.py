"""The other ways to merge one tensor of several models, each a function `f(base, tensors, ...) -> Tensor`.

Base θ₀, models θᵢ, task vectors τᵢ = θᵢ − θ₀, weights wᵢ, a scale λ; everything is computed in float32. Random choices
come from a seed, the tensor's name and the model's place, so neither order nor sharding of the files matters.
A tensor of one number is never thinned out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.select import kept
from merge.ties import consensus, ties
from merge.vectors import Given, Sparsifier, TaskVectors, Trim, per_model, untouched
from synapse_arch.errors import ConfigError, explain

Numbers = float | Sequence[float]
_NEARLY_PARALLEL = 0.9995


def linear(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    weights: Numbers = 1.0,
    lam: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """θ₀ + λ Σ wᵢ τᵢ / Σ wᵢ: for λ = 1 the weighted average of the models (Wortsman et al. 2022), whatever the base.

    Raises:
        ConfigError: the weights sum to 0.
    """
    vectors = TaskVectors(base, tensors)
    shares = per_model("weights", weights, vectors.models)
    if abs(sum(shares)) < 1e-8:
        raise ConfigError(explain("weights", "a sum other than 0, as linear divides by it", list(shares)))
    return _sum(vectors, untouched, shares, lam / sum(shares), dtype or base.dtype)


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    weights: Numbers = 1.0,
    lam: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """θ₀ + λ Σ wᵢ τᵢ (Ilharco et al. 2023); a negative weight takes a task away."""
    return _sum(TaskVectors(base, tensors), untouched, weights, lam, dtype or base.dtype)


def slerp(
    base: Tensor, tensors: Sequence[Given], *, weights: Numbers = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Two models along the arc between them (Shoemake 1985), as far as the second's share of the weights.

    With t = w₂ / (w₁ + w₂) and Ω the angle between the flattened tensors:
    (sin((1−t)Ω) θ₁ + sin(tΩ) θ₂) / sin Ω, and (1−t) θ₁ + t θ₂ where |cos Ω| > 0.9995 or one of them is 0.

    Args:
        base: gives adapters something to stand on, and the dtype; it does not count otherwise.
        tensors: of two models.
        weights: w₁ and w₂, 0 or more and not both 0; a single number means the middle.
        dtype: of the result; the base's when None.

    Raises:
        ConfigError: other than two models, or weights out of range.
    """
    vectors = TaskVectors(base, tensors)
    if vectors.models != 2:
        raise ConfigError(explain("slerp", "2 models", vectors.models, "merge them pair by pair, or take linear"))
    first, second = per_model("weights", weights, 2)
    if min(first, second) < 0 or first + second <= 0:
        raise ConfigError(explain("weights", "0 or more, and not both 0, for slerp", [first, second]))
    t, squares = second / (first + second), [0.0, 0.0, 0.0]
    for at in vectors.blocks():
        one, two = vectors.tensor(0, at).double(), vectors.tensor(1, at).double()
        squares = [
            total + float(a @ b) for total, (a, b) in zip(squares, ((one, one), (two, two), (one, two)), strict=True)
        ]
    norms = math.sqrt(squares[0] * squares[1])
    cosine = squares[2] / norms if norms else 1.0
    shares = (1 - t, t)
    if abs(cosine) <= _NEARLY_PARALLEL:
        angle = math.acos(cosine)
        shares = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
    merged = torch.empty(vectors.n, dtype=dtype or base.dtype)
    for at in vectors.blocks():
        merged[at] = vectors.tensor(0, at).mul_(shares[0]).add_(vectors.tensor(1, at), alpha=shares[1])
    return merged.view(vectors.shape)


def dare_linear(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    density: Numbers = 0.2,
    weights: Numbers = 1.0,
    lam: float = 1.0,
    seed: int = 0,
    name: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """θ₀ + λ Σ wᵢ τ̃ᵢ (Yu et al. 2024): of τ̃ᵢ each number stays with probability `density`, divided by it, else is 0."""
    vectors = TaskVectors(base, tensors)
    return _sum(vectors, _dropping(vectors, density, seed, name), weights, lam, dtype or base.dtype)


def dare_ties(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    density: Numbers = 0.2,
    weights: Numbers = 1.0,
    lam: float = 1.0,
    election: str = "mass",
    normalize: str = "count",
    seed: int = 0,
    name: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """TIES with the random drop and rescaling of `dare_linear` in place of trimming (Yu et al. 2024, §3)."""
    vectors = TaskVectors(base, tensors)
    sparsify = _dropping(vectors, density, seed, name)
    return consensus(
        vectors, sparsify, weights=weights, lam=lam, election=election, normalize=normalize, dtype=dtype or base.dtype
    )


def breadcrumbs(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    density: Numbers = 0.2,
    gamma: float = 0.01,
    weights: Numbers = 1.0,
    lam: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """θ₀ + λ Σ wᵢ τ̂ᵢ (Davari & Belilovsky 2024): outliers and small changes are both left out.

    Of the n magnitudes of τᵢ the largest ⌊gamma · n⌋ are zeroed, the share `density` below them stays, the rest is
    zeroed; equal magnitudes in order of their index. Where density + gamma > 1, fewer outliers are left out.
    """
    vectors = TaskVectors(base, tensors)
    return _sum(vectors, _band(vectors, density, gamma), weights, lam, dtype or base.dtype)


def della(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    density: Numbers = 0.2,
    epsilon: float = 0.1,
    weights: Numbers = 1.0,
    lam: float = 1.0,
    election: str = "mass",
    normalize: str = "count",
    seed: int = 0,
    name: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """DELLA (Deep et al. 2024): a random drop that spares large magnitudes, then TIES' election and mean.

    In each row (along the last axis) a number stays with probability p = density + epsilon · (r/(m−1) − ½), r its rank
    by magnitude from 0, m the length of the row, and is divided by p; equal magnitudes rank in order of their index.

    Raises:
        ConfigError: density ± epsilon/2 leaves (0, 1].
    """
    row = base.shape[-1] if base.dim() else 1
    vectors = TaskVectors(base, tensors, row=max(1, row))
    sparsify = _sparing(vectors, density, epsilon, max(1, row), seed, name)
    return consensus(
        vectors, sparsify, weights=weights, lam=lam, election=election, normalize=normalize, dtype=dtype or base.dtype
    )


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        merge: the function.
        about: a line for the help.
        uses: the settings it knows, of density, weights, lam, election, normalize, trim, epsilon, gamma, seed.
        base: whether it needs one; without one the first model stands in.
    """

    merge: Callable[..., Tensor]
    about: str
    uses: frozenset[str]
    base: bool = True


_SUM = frozenset({"weights", "lam"})
_VOTE = _SUM | {"density", "election", "normalize"}
METHODS: dict[str, Method] = {
    "ties": Method(ties, "trim, elect signs, average those that agree (Yadav et al. 2023)", _VOTE | {"trim"}),
    "linear": Method(linear, "weighted average (Wortsman et al. 2022); no base needed", _SUM, base=False),
    "task_arithmetic": Method(task_arithmetic, "weighted sum of task vectors (Ilharco et al. 2023)", _SUM),
    "slerp": Method(
        slerp, "two models, along the arc (Shoemake 1985); no base needed", frozenset({"weights"}), base=False
    ),
    "dare_linear": Method(dare_linear, "random drop, rescale, sum (Yu et al. 2024)", _SUM | {"density", "seed"}),
    "dare_ties": Method(dare_ties, "random drop, rescale, elect, average (Yu et al. 2024)", _VOTE | {"seed"}),
    "breadcrumbs": Method(
        breadcrumbs, "leave out outliers and small changes, sum (Davari & Belilovsky 2024)", _SUM | {"density", "gamma"}
    ),
    "della": Method(
        della, "drop by rank of magnitude, rescale, elect, average (Deep et al. 2024)", _VOTE | {"epsilon", "seed"}
    ),
}
"""Every method by its name; `mergekit:NAME` hands over to one of mergekit's."""


def _sum(vectors: TaskVectors, sparsify: Sparsifier, weights: Numbers, lam: float, dtype: torch.dtype) -> Tensor:
    """θ₀ + λ Σ wᵢ τ̂ᵢ."""
    shares = per_model("weights", weights, vectors.models)
    merged = torch.empty(vectors.n, dtype=dtype)
    for at in vectors.blocks():
        total = torch.zeros(at.stop - at.start)
        for index, weight in enumerate(shares):
            delta = vectors.delta(index, at)
            sparsify(index, at, delta)
            total.add_(delta, alpha=weight)
        merged[at] = torch.add(vectors.base(at), total, alpha=lam)
    return merged.view(vectors.shape)


def generator(seed: int, name: str, index: int) -> torch.Generator:
    """The random numbers of one tensor of one model."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _dropping(vectors: TaskVectors, density: Numbers, seed: int, name: str) -> Sparsifier:
    """Keeps each number with a probability, and divides by it."""
    densities = per_model("density", density, vectors.models)
    generators = [generator(seed, name, index) for index in range(vectors.models)]

    def drop(index: int, at: slice, delta: Tensor) -> None:
        share = densities[index]
        if share < 1:
            delta.mul_(torch.rand(len(delta), generator=generators[index]).lt_(share)).div_(share)

    return untouched if vectors.n == 1 else drop


def _band(vectors: TaskVectors, density: Numbers, gamma: float) -> Sparsifier:
    """Keeps the magnitudes between the outliers and the small ones."""
    n = vectors.n
    inner, outer = [], []
    for index, share in enumerate(per_model("density", density, vectors.models)):
        count = kept(n, share)
        outliers = min(int(gamma * n), n - count)
        inner.append(vectors.cut(index, outliers + count))
        outer.append(vectors.cut(index, outliers) if outliers else None)
    wide = Trim(inner)
    narrow = Trim([one or inner[0] for one in outer])

    def keep(index: int, at: slice, delta: Tensor) -> None:
        largest = None
        if outer[index] is not None:
            largest = delta.clone()
            narrow(index, at, largest)
        wide(index, at, delta)
        if largest is not None:
            delta.sub_(largest)

    return keep


def _sparing(vectors: TaskVectors, density: Numbers, epsilon: float, row: int, seed: int, name: str) -> Sparsifier:
    """Keeps each number with a probability that grows with its rank in its row, and divides by it."""
    densities = per_model("density", density, vectors.models)
    if epsilon < 0 or any(share - epsilon / 2 <= 0 or share + epsilon / 2 > 1 for share in densities):
        expected = "density - epsilon/2 above 0 and density + epsilon/2 up to 1"
        raise ConfigError(explain("epsilon", expected, f"epsilon {epsilon} at density {list(densities)}"))
    generators = [generator(seed, name, index) for index in range(vectors.models)]

    def drop(index: int, at: slice, delta: Tensor) -> None:
        order = delta.view(-1, row).abs().argsort(dim=1, stable=True)
        steps = torch.linspace(-epsilon / 2, epsilon / 2, row) if row > 1 else torch.zeros(1)
        stay = torch.empty(order.shape).scatter_(1, order, steps.expand(order.shape)).add_(densities[index]).view(-1)
        delta.mul_(torch.rand(len(delta), generator=generators[index]).lt_(stay)).div_(stay)

    return untouched if vectors.n == 1 else drop
