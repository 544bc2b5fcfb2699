"""POST /api/introspect: a prompt is run and traced. A session it starts from is copied, and stays as it is."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool

from serving.errors import bad_request
from serving.introspection.bodies import RunBody
from serving.introspection.interventions import check_layers, parse
from serving.introspection.record import TraceRecord
from serving.requests import Failed, GenerationRequest
from serving.runtime import Runtime
from serving.sessions import goes_on
from serving.tickets import Ticket
from serving.tokens import TextStopMatcher
from synapse_arch import Sampling, TraceSpec

OUTPUT_TOKENS = 32
"""Where a run does not say how many."""


async def start(runtime: Runtime, owner: str, request_id: str, body: RunBody) -> tuple[Ticket, TraceRecord]:
    """Checks what was asked, and hands it to the engine.

    Raises:
        ApiError: a field that does not fit. SynapseError: what the engine refuses.
    """
    interventions = parse(body.interventions, runtime.config)
    check_layers(body.layers, runtime.config)
    session = None
    if body.session_id is not None:
        session = await run_in_threadpool(runtime.sessions.load, body.session_id, owner)
    prompt = await run_in_threadpool(_prompt, runtime, body, follows=goes_on(session))
    most = runtime.settings.max_output_tokens
    max_tokens = min(OUTPUT_TOKENS, most) if body.max_tokens is None else body.max_tokens
    if max_tokens > most:
        raise bad_request(f"max_tokens: expected at most {most}", "max_tokens")
    request = GenerationRequest(
        prompt=prompt,
        sampling=Sampling(**body.sampling.model_dump(), max_tokens=max_tokens),
        state=session.state if session else None,
        trace=TraceSpec(
            level=body.level, layers=None if body.layers is None else tuple(body.layers), every=body.every,
            max_tokens=runtime.settings.trace_tokens,
        ),
        interventions=interventions, echo_logprobs=True, stops=TextStopMatcher((), runtime.codec),
    )  # fmt: skip
    ticket = runtime.engine.submit(request)
    record = runtime.traces.open(request_id, owner=owner, request=request, seed=ticket.seed, session_id=body.session_id)
    return ticket, record


async def complete(ticket: Ticket, record: TraceRecord) -> None:
    """Adds a run's events to its trace until it ends.

    Raises:
        SynapseError: the run failed.
    """
    try:
        async for event in ticket:
            record.add(event)
            if isinstance(event, Failed):
                raise event.error
    finally:
        record.cancel()


def _prompt(runtime: Runtime, body: RunBody, *, follows: bool) -> tuple[int, ...]:
    """The ids to read; the opening token in front of a text does not count as the client's."""
    name, most, vocabulary = "tokens", runtime.settings.max_prompt_tokens, runtime.config.vocab_size
    ids = body.tokens
    if ids is None:
        name, ids = "prompt", runtime.codec.encode(body.prompt or "")
    if len(ids) > most:
        raise bad_request(f"{name}: expected at most {most} tokens, got {len(ids)}", name)
    if body.tokens is None and not follows:
        ids = runtime.codec.opened(ids)
    if not ids:
        raise bad_request(f"{name}: expected at least one token", name)
    for index, token in enumerate(ids):
        if token >= vocabulary:
            raise bad_request(f"{name}.{index}: expected 0 to {vocabulary - 1}, got {token}", f"{name}.{index}")
    return tuple(ids)
