"""From a request's prompts to pieces of text: what completions and chats share, knowing nothing of their shapes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from serving.errors import ApiError, bad_request
from serving.introspection.interventions import check_layers, parse
from serving.requests import Done, Failed, GenerationRequest, PromptRead, RowTrace, Token
from serving.runtime import Runtime
from serving.schemas import MOST_CHOICES, GenerationBody
from serving.sessions import Session, goes_on
from serving.stream import gone
from serving.tokens import TextStopMatcher
from synapse_arch import Sampling, TraceSpec

if TYPE_CHECKING:
    from serving.engine import Ticket
    from serving.introspection.store import TraceRecord

SCATTER = 0x9E3779B97F4A7C15
"""Splitmix64's increment: seeds of neighbouring choices stay apart."""

Route = list[list[list[float]]]
"""By layer the experts of a token with their weights: [[expert, weight], ...]."""


@dataclass(frozen=True, eq=False)
class Ask:
    """What to generate.

    Attributes:
        body: the request's.
        field: what its prompts are called in an error.
        prompts: token ids, each with `body.choices` outputs; True asks for them as they go on in a conversation.
        max_tokens: of each output.
        stops: strings that end it.
        top_logprobs: likeliest tokens to report with each.
        echo: prompts are scored too.
    """

    body: GenerationBody
    field: str
    prompts: Callable[[bool], Sequence[Sequence[int]]]
    max_tokens: int
    stops: Sequence[str]
    top_logprobs: int = 0
    echo: bool = False


@dataclass(frozen=True, eq=False)
class Piece:
    """Something that happened to an output.

    Attributes:
        index: which output.
        text: what it adds to the text.
        event: what the engine said.
        route: the experts that the token went to, where a trace was asked to show them at once.
    """

    index: int
    text: str
    event: PromptRead | Token | Done
    route: Route | None = None


@dataclass(frozen=True, eq=False)
class _Output:
    """One output on its way; `prompt` is what was asked for, without the opening token put in front."""

    index: int
    prompt: Sequence[int]
    request: GenerationRequest
    stops: TextStopMatcher
    ticket: Ticket


class Generation:
    """Outputs on their way; `begin` makes one.

    Attributes:
        request_id: of the request that asked.
        created: when, seconds since 1970.
        count: how many outputs.
        choices: how many of them belong to each prompt.
        seed: of the first output.
        session: what it goes on from and is kept in, None for neither.
        trace: where its inside is recorded, None where nobody asked.
    """

    def __init__(
        self, runtime: Runtime, ask: Ask, request_id: str, outputs: list[_Output], session: Session | None
    ) -> None:
        self._runtime, self._outputs = runtime, outputs
        self._keeps = not ask.body.interventions  # a changed model's memory is not the conversation's
        self._started = time.perf_counter()
        self.request_id, self.created = request_id, int(time.time())
        self.count, self.choices = len(outputs), ask.body.choices
        self.seed: int = outputs[0].ticket.seed
        self.session = session
        self._inline = ask.body.trace is not None and ask.body.trace.inline
        self.trace: TraceRecord | None = None

    def prompt(self, index: int) -> Sequence[int]:
        """The token ids that were given for an output, without an opening token that was put in front."""
        return self._outputs[index].prompt

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Everything that happens, as it happens; leaving early cancels what is still on its way.

        Raises:
            ApiError, SynapseError: an output failed, or its session was continued by another.
        """
        sources = [self._follow(output) for output in self._outputs]
        joined = sources[0] if len(sources) == 1 else _side_by_side(sources)  # alone without a task for each event
        try:
            async with aclosing(joined):
                async for piece in joined:
                    yield piece
        finally:
            self.cancel()
            for source in sources:
                await source.aclose()

    def cancel(self) -> None:
        """Gives up what is still on its way; nothing of it is kept."""
        for output in self._outputs:
            output.ticket.cancel()
        if self.trace is not None:
            self.trace.cancel()

    async def _follow(self, output: _Output) -> AsyncGenerator[Piece]:
        """One output's pieces: text comes with the token that completes it."""
        decoder, metrics = self._runtime.codec.decoder(), self._runtime.metrics
        last: float | None = None
        async for event in output.ticket:
            if self.trace is not None:
                self.trace.add(event)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, PromptRead):
                yield Piece(output.index, "", event)
            elif isinstance(event, Token):
                now = time.perf_counter()
                if last is None:
                    metrics.first_token(now - self._started)
                else:
                    metrics.next_token(now - last)
                last = now
                shown = event.trace if self._inline else None
                path = await run_in_threadpool(route, shown) if shown is not None and shown.kept else None
                yield Piece(output.index, decoder.decode(self._runtime.codec.token_bytes(event.id)), event, path)
            else:
                if event.finish == "cancelled":
                    raise ApiError(408, "the answer was not read in time and given up", code="cancelled")
                rest = output.stops.rest if event.finish == "stop" else b""
                await self._keep(event)
                yield Piece(output.index, decoder.decode(rest, final=True), event)

    async def _keep(self, done: Done) -> None:
        """Saves the session as it stands after the text that the client has."""
        if self.session is None or not self._keeps:
            return
        assert done.state is not None, "a complete output has a state"
        self.session = await run_in_threadpool(self._runtime.sessions.save, self.session, done.state)


