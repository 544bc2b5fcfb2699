"""One step of decoding made cheap to launch: by torch.compile, one graph without a break, and as a CUDA graph."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from synapse_arch.errors import BackendUnavailable, ConfigError, explain
from synapse_arch.model.state import SynapseState, map_tensors

if TYPE_CHECKING:
    from synapse_arch.model.model import SynapseModel

Step = Callable[["SynapseModel", Tensor, SynapseState, Tensor | None], tuple[Tensor, SynapseState]]
"""(model, ids (B, 1), state, mask (B, 1) or None) -> logits (B, 1, V) and the next state."""


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where code for a CPU would have to be compiled and there is no C++ compiler."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            remedy = "install one, such as g++, or do not compile"
            raise ConfigError(explain("compile", "a C++ compiler", "none", remedy)) from error


@functools.cache
def compiled_step(device: str = "cpu", backend: str = "inductor") -> Step:
    """The step, compiled when it is first called for a model and a batch size; torch keeps up to eight of these.

    Args:
        device: the type of the device it will run on.
        backend: of torch.compile; "eager" traces without translating.
    """
    options: dict[str, str | int | bool | Callable[..., Any]] | None = None
    if backend == "inductor":
        from synapse_arch.model._products import StreamedProducts  # imports the compiler

        options = {"post_grad_custom_pre_pass": StreamedProducts(), "cpp_wrapper": device == "cpu"}
    return torch.compile(eager_step, fullgraph=True, dynamic=False, backend=backend, options=options)


GUARDED = 2
"""Steps of a loop before which torch.compile looks whether its code fits: later ones go on with what these return."""


def settled(step: Step) -> Step:
    """A compiled step for a loop that feeds it its own states, the first few calls of which are guarded.

    What torch.compile would look at again before every later step, a sixth of its time, cannot have changed: this is
    for loops in which nobody else's code runs. To go on with another state, or another model, make another one. While
    other threads run, every call is guarded: torch leaves the checks out for the whole process or not at all.
    """
    calls = itertools.count()

    def run(model: SynapseModel, ids: Tensor, state: SynapseState, mask: Tensor | None) -> tuple[Tensor, SynapseState]:
        if next(calls) < GUARDED or not _alone():
            return step(model, ids, state, mask)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return step(model, ids, state, mask)

    return run


def _alone() -> bool:
    """Whether this is the only thread of Python, but for the one by which tqdm watches its bars."""
    here = threading.current_thread()
    return all(thread is here or thread.name == "tqdm_monitor" for thread in threading.enumerate())


def eager_step(
    model: SynapseModel, ids: Tensor, state: SynapseState, mask: Tensor | None
) -> tuple[Tensor, SynapseState]:
    """What is compiled."""
    out = model(ids, state, mask=mask)
    return out.logits, out.state


class GraphedStep:
    """A step recorded as a CUDA graph: one launch a token instead of hundreds.

    The state lies in buffers of its own, which every call moves on by one token; `state` copies it out.

    Args:
        model: in evaluation mode, on a CUDA device; its weights are read where they lie, so they may change in place.
        state: what to begin with; it is not changed. Its batch size is that of every step.
        step: what is recorded, `eager_step` or what `compiled_step()` returned.

    Raises:
        BackendUnavailable: the model is not on a CUDA device.
        ConfigError: the model is in training mode.
        StateError: the state is of another model or device.
    """

    def __init__(self, model: SynapseModel, state: SynapseState, *, step: Step = eager_step) -> None:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise BackendUnavailable(explain("GraphedStep", "a model on a CUDA device", device, "use the step itself"))
        if model.training:
            raise ConfigError(explain("GraphedStep", "a model in evaluation mode", "training", "call model.eval()"))
        state.check_against(model, state.batch_size, device=device)
        self._ids = torch.zeros(state.batch_size, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            _, after = eager_step(model, self._ids, state, None)
        # What was given, from a file say, may be narrower than what a step returns.
        layers = map_tensors(lambda mine, other: mine.to(other.dtype, copy=True), state.layers, after.layers)
        self._state = SynapseState(layers, state.position.clone())
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(3):  # whatever is set up, tuned or compiled once must be, before anything is recorded
                step(model, self._ids, self._state, None)
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._logits, after = step(model, self._ids, self._state, None)
            self._overwrite(after)

    def __call__(self, ids: Tensor) -> Tensor:
        """Reads one token a row, (B, 1); the logits (B, 1, V) lie where the next call will write its own."""
        self._ids.copy_(ids)
        self._graph.replay()
        return self._logits

    @property
    def state(self) -> SynapseState:
        """A copy of the state behind the last token."""
        return self._state.clone()

    @torch.no_grad()
    def load(self, state: SynapseState) -> None:
        """Goes on from `state`, of the same batch size."""
        self._overwrite(state)

    def _overwrite(self, state: SynapseState) -> None:
        pairs = list(zip(self._state.to_tensors().values(), state.to_tensors().values(), strict=True))
        for dtype in {mine.dtype for mine, _ in pairs}:  # each dtype in one launch, or few
            mine, other = zip(*((a, b) for a, b in pairs if a.dtype == dtype), strict=True)
            torch._foreach_copy_(mine, other)
