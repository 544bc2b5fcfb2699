"""TIES: trim, elect, merge (Yadav et al. 2023), as a function over tensors and as a program.

    python -m merge.ties --base BASE --models A B C --density 0.2 --weights 1 1 1 --lambda 1.0 --out OUT

Of each model's task vector τᵢ = θᵢ − θ₀ the share `density` with the largest magnitudes stays: τ̂ᵢ. Then, of each
number,

    δᵢ = wᵢ τ̂ᵢ                        weighted
    γ = sgn Σ δᵢ  or  sgn Σ sgn δᵢ     the elected sign, by mass or by count; +1 where that is 0
    τ = Σ_{sgn δᵢ = γ} δᵢ / N          N = how many agree, or the sum of the weights of those that agree
    θ = θ₀ + λ τ

With equal weights both elections and normalisations are those of the paper, of peft and of mergekit; with others
`election="mass", normalize="weights"` is mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge.vectors import Given, Sparsifier, TaskVectors, Trim, per_model, trimming, untouched
from synapse_arch.errors import ConfigError, explain

ELECTIONS = ("mass", "count")
NORMALIZATIONS = ("count", "weights")


def ties(
    base: Tensor,
    tensors: Sequence[Given],
    *,
    density: float | Sequence[float] = 0.2,
    weights: float | Sequence[float] = 1.0,
    lam: float = 1.0,
    election: str = "mass",
    normalize: str = "count",
    trim: Trim | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Merges one tensor of several models as TIES does.

    Args:
        base: θ₀, of any shape and floating dtype.
        tensors: θᵢ of the same shape; a `Delta` stands for τᵢ itself.
        density: share of each τᵢ that is kept: exactly max(1, ⌊density · n⌋) of its n numbers; equal magnitudes in
            order of their index. One for all models or one each.
        weights: wᵢ ≥ 0, one for all models or one each.
        lam: λ.
        election: "mass" or "count".
        normalize: "count" or "weights".
        trim: what is kept instead of each tensor's own share; then `density` does not count.
        dtype: of the result; the base's when None. Everything is computed in float32.

    Returns:
        θ, a new tensor.

    Raises:
        ConfigError: a value out of range.
        ShapeError: shapes differ, or a tensor is not floating.

    >>> base = torch.zeros(4)
    >>> ties(base, [torch.tensor([4.0, 1.0, -3.0, 0.5]), torch.tensor([2.0, -6.0, 1.0, 0.1])], density=0.5)
    tensor([ 3., -6., -3.,  0.])
    """
    vectors = TaskVectors(base, tensors)
    sparsify = trimming(vectors, density) if trim is None else trim
    return consensus(
        vectors, sparsify, weights=weights, lam=lam, election=election, normalize=normalize, dtype=dtype or base.dtype
    )


def consensus(
    vectors: TaskVectors,
    sparsify: Sparsifier = untouched,
    *,
    weights: float | Sequence[float],
    lam: float,
    election: str,
    normalize: str,
    dtype: torch.dtype,
) -> Tensor:
    """Elects signs and averages those that agree, of task vectors that `sparsify` has thinned out."""
    shares = per_model("weights", weights, vectors.models)
    if min(shares) < 0:
        raise ConfigError(explain("weights", "0 or more each, as signs are elected", list(shares)))
    if election not in ELECTIONS:
        raise ConfigError(explain("election", " or ".join(ELECTIONS), repr(election)))
    if normalize not in NORMALIZATIONS:
        raise ConfigError(explain("normalize", " or ".join(NORMALIZATIONS), repr(normalize)))
    merged = torch.empty(vectors.n, dtype=dtype)
    for at in vectors.blocks():
        weighted = []
        for index, weight in enumerate(shares):
            delta = vectors.delta(index, at)
            sparsify(index, at, delta)
            weighted.append(delta if weight == 1 else delta.mul_(weight))
        mean = _agreeing_mean(weighted, _elect(weighted, election), shares if normalize == "weights" else None)
        merged[at] = torch.add(vectors.base(at), mean, alpha=lam)
    return merged.view(vectors.shape)


def _elect(weighted: list[Tensor], election: str) -> Tensor:
    """(n,) +1 or −1."""
    votes = torch.zeros_like(weighted[0])
    for delta in weighted:
        votes += delta if election == "mass" else delta.sign()
    return votes.ge_(0).mul_(2).sub_(1)


def _agreeing_mean(weighted: list[Tensor], elected: Tensor, shares: Sequence[float] | None) -> Tensor:
    """(n,) the mean of those with the elected sign, 0 where there are none; the blocks given are used up."""
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for index, delta in enumerate(weighted):
        agreeing = delta.mul_(elected).clamp_(min=0)
        total += agreeing
        divisor.add_(agreeing.sign_(), alpha=1.0 if shares is None else shares[index])
    return total.mul_(elected).div_(divisor.clamp_(min=torch.finfo(torch.float32).tiny))


if __name__ == "__main__":
    import sys

    from merge.cli import main

    sys.exit(main())
