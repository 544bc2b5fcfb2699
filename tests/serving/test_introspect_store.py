"""Traces as they are kept: cheap to add to, bounded in tokens, bytes and time, each its owner's."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from typing import Any

import pytest
import torch

from serving.errors import ApiError
from serving.introspection import columns as columns_module
from serving.introspection import record as record_module
from serving.introspection.columns import Ring
from serving.introspection.record import TraceRecord
from serving.introspection.store import TraceStore
from serving.requests import Done, Event, Failed, GenerationRequest, PromptRead, PromptToken, RowTrace, Timing, Token
from serving.rows import with_ages
from serving.settings import Settings
from synapse_arch import Sampling, StateError, SynapseModel, SynapseState, TraceSpec
from synapse_arch.introspection import SynapseTrace
from tests.model.small import VOCABULARY, small_model

Clock = Any
SLOTS = 3


@pytest.fixture(scope="module")
def model() -> SynapseModel:
    return small_model().double()


def request(prompt: tuple[int, ...] = (1, 2, 3), *, spec: TraceSpec | None = None, **options: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, sampling=Sampling(seed=0), trace=spec or TraceSpec(level="full"), **options)


def opened(store: TraceStore, asked: GenerationRequest | None = None, owner: str = "me") -> TraceRecord:
    return store.open("req-1", owner=owner, request=asked or request(), seed=0)


def settle(store: TraceStore) -> None:
    """Waits until what is to be decoded by now has been."""
    store._decoder.submit(lambda: None).result()


def done() -> Done:
    return Done("length", None, 3, 4, Timing(0.0, 0.1, 0.2))


@torch.inference_mode()
def passes(model: SynapseModel, asked: GenerationRequest, tokens: tuple[int, ...], row: int = 1) -> list[Event]:
    """What an engine says of a run that writes `tokens` in one row of a batch whose others do something else."""
    spec = asked.trace
    assert spec is not None
    out = model(torch.tensor([asked.prompt]), asked.state, trace=spec)
    thoughts = [PromptToken(token, None if not i else -1.0 * i, None, ()) for i, token in enumerate(asked.prompt)]
    assert out.trace is not None
    found: list[Event] = [PromptRead(RowTrace(out.trace, 0, spec), thoughts, 0.1, 0.25)]
    deep = TraceSpec(level="full")
    states = [model(torch.randint(VOCABULARY, (1, 4)), trace=deep).state for _ in range(SLOTS)]
    states[row] = out.state
    state = SynapseState.cat([with_ages(one) for one in states])
    for token in tokens:
        ids = torch.randint(VOCABULARY, (SLOTS, 1))
        ids[row] = token
        step = model(ids, state, trace=deep)
        state = step.state
        assert step.trace is not None
        found.append(Token(token, -0.5, 1.5, (), RowTrace(step.trace, row, spec)))
    return found


@torch.no_grad()
def whole(model: SynapseModel, asked: GenerationRequest, tokens: tuple[int, ...]) -> SynapseTrace:
    trace = model(torch.tensor([[*asked.prompt, *tokens]]), asked.state, trace=asked.trace).trace
    assert trace is not None
    return trace


def same(got: SynapseTrace, want: SynapseTrace) -> None:
    pairs = zip(columns_module.tensors(got), columns_module.tensors(want), strict=True)
    for a, b in pairs:
        close = 1e-5 if a.dtype == torch.float32 else 1e-8
        torch.testing.assert_close(a, b, equal_nan=True, rtol=close, atol=close)


def test_passes_become_the_trace_of_one_reading(model: SynapseModel) -> None:
    asked, tokens = request(), tuple(range(10)) * 5
    record = opened(TraceStore(Settings()), asked)
    for event in passes(model, asked, tokens):
        record.add(event)
    record.add(done())
    view = record.view()
    assert view.trace is not None
    same(view.trace, whole(model, asked, tokens))
    assert tuple(view.ids) == (*asked.prompt, *tokens)
    assert list(view.logprobs)[1:] == [-1.0, -2.0, *[-0.5] * 50]
    assert (view.prompt_tokens, view.overflow, view.finish) == (3, 0, "length")
    assert view.seconds["queue"] == 0.25
    assert view.seconds["ttft"] is not None
    assert view.seconds["itl_p50"] is not None
    assert record.tokens() == (asked.prompt, tokens)


def test_passes_are_decoded_by_another_thread(model: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds events, the event loop as a rule, does no work for it."""
    threads, row_trace = [], columns_module.row_trace

    def decode(passes: list[RowTrace], most: int) -> SynapseTrace:
        threads.append(threading.current_thread().name)
        return row_trace(passes, most)

    monkeypatch.setattr(columns_module, "row_trace", decode)
    monkeypatch.setattr(record_module, "BUNCH", 4)
    asked, store = request(), TraceStore(Settings())
    record = opened(store, asked)
    for event in passes(model, asked, (1,) * 9):
        record.add(event)
        settle(store)
    assert len(record._pending) < record_module.BUNCH
    record.add(done())
    settle(store)
    assert not record._pending
    assert {name.split("_")[0] for name in threads} == {"synapse-traces"}


