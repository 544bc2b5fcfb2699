"""/v1: OpenAI's models, completions and chats, with sessions, traces and interventions as further fields."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.responses import JSONResponse

from serving.answers import Answer, ChatAnswer, CompletionAnswer
from serving.errors import ApiError, as_api_error, bad_request
from serving.generation import Ask, Generation, begin, unless_gone
from serving.runtime import Current, Owner, Runtime
from serving.schemas import ChatBody, CompletionBody
from serving.stream import DONE, EventStream, frame
from serving.template import Message

COMPLETION_TOKENS = 16
"""What OpenAI's completions have where max_tokens is absent."""
CHAT_TOKENS = 512

STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models")
def models(runtime: Current) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(runtime)]}


@router.get("/models/{model:path}")
def model(model: Annotated[str, Path()], runtime: Current) -> dict[str, Any]:
    """The model, by its name."""
    if model != runtime.settings.model_id:
        message = f"this server has {runtime.settings.model_id!r} alone"
        raise ApiError(404, message, param="model", code="model_not_found")
    return _model(runtime)


@router.post("/completions", response_class=JSONResponse, responses=STREAMS)
async def completions(body: CompletionBody, request: Request, runtime: Current, owner: Owner) -> Response:
    """Goes on from a prompt: text, or token ids."""

    def prompts(_: bool) -> list[list[int]]:
        codec = runtime.codec
        return [codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]

    ask = Ask(
        body=body, field="prompt", prompts=prompts, stops=body.stops, echo=bool(body.echo),
        max_tokens=_limit(runtime, COMPLETION_TOKENS, body.max_tokens),
        top_logprobs=body.logprobs or 0,
    )  # fmt: skip
    generation = await begin(runtime, owner, request.scope["request_id"], ask)
    answer = CompletionAnswer(runtime, generation, logprobs=body.logprobs is not None, echo=bool(body.echo))
    return await _answer(request, ask, generation, answer)


@router.post("/chat/completions", response_class=JSONResponse, responses=STREAMS)
async def chat_completions(body: ChatBody, request: Request, runtime: Current, owner: Owner) -> Response:
    """The assistant's next turn; with a session only the new turns are sent."""
    messages = [Message("system" if one.role == "developer" else one.role, one.text) for one in body.messages]
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs: true", "top_logprobs")
    limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
    if len(limits) == 2:
        raise bad_request("max_completion_tokens: another number than max_tokens", "max_completion_tokens")
    ask = Ask(
        body=body, field="messages", prompts=lambda follows: [runtime.codec.chat(messages, follows=follows)],
        stops=[*body.stops, *runtime.codec.template.stops],
        max_tokens=_limit(runtime, CHAT_TOKENS, *limits),
        top_logprobs=body.top_logprobs or 0,
    )  # fmt: skip
    generation = await begin(runtime, owner, request.scope["request_id"], ask)
    answer = ChatAnswer(runtime, generation, logprobs=bool(body.logprobs))
    return await _answer(request, ask, generation, answer)


def _limit(runtime: Runtime, default: int, *given: int | None) -> int:
    """The tokens of output: what was asked for, or else the default, which the server's own limit may lower."""
    asked = [limit for limit in given if limit is not None]
    return asked[0] if asked else min(default, runtime.settings.max_output_tokens)


async def _answer(request: Request, ask: Ask, generation: Generation, answer: Answer) -> Response:
    """Whole, or token by token."""
    if ask.body.stream:
        options = ask.body.stream_options
        frames = _frames(generation, answer, usage=bool(options and options.include_usage))
        return EventStream(frames, generation)
    pieces = await unless_gone(request.receive, generation)
    if pieces is None:
        return Response(status_code=499)  # nobody reads it
    for piece in pieces:
        answer.take(piece)
    return JSONResponse(answer.whole())


async def _frames(generation: Generation, answer: Answer, *, usage: bool) -> AsyncIterator[bytes]:
    """The frames of a stream; what goes wrong on the way is its last one."""
    more: dict[str, Any] = {"usage": None} if usage else {}
    try:
        for chunk in answer.opening():
            yield frame(chunk | more)
        async for piece in generation.pieces():
            for chunk in answer.take(piece):
                yield frame(chunk | more)
        if usage:
            yield frame(answer.usage_chunk())
        yield DONE
    except Exception as error:
        found = as_api_error(error)
        if found.code == "internal_error":
            raise
        yield frame(found.body())


def _model(runtime: Runtime) -> dict[str, Any]:
    name = runtime.settings.model_id
    return {"id": name, "object": "model", "created": runtime.created, "owned_by": "synapse_arch"}
