"""A run once more, from the snapshot it started from: on the engine's thread, piece by piece between its steps.

The pieces are those of the engine's prompts, so others wait no longer than for a prompt. What was decoded token by
token is read in pieces here: the same numbers up to rounding.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from serving.engine import Engine
from serving.interventions import boundaries, clear_memory, cleared_at, controls_at
from serving.requests import GenerationRequest, Intervention
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.model.model import SynapseOutput

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Run:
    """What is read again.

    Attributes:
        ids: all tokens, prompt and output.
        state: what it started from, one row; None for a fresh one.
        interventions: in force.
    """

    ids: tuple[int, ...]
    state: SynapseState | None
    interventions: tuple[Intervention, ...] = ()

    @staticmethod
    def of(request: GenerationRequest, output: Sequence[int]) -> Run:
        """The run of a request that wrote `output`."""
        return Run((*request.prompt, *output), request.state, request.interventions)

    @property
    def first(self) -> int:
        """Position of the first token."""
        return 0 if self.state is None else int(self.state.position[0])

    def cuts(self) -> set[int]:
        """Offsets at which something begins or ends."""
        return {turn - self.first for turn in boundaries(self.interventions) if 0 < turn - self.first < len(self.ids)}

    def reader(self, model: SynapseModel) -> Reader:
        """Reads it on `model`; for the engine's thread."""
        return Reader(self, model)


class Reader:
    """A run being read, from piece to piece.

    Attributes:
        state: what has been read so far.
    """

    def __init__(self, run: Run, model: SynapseModel) -> None:
        self.run, self.model = run, model
        self.state = model.init_state(1) if run.state is None else run.state
        self.device = model.embedding.weight.device

    def enter(self, piece: slice) -> list[int | None]:
        """Does what is due in front of a piece; returns the layers whose memory is emptied there (None: all)."""
        layers = cleared_at(self.run.interventions, self.run.first + piece.start, self.run.first)
        if layers:
            self.state = clear_memory(self.state, 0, layers)
        return layers

    def read(self, piece: slice, **options: object) -> SynapseOutput:
        """Reads a piece under the controls in force there; `options` go to the model."""
        ids = torch.tensor([self.run.ids[piece]], dtype=torch.long, device=self.device)
        position = self.run.first + piece.start
        controls = controls_at(self.run.interventions, position, self.model.config, device=self.device)
        out: SynapseOutput = self.model(ids, self.state, controls=controls, **options)
        self.state = out.state
        return out


def pieces(runs: Sequence[Run], size: int, *, start: int = 0, end: int | None = None) -> Iterator[slice]:
    """Where runs of one length are cut, so that in no piece something begins or ends in any of them."""
    end = len(runs[0].ids) if end is None else end
    turns = {cut for run in runs for cut in run.cuts() if start < cut < end}
    cuts = sorted({*range(start, end, size), *turns, end})
    return (slice(a, b) for a, b in itertools.pairwise(cuts))


async def on_engine(engine: Engine, job: Callable[[SynapseModel], T]) -> T:
    """Runs a job on the engine's thread, without gradients, and waits for it."""

    def quiet(model: SynapseModel) -> T:
        with torch.inference_mode():
            return job(model)

    return await asyncio.wrap_future(engine.run(quiet))