def test_where_the_decoder_lags_whoever_adds_waits(model: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "MOST_WAITING", 8)
    asked, store = request(), TraceStore(Settings())
    record = opened(store, asked)
    busy = threading.Event()
    store._decoder.submit(busy.wait)
    for event in passes(model, asked, (1,) * 20):
        record.add(event)
        assert len(record._pending) < record_module.MOST_WAITING
    busy.set()
    store.close()


@pytest.mark.parametrize("limits", [{"trace_tokens": 8}, {"trace_bytes": 4000}])
def test_what_is_dropped_is_the_oldest_and_counted(model: SynapseModel, limits: dict[str, int]) -> None:
    asked, tokens = request(), tuple(range(20)) * 3
    record = opened(TraceStore(Settings(**limits)), asked)
    for event in passes(model, asked, tokens):
        record.add(event)
    view = record.view()
    assert view.trace is not None
    kept = len(view.trace.positions)
    if "trace_tokens" in limits:
        assert kept == 8
    else:
        assert (
            kept * columns_module.token_bytes(view.trace) <= 4000 < (kept + 1) * columns_module.token_bytes(view.trace)
        )
    assert view.overflow == 63 - kept
    assert view.trace.at[0].tolist() == list(range(63 - kept, 63))
    full = whole(model, asked, tokens)
    for got, want in zip(view.trace.layers, full.layers, strict=True):
        assert got.routing is not None
        assert want.routing is not None
        assert torch.equal(got.routing.experts, want.routing.experts[:, -kept:])
        assert torch.equal(got.routing.tokens, want.routing.tokens)  # counts cover what was dropped


def test_nothing_larger_than_the_trace_is_kept_alive(model: SynapseModel) -> None:
    """Neither a batch's other rows nor what the ring has dropped."""
    asked = request()
    record = opened(TraceStore(Settings(trace_tokens=4)), asked)
    for event in passes(model, asked, (1, 2, 3, 4, 5, 6)):
        record.add(event)
    view = record.view()
    assert view.trace is not None
    for tensor in columns_module.tensors(view.trace):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_bytes_are_bounded_over_all_traces_and_the_oldest_go(model: SynapseModel) -> None:
    asked = request()
    events = [*passes(model, asked, (1, 2)), done()]
    probe = opened(TraceStore(Settings()), asked)
    for event in events:
        probe.add(event)
    probe.view()
    store = TraceStore(Settings(traces_bytes=int(3.5 * probe.nbytes)))
    records = []
    for _ in range(8):
        records.append(opened(store, asked))
        for event in events:
            records[-1].add(event)
        settle(store)
        assert store.stats()["bytes"] <= int(3.5 * probe.nbytes)
    assert store.stats()["count"] == 3
    assert store.owned("me") == records[-3:]
    with pytest.raises(ApiError, match="no such trace"):
        store.get(records[0].id, "me")


def test_ten_thousand_traces_take_no_more_than_the_limit(model: SynapseModel) -> None:
    asked = request()
    events = [*passes(model, asked, (1,)), done()]
    store = TraceStore(Settings(traces_bytes=2**21))
    for number in range(10_000):
        record = opened(store, asked)
        if number % 100 == 0:
            for event in events:
                record.add(event)
    settle(store)
    stats = store.stats()
    assert stats["bytes"] <= 2**21
    assert stats["count"] <= 2**21 / record_module.BASE_BYTES
    assert stats["count"] == len(store._records) == len(store._sizes)


def test_the_snapshot_counts(model: SynapseModel) -> None:
    state = model.init_state(1)
    store = TraceStore(Settings())
    opened(store)
    before = store.stats()["bytes"]
    opened(store, request(state=state))
    assert store.stats()["bytes"] - before == before + state.nbytes


def test_a_trace_lives_so_long_after_its_last_event() -> None:
    now = [0.0]
    store = TraceStore(Settings(trace_ttl=300), clock=lambda: now[0])
    first, second = opened(store), opened(store)
    now[0] = 200.0
    first.add(done())
    settle(store)
    now[0] = 301.0
    assert store.owned("me") == [first]
    with pytest.raises(ApiError):
        store.get(second.id, "me")
    now[0] = 501.0
    assert store.stats() == {"count": 0, "bytes": 0, "limit_bytes": Settings().traces_bytes}


def test_looking_at_a_trace_does_not_prolong_it(model: SynapseModel) -> None:
    now = [0.0]
    store = TraceStore(Settings(trace_ttl=300), clock=lambda: now[0])
    asked = request()
    watched, left = opened(store, asked), opened(store, asked)
    read, token = passes(model, asked, (1,))
    watched.add(read)
    for now[0] in (100.0, 200.0, 290.0):
        left.view()
        watched.add(token)  # each is news, whether or not it has been decoded
    settle(store)
    now[0] = 301.0
    assert store.owned("me") == [watched]
    now[0] = 591.0
    assert store.owned("me") == []


