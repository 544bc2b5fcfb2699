"""Facts told once: keys of two symbols and a value, told in any order, again with another value, asked after a while.

Tokens: SYMBOLS first symbols, SYMBOLS second ones, VALUES values, FILLERS words that mean nothing. A fact is told as
first, second, value; a question is first, second, and the answer is predicted at second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SYMBOLS = VALUES = FILLERS = 16
VOCABULARY = 2 * SYMBOLS + VALUES + FILLERS
IGNORED = -100


class Facts(NamedTuple):
    """Rows of facts and questions."""

    told: Tensor
    """(B, 3 tellings) tokens."""
    asked: Tensor
    """(B, 2 questions) tokens."""
    answers: Tensor
    """(B, 2 questions) the value last told where it is to be predicted, else IGNORED."""
    first: Tensor
    """(B, 2 questions) the same with the value told first."""


def keys(*, seen: bool) -> Tensor:
    """The pairs used in training, or the half that is kept from it: first * SYMBOLS + second."""
    pairs = torch.randperm(SYMBOLS**2, generator=torch.Generator().manual_seed(0))
    return pairs[SYMBOLS**2 // 2 :] if seen else pairs[: SYMBOLS**2 // 2]


def filler(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """(B, length) tokens that mean nothing."""
    return torch.randint(VOCABULARY - FILLERS, VOCABULARY, (rows, length), generator=generator)


def make_facts(
    generator: torch.Generator, pairs: Tensor, rows: int, facts: int, *, questions: int | None = None, retold: int = 0
) -> Facts:
    """Random facts told in random order, some of them twice, and questions about distinct ones in another order.

    Args:
        generator: where all randomness comes from.
        pairs: the keys to choose from.
        rows: B.
        facts: distinct keys a row.
        questions: how many of them are asked; None for all.
        retold: how many of them are told a second time, with a value drawn anew.
    """
    chosen = _distinct(generator, pairs, rows, facts)
    events = torch.cat([torch.arange(facts).expand(rows, -1), _shuffled(generator, rows, facts)[:, :retold]], 1)
    events = events.gather(1, _shuffled(generator, rows, facts + retold))
    values = torch.randint(VALUES, events.shape, generator=generator)
    asked = _shuffled(generator, rows, facts)[:, :questions]
    return _render(chosen, events, values, asked)


def make_overwritten(generator: torch.Generator, pairs: Tensor, rows: int, *, between: int, after: int = 0) -> Facts:
    """One key told twice with different values, other facts between the tellings and after them; only it is asked.

    Args:
        generator: where all randomness comes from.
        pairs: the keys to choose from.
        rows: B.
        between: other facts between the two tellings.
        after: other facts after the second.
    """
    facts = 1 + between + after
    chosen = _distinct(generator, pairs, rows, facts)
    others = torch.arange(1, facts)
    zero = torch.zeros(1, dtype=torch.int64)
    events = torch.cat([zero, others[:between], zero, others[between:]]).expand(rows, -1)
    values = torch.randint(VALUES, events.shape, generator=generator)
    step = torch.randint(1, VALUES, (rows,), generator=generator)
    values[:, between + 1] = (values[:, 0] + step) % VALUES
    return _render(chosen, events, values, torch.zeros(rows, 1, dtype=torch.int64))


def _shuffled(generator: torch.Generator, rows: int, count: int) -> Tensor:
    """(B, count) a random order a row."""
    return torch.rand(rows, count, generator=generator).argsort(1)


def _distinct(generator: torch.Generator, pairs: Tensor, rows: int, facts: int) -> Tensor:
    return pairs[_shuffled(generator, rows, len(pairs))[:, :facts]]


def _render(chosen: Tensor, events: Tensor, values: Tensor, asked: Tensor) -> Facts:
    """Facts as tokens: keys (B, n), which of them is told when (B, E) with its value, and which are asked (B, Q)."""
    last, first = torch.zeros_like(chosen), torch.zeros_like(chosen)
    for t in range(events.shape[1]):
        last.scatter_(1, events[:, t : t + 1], values[:, t : t + 1])
    for t in reversed(range(events.shape[1])):
        first.scatter_(1, events[:, t : t + 1], values[:, t : t + 1])
    told, question = chosen.gather(1, events), chosen.gather(1, asked)
    return Facts(
        torch.stack([*_symbols(told), values + 2 * SYMBOLS], -1).flatten(1),
        torch.stack(_symbols(question), -1).flatten(1),
        _at_second(last.gather(1, asked)),
        _at_second(first.gather(1, asked)),
    )


def _symbols(pairs: Tensor) -> list[Tensor]:
    return [pairs // SYMBOLS, pairs % SYMBOLS + SYMBOLS]


def _at_second(values: Tensor) -> Tensor:
    return torch.stack([torch.full_like(values, IGNORED), values + 2 * SYMBOLS], -1).flatten(1)
