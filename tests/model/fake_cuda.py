"""A CUDA device that computes nothing, for machines without one: where tensors lie and who waits for them is told.

    python -m tests.model.fake_cuda GUARD      prints as JSON, for each case, its error and what waited for the device

GUARD is the library that `test_fake_cuda.py` builds: a build of torch without CUDA does not know how to switch to such
a device. torch's autograd engine does not run there, so each function of ours that has a backward pass of its own is
led through it at once, with gradients of ones.
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

CUDA = torch.device("cuda:0")
LIBRARY = str(Path(synapse_arch.__file__).parent)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "s6": {"thalamus.mamba": "s6", "thalamus.d_state": 16},
    "hebbian": {"memory.rule": "hebbian"},
    "write-gate": {"memory.write_gate": True, "memory.n_householder": 1},
    "shared": {"experts.d_shared": 64, "thalamus.bias_rate": 0.01},
    "no-experts": {"experts": None},
}


class Waits(FakeTensorMode):
    """Notes who reads a number out of a tensor, which is a wait for the device, and gives him a one."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(LIBRARY)]
            self.places.append(f"{Path(frames[-1].filename).name}: {frames[-1].name}")
            return 1.0 if args[0].is_floating_point() else 1
        return super().dispatch(func, types, args, kwargs)


def moved(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with all its tensors on the device."""

    def there(x: Tensor) -> FakeTensor:
        return FakeTensor(mode, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), CUDA)

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
    backward = function.backward.__wrapped__ if hasattr(function.backward, "__wrapped__") else function.backward

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


def cases(model: SynapseModel) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is done with a model, by name."""
    ids = torch.zeros(2, 70, dtype=torch.long, device=CUDA)
    packing = {"segment_ids": ids, "mask": torch.ones_like(ids, dtype=torch.bool)}
    yield "loss", lambda: model(ids, targets=ids)
    if next(model.parameters()).dtype == torch.float32:
        with torch.autocast("cuda", torch.bfloat16):
            yield "loss under autocast", lambda: model(ids, targets=ids)
    yield "loss, packed", lambda: model(ids, targets=ids, **packing)
    if model.config != SynapseConfig.preset("tiny", n_layers=1):
        return
    with torch.no_grad():
        yield "reading", lambda: model(ids)
        yield "step", lambda: model(ids[:1, :1], model.init_state(1))
        yield "step of two", lambda: model(ids[:, :1], model.init_state(2))
        yield "trace", lambda: model(ids, trace=TraceSpec(level="full"))
        yield "controls", lambda: model(ids, controls=Controls.neutral(model.config, 2, device=CUDA))
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
    mode, found = Waits(), {}
    for variant, changes in VARIANTS.items():
        for dtype in (torch.bfloat16, torch.float32):
            model = SynapseModel(SynapseConfig.preset("tiny", n_layers=1, **changes)).to(dtype)
            moved(model, mode)
            with mode:
                for name, run in cases(model):
                    mode.places, error = [], None
                    try:
                        run()
                    except Exception as problem:
                        error = f"{type(problem).__name__}: {problem}"
                    found[f"{variant}, {str(dtype)[6:]}, {name}"] = {"error": error, "waits": mode.places}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
