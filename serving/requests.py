"""What the engine takes and what it gives back; nothing here knows of HTTP or of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

from serving.rows import StepTrace, cut_trace, pick_tokens
from synapse_arch import Sampling, SynapseState, TraceSpec
from synapse_arch.errors import ConfigError, SynapseError, explain
from synapse_arch.introspection import SynapseTrace
from synapse_arch.model.sampling import Found

MOST_ALTERNATIVES = 20
MOST_INTERVENTIONS = 16

Finish = Literal["stop", "length", "cancelled"]
Kind = Literal[
    "force_expert",
    "ban_expert",
    "bias_expert",
    "pathways",
    "scale_memory",
    "clear_memory",
    "freeze_writes",
    "steer",
    "patch",
]
_NEEDS: dict[str, tuple[str, ...]] = {
    "force_expert": ("expert",),
    "ban_expert": ("expert",),
    "bias_expert": ("expert", "value"),
    "pathways": ("vector",),
    "scale_memory": ("value",),
    "clear_memory": (),
    "freeze_writes": (),
    "steer": ("value", "vector"),
    "patch": ("vector",),
}
"""The fields that each kind of intervention has; the others must be None."""


class QueueFull(SynapseError):  # noqa: N818 - a state of the server, not a fault
    """The queue has no room now.

    Attributes:
        retry_after: seconds after which it will probably have.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(SynapseError):  # noqa: N818 - a state of the server, not a fault
    """The engine is shutting down."""


class EngineFault(SynapseError):  # noqa: N818 - no fault of the caller's
    """Something failed inside the engine while it worked on a request."""


class Stops(Protocol):
    """Looks for what ends an output; `StopMatcher` is one. It serves one request."""

    def push(self, token: int) -> Found:
        """Takes the next token: how many of the last tokens end the output here, how many may begin to."""
        ...


