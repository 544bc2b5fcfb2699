"""Which implementation of an op runs where.

Every op has a "reference" form (a plain loop, the definition) and a fast pure-PyTorch form; some have "triton", the
kernels of flash-linear-attention, "mamba_ssm", those of that package, and "fusible", plain products for a compiler to
fuse. "auto" takes the fastest that can run. A name that does not exist is a ConfigError, one that exists but cannot run
here is BackendUnavailable: nothing is ever replaced silently.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from synapse_arch.errors import BackendUnavailable, ConfigError, explain

BACKENDS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("mamba_ssm", "chunked", "reference"),
    "ssd": ("triton", "mamba_ssm", "chunked", "fusible", "reference"),
    "mlstm": ("triton", "chunked", "fusible", "reference"),
    "delta_rule": ("triton", "chunked", "reference"),
    "expert_swiglu": ("sorted", "grouped", "rowwise", "reference"),
}
"""The implementations of each op, fastest first."""

KERNELS = ("triton", "mamba_ssm")
"""The implementations that need a package of kernels and a GPU."""

LEAST_DECAY = -104.0
"""Below it e^g is 0 in float32. Decays end here: kernels subtract running sums, which then stay short."""


def resolve(op: str, backend: str) -> str:
    """The implementation that `backend` means for `op`, with "auto" the fastest that every machine has.

    Raises:
        ConfigError: `backend` names nothing known.
    """
    names = BACKENDS[op]
    if backend == "auto":
        return next(name for name in names if name not in KERNELS)
    if backend in names:
        return backend
    raise ConfigError(explain(f"{op} backend", f"one of {', '.join(('auto', *names))}", repr(backend)))


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def fall_back(op: str, backend: str, wanted: str, instead: str, reason: str) -> str:
    """What runs where `wanted` cannot, for `reason`: `instead` under "auto", said once in the log.

    Raises:
        BackendUnavailable: `backend` asks for `wanted` by name.
    """
    if backend == wanted:
        raise BackendUnavailable(f"{op}: backend {wanted!r} cannot run here: {reason}; use {instead!r} or 'auto'")
    if not torch.compiler.is_compiling():
        _log_once(f"{op}: {instead!r} runs in place of {wanted!r}: {reason}")
    return instead


def absent(name: str, modules: Sequence[str], oldest: tuple[int, int], remedy: str) -> str:
    """Why this machine cannot run the kernels of the package `name`; empty if it can.

    Args:
        name: as people know it.
        modules: what is imported, the first of them with a version.
        oldest: the first version that will do.
        remedy: how to install it.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        package, *_ = (importlib.import_module(name) for name in modules)
    except ImportError as error:
        return f"{name} cannot be imported ({error}): {remedy}"
    found = tuple(int(part) for part in package.__version__.split(".")[:2])
    return "" if found >= oldest else f"{name} {package.__version__} is too old: {remedy}"


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, float32 otherwise: recurrences never run narrower."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def exact_dtype(x: Tensor) -> torch.dtype:
    """What long sums over `x` are kept in: float64, or float32 on the GPU of a Mac, which has no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast narrows matrix products on `x`'s device."""
    kind = x.device.type  # "meta" has none; torch.amp.is_autocast_available cannot be compiled before 2.12
    return kind != "meta" and torch.is_autocast_enabled(kind)


def finite_log(x: Tensor) -> Tensor:
    """Log decays in which that of 0, −inf, is a number whose exponential is 0 too: sums with −inf would be NaN."""
    return x.clamp(min=-1e6)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A region on `x`'s device where autocast does not narrow matrix products.

    A compiler traces a backward pass where autocast is off and may run it where it is on: the region says so itself.
    """
    if autocast_enabled(x) or (torch.compiler.is_compiling() and x.device.type != "meta"):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def is_step(length: int) -> bool:
    """Whether a call is a step of decoding, one position and no gradient: each op has a form of its own for it."""
    return length == 1 and not torch.is_grad_enabled()


def widen(dtype: torch.dtype, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in `dtype`."""
    return [x.to(dtype) for x in tensors]
