"""The `--compile` option: torch.compile of the layers, for the steps of a training."""

from __future__ import annotations

import contextlib

import torch

from synapse_arch import SynapseModel
from synapse_arch.model.compiling import require_compiler


def compile_layers(model: SynapseModel) -> None:
    """Has each layer compiled when it is first called; layers are alike, so the first one's code serves all.

    What is fused are projections' surroundings: norms, gates, convolutions' ends, routing, the inside of chunks. The
    loops over chunks and the experts' products run as they are. Embedding, head and loss are not compiled.

    Raises:
        ConfigError: the device is a CPU and there is no C++ compiler.
    """
    require_compiler(model.embedding.weight.device)
    for layer in model.layers:
        layer.compile()


def eagerly(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """A region where nothing is compiled: texts of other shapes, read for a look, would each be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
