"""Text, token by token: one pass over the prompt, then one step of constant cost a token.

B batch, T time, V vocabulary. `stream` serves one sequence and shows each token's inner record; `generate` serves a
batch. Both draw with one generator a row, so a row's draws depend on its seed and number, never on the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from synapse_arch.errors import ShapeError, explain
from synapse_arch.introspection.records import SynapseTrace
from synapse_arch.introspection.trace import TraceSpec
from synapse_arch.model.decoder import Decoder, evaluating
from synapse_arch.model.sampling import Sampling, StopMatcher
from synapse_arch.model.state import SynapseState

if TYPE_CHECKING:
    from synapse_arch.model.model import SynapseModel

__all__ = ["Finish", "GenerateOutput", "Sampling", "StreamedToken", "TokenStream", "generate", "stream"]

Finish = Literal["stop", "length"]


class StreamedToken(NamedTuple):
    """One token of output.

    Attributes:
        id: the token.
        logprob: its log-probability (nats) in the model's own distribution, before any sampling option.
        entropy: the entropy of that distribution, in nats.
        state: the state that has read everything up to this token and the token itself.
        trace: what the model did to arrive at the token: for the first one its pass over the prompt, for a later
            one its step on the token before; None where nothing is traced.
        finish: on the last token why the output ends, else None.
    """

    id: int
    logprob: float
    entropy: float
    state: SynapseState
    trace: SynapseTrace | None
    finish: Finish | None


@dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `generate` returns, one entry a row.

    Attributes:
        ids: the output tokens, without the prompt and without the stop sequence.
        logprobs: log-probability (nats) of each in the model's own distribution.
        state: each row has read its prompt and its output.
        finish: why each row ended.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    state: SynapseState
    finish: list[Finish]


class TokenStream(Iterator[StreamedToken]):
    """The tokens of `stream`, and how far it is.

    Attributes:
        state: has read the prompt (once the first token was asked for) and every token handed out; it also
            serves where a stop sequence came at once and there is no token.
        finish: why the output ended, None before.
    """

    def __init__(self, decoder: Decoder, sampling: Sampling) -> None:
        self.state = decoder.state
        self.finish: Finish | None = None
        self._tokens = self._run(decoder, sampling)

    def __next__(self) -> StreamedToken:
        token = next(self._tokens)
        self.state = token.state
        return token

    def close(self) -> None:
        """Ends the stream early: no further token is computed."""
        self._tokens.close()

    def _run(self, decoder: Decoder, sampling: Sampling) -> Generator[StreamedToken]:
        """Holds back what may become a stop sequence, and one token more, so that the last can say `finish`."""
        decoder.read_prompt()
        self.state = decoder.state
        stops = StopMatcher(sampling.stop)
        held: deque[StreamedToken] = deque()
        finish: Finish = "length"
        for _ in range(sampling.max_tokens):
            choice = decoder.choose()
            found = stops.push(choice.ids[0])
            if found.matched:
                finish = "stop"
                for _ in range(found.matched - 1):
                    held.pop()
                break
            while len(held) > found.begun:
                yield held.popleft()
            trace = decoder.trace
            decoder.read(choice.ids)
            (token,), (logprob,), (entropy,) = choice
            held.append(StreamedToken(token, logprob, entropy, decoder.state, trace, None))
        if not held:
            self.finish = finish
        while held:
            last = len(held) == 1
            self.finish = finish if last else None
            yield held.popleft()._replace(finish=self.finish)


def stream(
    model: SynapseModel,
    ids: Tensor,
    state: SynapseState | None = None,
    *,
    sampling: Sampling | None = None,
    mask: Tensor | None = None,
    trace: TraceSpec | None = None,
    compile: bool = False,
) -> TokenStream:
    """Continues one sequence, token by token. Arguments are checked at once, the prompt is read with the first token.

    A token is handed out when the model has read it, so that its `state` can open what follows. The model runs in
    evaluation mode (no router noise) without gradients, and is in its own mode whenever a token is handed out.

    Args:
        model: the model.
        ids: (T,) or (1, T) prompt tokens, T > 0; they follow what `state` has read.
        state: a state of one row; None for a fresh one. It is not changed.
        sampling: how to draw; None for the defaults.
        mask: bool, of ids' shape; False positions are padding.
        trace: what to record of each pass.
        compile: has torch.compile fuse the steps behind the prompt: the same logits up to rounding, in less time a
            token, for a minute or more of compiling at the first step of a model and batch size. Traced steps, and
            those on a machine without a C++ compiler, cannot be compiled.

    Returns:
        An iterator of StreamedToken; none of a stop sequence is ever part of it.

    Raises:
        ShapeError: ids or mask of a wrong shape, dtype or value, or an empty prompt.
        StateError: a state of another model or batch size; (while iterating) logits that are not finite.
        ConfigError: a stop sequence outside the vocabulary; `compile` with a trace or without a C++ compiler.
    """
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids[None]
        mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] != 1:
        raise ShapeError(explain("ids", "(T,) or (1, T)", tuple(ids.shape), "use generate for a batch"))
    sampling = sampling or Sampling()
    return TokenStream(Decoder(model, ids, state, sampling=sampling, mask=mask, trace=trace, compile=compile), sampling)


def generate(
    model: SynapseModel,
    ids: Tensor,
    state: SynapseState | None = None,
    *,
    sampling: Sampling | None = None,
    mask: Tensor | None = None,
    compile: bool = False,
) -> GenerateOutput:
    """Continues a batch of sequences; each row ends by itself, and its state then stays where it is.

    Args:
        model: the model; runs as in `stream`.
        ids: (B, T) prompt tokens, T > 0; they follow what `state` has read.
        state: a state of B rows; None for a fresh one. It is not changed.
        sampling: how to draw; each row has a generator of its own, seeded from (seed, row); row 0 draws as `stream`.
        mask: (B, T) bool, False where a shorter prompt is padded, on either side; None for none.
        compile: as in `stream`.

    Returns:
        The output without stop sequences. Each row of its state has read that row's prompt and output, and no more.

    Raises:
        ShapeError, StateError, ConfigError: as `stream`.
    """
    sampling = sampling or Sampling()
    decoder = Decoder(model, ids, state, sampling=sampling, mask=mask, trace=None, compile=compile, alone=True)
    rows = [_Row([], [], StopMatcher(sampling.stop)) for _ in range(ids.shape[0])]
    with evaluating(model), torch.inference_mode():
        decoder.read_prompt()
        before = deque([decoder.state], maxlen=max(map(len, sampling.stop), default=1))  # states to go back to
        for _ in range(sampling.max_tokens):
            choice = decoder.choose([row.finish is None for row in rows])
            for number, row in enumerate(rows):
                matched = row.push(choice.ids[number], choice.logprobs[number]) if row.finish is None else 0
                if matched > 1:  # the beginning of the stop sequence has been read
                    decoder.rewind(number, before[-matched])
            if all(row.finish for row in rows):
                break
            decoder.read(choice.ids, [row.finish is None for row in rows])
            before.append(decoder.state)
    return GenerateOutput(
        ids=[row.ids for row in rows],
        logprobs=[row.logprobs for row in rows],
        state=decoder.state.clone(),  # outside of inference mode: tensors like any other
        finish=[row.finish or "length" for row in rows],
    )


@dataclass
class _Row:
    """The output of one row of a batch."""

    ids: list[int]
    logprobs: list[float]
    stops: StopMatcher
    finish: Finish | None = None

    def push(self, token: int, logprob: float) -> int:
        """Takes the next token; returns the length of the stop sequence that it completes, which is then dropped."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        matched = self.stops.push(token).matched
        if matched:
            del self.ids[-matched:], self.logprobs[-matched:]
            self.finish = "stop"
        return matched