async def begin(runtime: Runtime, owner: str, request_id: str, ask: Ask) -> Generation:
    """Checks what was asked, and hands it to the engine.

    Raises:
        ApiError: a field that this server cannot serve. SynapseError: what the engine refuses.
    """
    body = ask.body
    _check(runtime, ask)
    session = None
    if body.session_id is not None:
        session = await run_in_threadpool(runtime.sessions.load, body.session_id, owner)
    follows = goes_on(session)
    prompts = await run_in_threadpool(ask.prompts, follows)
    _check_prompts(runtime, ask, prompts, follows=follows)
    spec = _trace_spec(runtime, body)
    interventions = parse(body.interventions or [], runtime.config)
    outputs: list[_Output] = []
    try:
        for prompt in prompts:
            for _ in range(body.choices):
                stops = TextStopMatcher(ask.stops, runtime.codec)
                request = GenerationRequest(
                    prompt=tuple(prompt if follows else runtime.codec.opened(prompt)),
                    sampling=_sampling(ask, len(outputs)), state=session.state if session else None, trace=spec,
                    interventions=interventions, top_logprobs=ask.top_logprobs,
                    echo_logprobs=ask.echo or spec is not None, stops=stops,
                )  # fmt: skip
                outputs.append(_Output(len(outputs), prompt, request, stops, runtime.engine.submit(request)))
        generation = Generation(runtime, ask, request_id, outputs, session)
        if spec is not None:
            (output,) = outputs
            generation.trace = runtime.traces.open(
                request_id, owner=owner, request=output.request, seed=output.ticket.seed, session_id=body.session_id
            )
    except BaseException:
        for output in outputs:
            output.ticket.cancel()
        raise
    return generation


async def _side_by_side(sources: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """What several sources give, in the order in which it comes."""
    pending = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = pending.pop(task)
                with suppress(StopAsyncIteration):
                    piece = task.result()
                    pending[asyncio.ensure_future(anext(source))] = source
                    yield piece
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def unless_gone(receive: Receive, generation: Generation) -> list[Piece] | None:
    """All pieces of an answer that is sent whole; None where the client has gone, and then nothing goes on."""

    async def collect() -> list[Piece]:
        return [piece async for piece in generation.pieces()]

    collecting = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await collecting if collecting.done() else None
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
        generation.cancel()


def route(trace: RowTrace) -> Route:
    """Where the latest token of a trace went, in the layers that were asked for."""
    layers = []
    for layer in trace.batch.layers:
        if layer.routing is None or not trace.spec.covers(layer.index):
            continue
        experts = layer.routing.experts[trace.row, -1].tolist()
        weights = layer.routing.weights[trace.row, -1].tolist()
        layers.append([[e, round(w, 4)] for e, w in zip(experts, weights, strict=True) if e >= 0])
    return layers


def _check(runtime: Runtime, ask: Ask) -> None:
    body, settings = ask.body, runtime.settings
    if body.model is not None and body.model != settings.model_id:
        message = f"model: this server has {settings.model_id!r} alone"
        raise ApiError(404, message, param="model", code="model_not_found")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: needs stream: true", "stream_options")
    if body.trace is not None and body.trace.inline and not body.stream:
        raise bad_request("trace.inline: needs stream: true", "trace.inline")
    for name in ("max_tokens", "max_completion_tokens"):
        if (getattr(body, name, None) or 0) > settings.max_output_tokens:
            raise bad_request(f"{name}: expected at most {settings.max_output_tokens}", name)


def _check_prompts(runtime: Runtime, ask: Ask, prompts: Sequence[Sequence[int]], *, follows: bool) -> None:
    body, settings = ask.body, runtime.settings
    if len(prompts) * body.choices > MOST_CHOICES:
        raise bad_request(f"n: prompts times n must be at most {MOST_CHOICES}", "n")
    room = settings.slots + settings.queue
    if len(prompts) * body.choices > room:
        raise bad_request(f"n: prompts times n must be at most {room}, what this server runs and lets wait", "n")
    for name in ("session_id", "trace"):
        if getattr(body, name) is not None and len(prompts) * body.choices > 1:
            raise bad_request(f"{name}: needs a single prompt and n: 1", name)
    for prompt in prompts:
        if len(prompt) > settings.max_prompt_tokens:
            message = f"{ask.field}: expected at most {settings.max_prompt_tokens} tokens, got {len(prompt)}"
            raise bad_request(message, ask.field, "context_length_exceeded")
        if not prompt and (follows or runtime.codec.opening is None) and ask.max_tokens:
            raise bad_request(f"{ask.field}: there must be at least one token to go on from", ask.field)
        if any(token >= runtime.config.vocab_size for token in prompt):
            raise bad_request(f"{ask.field}: token ids go up to {runtime.config.vocab_size - 1}", ask.field)


def _trace_spec(runtime: Runtime, body: GenerationBody) -> TraceSpec | None:
    if body.trace is None:
        return None
    layers = None if body.trace.layers is None else tuple(body.trace.layers)
    check_layers(layers, runtime.config, field="trace.layers")
    return TraceSpec(
        level=body.trace.level, layers=layers, every=body.trace.every, max_tokens=runtime.settings.trace_tokens
    )


def _sampling(ask: Ask, number: int) -> Sampling:
    body = ask.body
    sampling = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature, top_k=body.top_k, top_p=body.top_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        max_tokens=ask.max_tokens,
    )  # fmt: skip
    return sampling if body.seed is None else replace(sampling, seed=(body.seed + number * SCATTER) % 2**63)
