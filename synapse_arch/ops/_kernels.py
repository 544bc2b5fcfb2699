"""Which kernels of other packages can run an op here, and what "auto" takes."""

from __future__ import annotations

import torch
from torch import Tensor

from synapse_arch.ops import _mamba_ssm, _triton
from synapse_arch.ops._backends import BACKENDS, KERNELS, fall_back, resolve


def choose(op: str, backend: str, values: Tensor, widest: torch.dtype, key: int, value: int, lacking: str = "") -> str:
    """The implementation of `op` that `backend` means for these inputs.

    Args:
        op: a key of BACKENDS that has kernels.
        backend: what the caller asked for.
        values: the tensor whose device and dtype decide.
        widest: what gates and states are computed in.
        key: K, or N of the state-space recurrences.
        value: V.
        lacking: what the kernels cannot do of what was asked for; empty where they can.

    Returns:
        A name of BACKENDS[op], for "auto" the fastest here: "fusible" where torch.compile fuses it for a GPU, else
        the first kernels that run.

    Raises:
        ConfigError: an unknown backend. BackendUnavailable: kernels by name, where they cannot run.
    """
    chosen = resolve(op, backend)
    if backend == "auto" and "fusible" in BACKENDS[op] and _fuses(values, widest):
        return "fusible"
    if chosen not in KERNELS and not (backend == "auto" and values.device.type == "cuda"):
        return chosen
    reasons = {}
    for name in (name for name in BACKENDS[op] if name in KERNELS and backend in (name, "auto")):
        reasons[name] = lacking or _obstacle(name, op, values, widest, key, value)
        if not reasons[name]:
            chosen = name
            break
    else:
        chosen = "chunked"
    for name, reason in reasons.items():
        if reason:
            fall_back(op, backend, name, chosen, reason)
    return chosen


def _fuses(values: Tensor, widest: torch.dtype) -> bool:
    """Whether a compiler for a GPU looks on that makes plain products in bfloat16 faster than the kernels."""
    return (
        torch.compiler.is_compiling() and values.device.type == "cuda"
        and values.dtype == torch.bfloat16 and widest != torch.float64
    )  # fmt: skip


def missing(name: str, op: str) -> str:
    """Why this machine has no kernels of `name` for `op`; empty if it has."""
    return _triton.missing() if name == "triton" else _mamba_ssm.missing(op)


def report() -> dict[str, tuple[str, ...]]:
    """The implementations each op can run on this machine, fastest first."""
    return {
        op: tuple(name for name in names if name not in KERNELS or not missing(name, op))
        for op, names in BACKENDS.items()
    }


def _obstacle(name: str, op: str, values: Tensor, widest: torch.dtype, key: int, value: int) -> str:
    """Why the kernels of `name` cannot take these here; empty if they can."""
    if reason := _elsewhere(values):
        return reason
    if name == "triton":
        return _triton.obstacle(values, widest, key, value) or missing(name, op)
    return _mamba_ssm.obstacle(op, values, widest, key) or missing(name, op)


def _elsewhere(values: Tensor) -> str:
    kind = values.device.type
    return "" if kind == "cuda" else f"its kernels run on CUDA devices, the tensors are on {kind}"