def test_only_its_owner_finds_it() -> None:
    store = TraceStore(Settings())
    record = opened(store, owner="alice")
    assert store.get(record.id, "alice") is record
    assert store.owned("bob") == []
    for call in (store.get, store.delete):
        with pytest.raises(ApiError) as refusal:
            call(record.id, "bob")
        assert refusal.value.status == 404
    store.delete(record.id, "alice")
    with pytest.raises(ApiError):
        store.get(record.id, "alice")
    assert store.stats()["bytes"] == 0


def test_events_after_the_end_are_ignored(model: SynapseModel) -> None:
    asked = request()
    events = passes(model, asked, (1, 2))
    record = opened(TraceStore(Settings()), asked)
    record.add(events[0])
    record.add(Failed(StateError("broken")))
    record.add(events[1])
    record.cancel()
    assert (record.finish, record.closed, record.tokens()) == ("failed", True, (asked.prompt, ()))
    given_up = opened(TraceStore(Settings()), asked)
    given_up.cancel()
    assert given_up.finish == "cancelled"


def test_what_experts_did_does_not_depend_on_which_passes_came_together() -> None:
    model = small_model()
    asked, tokens = request(), tuple(range(10)) * 6
    seen = [one.trace for one in passes(model, asked, tokens) if isinstance(one, PromptRead | Token)]
    kept = [trace for trace in seen if trace is not None]
    found = []
    for bunch in (1, 2, 7, 32, len(kept)):
        ring = Ring(16, 2**20)
        for start in range(0, len(kept), bunch):
            ring.add(kept[start : start + bunch])
            if start % 3 == 0:
                ring.whole()
        found.append(ring.whole())
    want = whole(model, asked, tokens)
    for trace in found:
        assert trace is not None
        assert found[0] is not None
        for got, first, one in zip(trace.layers, found[0].layers, want.layers, strict=True):
            assert got.experts is not None
            assert first.experts is not None
            assert one.experts is not None
            assert got.experts.out_norm.dtype == torch.float32
            for name in ("tokens", "out_norm", "sparsity"):
                value = getattr(got.experts, name)
                assert value.tolist() == getattr(first.experts, name).tolist()
                torch.testing.assert_close(value, getattr(one.experts, name), equal_nan=True)


def test_several_kinds_of_batches_join(model: SynapseModel) -> None:
    """Others in the batch may look deeper, or leave, between two steps."""
    asked = request(spec=TraceSpec(level="gates", layers=(1,)))
    tokens = (1, 2, 3, 4)
    events = passes(model, asked, tokens)
    shallow = passes(model, asked, tokens)
    for number in (1, 3):
        event = shallow[number]
        assert isinstance(event, Token)
        assert event.trace is not None
        alone = RowTrace(event.trace.get(), 0, event.trace.spec)
        events[number] = Token(event.id, event.logprob, event.entropy, event.top, alone)
    record = opened(TraceStore(Settings()), asked)
    for event in events:
        record.add(event)
    view = record.view()
    assert view.trace is not None
    same(view.trace, whole(model, asked, tokens))


def test_a_watcher_is_woken_by_an_event_and_by_the_end(model: SynapseModel) -> None:
    asked = request()
    events = passes(model, asked, (1,))
    record = opened(TraceStore(Settings()), asked)

    async def watch() -> list[bool]:
        seen = [await record.changed(record.view().version, 0.01)]
        loop = asyncio.get_running_loop()
        for event in (*events, done()):
            version = record.view().version
            waiting = asyncio.ensure_future(record.changed(version, 5))
            await asyncio.sleep(0)
            await loop.run_in_executor(None, record.add, event)
            seen.append(await waiting)
        return [*seen, await record.changed(10**9, 0.01)]

    assert asyncio.run(watch()) == [False, True, True, True, True]
    assert not record._watchers


def test_strides_and_resumed_positions(model: SynapseModel) -> None:
    with torch.no_grad():
        state = model(torch.tensor([[5, 6, 7, 8, 9]])).state
    asked = request(spec=TraceSpec(every=3), state=state)
    tokens = tuple(itertools.islice(itertools.cycle((4, 2)), 7))
    record = opened(TraceStore(Settings()), asked)
    for index, event in enumerate(passes(model, asked, tokens)):
        if isinstance(event, Token) and (2 + index) % 3:
            assert event.trace is not None
            event = dataclasses.replace(event, trace=dataclasses.replace(event.trace, kept=False))
        record.add(event)
    view = record.view()
    assert view.trace is not None
    assert view.trace.at[0].tolist() == [5, 8, 11, 14]
    assert (view.first, view.overflow) == (5, 0)
    same(view.trace, whole(model, asked, tokens))
