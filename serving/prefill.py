"""Reading a prompt, alone and piece by piece, so that others can take their steps in between. V vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from serving.batch import Seat, likeliest
from serving.interventions import boundaries, clear_memory, cleared_at, controls_at
from serving.requests import PromptToken
from synapse_arch import StateError, SynapseModel, SynapseOutput, SynapseState
from synapse_arch.errors import explain
from synapse_arch.introspection import SynapseTrace, join_traces


class Prompt(NamedTuple):
    """A prompt that has been read."""

    state: SynapseState
    """One row."""
    logits: Tensor
    """(V,) for what comes next."""
    trace: SynapseTrace | None
    tokens: list[PromptToken]
    """What was thought of the prompt's tokens, where that was asked for."""


def read_prompt(model: SynapseModel, seat: Seat, piece: int) -> Generator[None, None, Prompt]:
    """Reads a request's prompt; stops between its pieces.

    Where the pieces end depends on the request alone: after every `piece` tokens and where an intervention begins or
    ends. So does every bit of the result.

    Raises:
        StateError: logits that are looked at are not finite: those for what comes next, or a scored token's.
    """
    request, config = seat.request, model.config
    device, spec = model.embedding.weight.device, request.trace
    state = request.state or model.init_state(1)
    ids = torch.tensor(request.prompt, dtype=torch.long, device=device)[None]
    logits, traces = torch.empty(0), []
    tokens: list[PromptToken] = []
    for span in _pieces(seat, piece):
        with torch.inference_mode():
            position = seat.first + span.start
            if layers := cleared_at(request.interventions, position, seat.first):
                state = clear_memory(state, 0, layers)
            out = model(
                ids[:, span], state,
                trace=None if spec is None else dataclasses.replace(spec, start=spec.start + span.start),
                logits_to_keep=0 if request.echo_logprobs else 1,
                controls=controls_at(request.interventions, position, config, device=device),
            )  # fmt: skip
            if request.echo_logprobs:
                before = logits[None] if tokens else out.logits.new_empty(0, config.vocab_size)
                predictions = torch.cat([before, out.logits[0, :-1]])
                tokens.extend(_score(request.prompt[span], predictions, request.top_logprobs))
            state, logits = out.state, out.logits[0, -1]
            if out.trace is not None:
                traces.append(out.trace)
        seat.position = seat.first + span.stop
        if span.stop < len(request.prompt):
            yield
    if not logits.isfinite().all():
        raise not_finite("NaN or infinite ones")
    trace = None if spec is None or not traces else join_traces(traces, max_tokens=spec.max_tokens)
    return Prompt(state, logits, trace, tokens)


def not_finite(got: str) -> StateError:
    """What is said of logits that hold NaN or infinities."""
    remedy = "the weights, the state or an intervention hold values that are not finite"
    return StateError(explain("logits", "finite values", got, remedy))


@torch.inference_mode()
def read_on(model: SynapseModel, state: SynapseState, tokens: Sequence[int]) -> SynapseState:
    """The state of one row after a few more tokens; the same one after none."""
    if not tokens:
        return state
    ids = torch.tensor([list(tokens)], device=model.embedding.weight.device)
    out: SynapseOutput = model(ids, state, logits_to_keep=1)
    return out.state


def _pieces(seat: Seat, size: int) -> Iterator[slice]:
    """Where the prompt is cut."""
    length = len(seat.request.prompt)
    turns = (turn - seat.first for turn in boundaries(seat.request.interventions))
    cuts = sorted({*range(0, length, size), *(turn for turn in turns if 0 < turn < length), length})
    return (slice(start, end) for start, end in itertools.pairwise(cuts))


def _score(tokens: tuple[int, ...], logits: Tensor, top: int) -> list[PromptToken]:
    """What logits (n, V) say of the last n of the tokens; the first may have had none.

    Raises:
        StateError: they are not finite.
    """
    logprobs = logits.float().log_softmax(-1)
    if not logprobs.isfinite().all():
        raise not_finite("NaN or infinite ones")
    known = tokens[len(tokens) - len(logprobs) :]
    chosen = logprobs.gather(1, torch.tensor(known, dtype=torch.long, device=logits.device)[:, None])[:, 0].tolist()
    entropies = torch.special.entr(logprobs.exp()).sum(-1).tolist()
    scored = [PromptToken(*values) for values in zip(known, chosen, entropies, likeliest(logprobs, top), strict=True)]
    return [PromptToken(tokens[0], None, None, ()), *scored] if len(known) < len(tokens) else scored
