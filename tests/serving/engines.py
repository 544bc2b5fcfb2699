"""What the engine's tests share: requests, their outcomes, and outcomes compared bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from serving.engine import Engine
from serving.requests import Done, Event, Failed, GenerationRequest, PromptRead, RowTrace, Token
from serving.tickets import Ticket
from synapse_arch import Sampling, SynapseModel, SynapseState, TraceSpec
from synapse_arch.introspection import SynapseTrace
from tests.helpers import assert_equal
from tests.model.small import VOCABULARY

PATIENCE = 60.0
"""Seconds to wait for any one event."""


@dataclass
class Outcome:
    """What came of a request."""

    tokens: list[int] = field(default_factory=list)
    numbers: dict[str, Tensor] = field(default_factory=dict)
    """Every number that was reported, by name."""
    done: Done | None = None
    failed: Failed | None = None

    @property
    def state(self) -> SynapseState:
        assert self.done is not None
        assert self.done.state is not None
        return self.done.state


@contextmanager
def engine_of(model: SynapseModel, **options: Any) -> Iterator[Engine]:
    engine = Engine(model, **options)
    try:
        yield engine
    finally:
        engine.close()
        assert not engine.alive


def ask(prompt: Sequence[int] = (1, 2, 3), *, max_tokens: int = 5, **options: Any) -> GenerationRequest:
    """A request; options of `Sampling` and of `GenerationRequest` alike."""
    drawing = {name: options.pop(name) for name in list(options) if name in Sampling.__dataclass_fields__}
    sampling = Sampling(max_tokens=max_tokens, **{"seed": 0, **drawing})
    return GenerationRequest(prompt=tuple(prompt), sampling=sampling, **options)


def outcome(ticket: Ticket) -> Outcome:
    """Reads a request to its end, and checks the order of its events."""
    events = list(ticket.wait(PATIENCE))
    assert isinstance(events[-1], Done | Failed)
    kinds = [type(event) for event in events[:-1]]
    assert kinds == ([PromptRead] + [Token] * (len(kinds) - 1) if kinds else [])
    return gathered(events)


def gathered(events: Sequence[Event]) -> Outcome:
    found = Outcome()
    for number, event in enumerate(events):
        if isinstance(event, Done):
            found.done = event
            if event.state is not None:
                found.numbers |= {f"state.{name}": x for name, x in event.state.to_tensors().items()}
        elif isinstance(event, Failed):
            found.failed = event
        else:
            found.numbers |= traced(event.trace, f"{number}")
        if isinstance(event, Token):
            found.tokens.append(event.id)
            found.numbers[f"{number}.scores"] = torch.tensor(
                [event.id, event.logprob, event.entropy, *(x for pair in event.top for x in pair)], dtype=torch.float64
            )
        elif isinstance(event, PromptRead) and event.logprobs is not None:
            scores = [x for one in event.logprobs for x in (one.logprob, one.entropy, *sum(one.top, ()))]
            found.numbers["prompt"] = torch.tensor([torch.nan if x is None else x for x in scores], dtype=torch.float64)
    return found


def traced(trace: RowTrace | SynapseTrace | None, name: str) -> dict[str, Tensor]:
    """Every tensor of a trace by name."""
    if trace is None:
        return {}
    whole = trace.get() if isinstance(trace, RowTrace) else trace
    found = {f"{name}.tokens": whole.tokens, f"{name}.at": whole.at, f"{name}.positions": whole.positions}
    for layer in whole.layers:
        for part in (layer.routing, layer.experts, layer.gates, layer.memory):
            for field_name, value in vars(part).items() if part else ():
                if isinstance(value, Tensor):
                    found[f"{name}.{layer.index}.{type(part).__name__}.{field_name}"] = value
    return found


def alone(model: SynapseModel, *requests: GenerationRequest, **options: Any) -> list[Outcome]:
    """What each request gives where nobody else is, neither in the batch nor in the queue."""
    with engine_of(model, slots=1, **options) as engine:
        return [outcome(engine.submit(request)) for request in requests]


def one(model: SynapseModel, request: GenerationRequest, **options: Any) -> Outcome:
    """What a request gives by itself."""
    return alone(model, request, **options)[0]


def assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    assert actual.failed is None
    assert expected.failed is None
    assert actual.tokens == expected.tokens
    assert actual.done is not None
    assert expected.done is not None
    assert actual.done.finish == expected.done.finish
    assert_equal(actual.numbers, expected.numbers)


def mixed_requests(count: int, seed: int) -> list[GenerationRequest]:
    """Requests of every kind, drawn from a seed."""
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.choice([1, 2, 5, 9, 17]))]
        spec = draw.choice([
            None, None, TraceSpec(), TraceSpec(level="gates", layers=(1,)), TraceSpec(level="full", every=2),
            TraceSpec(level="gates", max_tokens=4),
        ])  # fmt: skip
        drawing = draw.choice([
            {"temperature": 0.0}, {}, {"temperature": 1.7, "top_k": 5}, {"top_p": 0.8},
            {"repetition_penalty": 1.3, "top_p": 0.9}, {"stop": ((3,), (7, 1))},
        ])  # fmt: skip
        requests.append(
            ask(
                prompt, max_tokens=draw.choice([1, 4, 9, 18]), seed=number, trace=spec,
                top_logprobs=draw.choice([0, 0, 3]), echo_logprobs=draw.random() < 0.3, **drawing,
            )
        )  # fmt: skip
    return requests