@runtime_checkable
class TextStops(Stops, Protocol):
    """Stops that may begin inside a token."""

    def left(self) -> Sequence[int]:
        """Once matched: text in front of the stop, of the token in which it begins, as tokens of its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change to what the model does, in force while it reads the tokens at positions start to end.

    Attributes:
        kind: force_expert, ban_expert: an expert is always, never chosen; bias_expert: `value` is added to its rank
            (never to its weight); pathways: `vector` is added to the router's pathways; scale_memory: what the
            fast-weight memory answers is multiplied by `value`; clear_memory: the memory is emptied once, in front of
            the first of the positions; freeze_writes: the memory neither decays nor learns; steer: `value` · `vector`
            is added to the residual stream behind the layer; patch: `vector` takes the stream's place there, before any
            steering.
        layer: which layer; None for all.
        expert: which expert.
        value: see `kind`.
        vector: (D,); for pathways (E · E,), row i holding what is added where i ranks first, or (L · E · E,) for all
            layers.
        start: the first position, counted from the first token that the row's state has read.
        end: the position after the last one; None for no end.

    Raises:
        ConfigError: an unknown kind, a field that the kind lacks or does not have, or a value out of its range.
    """

    kind: Kind
    layer: int | None = None
    expert: int | None = None
    value: float | None = None
    vector: tuple[float, ...] | None = None
    start: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(explain("intervention.kind", f"one of {', '.join(get_args(Kind))}", repr(self.kind)))
        for name in ("expert", "value", "vector"):
            if (getattr(self, name) is not None) != (name in _NEEDS[self.kind]):
                expected = "a value" if name in _NEEDS[self.kind] else "none"
                raise ConfigError(explain(f"{self.kind}.{name}", expected, repr(getattr(self, name))))
        for name in ("layer", "expert", "start", "end"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
                raise ConfigError(explain(f"{self.kind}.{name}", "an integer of 0 or more", repr(number)))
        if self.end is not None and self.end <= self.start:
            raise ConfigError(explain(f"{self.kind}.end", f"above start={self.start}", self.end))
        if self.kind == "clear_memory" and self.end is not None:
            raise ConfigError(explain("clear_memory.end", "none", self.end, "a memory is emptied once, at `start`"))
        for number in (*(() if self.value is None else (self.value,)), *(self.vector or ())):
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ConfigError(explain(self.kind, "finite numbers", repr(number)))

    def active(self, position: int) -> bool:
        """Whether it is in force while the token at `position` is read."""
        return self.start <= position and (self.end is None or position < self.end)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One sequence to read and go on with.

    Attributes:
        prompt: token ids; they may be none where `state` has read something and nothing is to be written.
        sampling: how to draw, and how many tokens; without a seed one is drawn and reported by the ticket.
        state: one row, never changed; None for a fresh one.
        trace: what to record of every pass.
        interventions: at most 16.
        top_logprobs: how many of the likeliest tokens to report with each token, 0 to 20.
        echo_logprobs: the prompt's tokens are scored too.
        stops: takes the place of `sampling.stop`.

    Raises:
        ConfigError: a value out of its range.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    state: SynapseState | None = None
    trace: TraceSpec | None = None
    interventions: tuple[Intervention, ...] = ()
    top_logprobs: int = 0
    echo_logprobs: bool = False
    stops: Stops | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.top_logprobs <= MOST_ALTERNATIVES:
            raise ConfigError(explain("top_logprobs", f"0 to {MOST_ALTERNATIVES}", self.top_logprobs))
        if len(self.interventions) > MOST_INTERVENTIONS:
            raise ConfigError(explain("interventions", f"at most {MOST_INTERVENTIONS}", len(self.interventions)))
        if not self.prompt and (self.state is None or self.sampling.max_tokens > 0):
            remedy = "give at least one token; a state alone does not hold what comes next"
            raise ConfigError(explain("prompt", "token ids", "none", remedy))


@dataclass(frozen=True, eq=False)
class RowTrace:
    """One row of a batch's trace, cut out when it is asked for: do that outside the engine's thread.

    Attributes:
        source: the whole batch's trace, or what makes it.
        row: which of its rows.
        spec: what the row's request asked to see; others in the batch may have asked for more.
        kept: whether it has the tokens; where the request's stride leaves them out, they still count.
    """

    source: SynapseTrace | StepTrace
    row: int
    spec: TraceSpec
    kept: bool = True

    @property
    def batch(self) -> SynapseTrace:
        """The whole batch's trace."""
        return self.source.get() if isinstance(self.source, StepTrace) else self.source

    def get(self) -> SynapseTrace:
        """The row's trace, B = 1, in memory of its own."""
        trace = cut_trace(self.batch, self.row, self.spec)
        return trace if self.kept else pick_tokens(trace, slice(0))


@dataclass(frozen=True)
class PromptToken:
    """What the model thought of one token of the prompt.

    Attributes:
        id: the token.
        logprob: its log-probability (nats); None for the first token read, which nothing predicted.
        entropy: of the distribution it was seen in (nats); None for the first.
        top: the likeliest tokens there with their log-probabilities.
    """

    id: int
    logprob: float | None
    entropy: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class PromptRead:
    """The prompt has been read.

    Attributes:
        trace: the pass over it, where a trace was asked for.
        logprobs: a record a token, where they were asked for.
        seconds: from the slot's allocation to here.
        queued: seconds in front of that.
    """

    trace: RowTrace | None
    logprobs: list[PromptToken] | None
    seconds: float
    queued: float


@dataclass(frozen=True, eq=False)
class Token:
    """One token of output.

    Attributes:
        id: the token.
        logprob: its log-probability (nats) in the model's own distribution, before any sampling option.
        entropy: of that distribution (nats).
        top: the likeliest tokens there with their log-probabilities.
        trace: the step that read this token.
    """

    id: int
    logprob: float
    entropy: float
    top: tuple[tuple[int, float], ...]
    trace: RowTrace | None


@dataclass(frozen=True)
class Timing:
    """Seconds that a request took.

    Attributes:
        queued: until it got a slot.
        prefill: from there until the prompt was read.
        decode: from there to the end.
    """

    queued: float
    prefill: float
    decode: float


@dataclass(frozen=True, eq=False)
class Done:
    """The output is complete.

    Attributes:
        finish: why.
        state: one row that has read the prompt and the output, and no more: the returned tokens, and what is left in
            front of a stop that begins inside a token. None where it was cancelled.
        prompt_tokens: tokens of the prompt that were read: all, unless it was cancelled before.
        output_tokens: tokens that were returned.
        timing: how long it took.
    """

    finish: Finish
    state: SynapseState | None
    prompt_tokens: int
    output_tokens: int
    timing: Timing


@dataclass(frozen=True, eq=False)
class Failed:
    """The request came to nothing; the engine goes on.

    Attributes:
        error: what went wrong.
    """

    error: SynapseError


Event = PromptRead | Token | Done | Failed
