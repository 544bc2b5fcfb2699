"""The engine: equal bits alone and in a crowd, exact ends, and nothing that crosses from one request to another."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from serving.batch import Batch
from serving.engine import Engine
from serving.requests import Done, GenerationRequest, PromptRead, Token
from serving.rows import StepTrace
from synapse_arch import ExpertsConfig, Sampling, SynapseModel, SynapseState, TraceSpec
from synapse_arch.model.sampling import Found, draw_tokens
from tests.helpers import assert_same
from tests.model.small import VARIANTS, VOCABULARY, small_config, small_model, tokens
from tests.serving.engines import (
    PATIENCE,
    Outcome,
    alone,
    ask,
    assert_same_bits,
    engine_of,
    mixed_requests,
    one,
    outcome,
    traced,
)

PIECE = 4
"""Tokens of a prompt read at a time in these tests."""


@pytest.fixture(scope="module")
def model() -> SynapseModel:
    torch.manual_seed(0)
    return small_model()


def crowd(engine: Engine, requests: list[GenerationRequest], seed: int) -> list[Outcome]:
    """All requests, staggered; a third of others that come and give up in between."""
    draw, tickets = random.Random(seed), []
    for request in requests:
        tickets.append(engine.submit(request))
        if draw.random() < 0.3:
            engine.submit(ask([5, 6], max_tokens=30, trace=TraceSpec(level="full"))).cancel()
        time.sleep(draw.choice([0.0, 0.0, 0.002, 0.005]))
    return [outcome(ticket) for ticket in tickets]


class TestDeterminism:
    @pytest.mark.parametrize("count", [2, 8, 32])
    def test_equal_bits_alone_and_in_a_crowd(self, model: SynapseModel, count: int) -> None:
        requests = mixed_requests(count, seed=count)
        with engine_of(model, slots=8, prefill_chunk=PIECE) as engine:
            assert engine.stats.exact
            together = crowd(engine, requests, seed=count)
        for found, expected in zip(together, alone(model, *requests, prefill_chunk=PIECE), strict=True):
            assert_same_bits(found, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_step_with_others_at_the_same_experts(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Wider products, all slots taken at once: what a dispatch by expert would not survive."""
        torch.manual_seed(0)
        experts = ExpertsConfig(n_experts=4, d_expert=48, d_shared=20)
        SynapseModel(dataclasses.replace(small_config(experts=experts), d_model=64)).save_pretrained(tmp_path)
        model = SynapseModel.from_pretrained(tmp_path, dtype=dtype)
        requests = [
            ask([number, 2, 3], max_tokens=6, seed=number, trace=TraceSpec(level="full")) for number in range(8)
        ]
        with engine_of(model, slots=8) as engine:
            together = [outcome(ticket) for ticket in [engine.submit(request) for request in requests]]
            assert engine.stats.steps < 8 * 6  # or they were not together
        for found, expected in zip(together, alone(model, *requests), strict=True):
            assert_same_bits(found, expected)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_for_every_kind_of_model(self, variant: str) -> None:
        model, requests = small_model(**VARIANTS[variant]), mixed_requests(4, seed=1)
        with engine_of(model, slots=3, prefill_chunk=PIECE) as engine:
            together = crowd(engine, requests, seed=1)
        for found, expected in zip(together, alone(model, *requests, prefill_chunk=PIECE), strict=True):
            assert_same_bits(found, expected)

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.7}, {"repetition_penalty": 1.5}])
    def test_draws_what_the_model_draws_by_itself(self, model: SynapseModel, options: dict[str, float]) -> None:
        sampling = Sampling(seed=11, max_tokens=12, **options)
        expected = list(model.stream(torch.tensor([4, 5, 6]), sampling=sampling))
        found = one(model, ask([4, 5, 6], seed=11, max_tokens=12, **options))
        assert found.tokens == [token.id for token in expected]
        for number, token in enumerate(expected, start=1):
            scores = found.numbers[f"{number}.scores"]
            torch.testing.assert_close(scores[1:].float(), torch.tensor([token.logprob, token.entropy]))

    def test_tracing_changes_no_bit(self, model: SynapseModel) -> None:
        plain = one(model, ask(range(9), max_tokens=9), prefill_chunk=PIECE)
        for spec in (TraceSpec(), TraceSpec(level="gates", layers=(0,)), TraceSpec(level="full")):
            found = one(model, ask(range(9), max_tokens=9, trace=spec), prefill_chunk=PIECE)
            for name, value in plain.numbers.items():
                assert torch.equal(found.numbers[name], value), name

    def test_a_seed_is_drawn_and_told(self, model: SynapseModel) -> None:
        with engine_of(model) as engine:
            tickets = [engine.submit(ask(seed=None, max_tokens=8)) for _ in range(2)]
            first, second = (outcome(ticket) for ticket in tickets)
            assert tickets[0].seed != tickets[1].seed
            assert outcome(engine.submit(ask(seed=tickets[0].seed, max_tokens=8))).tokens == first.tokens
            assert outcome(engine.submit(ask(seed=tickets[1].seed, max_tokens=8))).tokens == second.tokens


