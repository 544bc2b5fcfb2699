"""How the next token is drawn from the logits, and when the output ends. B rows, V vocabulary."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    The order is: repetition penalty, temperature, top_k, top_p.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn; None for all, and so is a k above the vocabulary.
        top_p: only the smallest set of likeliest tokens whose probability reaches p is drawn; None for all.
        repetition_penalty: positive logits of tokens seen in the prompt or the output are divided by it, negative
            ones multiplied (CTRL, Keskar et al. 2019); 1 for none. What only `state` has read is not known here.
        stop: sequences of token ids that end the output, found across steps; they are never part of the output.
        seed: makes the draws repeatable; None takes one from torch's global generator.
        max_tokens: most tokens of output; 0 only reads the prompt.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    max_tokens: int = 256

    def __post_init__(self) -> None:
        top_p = 1.0 if self.top_p is None else self.top_p
        _require("temperature", _is_number(self.temperature) and self.temperature >= 0, "0 or more", self.temperature)
        _require("top_k", self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1), "1 or more", self.top_k)
        _require("top_p", _is_number(top_p) and 0 < top_p <= 1, "a number in (0, 1]", self.top_p)
        penalty = self.repetition_penalty
        _require("repetition_penalty", _is_number(penalty) and penalty > 0, "a number above 0", penalty)
        sequences = isinstance(self.stop, tuple) and all(
            isinstance(ids, tuple) and ids and all(_is_int(token) and token >= 0 for token in ids) for ids in self.stop
        )
        _require("stop", sequences, "a tuple of non-empty tuples of token ids", self.stop)
        in_range = self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63)
        _require("seed", in_range, "an integer from 0 to 2**63 - 1", self.seed)
        _require("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 0, "0 or more", self.max_tokens)


class Found(NamedTuple):
    """What ends at the last token of an output."""

    matched: int
    """Length of the stop sequence that ends here, 0 for none."""
    begun: int
    """Length of the longest beginning of a stop sequence that ends here."""


class StopMatcher:
    """Looks for stop sequences at the end of a growing output."""

    def __init__(self, stop: tuple[tuple[int, ...], ...]) -> None:
        self._stop = stop
        self._tail: deque[int] = deque(maxlen=max(map(len, stop), default=0))

    def push(self, token: int) -> Found:
        """Takes the next token of the output; the longest of several matches counts."""
        self._tail.append(token)
        tail = tuple(self._tail)
        matched = (len(ids) for ids in self._stop if tail[-len(ids) :] == ids)
        begun = (n for ids in self._stop for n in range(1, len(ids)) if tail[-n:] == ids[:n])
        return Found(max(matched, default=0), max(begun, default=0))


def draw_tokens(scores: Tensor, sampling: Sampling, at: Tensor) -> Tensor:
    """One token a row (B,) from scores (B, V) by inverting the distribution function at `at` (B,) in [0, 1)."""
    if sampling.temperature == 0:
        return scores.argmax(-1)
    scores = (scores - scores.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)  # 0 in float32 below that
    order = None
    if sampling.top_k is not None:
        scores, order = scores.topk(min(sampling.top_k, scores.shape[-1]))
    elif sampling.top_p is not None:
        scores, order = scores.sort(descending=True, stable=True)
    chances = scores.softmax(-1)
    if sampling.top_p is not None:
        least = max(sampling.top_p, torch.finfo(chances.dtype).tiny)  # the likeliest token is drawn whatever top_p is
        chances = torch.where(chances.cumsum(-1) - chances < least, chances, 0.0)
    reached = chances.cumsum(-1)
    total = reached[:, -1:]
    target = torch.minimum(at[:, None] * total, total.nextafter(torch.zeros_like(total)))  # below the total
    index = (reached <= target).sum(-1, keepdim=True)
    return (index if order is None else order.gather(1, index))[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty on logits (B, V) where `seen` (B, V) is True; no penalty makes a logit infinite."""
    info = torch.finfo(logits.dtype)
    most, penalty = info.max / 2, min(max(penalty, info.tiny), info.max)
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-most, most)
    return torch.where(seen, changed, logits)


def row_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """One generator a row, seeded from (seed, row) alone; without a seed, from torch's global generator."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
    scatter = 0x9E3779B97F4A7C15  # splitmix64's increment: neighbouring seeds and rows stay apart
    return [torch.Generator("cpu").manual_seed((seed + row * scatter) % 2**63) for row in range(rows)]


def uniforms(generators: list[torch.Generator]) -> Tensor:
    """(B,) numbers in [0, 1), one from each generator, on the CPU, so that every device draws the same."""
    draws = [torch.rand((), generator=generator, dtype=torch.float32, device="cpu") for generator in generators]
    return torch.stack(draws)


def _require(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ConfigError(explain(name, expected, repr(got)))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
