"""The engine from start to end: who may come, who leaves early, what fails, and how it shuts down."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serving.engine import Engine
from serving.requests import Done, Draining, EngineFault, Failed, PromptRead, QueueFull, Token
from serving.tickets import Ticket
from synapse_arch import ConfigError, StateError, SynapseModel, TraceSpec
from synapse_arch.model.sampling import Found
from tests.model.small import small_model
from tests.serving.engines import PATIENCE, ask, assert_same_bits, engine_of, one, outcome

LONG = 100_000
"""More tokens than any test waits for."""


@pytest.fixture(scope="module")
def model() -> SynapseModel:
    torch.manual_seed(0)
    return small_model()


def until(holds: Callable[[], bool]) -> None:
    """Waits for something that has to come true soon."""
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.005)
    pytest.fail("it never came true")


def first_token(ticket: Ticket) -> None:
    """Reads until a token has come, without giving up."""
    until(lambda: len(ticket._events) >= 2)


class TestCancelling:
    def test_before_the_first_token(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1, prefill_chunk=1) as engine:
            ticket = engine.submit(ask([1] * 500, max_tokens=LONG))
            until(lambda: engine.stats.busy == 1)
            ticket.cancel()
            done = outcome(ticket).done
            assert done is not None
            assert (done.finish, done.state, done.output_tokens) == ("cancelled", None, 0)
            assert done.prompt_tokens < 500
            assert engine.stats.busy == 0
            outcome(engine.submit(ask(max_tokens=400)))
            assert engine.stats.prompt_tokens == 3  # of the second alone: nobody reads the first to its end

    def test_mid_stream_the_slot_is_free_within_a_step(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1) as engine:
            ticket, waiting = engine.submit(ask(max_tokens=LONG)), engine.submit(ask(max_tokens=2))
            first_token(ticket)
            assert engine.stats.queued == 1
            steps = engine.stats.steps
            ticket.cancel()
            until(lambda: engine.stats.busy == 0 or engine.stats.queued == 0)
            assert engine.stats.steps - steps <= 2 + 2  # two that were under way, and those of the other
            assert outcome(ticket).done is not None
            assert_same_bits(outcome(waiting), one(model, ask(max_tokens=2)))

    def test_in_the_queue(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1) as engine:
            running = engine.submit(ask(max_tokens=LONG))
            until(lambda: engine.stats.busy == 1)
            waiting = engine.submit(ask())
            waiting.cancel()
            done = outcome(waiting).done
            assert done is not None
            assert (done.finish, done.prompt_tokens) == ("cancelled", 0)  # nothing of it was read
            assert (engine.stats.busy, engine.stats.queued) == (1, 0)
            running.cancel()

    def test_after_the_end_it_means_nothing(self, model: SynapseModel) -> None:
        with engine_of(model) as engine:
            ticket = engine.submit(ask())
            assert outcome(ticket).done is not None
            ticket.cancel()
            assert not ticket.cancelled
            assert engine.stats.finished == {"length": 1}

    def test_who_stops_reading_gives_up(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1) as engine:
            ticket = engine.submit(ask(max_tokens=LONG))
            for event in ticket.wait(PATIENCE):
                if isinstance(event, Token):
                    break
            until(lambda: engine.stats.finished == {"cancelled": 1})
            assert engine.stats.busy == 0

    def test_a_reader_that_stalls_is_given_up(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1, buffer=5) as engine:
            ticket = engine.submit(ask(max_tokens=LONG))
            until(lambda: engine.stats.finished == {"cancelled": 1})
            events = list(ticket.wait(PATIENCE))
            assert 5 <= len(events) <= 9
            assert isinstance(events[-1], Done)
            assert events[-1].finish == "cancelled"

    def test_a_reader_that_waits_in_vain_is_told(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1) as engine:
            engine.submit(ask(max_tokens=LONG))
            with pytest.raises(TimeoutError):
                list(engine.submit(ask()).wait(0.05))


class TestAsyncio:
    def test_events_come_in_order_and_leaving_gives_up(self, model: SynapseModel) -> None:
        async def read(ticket: Ticket, most: int) -> list[Any]:
            events: list[Any] = []
            async for event in ticket:
                events.append(event)
                if len(events) == most:
                    break
            return events

        async def main(engine: Engine) -> None:
            tickets = [engine.submit(ask(max_tokens=6, seed=seed)) for seed in range(3)]
            endless = engine.submit(ask(max_tokens=LONG))
            *whole, part = await asyncio.gather(*(read(ticket, 99) for ticket in tickets), read(endless, 3))
            assert [len(events) for events in whole] == [8, 8, 8]
            assert [type(event) for event in part] == [PromptRead, Token, Token]
            endless.cancel()

        with engine_of(model) as engine:
            asyncio.run(main(engine))
            until(lambda: engine.stats.finished == {"length": 3, "cancelled": 1})

    def test_a_loop_that_is_gone_gives_up(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1) as engine:
            blocker, ticket = engine.submit(ask(max_tokens=LONG)), engine.submit(ask(max_tokens=LONG))
            loop = asyncio.new_event_loop()
            reader = ticket.__aiter__()
            task = loop.create_task(reader.__anext__())  # type: ignore[arg-type]
            loop.run_until_complete(asyncio.sleep(0.05))
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            loop.close()
            blocker.cancel()
            until(lambda: engine.stats.finished == {"cancelled": 2})


class TestQueue:
    def test_full_means_later(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1, queue=2) as engine:
            tickets = [engine.submit(ask(max_tokens=LONG)) for _ in range(3)]
            with pytest.raises(QueueFull, match=r"queue: expected at most 2 requests waiting.*retry in") as caught:
                engine.submit(ask())
            assert caught.value.retry_after >= 1
            tickets[1].cancel()
            until(lambda: engine.stats.queued == 1)
            tickets.append(engine.submit(ask()))
            for ticket in tickets:
                ticket.cancel()

    def test_first_come_first_served(self, model: SynapseModel) -> None:
        order: list[int] = []
        with engine_of(model, slots=1) as engine:
            threads = []
            for number in range(4):
                ticket = engine.submit(ask(max_tokens=3))

                def read(ticket: Ticket = ticket, number: int = number) -> None:
                    outcome(ticket)
                    order.append(number)

                threads.append(threading.Thread(target=read))
                threads[-1].start()
            for thread in threads:
                thread.join()
        assert order == [0, 1, 2, 3]

    def test_a_long_prompt_does_not_hold_up_the_others(self, model: SynapseModel) -> None:
        with engine_of(model, slots=3, prefill_chunk=1) as engine:
            talking = engine.submit(ask(max_tokens=LONG))
            first_token(talking)
            long, before = engine.submit(ask([1] * 3000, max_tokens=1)), engine.stats.steps
            outcome(engine.submit(ask([1, 2], max_tokens=3)))
            assert engine.stats.busy == 2
            assert 3 <= engine.stats.steps - before < 60
            long.cancel()
            talking.cancel()

    @pytest.mark.parametrize("options", [{"slots": 0}, {"queue": -1}, {"prefill_chunk": 0}, {"buffer": 0}])
    def test_sizes_that_make_no_sense(self, model: SynapseModel, options: dict[str, int]) -> None:
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            Engine(model, **options)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"prompt": (1, 23)}, ConfigError, "token ids: expected 0 to 22"),
            ({"stop": ((23,),)}, ConfigError, "token ids: expected 0 to 22"),
            ({"prompt": (-1,)}, ConfigError, "token ids: expected 0 to 22"),
            ({"trace": TraceSpec(layers=(2,))}, ConfigError, "trace.layers: expected 0 to 1"),
            ({"state": small_model(memory=None).init_state(1)}, StateError, "memory"),
            ({"state": small_model().init_state(2)}, StateError, "batch size"),
        ],
    )
    def test_what_the_model_cannot_do(
        self, model: SynapseModel, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with engine_of(model) as engine, pytest.raises(error, match=message):
            engine.submit(ask(**options))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt": ()}, "prompt: expected token ids"),
            ({"prompt": (), "max_tokens": 0}, "prompt: expected token ids"),
            ({"top_logprobs": 21}, "top_logprobs: expected 0 to 20"),
        ],
    )
    def test_what_no_model_can_do(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ask(**options)


class TestFailures:
    def test_a_failing_step_fails_who_was_running_and_the_engine_goes_on(
        self, model: SynapseModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = one(model, ask())
        with engine_of(model, slots=2) as engine:
            tickets = [engine.submit(ask(max_tokens=LONG)) for _ in range(2)]
            for ticket in tickets:
                first_token(ticket)
            broken = monkeypatch.context()
            with broken as patch:
                patch.setattr(engine._batch, "read", lambda tokens: 1 / 0)
                for ticket in tickets:
                    failed = outcome(ticket).failed
                    assert failed is not None
                    assert isinstance(failed.error, EngineFault)
                    assert "ZeroDivisionError" in str(failed.error)
            assert engine.stats.finished == {"failed": 2}
            assert_same_bits(outcome(engine.submit(ask())), expected)

    def test_a_failing_prompt_fails_alone(self, model: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
        def reader(*_: object) -> Any:
            raise MemoryError("no room for this prompt")
            yield

        expected = one(model, ask(max_tokens=30))
        with engine_of(model, slots=2) as engine:
            good = engine.submit(ask(max_tokens=30))
            first_token(good)
            monkeypatch.setattr("serving.engine.read_prompt", reader)
            failed = outcome(engine.submit(ask())).failed
            assert failed is not None
            assert str(failed.error) == "MemoryError: no room for this prompt"
            assert_same_bits(outcome(good), expected)

    def test_a_failing_stop_matcher_fails_alone(self, model: SynapseModel) -> None:
        class Broken:
            def push(self, token: int) -> Found:
                raise KeyError(token)

        with engine_of(model, slots=2) as engine:
            good, bad = engine.submit(ask(max_tokens=9)), engine.submit(ask(stops=Broken()))
            failed = outcome(bad).failed
            assert failed is not None
            assert "KeyError" in str(failed.error)
            assert outcome(good).done is not None
            assert engine.stats.busy == 0


class TestJobs:
    def test_jobs_run_between_steps_on_the_engines_thread(self, model: SynapseModel) -> None:
        with engine_of(model) as engine:
            ticket = engine.submit(ask(max_tokens=30))
            name = engine.run(lambda own: (own is model, threading.current_thread().name)).result(PATIENCE)
            assert name == (True, "synapse-engine")
            with pytest.raises(ZeroDivisionError):
                engine.run(lambda _: 1 / 0).result(PATIENCE)
            assert_same_bits(outcome(ticket), one(model, ask(max_tokens=30)))


class TestClosing:
    def test_draining_lets_everyone_end(self, model: SynapseModel) -> None:
        engine = Engine(model, slots=1)
        tickets = [engine.submit(ask(max_tokens=20)) for _ in range(3)]
        closing = threading.Thread(target=engine.close, kwargs={"drain": PATIENCE})
        closing.start()
        until(lambda: engine.stats.draining)
        with pytest.raises(Draining):
            engine.submit(ask())
        with pytest.raises(Draining):
            engine.run(lambda _: None)
        closing.join()
        for ticket in tickets:
            done = outcome(ticket).done
            assert done is not None
            assert done.finish == "length"
        assert not engine.alive

    def test_what_has_not_ended_in_time_fails(self, model: SynapseModel) -> None:
        engine = Engine(model, slots=1)
        tickets = [engine.submit(ask(max_tokens=LONG)) for _ in range(2)]
        first_token(tickets[0])
        engine.close(drain=0.1)
        engine.close()
        for ticket in tickets:
            failed = [event for event in ticket.wait(PATIENCE) if isinstance(event, Failed)]
            assert isinstance(failed[0].error, Draining)

    def test_nothing_is_left_behind(self, model: SynapseModel) -> None:
        before = threading.active_count()
        for _ in range(5):
            with engine_of(model) as engine:
                outcome(engine.submit(ask(max_tokens=2)))
        assert threading.active_count() == before


def test_figures(model: SynapseModel) -> None:
    with engine_of(model, slots=2) as engine:
        assert engine.stats.tokens_per_second == engine.stats.step_seconds == 0
        outcome(engine.submit(ask([1, 2, 3], max_tokens=6)))
        stats = engine.stats
        assert (stats.slots, stats.busy, stats.queued, stats.steps) == (2, 0, 0, 6)
        assert (stats.prompt_tokens, stats.output_tokens) == (3, 6)
        assert stats.tokens_per_second > 0
        assert 0 < stats.step_seconds < 1
        assert stats.to_dict()["finished"] == {"length": 1}


def test_a_job_that_was_not_done_when_the_engine_stopped_says_so(
    model: SynapseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, free = threading.Event(), threading.Event()
    with engine_of(model, slots=1) as engine:
        choose = engine._batch.choose

        def slow() -> object:
            held.set()
            free.wait(PATIENCE)
            return choose()

        monkeypatch.setattr(engine._batch, "choose", slow)
        engine.submit(ask(max_tokens=9))
        assert held.wait(PATIENCE)
        job = engine.run(lambda model: None)
        closing = threading.Thread(target=engine.close)
        closing.start()
        until(lambda: engine.stats.draining)
        free.set()
        assert isinstance(job.exception(PATIENCE), Draining)
        closing.join(PATIENCE)


def test_a_second_close_gives_no_more_time(model: SynapseModel) -> None:
    with engine_of(model, slots=1, buffer=100_000) as engine:
        engine.submit(ask(max_tokens=100_000))
        until(lambda: engine.stats.busy == 1)
        first = threading.Thread(target=engine.close, kwargs={"drain": 0.3})
        first.start()
        until(lambda: engine.stats.draining)
        began = time.monotonic()
        engine.close(drain=30.0)
        assert time.monotonic() - began < 15
        first.join(PATIENCE)
