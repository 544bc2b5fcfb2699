"""torch.compile of one step of decoding: a state in, a state out, one graph without a break."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, explain
from synapse_arch.model.state import SynapseState

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
def compiled_step(backend: str = "inductor") -> Step:
    """The step, compiled when it is first called for a model and a batch size; torch keeps up to eight of these.

    Args:
        backend: of torch.compile; "eager" traces without translating.
    """
    return torch.compile(eager_step, fullgraph=True, dynamic=False, backend=backend)


def eager_step(
    model: SynapseModel, ids: Tensor, state: SynapseState, mask: Tensor | None
) -> tuple[Tensor, SynapseState]:
    """What is compiled."""
    out = model(ids, state, mask=mask)
    return out.logits, out.state
