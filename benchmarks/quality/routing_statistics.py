"""How much two label sequences say about each other, and how much they would by chance.

Text is autocorrelated: labels shuffled one by one say far less about the experts than labels that kept their order
but lost their place. So there are several kinds of chance, from `tokens` (no order at all) to `shifts` (all of it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Draw = Callable[[torch.Generator], Tensor]
Chance = dict[str, float | int | None]

NEAR = 2048
"""Labels turned round by fewer tokens than this would still be near their place."""


class Choices(NamedTuple):
    """The experts that each of N tokens visited."""

    experts: Tensor
    """(N, k) int64, the first choice first."""
    weights: Tensor
    """(N, k), summing to 1 over k."""
    n_experts: int

    @property
    def first(self) -> Choices:
        """The first choice alone, with weight 1."""
        return Choices(self.experts[:, :1], torch.ones_like(self.weights[:, :1]), self.n_experts)


def counts(choices: Choices, labels: Tensor, classes: int) -> Tensor:
    """(E, C) float64: how many tokens of each class each expert got, by weight."""
    table = torch.zeros(choices.n_experts * classes, dtype=torch.float64)
    for slot in range(choices.experts.shape[1]):
        pairs = choices.experts[:, slot] * classes + labels
        weights = choices.weights[:, slot].double() if choices.experts.shape[1] > 1 else None
        table += torch.bincount(pairs, weights, minlength=len(table))
    return table.view(choices.n_experts, classes)


def entropy(amounts: Tensor) -> float:
    """Bits, of the shares that non-negative amounts make."""
    return float(torch.special.entr(amounts.double().flatten() / amounts.sum()).sum()) / math.log(2)


def mutual_information(table: Tensor) -> float:
    """Bits that row and column of a table of counts (E, C) say about each other."""
    return max(0.0, entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table))


def conditional_information(choices: Choices, pairs: Tensor, classes: int, values: int) -> float:
    """Bits that expert and label say about each other once a third thing is known.

    Args:
        choices: of N tokens.
        pairs: (N,) int64, label * values + third.
        classes: labels are below it.
        values: the third is below it.
    """
    joint = counts(choices, pairs, classes * values).view(-1, classes, values)
    parts = entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint) - entropy(joint.sum((0, 1)))
    return max(0.0, parts)


def chance(score: float, scores: Sequence[float]) -> Chance:
    """Where a score stands among those of labels without a place.

    Returns:
        mean, standard deviation and 95 % quantile of the scores; z, by how many standard deviations the true one
        exceeds the mean; p, which share of all, the true one counted in, reaches it; n, how many scores.
    """
    found = torch.tensor(scores, dtype=torch.float64)
    mean, deviation = float(found.mean()), float(found.std(correction=0))
    return {
        "mean": mean,
        "sd": deviation,
        "q95": float(found.quantile(0.95)),
        "z": (score - mean) / deviation if deviation > 0 else None,
        "p": (1 + int((found >= score).sum())) / (1 + len(scores)),
        "n": len(scores),
    }


def shifts(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Labels turned round the stream by a random part of it: order and shares stay, the place goes."""
    near = max(1, min(NEAR, len(labels) // 4))
    return labels.roll(int(torch.randint(near, len(labels) - near + 1, (), generator=generator)))


def tokens(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Labels in random order."""
    return labels[torch.randperm(len(labels), generator=generator)]


def blocks(labels: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """The documents' stretches of labels in random order."""
    parts = labels.split(list(sizes))
    return torch.cat([parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()])


def groups(labels: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Each document takes the class of another: for labels that are one class a document."""
    lengths = torch.tensor(sizes)
    ones = labels[lengths.cumsum(0) - lengths]
    return tokens(ones, generator).repeat_interleave(lengths)


def compare(
    score: Callable[[Tensor], Sequence[float]], labels: Tensor, ways: Mapping[str, Draw], count: int, seed: int
) -> tuple[Sequence[float], list[dict[str, Chance]]]:
    """What `score` gives for the labels, and where each of its numbers stands among those of labels without a place.

    Args:
        score: several numbers of one label sequence.
        labels: the true one.
        ways: by name, how to draw one without a place.
        count: draws of each way.
        seed: of the draws.

    Returns:
        The numbers, and for each of them the `chance` of every way.
    """
    found = score(labels)
    chances: list[dict[str, Chance]] = [{} for _ in found]
    for name, draw in ways.items():
        generator = torch.Generator().manual_seed(seed)
        rows = [score(draw(generator)) for _ in range(count)]
        for number, scores, own in zip(found, zip(*rows, strict=True), chances, strict=True):
            own[name] = chance(number, scores)
    return found, chances


def match(table: Tensor) -> tuple[int, ...]:
    """The column that belongs to each row of a square table so that the chosen cells have the largest sum.

    Shortest augmenting paths with prices (Kuhn 1955; Jonker & Volgenant 1987), O(E³).

    >>> match(torch.tensor([[1.0, 5.0], [4.0, 6.0]]))
    (1, 0)
    """
    cost = (table.max() - table).tolist()
    n = len(cost)
    row_price, column_price, owner = [0.0] * n, [0.0] * (n + 1), [-1] * (n + 1)
    for row in range(n):
        owner[n], column = row, n  # the spare column n starts the path
        reach, before, done = [math.inf] * n, [n] * n, [False] * (n + 1)
        while owner[column] >= 0:
            done[column] = True
            this, free = owner[column], [c for c in range(n) if not done[c]]
            for c in free:
                detour = cost[this][c] - row_price[this] - column_price[c]
                if detour < reach[c]:
                    reach[c], before[c] = detour, column
            nearest = min(free, key=lambda c: reach[c])
            step = reach[nearest]
            for c in range(n + 1):
                if done[c]:
                    row_price[owner[c]] += step
                    column_price[c] -= step
                elif c < n:
                    reach[c] -= step
            column = nearest
        while column != n:
            owner[column], column = owner[before[column]], before[column]
    return tuple(sorted(range(n), key=lambda c: owner[c]))


def agreement(table: Tensor) -> float:
    """Share of the tokens on which two models agree once the experts are matched; table (E, E) counts."""
    columns = torch.tensor(match(table))
    return float(table[torch.arange(len(table)), columns].sum() / table.sum())
