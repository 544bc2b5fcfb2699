"""One trace while it grows: events are noted as they come; what passes report is decoded in bunches by another thread.

n kept tokens of one row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import threading
import time
from array import array
from collections.abc import Callable
from statistics import median

from serving.errors import as_api_error
from serving.introspection.columns import Ring
from serving.requests import Done, Event, Failed, GenerationRequest, PromptRead, RowTrace, Token
from synapse_arch.introspection import SynapseTrace

MAKE = 4
"""Passes after which their traces are made, as until then each holds all states of its step."""
BUNCH = 32
"""Passes that are decoded together."""
MOST_WAITING = 64
"""Passes that may wait; whoever adds one more decodes them himself."""
BASE_BYTES = 8192
"""What a record takes besides its tensors."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A trace as it stood at one moment.

    Attributes:
        trace: the kept tokens, B = 1; None where none was traced yet.
        first: position of the run's first token.
        ids, logprobs, entropies: of every token of the run, kept or not; NaN where nothing predicted it.
        prompt_tokens: how many of them are the prompt's.
        finish: how it ended: "stop", "length", "cancelled", "failed"; None while it runs.
        error: why it failed, as its client is told; None where it did not.
        overflow: tokens that made room for later ones.
        seconds: "queue", "ttft", "itl_p50", "trace"; None where there is none yet.
        version: grows with every event.
    """

    trace: SynapseTrace | None
    first: int
    ids: array[int]
    logprobs: array[float]
    entropies: array[float]
    prompt_tokens: int
    finish: str | None
    error: str | None
    overflow: int
    seconds: dict[str, float | None]
    version: int


class TraceRecord:
    """A trace; `TraceStore.open` makes one.

    Args:
        trace_id: its name.
        request: what is run. Its prompt, state and interventions are the snapshot that replays start from.
        request_id: the name of the HTTP request.
        session_id: the session it started from.
        owner: who may see it.
        seed: what the run's draws come from.
        most_tokens: tokens it keeps, the latest.
        most_bytes: bytes that what grows with its tokens may take.
        soon: gets `prepare` called soon, by another thread.
        heard: called at every event.
        grown: called when its size has changed.
    """

    def __init__(
        self,
        trace_id: str,
        request: GenerationRequest,
        *,
        request_id: str,
        session_id: str | None,
        owner: str,
        seed: int,
        most_tokens: int,
        most_bytes: int,
        soon: Callable[[TraceRecord], None],
        heard: Callable[[TraceRecord], None],
        grown: Callable[[TraceRecord], None],
    ) -> None:
        assert request.trace is not None, "only what is traced has a record"
        self.id, self.request, self.spec = trace_id, request, request.trace
        self.request_id, self.session_id, self.owner, self.seed = request_id, session_id, owner, seed
        self.first = 0 if request.state is None else int(request.state.position[0])
        self._soon, self._heard, self._grown = soon, heard, grown
        self._lock, self._decoding = threading.Lock(), threading.Lock()  # taken in the other order
        self._pending: list[RowTrace] = []
        self._ring = Ring(most_tokens, most_bytes)
        self._prompt_tokens = self._version = 0
        self._ids, self._logprobs, self._entropies = array("i"), array("d"), array("d")
        self._opened, self._seconds = time.perf_counter(), 0.0
        self._queued: float | None = None
        self._times: list[float] = []
        self.finish: str | None = None
        self._error: str | None = None
        self._closed = False
        self._watchers: set[Callable[[], None]] = set()

    @property
    def closed(self) -> bool:
        """Whether no event comes any more."""
        return self._closed

    @property
    def level(self) -> str:
        """How deep it looks."""
        return self.spec.level

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the state that replays start from."""
        return 0 if self.request.state is None else self.request.state.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes it takes, the snapshot included."""
        with self._lock:
            tokens = sum(x.itemsize * len(x) for x in (self._ids, self._logprobs, self._entropies))
            return BASE_BYTES + self.snapshot_bytes + tokens + 8 * len(self._times) + self._ring.nbytes

    def add(self, event: Event) -> None:
        """Notes an event of the request's ticket. Cheap: what a pass reported is decoded later."""
        with self._lock:
            if self._closed:
                return
            if isinstance(event, PromptRead):
                self._read_prompt(event)
            elif isinstance(event, Token):
                self._times.append(time.perf_counter())
                self._ids.append(event.id)
                self._logprobs.append(event.logprob)
                self._entropies.append(event.entropy)
            elif isinstance(event, Done):
                self.finish = event.finish
            else:
                self.finish, self._error = "failed", as_api_error(event.error).message
            if isinstance(event, PromptRead | Token) and event.trace is not None:
                self._pending.append(event.trace)
            waiting = len(self._pending)
        if isinstance(event, Done | Failed):
            self.cancel()
            return
        if waiting >= MOST_WAITING:
            self.decode()
        elif waiting and waiting % MAKE == 0:
            self._soon(self)
        self._wake()

    def cancel(self) -> None:
        """Takes no more events; a run that had not ended by then was given up. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed, self.finish = True, self.finish or "cancelled"
        self._soon(self)
        self._wake()

    def prepare(self) -> None:
        """Makes the traces of the passes that wait, and decodes them where they are many or the last."""
        began = time.perf_counter()
        with self._lock:
            passes = list(self._pending)
        for one in passes:
            _ = one.batch
        self._seconds += time.perf_counter() - began
        if self._closed or len(passes) >= BUNCH:
            self.decode()

    def decode(self) -> None:
        """Adds the passes that wait to what is kept."""
        with self._decoding:
            self._gather()
        self._grown(self)

    def view(self) -> View:
        """What is known by now."""
        with self._lock:
            version = self._version
        with self._decoding:
            self._gather()
            trace = self._ring.whole()
        self._grown(self)
        length = 0 if trace is None else trace.length
        wanted = len(range(-self.spec.start % self.spec.every, length, self.spec.every))
        kept = 0 if trace is None else len(trace.positions)
        with self._lock:
            gaps = [b - a for a, b in itertools.pairwise(self._times)]
            seconds = {
                "queue": self._queued,
                "ttft": self._times[0] - self._opened if self._times else None,
                "itl_p50": median(gaps) if gaps else None,
                "trace": self._seconds,
            }
            return View(
                trace, self.first, self._ids[:], self._logprobs[:], self._entropies[:], self._prompt_tokens,
                self.finish, self._error, wanted - kept, seconds, version,
            )  # fmt: skip

    def tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The prompt and the output so far."""
        with self._lock:
            ids = tuple(self._ids)
            return ids[: self._prompt_tokens], ids[self._prompt_tokens :]

    async def changed(self, version: int, timeout: float) -> bool:
        """Waits until it is newer than `version` or closed; False where that did not happen in time (seconds)."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(arrived.set)

        with self._lock:
            if self._version > version or self._closed:
                return True
            self._watchers.add(wake)
        try:
            await asyncio.wait_for(arrived.wait(), timeout)
        except TimeoutError:
            return False
        finally:
            with self._lock:
                self._watchers.discard(wake)
        return True

    def _read_prompt(self, event: PromptRead) -> None:
        self._queued = event.queued
        scores = event.logprobs or []
        unknown = [math.nan] * (len(self.request.prompt) - len(scores))
        self._ids.extend(self.request.prompt)
        self._logprobs.extend([*unknown, *(_number(score.logprob) for score in scores)])
        self._entropies.extend([*unknown, *(_number(score.entropy) for score in scores)])
        self._prompt_tokens = len(self.request.prompt)

    def _gather(self) -> None:
        with self._lock:
            passes, self._pending = self._pending, []
        if passes:
            began = time.perf_counter()
            self._ring.add(passes)
            if self._closed:
                self._ring.whole()
            self._seconds += time.perf_counter() - began

    def _wake(self) -> None:
        self._heard(self)
        with self._lock:
            self._version += 1
            watchers = list(self._watchers)
        for wake in watchers:
            wake()


def _number(value: float | None) -> float:
    return math.nan if value is None else value