class TestIsolation:
    def test_a_secret_of_one_changes_no_bit_of_another(self, model: SynapseModel) -> None:
        watched = [ask([9, 8, 7], max_tokens=12, trace=TraceSpec(level="full"), top_logprobs=4, seed=2)] * 2
        found = []
        for secret in (3, 17):
            with engine_of(model, slots=4, prefill_chunk=PIECE) as engine:
                others = [engine.submit(ask([secret] * 11, max_tokens=20, seed=secret)) for _ in range(3)]
                mine = [outcome(engine.submit(request)) for request in watched]
                found.append(mine)
                assert {outcome(other).done is not None for other in others} == {True}
        assert_same_bits(found[0][0], found[1][0])
        assert_same_bits(found[0][1], found[1][1])
        assert_same_bits(found[0][0], found[0][1])

    def test_free_rows_are_poisoned_and_reused_ones_are_fresh(self, model: SynapseModel) -> None:
        with engine_of(model, slots=1) as engine:
            fresh = outcome(engine.submit(ask([2, 3], max_tokens=6)))
            outcome(engine.submit(ask([5] * 9, max_tokens=6)))
            held = engine.run(lambda _: engine._batch._state.to_tensors()).result(PATIENCE)
            for name, value in held.items():
                if name != "position":
                    assert value.isnan().all(), name
            assert_same_bits(outcome(engine.submit(ask([2, 3], max_tokens=6))), fresh)

    def test_broken_logits_fail_their_own_request_only(self, model: SynapseModel) -> None:
        poisoned = model.init_state(1)
        poisoned.layers[0].memory.weights.fill_(torch.nan)
        request = ask([1, 2], max_tokens=9)
        expected = one(model, request)
        with engine_of(model, slots=3) as engine:
            tickets = [engine.submit(request), engine.submit(ask(state=poisoned)), engine.submit(request)]
            first, broken, second = (outcome(ticket) for ticket in tickets)
        assert broken.failed is not None
        assert "logits: expected finite values" in str(broken.failed.error)
        assert_same_bits(first, expected)
        assert_same_bits(second, expected)

    def test_a_draw_that_fails_fails_those_who_asked_for_it(
        self, model: SynapseModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = ask([1, 2], max_tokens=9)
        expected = one(model, request)

        def fragile(scores: torch.Tensor, sampling: Sampling, at: torch.Tensor) -> torch.Tensor:
            if sampling.top_k == 2:
                raise RuntimeError("index out of range")
            return draw_tokens(scores, sampling, at)

        monkeypatch.setattr("serving.batch.draw_tokens", fragile)
        with engine_of(model, slots=3) as engine:
            tickets = [engine.submit(request), engine.submit(ask([3], top_k=2)), engine.submit(request)]
            first, broken, second = (outcome(ticket) for ticket in tickets)
        assert broken.failed is not None
        assert "index out of range" in str(broken.failed.error)
        assert_same_bits(first, expected)
        assert_same_bits(second, expected)

    def test_a_given_state_is_not_changed(self, model: SynapseModel) -> None:
        state = one(model, ask([1, 2, 3])).state
        before = state.clone()
        one(model, ask([4, 5], state=state, max_tokens=9, trace=TraceSpec(level="gates")))
        for name, value in state.to_tensors().items():
            assert torch.equal(value, before.to_tensors()[name])


class TestEnds:
    @pytest.mark.parametrize("seed", range(4))
    def test_the_state_has_read_the_prompt_and_the_output_and_no_more(self, model: SynapseModel, seed: int) -> None:
        stop = tuple(tuple(random.Random(seed * 9 + n).choices(range(VOCABULARY), k=n)) for n in (1, 2))
        prompt = [3, 1, 4, 1, 5]
        free = one(model, ask(prompt, max_tokens=24, seed=seed)).tokens
        sequences = (*stop, tuple(free[5:8]))
        found = one(model, ask(prompt, max_tokens=24, seed=seed, stop=sequences))
        assert found.done is not None
        assert found.done.finish == "stop"
        assert found.done.output_tokens == len(found.tokens) < 8
        expected = model.generate(
            torch.tensor([prompt]), sampling=Sampling(max_tokens=24, seed=seed, stop=sequences)
        )  # fmt: skip
        assert found.tokens == expected.ids[0]
        assert_same(found.state.to_tensors(), expected.state.to_tensors())
        forced = one(model, ask(prompt, max_tokens=len(found.tokens), seed=seed)) if found.tokens else None
        if forced is not None:  # the same engine without a stop, cut there: the same bits
            assert forced.tokens == found.tokens
            for name, value in forced.state.to_tensors().items():
                assert torch.equal(found.state.to_tensors()[name], value), name

    def test_nothing_of_a_stop_sequence_is_handed_out_while_it_may_match(self, model: SynapseModel) -> None:
        """A stop that nearly matches: everything comes out, late, in order."""
        free = one(model, ask(max_tokens=10)).tokens
        near = (*free[2:5], (free[5] + 1) % VOCABULARY)
        found = one(model, ask(max_tokens=10, stop=(near,)))
        assert found.tokens == free
        exact = one(model, ask(max_tokens=10, stop=(tuple(free[2:5]),)))
        assert exact.tokens == free[:2]

    def test_going_on_from_a_state_is_one_conversation(self, model: SynapseModel) -> None:
        first = one(model, ask([1, 2, 3, 4], max_tokens=4))
        second = one(model, ask([5, 6], state=first.state, max_tokens=4, seed=3))
        whole = one(model, ask([1, 2, 3, 4, *first.tokens, 5, 6], max_tokens=4, seed=3))
        assert second.tokens == whole.tokens
        assert_same(second.state.to_tensors(), whole.state.to_tensors())

    def test_a_stop_matcher_of_the_callers_own(self, model: SynapseModel) -> None:
        class AfterThree:
            count = 0

            def push(self, token: int) -> Found:
                self.count += 1
                return Found(1, 0) if self.count == 4 else Found(0, 0)

        free = one(model, ask(max_tokens=8)).tokens
        assert one(model, ask(max_tokens=8, stops=AfterThree())).tokens == free[:3]

    def test_no_tokens_are_asked_for(self, model: SynapseModel) -> None:
        found = one(model, ask([1, 2, 3], max_tokens=0, trace=TraceSpec(), echo_logprobs=True))
        assert found.tokens == []
        assert found.state.position.tolist() == [3]
        again = one(model, ask([], max_tokens=0, state=found.state))
        assert again.state.position.tolist() == [3]
        assert again.done is not None
        assert (again.done.finish, again.done.prompt_tokens, again.done.output_tokens) == ("length", 0, 0)
        assert_same(again.state.to_tensors(), found.state.to_tensors())

    def test_what_leaves_the_engine_can_be_used_with_gradients(self, model: SynapseModel) -> None:
        with engine_of(model) as engine:
            events = list(engine.submit(ask(trace=TraceSpec(level="gates"))).wait(PATIENCE))
        done = events[-1]
        assert isinstance(done, Done)
        assert done.state is not None
        model(tokens(1, 3), done.state).logits.sum().backward()
        model.zero_grad()
        for event in events[:-1]:
            assert isinstance(event, PromptRead | Token)
            assert event.trace is not None
            assert not any(x.is_inference() for x in traced(event.trace, "").values())


class TestTraces:
    def test_a_token_comes_with_the_step_that_read_it(self, model: SynapseModel) -> None:
        with engine_of(model, prefill_chunk=2) as engine:
            events = list(engine.submit(ask([1, 2, 3], max_tokens=4, trace=TraceSpec(level="full"))).wait(PATIENCE))
        read = [1, 2, 3, *(event.id for event in events if isinstance(event, Token))]
        state = model.init_state(1)
        for event in events[:-1]:
            assert isinstance(event, PromptRead | Token)
            assert event.trace is not None
            got = event.trace.get()
            at = got.at[0].tolist()
            assert got.tokens[0].tolist() == [read[place] for place in at]
            with torch.no_grad():
                out = model(got.tokens, state, trace=TraceSpec(level="full"))
            state = out.state
            expected = traced(out.trace, "")
            for name, value in traced(got, "").items():
                torch.testing.assert_close(value, expected[name], equal_nan=True, rtol=1e-4, atol=1e-5, msg=name)

    def test_level_layers_and_stride_are_the_requests_own(self, model: SynapseModel) -> None:
        specs = [
            TraceSpec(), TraceSpec(level="full"), TraceSpec(level="gates", layers=(1,), every=3),
        ]  # fmt: skip
        with engine_of(model) as engine:
            tickets = [engine.submit(ask([1, 2, 3, 4], max_tokens=7, trace=spec)) for spec in specs]
            runs = [list(ticket.wait(PATIENCE)) for ticket in tickets]
        for spec, events in zip(specs, runs, strict=True):
            places: list[int] = []
            for event in events[:-1]:
                assert isinstance(event, PromptRead | Token)
                if event.trace is not None:
                    trace = event.trace.get()
                    assert trace.level == spec.level
                    assert [layer.index for layer in trace.layers] == list(spec.layers or (0, 1))
                    assert all((layer.gates is None) == (spec.level == "routes") for layer in trace.layers)
                    assert all((layer.experts is None) == (spec.level != "full") for layer in trace.layers)
                    places += trace.at[0].tolist()
            assert places == list(range(0, 11, spec.every))


def test_places_that_differ_are_found_out(
    model: SynapseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = SynapseModel.forward

    def uneven(self: SynapseModel, ids: torch.Tensor, state: SynapseState | None = None, **options: object) -> object:
        out = forward(self, ids, state, **options)  # type: ignore[arg-type]
        out.logits[-1, -1, -1] += 1e-6
        return out

    assert Batch(model, 2).exact
    monkeypatch.setattr(SynapseModel, "forward", uneven)
    assert not Batch(model, 2).exact
    assert "only up to rounding" in caplog.text


def test_a_stride_may_start_later(model: SynapseModel) -> None:
    with engine_of(model, slots=2) as engine:
        events = list(engine.submit(ask(max_tokens=6, trace=TraceSpec(every=3, start=1))).wait(PATIENCE))
    traces = [event.trace for event in events if isinstance(event, Token)]
    assert [trace.kept for trace in traces if trace is not None] == [False, False, True] * 2
    assert [len(trace.get().positions) for trace in traces if trace is not None] == [0, 0, 1] * 2


def test_a_step_s_trace_is_made_once_for_all_who_read_it() -> None:
    made: list[int] = []

    def make() -> object:
        time.sleep(0.05)
        made.append(1)
        return object()

    step = StepTrace(make)  # type: ignore[arg-type]
    threads = [threading.Thread(target=step.get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
