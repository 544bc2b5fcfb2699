"""The rows that are decoded together: a fixed number of places, of which some are taken.

A step reads one token in every taken row. Free rows are masked and full of NaN. The products have the same shapes
however many rows are taken, so a row's bits depend neither on its place nor on its company.
S rows of the batch, V vocabulary, D model width.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from serving.interventions import boundaries, clear_memory, cleared_at, controls_at
from serving.requests import GenerationRequest, RowTrace
from serving.rows import StepTrace, poison, put_row, take_row
from synapse_arch import Controls, Sampling, SynapseModel, SynapseState, TraceSpec
from synapse_arch.introspection import LEVELS
from synapse_arch.model.sampling import draw_tokens, penalise, row_generators, uniforms

TILE = 8
"""Rows come in multiples of this: products of fewer rows treat the places differently."""


class Choice(NamedTuple):
    """What a row's logits led to."""

    token: int
    logprob: float
    entropy: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Seat:
    """What the batch knows of a taken row.

    Attributes:
        request: whose it is.
        generator: of its draws.
        first: the position at which the request began to read.
        position: tokens that its state has read.
        turns: the positions in front of which interventions begin or end.
        drawing: how it draws; rows of one kind are drawn together.
    """

    request: GenerationRequest
    generator: torch.Generator
    first: int
    position: int

    def __post_init__(self) -> None:
        self.turns = frozenset((*boundaries(self.request.interventions), self.first))
        self.drawing = dataclasses.replace(self.request.sampling, stop=(), seed=None, max_tokens=0)


