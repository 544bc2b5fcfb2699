"""What `stream` and `generate` run on: the state of a batch, the logits for what comes next, and the draws from them.

B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, ShapeError, StateError, explain
from synapse_arch.introspection.records import SynapseTrace
from synapse_arch.introspection.trace import TraceSpec
from synapse_arch.model.compiling import Step, compiled_step, require_compiler, settled
from synapse_arch.model.sampling import Sampling, draw_tokens, penalise, row_generators, uniforms
from synapse_arch.model.state import SynapseState

if TYPE_CHECKING:
    from synapse_arch.model.model import SynapseModel


class Choice(NamedTuple):
    """The next token of every row, with its log-probability and the entropy of what it was drawn from (nats)."""

    ids: list[int]
    logprobs: list[float]
    entropies: list[float]


class Decoder:
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
    def choose(self, active: Sequence[bool] | None = None) -> Choice:
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
        return Choice(tokens.tolist(), logprobs, entropies)

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
        return nullcontext() if self._alone else evaluating(self._model)

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
def evaluating(model: nn.Module) -> Iterator[None]:
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
