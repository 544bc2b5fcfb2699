"""The engine: one thread owns the model and serves many requests at once, each with the bits it would get alone.

    submit ──► queue ──► a slot: the prompt, read piece by piece between steps ──► steps, one token a row ──► Done

B rows, T tokens.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from serving import interventions
from serving.batch import Batch, seat_for
from serving.prefill import Prompt, read_prompt
from serving.requests import Done, Draining, EngineFault, Failed, Finish, GenerationRequest, QueueFull, Timing
from serving.rows import take_row
from serving.running import Running
from serving.tickets import Ticket
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.errors import ConfigError, SynapseError, explain

__all__ = ["Engine", "EngineStats", "Ticket"]

T = TypeVar("T")
LONGEST_BREAK = 10.0
"""Seconds without a step after which the speed counts as zero."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine is doing.

    Attributes:
        slots: requests that can run at once.
        busy: how many do.
        queued: how many wait.
        tokens_per_second: of output, over the last steps.
        step_seconds: a step's mean duration, over the last steps; 0 before the first.
        steps: steps so far.
        prompt_tokens: read so far, of prompts.
        output_tokens: chosen and read so far.
        finished: requests that ended, by "stop", "length", "cancelled", "failed".
        draining: whether it is shutting down.
        exact: whether outputs are the same bits alone and in any company on this machine.
    """

    slots: int
    busy: int
    queued: int
    tokens_per_second: float
    step_seconds: float
    steps: int
    prompt_tokens: int
    output_tokens: int
    finished: dict[str, int]
    draining: bool
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return asdict(self)


class Engine:
    """Serves requests on one model, which from now on belongs to it.

    Args:
        model: is set to evaluation mode; use it through `run` only.
        slots: requests that run at once.
        queue: requests that may wait for a slot.
        prefill_chunk: tokens of a prompt read between two steps.
        buffer: events that may wait for a reader before its request is given up; a quarter where gates are traced.
        ended: is told of every output that did not fail, on the engine's thread.

    Raises:
        ConfigError: a number below 1 (queue: below 0).

    >>> from serving.requests import GenerationRequest
    >>> from synapse_arch import Sampling, SynapseConfig
    >>> engine = Engine(SynapseModel(SynapseConfig.preset("tiny", n_layers=1, d_model=64)), slots=2)
    >>> ticket = engine.submit(GenerationRequest(prompt=(1, 2, 3), sampling=Sampling(max_tokens=2, seed=0)))
    >>> [type(event).__name__ for event in ticket.wait()]
    ['PromptRead', 'Token', 'Token', 'Done']
    >>> engine.close()
    """

    def __init__(
        self,
        model: SynapseModel,
        *,
        slots: int = 8,
        queue: int = 64,
        prefill_chunk: int = 64,
        buffer: int = 256,
        ended: Callable[[Done], None] | None = None,
    ) -> None:
        for name, value, least in (
            ("slots", slots, 1), ("queue", queue, 0), ("prefill_chunk", prefill_chunk, 1), ("buffer", buffer, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(explain(name, f"{least} or more", value))
        self._model, self._piece, self._room, self._buffer = model.eval(), prefill_chunk, queue, buffer
        self._batch, self._ended = Batch(self._model, slots), ended
        self._waiting: deque[tuple[Ticket, float]] = deque()
        self._jobs: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._running: dict[int, Running] = {}
        self._reading: deque[Running] = deque()
        self._change = threading.Condition()
        self._deadline: float | None = None
        self._finished: Counter[str] = Counter()
        self._steps = self._prompt_tokens = self._output_tokens = 0
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=64)  # when a step ended, how long, tokens
        self._request_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="synapse-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queues a request.

        Returns:
            What its events are read from.

        Raises:
            QueueFull: too many wait already.
            Draining: the engine is shutting down.
            ConfigError, StateError: the model cannot do this.
        """
        self._check(request)
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        traced = request.trace is not None and request.trace.wants("gates")  # such a step holds the memories
        room = max(1, self._buffer // 4) if traced else self._buffer
        ticket = Ticket(request, seed=seed, room=room, wake=self._wake)
        with self._change:
            self._refuse_when_draining()
            free = self._batch.slots - len(self._running)
            if len(self._waiting) >= self._room + free:
                wait = max(1.0, self._request_seconds * (len(self._waiting) + 1) / self._batch.slots)
                got = f"{len(self._waiting)} waiting"
                message = explain("queue", f"at most {self._room} requests waiting", got, f"retry in {wait:.0f} s")
                raise QueueFull(message, retry_after=wait)
            self._waiting.append((ticket, time.perf_counter()))
            self._change.notify()
        return ticket

    def run(self, function: Callable[[SynapseModel], T]) -> Future[T]:
        """Calls a function with the model, on the engine's thread between two steps; everybody waits for it.

        Raises:
            Draining: the engine is shutting down.
        """
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(self._model)
            except BaseException as error:  # the one who asked is to see it, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._change:
            self._refuse_when_draining()
            self._jobs.append((job, future))
            self._change.notify()
        return future

    def close(self, *, drain: float = 0.0) -> None:
        """Takes no more requests, ends those that run and wait, and stops the thread.

        Args:
            drain: seconds in which requests may still end by themselves; what is left then fails.
        """
        with self._change:
            if self._deadline is None:
                self._deadline = time.perf_counter() + drain
            self._change.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        """What it is doing now."""
        recent = list(self._recent)
        spent = sum(seconds for _, seconds, _ in recent)
        fresh = bool(recent) and time.perf_counter() - recent[-1][0] < LONGEST_BREAK
        since = recent[-1][0] - recent[0][0] + recent[0][1] if recent else 0.0
        return EngineStats(
            slots=self._batch.slots,
            busy=len(self._running),
            queued=len(self._waiting),
            tokens_per_second=sum(tokens for *_, tokens in recent) / since if fresh else 0.0,
            step_seconds=spent / len(recent) if recent else 0.0,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            finished=dict(self._finished),
            draining=self._deadline is not None,
            exact=self._batch.exact,
        )

    def _check(self, request: GenerationRequest) -> None:
        config = self._model.config
        ids = [*request.prompt, *(token for sequence in request.sampling.stop for token in sequence)]
        if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ConfigError(explain("token ids", f"0 to {config.vocab_size - 1}", f"{min(ids)} to {max(ids)}"))
        outside = [layer for layer in (request.trace and request.trace.layers) or () if layer >= config.n_layers]
        if outside:
            raise ConfigError(explain("trace.layers", f"0 to {config.n_layers - 1}", outside[0]))
        interventions.check(request.interventions, config)
        if request.state is not None:
            request.state.check_against(self._model, 1, device=self._batch.device)

    def _refuse_when_draining(self) -> None:
        if self._deadline is not None:
            raise Draining("the engine is shutting down and takes no more requests")

    def _wake(self) -> None:
        with self._change:
            self._change.notify()

    # On the worker's thread

    def _work(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:
                logging.getLogger(__name__).exception("a step failed, and with it every request that was running")
                for running in list(self._running.values()):
                    self._fail(running, error)
                self._batch.clear()
        self._stop()

    def _wait(self) -> bool:
        """Waits for something to do; False when it is time to stop."""
        with self._change:
            while not (self._waiting or self._jobs or self._running or self._deadline is not None):
                self._change.wait()
            busy = bool(self._waiting or self._jobs or self._running)
            return self._deadline is None or (busy and time.perf_counter() < self._deadline)

    def _turn(self) -> None:
        """Jobs, who leaves, who comes, a piece of a prompt, a step."""
        while self._jobs:
            self._jobs.popleft()[0]()
        self._drop_cancelled()
        self._admit()
        self._read_piece()
        if len(self._running) > len(self._reading):
            self._step()

    def _drop_cancelled(self) -> None:
        for running in list(self._running.values()):
            if running.ticket.cancelled:
                self._complete(running, "cancelled", None)
        with self._change:
            gone = [entry for entry in self._waiting if entry[0].cancelled]
            for entry in gone:
                self._waiting.remove(entry)
        for ticket, since in gone:
            self._finished["cancelled"] += 1
            timing = Timing(time.perf_counter() - since, 0.0, 0.0)
            done = Done("cancelled", None, 0, 0, timing)
            self._tell(done)
            ticket.put(done)

    def _admit(self) -> None:
        """Gives free slots to those who wait, first come first served."""
        with self._change:
            for row in range(self._batch.slots):
                if row not in self._running and self._waiting:
                    ticket, since = self._waiting.popleft()
                    seat = seat_for(ticket.request, ticket.seed)
                    running = Running(ticket, seat, row, read_prompt(self._model, seat, self._piece), since)
                    self._running[row] = running
                    self._reading.append(running)

    def _read_piece(self) -> None:
        """Reads one piece of one prompt, in turn."""
        if not self._reading:
            return
        running = self._reading.popleft()
        assert running.reader is not None
        try:
            next(running.reader)
        except StopIteration as end:
            self._open(running, end.value)
        except Exception as error:  # whatever it is, it is this request's
            self._fail(running, error)
        else:
            self._reading.append(running)

    def _open(self, running: Running, prompt: Prompt) -> None:
        request = running.ticket.request
        self._prompt_tokens += len(request.prompt)
        running.opened(prompt)
        if request.sampling.max_tokens == 0:
            self._complete(running, "length", take_row(prompt.state, 0, request.trace))
        else:
            self._batch.join(running.row, running.seat, prompt.state, prompt.logits)

    def _step(self) -> None:
        """Chooses a token for every row that has read its prompt, and reads it."""
        began = time.perf_counter()
        chosen = self._batch.choose()
        for row, choice in chosen.items():
            running = self._running[row]
            try:
                if isinstance(choice, Exception):
                    raise choice
                state = running.push(choice, self._batch)
            except Exception as error:  # broken logits, or a draw or a stop matcher that failed
                self._fail(running, error)
            else:
                if state is not None:
                    self._complete(running, "stop", state)
        left = {row: choice for row, choice in chosen.items() if row in self._running}
        tokens = {row: choice.token for row, choice in left.items() if not isinstance(choice, Exception)}
        if not tokens:
            return
        traces = self._batch.read(tokens)
        now = time.perf_counter()
        self._steps += 1
        self._output_tokens += len(tokens)
        self._recent.append((now, now - began, len(tokens)))
        for row, trace in traces.items():
            running = self._running[row]
            if (state := running.was_read(trace, self._batch)) is not None:
                self._complete(running, "length", state)

    def _complete(self, running: Running, why: Finish, state: SynapseState | None) -> None:
        self._finished[why] += 1
        self._request_seconds += 0.1 * (time.perf_counter() - running.started - self._request_seconds)
        self._end(running)
        self._tell(running.finish(why, state))

    def _tell(self, done: Done) -> None:
        if self._ended is not None:
            self._ended(done)

    def _fail(self, running: Running, error: Exception) -> None:
        if not isinstance(error, SynapseError):
            logging.getLogger(__name__).error("a request failed", exc_info=error)
            error = EngineFault(f"{type(error).__name__}: {error}")
        self._finished["failed"] += 1
        self._end(running)
        running.ticket.put(Failed(error))

    def _end(self, running: Running) -> None:
        """Frees a request's slot."""
        del self._running[running.row]
        if running in self._reading:
            self._reading.remove(running)
        if self._batch.seats[running.row] is running.seat:
            self._batch.leave(running.row)

    def _stop(self) -> None:
        """Ends what is left."""
        late = Draining("the engine shut down before the output was complete")
        for running in list(self._running.values()):
            self._fail(running, late)
        with self._change:
            waiting, self._waiting = list(self._waiting), deque()
        for ticket, _ in waiting:
            self._finished["failed"] += 1
            ticket.put(Failed(late))
        while self._jobs:
            _, future = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(late)
