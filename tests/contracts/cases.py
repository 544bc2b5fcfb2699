"""Every mixer the contract runs over. Adding one: an entry in OPS, or one line in MODULES.

A case is a function of named tensors: those in `sequence` are (B, T, ...), those called "state..." (B, ...), all others
are shared by rows and positions. Sizes are small, odd where they can be, and differ from one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from synapse_arch.modules import (
    XLSTM,
    FastWeightMemory,
    Mamba,
    MambaConfig,
    MemoryConfig,
    Thalamus,
    ThalamusConfig,
    XLSTMConfig,
)
from synapse_arch.ops import MLSTMState, causal_conv1d, delta_rule, mlstm, selective_scan, ssd
from tests.helpers import Tensors, flatten, rebuild

H, K, V, P, N, G, W, D, E = 4, 6, 5, 3, 7, 2, 4, 8, 5
RECURRENCES = ("reference", "chunked")
KERNELS = (*RECURRENCES, "triton")
LINEAR = (*KERNELS, "fusible")
SCANS = (*RECURRENCES, "mamba_ssm")


@dataclass(frozen=True)
class Case:
    """A sequence mixer as a function of named tensors.

    Attributes:
        name: shown by pytest.
        draw: (B, T) -> float64 inputs in the range the mixer is made for, with a state that is not fresh.
        call: (inputs, **options) -> outputs; without "state..." inputs the state is fresh.
        sequence: the inputs with a time axis.
        backends: the implementations that can be asked for by name.
        extremes: what may be laid over the inputs to drive gates and decays to their ends.
        module: the module behind the case, None for an op.
    """

    name: str
    draw: Callable[[int, int], Tensors]
    call: Callable[..., Tensors]
    sequence: tuple[str, ...]
    backends: tuple[str, ...] = ()
    extremes: tuple[dict[str, float], ...] = ()
    module: Any = None

    def __str__(self) -> str:
        return self.name


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64)


def keys(*shape: int) -> Tensor:
    return F.normalize(normal(*shape), dim=-1)


def packing(batch: int, length: int) -> Tensors:
    """Segments of uneven lengths and padding on both sides and within."""
    position = torch.arange(length)
    segment_ids = torch.stack([position // 37, (position > 5).long() + (position // 64)])
    mask = torch.rand(batch, length) > 0.2
    mask[1, : length // 8] = False
    return {"segment_ids": segment_ids, "mask": mask}


def op(function: Callable[..., Any], template: Any = None, **fixed: Any) -> Callable[..., Tensors]:
    """An op as a function of named tensors."""

    def call(tensors: Tensors, **options: Any) -> Tensors:
        arguments = {name: x for name, x in tensors.items() if not name.startswith("state")}
        state = rebuild(template, tensors, "state") if any(name.startswith("state") for name in tensors) else None
        y, final = function(**arguments, state=state, **fixed, **options)
        return {"y": y, **flatten(final, "state")}

    return call


def draw_conv(batch: int, length: int) -> Tensors:
    return {
        "x": normal(batch, length, D), "weight": normal(D, W), "bias": normal(D), "state": normal(batch, W - 1, D)
    }  # fmt: skip


def draw_scan(batch: int, length: int) -> Tensors:
    return {
        "u": normal(batch, length, D),
        "dt": uniform(0.01, 1, batch, length, D),
        "A": -uniform(0.1, 4, D, N),
        "B": normal(batch, length, N),
        "C": normal(batch, length, N),
        "D": normal(D),
        "state": normal(batch, D, N),
    }


def draw_ssd(batch: int, length: int) -> Tensors:
    return {
        "x": normal(batch, length, H, P),
        "dt": uniform(0.01, 1, batch, length, H),
        "A": -uniform(0.1, 4, H),
        "B": normal(batch, length, G, N),
        "C": normal(batch, length, G, N),
        "D": normal(H),
        "state": normal(batch, H, P, N),
    }


def draw_mlstm(batch: int, length: int) -> Tensors:
    return {
        "q": normal(batch, length, H, K),
        "k": normal(batch, length, H, K),
        "v": normal(batch, length, H, V),
        "i": normal(batch, length, H),
        "f": 2 + 2 * normal(batch, length, H),
        "state.C": normal(batch, H, K, V),
        "state.n": normal(batch, H, K),
        "state.m": normal(batch, H),
    }


def draw_delta(batch: int, length: int) -> Tensors:
    return {
        "q": normal(batch, length, H, K),
        "k": keys(batch, length, H, K),
        "v": normal(batch, length, H, V),
        "beta": uniform(0, 2, batch, length, H),
        "log_decay": -uniform(0, 1, batch, length, H),
        "state": normal(batch, H, K, V),
    }


def draw_product(batch: int, length: int) -> Tensors:
    """Two writes a position."""
    M = 2
    return draw_delta(batch, length) | {
        "k": keys(batch, length, M, H, K),
        "v": normal(batch, length, M, H, V),
        "beta": uniform(0, 2, batch, length, M, H),
    }


def draw_gated_product(batch: int, length: int) -> Tensors:
    """Three writes a position, each with a strength for every value channel."""
    M = 3
    return draw_delta(batch, length) | {
        "k": keys(batch, length, M, H, K),
        "v": normal(batch, length, M, H, V),
        "beta": uniform(0, 2, batch, length, M, H),
        "write": uniform(0, 1, batch, length, M, H, V),
    }


SSM_EXTREMES = ({"dt": 1e-12}, {"dt": 1e3}, {"dt": 1e3, "A": -1e4}, {"dt": 1e-3, "A": -1e-9})
MLSTM_EXTREMES = (
    {"i": 80.0}, {"i": -80.0}, {"f": 1e3}, {"f": -1e3}, {"i": 80.0, "f": -1e3}, {"i": -80.0, "f": -1e3},
    {"i": 1e3, "f": 1e3}, {"i": -1e3, "f": 1e3}, {"i": -1e3, "f": -1e3}, {"q": 0.0}, {"k": 0.0},
)  # fmt: skip
DELTA_EXTREMES = ({"log_decay": -1e4}, {"log_decay": 0.0, "beta": 2.0}, {"beta": 0.0}, {"k": 0.0, "q": 0.0})
MEMORY = ("q", "k", "v", "beta", "log_decay")
GATED = (*MEMORY, "write")
GATED_EXTREMES = (*DELTA_EXTREMES, {"write": 0.0}, {"write": 1.0, "beta": 0.0, "log_decay": 0.0})

TENSOR = torch.empty(0)  # the structure of a state that is one tensor
OPS = (
    Case("causal_conv1d", draw_conv, op(causal_conv1d, TENSOR), ("x",)),
    Case("causal_conv1d-silu", draw_conv, op(causal_conv1d, TENSOR, activation="silu"), ("x",)),
    Case("selective_scan", draw_scan, op(selective_scan, TENSOR), ("u", "dt", "B", "C"), SCANS, SSM_EXTREMES),
    Case("ssd", draw_ssd, op(ssd, TENSOR), ("x", "dt", "B", "C"), (*LINEAR, "mamba_ssm"), SSM_EXTREMES),
    Case(
        "mlstm", draw_mlstm, op(mlstm, MLSTMState(*torch.empty(3))), ("q", "k", "v", "i", "f"), LINEAR,
        MLSTM_EXTREMES,
    ),
    Case("delta_rule", draw_delta, op(delta_rule, TENSOR), MEMORY, KERNELS, DELTA_EXTREMES),
    Case("hebbian", draw_delta, op(delta_rule, TENSOR, rule="hebbian"), MEMORY, KERNELS, DELTA_EXTREMES),
    Case("delta_rule-2", draw_product, op(delta_rule, TENSOR), MEMORY, KERNELS, DELTA_EXTREMES),
    Case("delta_rule-3-write", draw_gated_product, op(delta_rule, TENSOR), GATED, KERNELS, GATED_EXTREMES),
)  # fmt: skip


def of_module(name: str, make: Callable[[], nn.Module]) -> Case:
    """A module as a function of its input, its state and its parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = make().double()
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for weight in weights.values():  # nothing stays at a value that hides it, such as a zero bias
            weight.data += 0.1 * torch.randn_like(weight)
    template = module.init_state(1)  # type: ignore[operator]

    def draw(batch: int, length: int) -> Tensors:
        with torch.no_grad():
            state = module(normal(batch, 9, D)).state
        return {
            "x": normal(batch, length, D),
            **flatten(state, "state"),
            **{f"param.{key}": x.detach() for key, x in weights.items()},
        }

    def call(tensors: Tensors, **options: Any) -> Tensors:
        parameters = {key.removeprefix("param."): x for key, x in tensors.items() if key.startswith("param.")}
        state = rebuild(template, tensors, "state") if any(key.startswith("state") for key in tensors) else None
        result = functional_call(module, parameters, (tensors["x"], state), options)
        return flatten(result._replace(trace=None), "")

    return Case(name, draw, call, ("x",), extremes=({"x": 1e4}, {"x": 0.0}, {"x": -1e4}), module=module)


