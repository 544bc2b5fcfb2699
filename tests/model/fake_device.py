"""A GPU that computes nothing, for machines without one: where tensors lie and who waits for them is told.

    python -m tests.model.fake_device GUARDS    prints as JSON, for each case, its error and what waited for the device

GUARDS is the library that `test_fake_device.py` builds: a build of torch without CUDA does not know how to switch to
such a device. torch's autograd engine does not run there, so each function of ours that has a backward pass of its own
is led through it at once, with gradients of ones.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import synapse_arch
from synapse_arch import Controls, Sampling, SynapseConfig, SynapseModel, TraceSpec

LIBRARY = str(Path(synapse_arch.__file__).parent)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "s6": {"thalamus.mamba": "s6", "thalamus.d_state": 16},
    "hebbian": {"memory.rule": "hebbian"},
    "write-gate": {"memory.write_gate": True, "memory.n_householder": 1},
    "shared": {"experts.d_shared": 64, "thalamus.bias_rate": 0.01},
    "no-experts": {"experts": None},
}
KINDS = [
    *(("cuda:0", variant, dtype) for variant in VARIANTS for dtype in (torch.bfloat16, torch.float32)),
    *(("mps:0", variant, torch.float32) for variant in ("default", "s6")),
]


class Fake(FakeTensorMode):
    """Notes who reads a number out of a tensor, which is a wait for the device, and gives him a one."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(LIBRARY)]
            self.waits.append(f"{Path(frames[-1].filename).name}: {frames[-1].name}")
            return 1.0 if args[0].is_floating_point() else 1
        found = super().dispatch(func, types, args, kwargs)
        if isinstance(found, Tensor) and (found.device.type, found.dtype) == ("mps", torch.float64):
            raise TypeError(f"{func}: a Mac's GPU has no float64")
        return found


def moved(model: nn.Module, mode: FakeTensorMode, device: str) -> nn.Module:
    """The model with all its tensors on the device."""

    def there(x: Tensor) -> FakeTensor:
        on_meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(mode, on_meta, torch.device(device))

    for module in model.modules():
        module._parameters = {k: v if v is None else nn.Parameter(there(v)) for k, v in module._parameters.items()}
        module._buffers = {k: v if v is None else there(v) for k, v in module._buffers.items()}
    return model


class Context:
    """Stands in for the context of an autograd function, all of whose arguments have gradients."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.is_floating_point() for x in arguments)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def there_and_back(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Forward, then backward with gradients of ones, each of which must lie and be shaped as its argument."""
    backward = getattr(function.backward, "__wrapped__", function.backward)  # without the check of once_differentiable

    def apply(*arguments: Any) -> Any:
        context = Context(arguments)
        with torch.no_grad():
            found = function.forward(context, *arguments)
            outputs = found if isinstance(found, tuple) else (found,)
            grads = backward(context, *(torch.ones_like(y) for y in outputs))
        for grad, x in zip(grads if isinstance(grads, tuple) else (grads,), arguments, strict=True):
            if grad is not None and isinstance(x, Tensor):
                assert (grad.shape, grad.device) == (x.shape, x.device), (function.__name__, grad.shape, x.shape)
        return found

    return apply


def functions() -> Iterator[type[torch.autograd.Function]]:
    """All autograd functions of the library."""
    for module in pkgutil.walk_packages(synapse_arch.__path__, "synapse_arch."):
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and issubclass(thing, torch.autograd.Function):
                yield thing


def cases(model: SynapseModel, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done with a model, by name."""
    ids = torch.zeros(4, 70, dtype=torch.long, device=device)  # a step has as many slots as experts, one for each
    packing = {"segment_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
    yield "loss", lambda: model(ids, targets=ids)
    yield "loss, packed", lambda: model(ids, targets=ids, **packing)
    if (next(model.parameters()).dtype, device) == (torch.float32, "cuda:0"):
        with torch.autocast("cuda", torch.bfloat16):
            yield "loss under autocast", lambda: model(ids, targets=ids)
    if model.config != SynapseConfig.preset("tiny", n_layers=1):
        return
    with torch.no_grad():
        yield "reading", lambda: model(ids)
        yield "step", lambda: model(ids[:1, :1], model.init_state(1))
        yield "step of four", lambda: model(ids[:, :1], model.init_state(4))
        yield "trace", lambda: model(ids, trace=TraceSpec(level="full"))
        yield "controls", lambda: model(ids, controls=Controls.neutral(model.config, 4, device=device))
        state = model.init_state(2)
        yield "rows", lambda: (state.select([0, 0]), state.memory_only(), model.consolidate(state))
        yield "generate", lambda: model.generate(ids, sampling=Sampling(max_tokens=2, temperature=0.7, top_k=3, seed=0))


def main() -> None:
    """Runs every case."""
    ctypes.CDLL(sys.argv[1])
    torch.cuda._lazy_init = lambda: None
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda: True
    logging.disable(logging.WARNING)
    for function in list(functions()):
        function.apply = there_and_back(function)
    mode, found = Fake(), {}
    for device, variant, dtype in KINDS:
        model = SynapseModel(SynapseConfig.preset("tiny", n_layers=1, **VARIANTS[variant])).to(dtype)
        moved(model, mode, device)
        with mode:
            for name, run in cases(model, device):
                mode.waits, error = [], None
                try:
                    run()
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"
                case = ", ".join((device[:-2], variant, str(dtype)[6:], name))
                found[case] = {"error": error, "waits": mode.waits}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
