"""How many facts a K × V matrix holds: random unit keys, one of C orthonormal values each, the nearest value read.

The library's own `delta_rule` writes and reads without decay and at full strength. What it should reach is known:
the reading for a key is a signal m at the right value and noise of energy E shared by the C values, so that with the
scores of H independent heads added

    share right = ∫ φ(z) Φ(z + m / σ)^(C−1) dz,    σ² = E / (C H)

- Hebbian: m = 1 and E = (n − 1) / K: every other key overlaps with the asked one by 1/K on average (Hopfield 1982).
- Delta rule at strength 1: a later write along k removes that direction. Walked back from the last write, what is left
  of the asked key shrinks by 1 − 1/K a write, so that a fact of age a has m = p = (1 − 1/K)^a. What is taken away is
  read as the values of later facts, 1 − p, and of the remainder p − p² the facts before take the share
  1 − (1 − 1/K)^(n−1−a). The noise never exceeds one value's energy, however many facts are told.
- Least squares, the best fixed matrix for all facts at once, has no such formula below; it is exact for n <= K.

Orthonormal keys are held exactly up to n = K. A K + 1st must reuse a direction: the delta rule then keeps the last.
B rows, n facts, H heads, K key width, C values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import progress
from synapse_arch.ops import delta_rule
from synapse_arch.ops.delta_rule import Rule

Curve = list[float]


def random_keys(generator: torch.Generator, rows: int, facts: int, heads: int, width: int) -> Tensor:
    """(B, n, H, K) independent directions."""
    return F.normalize(torch.randn(rows, facts, heads, width, generator=generator, dtype=torch.float64), dim=-1)


def orthonormal_keys(generator: torch.Generator, rows: int, facts: int, heads: int, width: int) -> Tensor:
    """(B, n, H, K) of a random orthonormal basis; after K facts it begins again."""
    square = torch.randn(rows, heads, width, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q.transpose(1, 2)
    return basis[:, torch.arange(facts) % width]


def recalled(keys: Tensor, values: Tensor, count: int, rule: Rule) -> Tensor:
    """(B, n) bool: which facts the library's operator gives back when it is asked for all after the last.

    Args:
        keys: (B, n, H, K) of unit length.
        values: (B, n) below `count`.
        count: C.
        rule: "delta" or "hebbian".
    """
    code = F.one_hot(values, count).to(keys.dtype)[:, :, None].expand(-1, -1, keys.shape[2], -1)
    _, matrix = delta_rule(keys, keys, code, torch.ones_like(keys[..., 0]), rule=rule)
    return _nearest(keys, matrix) == values


def recalled_by_least_squares(keys: Tensor, values: Tensor, count: int) -> Tensor:
    """(B, n) bool: the same for the matrix with the least squared error over all facts."""
    code = F.one_hot(values, count).to(keys.dtype)[:, None]
    return _nearest(keys, torch.linalg.pinv(keys.transpose(1, 2)) @ code) == values


def _nearest(keys: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("bnhk,bhkc->bnc", keys, matrix).argmax(-1)


def share_right(signal: Tensor, energy: Tensor, count: int, heads: int) -> Tensor:
    """The formula above, for m and E of any one shape."""
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2)
    ratio = signal / (energy / (count * heads)).clamp(min=1e-12).sqrt()
    return (torch.special.ndtr(z + ratio[..., None]) ** (count - 1) * density).sum(-1) / density.sum()


def reading(facts: int, *, width: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Signal m and noise energy E of the formulas above, (n,) each, in the order of telling."""
    age = torch.arange(facts - 1, -1, -1, dtype=torch.float64)
    if rule == "hebbian":
        return torch.ones_like(age), torch.full_like(age, (facts - 1) / width)
    kept = 1 - 1 / width
    signal = kept**age
    return signal, 1 - signal + signal * (1 - signal) * (1 - kept ** (facts - 1 - age))


def predicted(facts: int, *, heads: int, width: int, count: int, rule: Rule) -> float:
    """The share of `facts` random facts that a memory should give back, on average over their ages."""
    return float(share_right(*reading(facts, width=width, rule=rule), count, heads).mean())


def capacity(
    facts: Sequence[int],
    *,
    heads: Sequence[int] = (1, 2, 4),
    width: int = 32,
    count: int = 16,
    answers: int = 4096,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall against the number of facts: of each rule, measured and predicted, by the number of heads.

    Args:
        facts: the numbers n of facts.
        heads: the numbers H of heads.
        width: K.
        count: C, at most the value width V, which then plays no further part.
        answers: asked for each point, at least.
        seed: of keys and values.
    """
    curves: dict[str, Any] = {}
    for number in progress(heads, "capacity"):
        curves[str(number)] = by_rule = {}
        for rule in ("delta", "hebbian"):
            measured = _measure(facts, number, width, count, answers, seed, random_keys, rule)
            expected = [predicted(n, heads=number, width=width, count=count, rule=rule) for n in facts]
            by_rule[rule] = {"measured": measured, "predicted": expected}
        best = _measure(facts, number, width, count, answers, seed, random_keys, None)
        by_rule["least_squares"] = {"measured": best}
    orthonormal = {
        rule: {"measured": _measure(facts, 1, width, count, answers, seed, orthonormal_keys, rule)}
        for rule in ("delta", "hebbian")
    }
    sizes = {"d_key": width, "values": count, "answers": answers, "seed": seed}
    return {"facts": list(facts), **sizes, "random_keys": curves, "orthonormal_keys": {"1": orthonormal}}


def _measure(
    facts: Sequence[int],
    heads: int,
    width: int,
    count: int,
    answers: int,
    seed: int,
    make_keys: Callable[[torch.Generator, int, int, int, int], Tensor],
    rule: Rule | None,
) -> Curve:
    """The share right at each number of facts; rule None is least squares. Every rule meets the same keys."""
    shares = []
    for n in facts:
        generator = torch.Generator().manual_seed(seed)
        rows = -(-answers // n)
        keys = make_keys(generator, rows, n, heads, width)
        values = torch.randint(count, (rows, n), generator=generator)
        right = recalled_by_least_squares(keys, values, count) if rule is None else recalled(keys, values, count, rule)
        shares.append(float(right.double().mean()))
    return shares