MEMORY_SIZES = MemoryConfig(n_heads=2, d_key=K, d_value=V, n_householder=1)
MODULES = (
    of_module("Mamba-ssd", lambda: Mamba(D, MambaConfig(d_state=N, head_dim=4, n_groups=G))),
    of_module("Mamba-s6", lambda: Mamba(D, MambaConfig(variant="s6", d_state=N, dt_rank=3))),
    of_module("Thalamus-ssd", lambda: Thalamus(D, E, ThalamusConfig(d_state=N, head_dim=4))),
    of_module("Thalamus-s6", lambda: Thalamus(D, E, ThalamusConfig(mamba="s6", d_state=N))),
    of_module("Thalamus-none", lambda: Thalamus(D, E, ThalamusConfig(mamba=None))),
    # 32 values a head: four are now and then all but zero at once, and the norm's division lets rounding grow 50 times
    of_module("XLSTM", lambda: XLSTM(D, XLSTMConfig(n_heads=2, d_hidden=64))),
    of_module("Memory-delta", lambda: FastWeightMemory(D, MEMORY_SIZES)),
    of_module("Memory-hebbian", lambda: FastWeightMemory(D, replace(MEMORY_SIZES, rule="hebbian"))),
    of_module("Memory-2-write", lambda: FastWeightMemory(D, replace(MEMORY_SIZES, n_householder=2, write_gate=True))),
)  # fmt: skip

CASES = OPS + MODULES
RECURRENT = tuple(case for case in CASES if case.backends)
