"""Text, token by token: one pass over the prompt, then one step of constant cost a token.

B batch, T time, V vocabulary. `stream` serves one sequence and shows each token's inner record; `generate` serves a
batch. Both draw with one generator a row, so a row's draws depend on its seed and number, never on the batch.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, ShapeError, StateError, explain
from synapse_arch.introspection.records import SynapseTrace
from synapse_arch.introspection.trace import TraceSpec
from synapse_arch.model.compiling import Step, compiled_step, require_compiler, settled
from synapse_arch.model.sampling import Sampling, StopMatcher, draw_tokens, penalise, row_generators, uniforms
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

    def __init__(self, decoder: _Decoder, sampling: Sampling) -> None:
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

    def _run(self, decoder: _Decoder, sampling: Sampling) -> Generator[StreamedToken]:
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
    return TokenStream(
        _Decoder(model, ids, state, sampling=sampling, mask=mask, trace=trace, compile=compile), sampling
    )


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
    decoder = _Decoder(model, ids, state, sampling=sampling, mask=mask, trace=None, compile=compile, alone=True)
    rows = [_Row([], [], StopMatcher(sampling.stop)) for _ in range(ids.shape[0])]
    with _evaluating(model):
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
        state=decoder.state,
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


class _Choice(NamedTuple):
    ids: list[int]
    logprobs: list[float]
    entropies: list[float]


class _Decoder:
    """A running batch: the state, and the logits for what comes next. Checks its arguments when made.

    With `alone` no other code runs between its steps, and the caller has put the model into evaluation mode.
    """

    def __init__(
        self,
        model: SynapseModel,
        ids: Tensor,
        state: SynapseState | None,
        *,
        sampling: Sampling,
        mask: Tensor | None,
        trace: TraceSpec | None,
        compile: bool,
        alone: bool = False,
    ) -> None:
        vocabulary = model.config.vocab_size
        _check_prompt(ids, mask, vocabulary)
        outside = [sequence for sequence in sampling.stop if max(sequence) >= vocabulary]
        if outside:
            raise ConfigError(explain("stop", f"token ids below {vocabulary}", outside[0]))
        device = next(model.parameters()).device
        if compile:
            if trace is not None:
                raise ConfigError(explain("compile", "no trace", "a TraceSpec", "leave one of them away"))
            require_compiler(device)
        batch = ids.shape[0]
        if state is None:
            state = model.init_state(batch, device=device)
        else:
            state.check_against(model, batch, device=device)
        self.state = state
        self.trace: SynapseTrace | None = None
        self._model, self._sampling, self._spec, self._alone = model, sampling, trace, alone
        self._prompt = ids.to(device).long()
        self._compiled = self._compiled_step() if compile else None
        self._mask = None if mask is None or bool(mask.all()) else mask.to(device)
        self._logits = torch.empty(0)
        self._seen: Tensor | None = None
        self._draws = row_generators(sampling.seed, batch)

    def read_prompt(self) -> None:
        """The one pass over the prompt."""
        if self._mask is None:
            self._logits = self._advance(self._prompt, None)[:, -1]
        else:
            padding = self._mask.flip(1).int().argmax(1)  # (B,) positions behind each row's last real one
            logits = self._advance(self._prompt, self._mask, keep=int(padding.max()) + 1)
            self._logits = logits[torch.arange(len(padding), device=padding.device), logits.shape[1] - 1 - padding]
        if self._sampling.repetition_penalty != 1:
            self._seen = torch.zeros_like(self._logits, dtype=torch.bool)
            real = torch.ones_like(self._prompt, dtype=torch.bool) if self._mask is None else self._mask
            self._seen[real.nonzero()[:, 0], self._prompt[real]] = True

    @torch.no_grad()
    def choose(self, active: Sequence[bool] | None = None) -> _Choice:
        """Draws the next token of every row; what it says of rows that are not active means nothing.

        Raises:
            StateError: the logits of an active row are not finite.
        """
        logits = self._logits.float()  # (B, V)
        own = logits.log_softmax(-1)
        scores = logits if self._seen is None else penalise(logits, self._seen, self._sampling.repetition_penalty)
        tokens = draw_tokens(scores, self._sampling, uniforms(self._draws).to(logits.device))
        logprobs = own.gather(1, tokens[:, None])[:, 0].tolist()
        entropies = torch.special.entr(own.exp()).sum(-1).tolist()
        for row, logprob in enumerate(logprobs):
            if not math.isfinite(logprob) and (active is None or active[row]):
                remedy = "the weights or the state hold values that are not finite"
                raise StateError(explain(f"logits of row {row}", "finite values", f"log-probability {logprob}", remedy))
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return _Choice(tokens.tolist(), logprobs, entropies)

    def read(self, tokens: Sequence[int], active: Sequence[bool] | None = None) -> None:
        """Reads one token a row; rows that are not active stay as they are."""
        device = self._prompt.device
        whole = active is None or (
            all(active) and not (self._compiled is not None and len(active) > 1)
        )  # a graph has a mask or none
        mask = None if whole else torch.tensor(active, device=device)[:, None]
        ids = torch.tensor(tokens, device=device)[:, None]
        compiled = self._compiled
        self._logits = (self._advance(ids, mask) if compiled is None else self._step(compiled, ids, mask))[:, -1]

    def _mode(self) -> AbstractContextManager[None]:
        return nullcontext() if self._alone else _evaluating(self._model)

    def _compiled_step(self) -> Step:
        step = compiled_step(self._prompt.device.type)
        return settled(step) if self._alone else step

    @torch.no_grad()
    def _step(self, compiled: Step, ids: Tensor, mask: Tensor | None) -> Tensor:
        with self._mode():
            logits, self.state = compiled(self._model, ids, self.state, mask)
        return logits

    def rewind(self, row: int, state: SynapseState) -> None:
        """Sets one row back to an earlier state."""
        rows = torch.zeros(self.state.batch_size, dtype=torch.bool, device=self.state.device)
        rows[row] = True
        self.state = state.where(rows, self.state)
        if self._compiled is not None:
            self._compiled = self._compiled_step()

    @torch.no_grad()
    def _advance(self, ids: Tensor, mask: Tensor | None, *, keep: int = 1) -> Tensor:
        with self._mode():
            out = self._model(ids, self.state, mask=mask, trace=self._spec, logits_to_keep=keep)
        self.state, self.trace = out.state, out.trace
        return cast(Tensor, out.logits)


def _check_prompt(ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    if not isinstance(ids, Tensor):
        raise ShapeError(explain("ids", "a tensor of token ids", type(ids).__name__, "use torch.tensor(ids)"))
    if ids.dim() != 2 or 0 in ids.shape:
        remedy = "a prompt needs at least one token"
        raise ShapeError(explain("ids", "(B, T) with B > 0, T > 0", tuple(ids.shape), remedy))
    if ids.dtype not in (torch.int64, torch.int32):
        raise ShapeError(explain("ids", "int64 or int32", ids.dtype, "token ids are integers"))
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        remedy = "use the tokenizer of this model"
        raise ShapeError(explain("ids", f"0 to {vocabulary - 1}", f"{low} to {high}", remedy))
    if mask is None:
        return
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        got = f"{tuple(mask.shape)} {mask.dtype}"
        raise ShapeError(explain("mask", f"{tuple(ids.shape)} torch.bool", got, "True means a real token"))
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ShapeError(explain("mask", "at least one real token in every row", f"none in rows {empty[:10]}"))


_lock = threading.Lock()
_evaluated: dict[nn.Module, tuple[int, list[nn.Module]]] = {}
"""Of the models that are read now: by how many at once, and which of their modules were in training mode before."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each submodule in the mode it was in when the last of several threads has left."""
    with _lock:
        readers, training = _evaluated.get(model) or (0, [module for module in model.modules() if module.training])
        _evaluated[model] = readers + 1, training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _lock:
            readers, training = _evaluated.pop(model)
            if readers > 1:
                _evaluated[model] = readers - 1, training
            else:
                for module in training:
                    module.training = True
