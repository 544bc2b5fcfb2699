"""A request on its way: what of its output can be handed out, and what may still turn out to end it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from serving.batch import Batch, Choice, Seat
from serving.prefill import Prompt, not_finite, read_on
from serving.requests import Done, Finish, PromptRead, RowTrace, Stops, TextStops, Timing, Token
from serving.tickets import Ticket
from synapse_arch import SynapseState
from synapse_arch.model.sampling import StopMatcher


@dataclass(eq=False)
class Held:
    """A token that may be the beginning of what ends the output.

    Attributes:
        choice: the token.
        before: the row's state before it was read; None where it cannot be such a beginning.
        event: what will be handed out, once it has been read.
    """

    choice: Choice
    before: SynapseState | None
    event: Token | None = None


@dataclass(eq=False)
class Running:
    """A request that has a slot.

    Attributes:
        ticket: where its events go.
        seat: how far it is.
        row: its slot.
        reader: of the prompt; None when that is done.
        submitted: when it came, by `time.perf_counter`.
    """

    ticket: Ticket
    seat: Seat
    row: int
    reader: Generator[None, None, Prompt] | None
    submitted: float

    def __post_init__(self) -> None:
        request = self.ticket.request
        self.stops: Stops = StopMatcher(request.sampling.stop) if request.stops is None else request.stops
        self.left: Callable[[], Sequence[int]] = self.stops.left if isinstance(self.stops, TextStops) else tuple
        self.held: deque[Held] = deque()
        self.started, self.read_at = time.perf_counter(), 0.0
        self.chosen = self.returned = 0

    def opened(self, prompt: Prompt) -> None:
        """The prompt has been read."""
        self.reader, self.read_at = None, time.perf_counter()
        request = self.ticket.request
        trace = None
        if request.trace is not None and prompt.trace is not None:
            trace = RowTrace(prompt.trace, 0, request.trace)
        seconds, queued = self.read_at - self.started, self.started - self.submitted
        logprobs = prompt.tokens if request.echo_logprobs else None
        self.ticket.put(PromptRead(trace, logprobs, seconds, queued))

    def push(self, choice: Choice, batch: Batch) -> SynapseState | None:
        """Takes the next token; where a stop sequence ends with it, the state that has read the output before that.

        Raises:
            StateError: the logits it was drawn from are not finite.
        """
        if not math.isfinite(choice.logprob):
            raise not_finite(f"log-probability {choice.logprob}")
        found = self.stops.push(choice.token)
        if found.matched:
            state: SynapseState | None = None
            for _ in range(found.matched - 1):
                state = self.held.pop().before
            return read_on(batch.model, batch.snapshot(self.row) if state is None else state, self.left())
        self.release(found.begun - 1)
        self.held.append(Held(choice, batch.snapshot(self.row) if found.begun else None))
        self.chosen += 1
        return None

    def was_read(self, trace: RowTrace | None, batch: Batch) -> SynapseState | None:
        """The last token has been read; where no more were asked for, the state that has read the output."""
        last = self.held[-1]
        last.event = Token(*last.choice, trace)
        if last.before is None:
            self.release(0)
        if self.chosen < self.ticket.request.sampling.max_tokens:
            return None
        return batch.snapshot(self.row)

    def release(self, keep: int) -> None:
        """Hands out what was held, but for the last `keep` tokens."""
        while len(self.held) > max(keep, 0):
            event = self.held.popleft().event
            assert event is not None, "a token is handed out when it has been read"
            self.returned += 1
            self.ticket.put(event)

    def finish(self, why: Finish, state: SynapseState | None) -> Done:
        """Hands out what remains and says that this was all."""
        if why != "cancelled":
            self.release(0)
        now = time.perf_counter()
        read_at = self.read_at or now
        timing = Timing(self.started - self.submitted, read_at - self.started, now - read_at)
        read = len(self.ticket.request.prompt) if self.reader is None else self.seat.position - self.seat.first
        done = Done(why, state, read, self.returned, timing)
        self.ticket.put(done)
        return done
