"""The `--compile` option: torch.compile of the layers, for the steps of a training."""

from __future__ import annotations

import contextlib

import torch
from torch._functorch import config as autograd_config

from synapse_arch import SynapseModel
from synapse_arch.model.compiling import require_compiler


def compile_layers(model: SynapseModel, *, backend: str = "inductor") -> None:
    """Has each layer compiled when it is first called; layers are alike, so the first one's code serves all.

    What is fused are projections' surroundings: norms, gates, convolutions' ends, routing, the inside of chunks. The
    loops over chunks and the experts' products run as they are. Embedding, head and loss are not compiled.
    From then on, gradients are compiled as they are computed uncompiled: outside autocast, in this whole process.

    Args:
        model: on the device where it is trained.
        backend: torch.compile's; "aot_eager" traces without translating.

    Raises:
        ConfigError: the device is a CPU and there is no C++ compiler.
    """
    require_compiler(model.embedding.weight.device)
    autograd_config.backward_pass_autocast = "off"
    for layer in model.layers:
        layer.compile(backend=backend)


def eagerly(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """A region where nothing is compiled: texts of other shapes, read for a look, would each be compiled anew."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
