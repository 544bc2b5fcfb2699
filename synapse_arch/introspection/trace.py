"""What a caller asks to see of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, explain

Level = Literal["routes", "gates", "full"]
LEVELS: tuple[str, ...] = get_args(Level)
T = TypeVar("T")
Recorded: TypeAlias = T | Callable[[], T]
"""A record, or what makes it later."""


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """How deep to look, at which layers, and at which tokens of a call.

    Attributes:
        level: "routes" (routing), "gates" (and language-module gates and memory), "full" (and router
            logits and expert activations); each holds all of the previous.
        layers: indices of the layers to trace; None for all.
        every: stride in tokens: offsets 0, every, 2 * every ... of each call are kept (see `start`).
        max_tokens: at most so many offsets are kept a call, the last ones.
        start: what the call's first token counts as in the stride; a call that goes on where another of `start` 0
            and T tokens ended keeps its stride with `start` T.
        later: the pass only notes what its records are made of, and `SynapseOutput.pending` makes them; until that is
            called they hold tensors of the pass, its states included.

    Counts and means over a whole call (load, importance, writes) always cover every unmasked token.

    Raises:
        ConfigError: on an unknown level, a negative or repeated layer, or a size below 1.

    >>> TraceSpec(every=4, max_tokens=3).positions(20).tolist()
    [8, 12, 16]
    """

    level: Level = "routes"
    layers: tuple[int, ...] | None = None
    every: int = 1
    max_tokens: int = 1024
    start: int = 0
    later: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(explain("level", f"one of {', '.join(LEVELS)}", repr(self.level)))
        for name in ("every", "max_tokens"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError(explain(name, "an integer of 1 or more", repr(value)))
        if not _is_int(self.start) or self.start < 0:
            raise ConfigError(explain("start", "an integer of 0 or more", repr(self.start)))
        if self.layers is not None:
            fits = isinstance(self.layers, tuple) and all(_is_int(i) and i >= 0 for i in self.layers)
            if not fits or len(set(self.layers)) != len(self.layers):
                remedy = "use None to trace every layer"
                raise ConfigError(explain("layers", "a tuple of distinct layer indices", repr(self.layers), remedy))

    def wants(self, level: Level) -> bool:
        """True where this spec asks for `level` or deeper."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

    def covers(self, layer: int) -> bool:
        """True where layer number `layer` is to be traced."""
        return self.layers is None or layer in self.layers

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """The kept token offsets of a call of `length` tokens: (n,) int64, ascending, n <= max_tokens."""
        return torch.arange(self._first(length), length, self.every, device=device)

    def count(self, length: int) -> int:
        """How many offsets of a call of `length` tokens are kept: n, known without looking at a tensor."""
        return len(range(self._first(length), length, self.every))

    def keep(self, x: Tensor) -> Tensor:
        """Selects the kept offsets of x (B, T, ...), detached: (B, n, ...).

        A copy whenever T > 1, so that a record never keeps a larger activation alive.
        """
        if x.shape[1] == 1 and not self._first(1):
            return x.detach()
        return x.detach()[:, self._first(x.shape[1]) :: self.every].clone()

    def record(self, make: Callable[[], T]) -> Recorded[T]:
        """What `make` returns, or with `later` `make` itself."""
        return make if self.later else make()

    def _first(self, length: int) -> int:
        first = min(-self.start % self.every, length)
        kept = -(-(length - first) // self.every)
        return first + max(0, kept - self.max_tokens) * self.every


def made(record: Recorded[T]) -> T:
    """The record, now."""
    return record() if callable(record) else record


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