class Batch:
    """The places, their state and the logits for what comes next.

    Args:
        model: in evaluation mode; nobody else may use it meanwhile.
        slots: how many rows can be taken.

    Attributes:
        seats: who sits where, None where nobody does.
        exact: whether equal rows come out of a step in equal bits on this machine, wherever they are.
    """

    def __init__(self, model: SynapseModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self.size = -(-slots // TILE) * TILE
        self.device = model.embedding.weight.device
        self.clear()
        self.exact = self._is_exact()
        if not self.exact:
            logging.getLogger(__name__).warning(
                "products treat the rows of a batch of %d differently on this machine: an output is repeatable in the "
                "same company only up to rounding",
                self.size,
            )

    @torch.inference_mode()
    def clear(self) -> None:
        """Frees all places."""
        self.seats: list[Seat | None] = [None] * self.slots
        self._state = self.model.init_state(self.size)
        for row in range(self.size):
            self._state = poison(self._state, row)
        vocabulary = self.model.config.vocab_size
        self._logits = torch.full((self.size, vocabulary), torch.nan, device=self.device)
        self._seen = torch.zeros(self.size, vocabulary, dtype=torch.bool, device=self.device)
        self._mask = torch.zeros(self.size, 1, dtype=torch.bool, device=self.device)
        self._hands: list[Controls | None] = [None] * self.size
        self._controls: Controls | None = None

    @torch.inference_mode()
    def join(self, row: int, seat: Seat, state: SynapseState, logits: Tensor) -> None:
        """Lets a request whose prompt has been read take a free row.

        Args:
            row: which.
            seat: the request.
            state: one row that has read the prompt.
            logits: (V,) for what comes next.
        """
        self.seats[row] = seat
        self._state = put_row(self._state, row, state)
        self._logits[row] = logits
        self._seen[row] = False
        self._seen[row, list(seat.request.prompt)] = True
        self._take(row, True)
        controls = controls_at(seat.request.interventions, seat.position, self.model.config, device=self.device)
        self._hand(row, controls)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Frees a row and spoils what it held."""
        self.seats[row] = None
        self._state = poison(self._state, row)
        self._logits[row] = torch.nan
        self._take(row, False)
        self._hand(row, None)

    def snapshot(self, row: int) -> SynapseState:
        """A copy of a row's state."""
        seat = self.seats[row]
        return take_row(self._state, row, seat.request.trace if seat else None)

    @torch.inference_mode()
    def choose(self) -> dict[int, Choice | Exception]:
        """Draws the next token of every taken row; a row whose logits are not finite gets NaN for log-probability.

        Where a kind of drawing fails, the rows that asked for it get the error, and the others their tokens.
        """
        taken = {row: seat for row, seat in enumerate(self.seats) if seat is not None}
        sound = self._logits.isfinite().all(-1, keepdim=True)
        logits = torch.where(sound, self._logits.float(), 0.0)
        own = torch.where(sound, logits.log_softmax(-1), torch.nan)
        drawn, failed = [0] * self.size, dict[int, Exception]()
        for sampling, rows in _alike(taken).items():
            try:
                tokens = self._draw(logits, sampling, rows, [taken[row].generator for row in rows])
            except Exception as error:  # whatever it is, it is these rows'
                failed |= dict.fromkeys(rows, error)
            else:
                for row in rows:
                    drawn[row] = tokens[row]
        chosen = torch.tensor(drawn, device=self.device)[:, None]
        self._seen.scatter_(1, chosen, True)
        logprobs, entropies = own.gather(1, chosen)[:, 0].tolist(), torch.special.entr(own.exp()).sum(-1).tolist()
        tops = likeliest(own, max((seat.request.top_logprobs for seat in taken.values()), default=0))
        return {
            row: failed.get(row)
            or Choice(drawn[row], logprobs[row], entropies[row], tops[row][: seat.request.top_logprobs])
            for row, seat in taken.items()
        }

    def _draw(
        self, logits: Tensor, sampling: Sampling, rows: list[int], generators: list[torch.Generator]
    ) -> list[int]:
        """A token for every row (S, V) of the batch, of which only those of `rows` count."""
        if sampling.repetition_penalty != 1:
            logits = penalise(logits, self._seen, sampling.repetition_penalty)
        at = torch.zeros(self.size)
        if sampling.temperature > 0:
            at[rows] = uniforms(generators)
        tokens: list[int] = draw_tokens(logits, sampling, at.to(self.device)).tolist()
        return tokens

    @torch.inference_mode()
    def read(self, tokens: dict[int, int]) -> dict[int, RowTrace | None]:
        """Reads one token in every taken row.

        Args:
            tokens: by row, for all that are taken.

        Returns:
            What each row's request asked to see of the step.
        """
        ids = torch.zeros(self.size, 1, dtype=torch.long)
        for row, token in tokens.items():
            ids[row] = token
            self._intervene(row)
        spec = self._spec()
        out = self.model(
            ids.to(self.device), self._state, mask=self._mask, trace=spec, controls=self._controls,
            expert_backend="rowwise",
        )  # fmt: skip
        self._state, self._logits = out.state, out.logits[:, 0]
        trace = None if out.pending is None else StepTrace(out.pending)
        return {row: self._seen_by(row, trace) for row in tokens}

    def _take(self, row: int, taken: bool) -> None:
        """Marks a row; the mask of an earlier step may still be needed for its trace."""
        self._mask = self._mask.clone()
        self._mask[row] = taken

    def _intervene(self, row: int) -> None:
        """Brings a row's interventions up to the position that it reads next."""
        seat = self.seats[row]
        assert seat is not None
        if seat.position in seat.turns:
            interventions = seat.request.interventions
            if layers := cleared_at(interventions, seat.position, seat.first):
                self._state = clear_memory(self._state, row, layers)
            self._hand(row, controls_at(interventions, seat.position, self.model.config, device=self.device))
        seat.position += 1

    def _hand(self, row: int, controls: Controls | None) -> None:
        """Sets a row's controls."""
        if controls is self._hands[row] is None:
            return
        self._hands[row] = controls
        self._controls = None
        if any(self._hands):
            neutral = Controls.neutral(self.model.config, 1, device=self.device)
            self._controls = Controls(*map(torch.cat, zip(*(hand or neutral for hand in self._hands), strict=True)))

    def _spec(self) -> TraceSpec | None:
        """What has to be traced for all to see what they asked for."""
        specs = [seat.request.trace for seat in self.seats if seat is not None and seat.request.trace is not None]
        if not specs:
            return None
        layers: tuple[int, ...] | None = None
        if all(spec.layers is not None for spec in specs):
            layers = tuple(sorted({layer for spec in specs for layer in spec.layers or ()}))
        return TraceSpec(level=max((spec.level for spec in specs), key=LEVELS.index), layers=layers, later=True)

    def _seen_by(self, row: int, trace: StepTrace | None) -> RowTrace | None:
        """A row's part of the step's trace; without its token at the positions that the stride leaves out."""
        seat = self.seats[row]
        assert seat is not None
        spec = seat.request.trace
        if spec is None or trace is None:
            return None
        kept = (spec.start + seat.position - 1 - seat.first) % spec.every == 0
        return RowTrace(trace, row, spec, kept)

    @torch.inference_mode()
    def _is_exact(self) -> bool:
        """Reads the same token in all rows."""
        ids, mask = torch.ones(self.size, 1, dtype=torch.long, device=self.device), torch.ones_like(self._mask)
        out = self.model(ids, mask=mask, expert_backend="rowwise")
        found = [out.logits, *out.state.to_tensors().values()]
        return all(torch.equal(x, x[:1].expand_as(x)) for x in found)


def likeliest(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` likeliest tokens of each row of logprobs (n, V), with their log-probabilities."""
    if not count:
        return [()] * logprobs.shape[0]
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def seat_for(request: GenerationRequest, seed: int) -> Seat:
    """The seat of a request that is about to read its prompt."""
    first = 0 if request.state is None else int(request.state.position[0])
    return Seat(request, row_generators(seed, 1)[0], first, first)


def _alike(taken: dict[int, Seat]) -> dict[Sampling, list[int]]:
    """The rows by how they are drawn: a draw looks at all rows, so that its shapes do not depend on their number."""
    groups: dict[Sampling, list[int]] = {}
    for row, seat in taken.items():
        groups.setdefault(seat.drawing, []).append(row)
    return groups
