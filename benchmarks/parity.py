"""The fast form of every op against its reference: outputs, final states, and all gradients.

B batch, T time, D channels, H heads, G groups, K key and N state width, P and V value width, E experts, F their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Figure, Tensors, progress
from synapse_arch.errors import BackendUnavailable
from synapse_arch.ops import MLSTMState, backends, causal_conv1d, delta_rule, expert_swiglu, mlstm, selective_scan, ssd

GOALS = {torch.float64: 1e-10, torch.float32: 1e-5}
B, D, H, G, K, V, N, P, E, F_ = 2, 128, 4, 2, 64, 48, 32, 40, 8, 64

Form = Callable[..., Tensors]


@dataclass(frozen=True)
class Op:
    """An op with its forms.

    Attributes:
        draw: T -> float64 inputs in the range the op is made for, the state not fresh.
        form: (inputs, backend, packing) -> named outputs.
        fast: the backends that must equal "reference".
        packs: whether it takes segments and padding.
    """

    name: str
    draw: Callable[[int], Tensors]
    form: Form
    fast: tuple[str, ...]
    packs: bool = True


def parity(lengths: tuple[int, ...]) -> list[Figure]:
    """The largest relative difference over ops, lengths and tensors, in float64 and in float32.

    Beside it how far the float32 references are from float64 themselves: what rounding alone comes to.
    """
    figures = []
    for dtype, goal in GOALS.items():
        name = str(dtype).removeprefix("torch.")
        worst = _Worst()
        for op in progress(OPS, f"fast forms, {name}"):
            torch.manual_seed(0)
            for length in lengths:
                _compare(op, op.draw(length), {}, dtype, worst)
                if op.packs:
                    _compare(op, op.draw(length), _packing(length), dtype, worst)
        details = {"each": worst.fast, "lengths": list(lengths), "not available": sorted(worst.unavailable)}
        what = f"ops: fast form against reference, {name}"
        value = max(worst.fast.values())
        figures.append(Figure(what=what, values=(value,), unit="relative", goal=goal, exact=True, details=details))
    what = "ops: float32 reference against float64 reference"
    value = max(worst.rounding.values())
    return [*figures, Figure(what=what, values=(value,), unit="relative", exact=True, details={"each": worst.rounding})]


@dataclass
class _Worst:
    """The largest differences met so far."""

    fast: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    unavailable: set[str] = field(default_factory=set)


def _compare(op: Op, inputs: Tensors, packing: Tensors, dtype: torch.dtype, worst: _Worst) -> None:
    """Adds how far an op's fast forms are from its reference, and the reference from itself in float64."""
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    expected = _with_gradients(op.form, inputs, "reference", packing)
    for backend in op.fast:
        try:
            got = _with_gradients(op.form, inputs, backend, packing)
        except BackendUnavailable as reason:
            worst.unavailable.add(str(reason))
            continue
        key = f"{op.name}/{backend}"
        worst.fast[key] = max(worst.fast.get(key, 0.0), difference(got, expected))
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    exact = _with_gradients(op.form, wide, "reference", packing)
    worst.rounding[op.name] = max(worst.rounding.get(op.name, 0.0), difference(expected, exact))


def difference(got: Tensors, expected: Tensors) -> float:
    """The largest over tensors of max |got - expected| / max |expected|; infinite where that is no number."""
    worst = 0.0
    for key, b in expected.items():
        a, b = got[key].double(), b.double()
        error, scale = (a - b).abs().max().item(), b.abs().max().item()
        if error and not error <= torch.finfo(torch.float64).max * scale:  # not finite, or off from zero
            return math.inf
        worst = max(worst, error / scale if error else 0.0)
    return worst


def _with_gradients(form: Form, inputs: Tensors, backend: str, packing: Tensors) -> Tensors:
    """Outputs and, as "grad ...", the gradients of every floating input for fixed random cotangents."""
    leaves = {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    outputs = form(leaves, backend, packing)
    if "mask" in packing:  # what stands at padding is not specified
        outputs["y"] = torch.where(packing["mask"][..., *[None] * (outputs["y"].dim() - 2)], outputs["y"], 0.0)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=outputs["y"].dtype)
    for y in outputs.values():
        total = total + (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum()
    wanted = {key: x for key, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return {key: y.detach() for key, y in outputs.items()} | {
        f"grad {key}": grad for key, grad in zip(wanted, grads, strict=True)
    }


def _packing(length: int) -> Tensors:
    """Documents of uneven lengths, and padding at both ends and between."""
    position = torch.arange(length)
    mask = torch.rand(B, length) > 0.2
    mask[1, : length // 8] = False
    return {"segment_ids": torch.stack([position // 37, position // 64 + (position > 5)]), "mask": mask}


def _recurrence(op: Callable[..., Any], **fixed: Any) -> Form:
    def form(inputs: Tensors, backend: str, packing: Tensors) -> Tensors:
        y, state = op(**inputs, **packing, **fixed, backend=backend)
        return {"y": y, "state": state}

    return form


def _mlstm(inputs: Tensors, backend: str, packing: Tensors) -> Tensors:
    state = MLSTMState(*(inputs[name] for name in MLSTMState._fields))
    arguments = {name: x for name, x in inputs.items() if name not in MLSTMState._fields}
    op: Callable[..., Any] = mlstm
    y, final = op(**arguments, **packing, state=state, backend=backend)
    return {"y": y, **final._asdict()}


def _conv(activation: str | None) -> Form:
    """The convolution; its reference is torch's own."""

    def form(inputs: Tensors, backend: str, packing: Tensors) -> Tensors:
        if backend == "auto":
            op: Callable[..., Any] = causal_conv1d
            y, state = op(**inputs, activation=activation)
            return {"y": y, "state": state}
        padded = torch.cat([inputs["state"], inputs["x"]], dim=1)
        y = F.conv1d(padded.mT, inputs["weight"][:, None], inputs["bias"], groups=D).mT
        return {"y": F.silu(y) if activation else y, "state": padded[:, -inputs["state"].shape[1] :]}

    return form


def _experts(inputs: Tensors, backend: str, packing: Tensors) -> Tensors:
    return {"y": expert_swiglu(**inputs, backend=backend)}


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64)


def _draw_conv(length: int) -> Tensors:
    return {"x": _normal(B, length, D), "weight": _normal(D, 4), "bias": _normal(D), "state": _normal(B, 3, D)}


def _draw_scan(length: int) -> Tensors:
    return {
        "u": _normal(B, length, D), "dt": _uniform(-7, -1, B, length, D).exp(), "A": -_uniform(0.1, 16, D, 16),
        "B": _normal(B, length, 16), "C": _normal(B, length, 16), "D": _normal(D), "state": _normal(B, D, 16),
    }  # fmt: skip


def _draw_ssd(length: int) -> Tensors:
    return {
        "x": _normal(B, length, H, P), "dt": _uniform(-7, -1, B, length, H).exp(), "A": -_uniform(0.1, 16, H),
        "B": _normal(B, length, G, N), "C": _normal(B, length, G, N), "D": _normal(H), "state": _normal(B, H, P, N),
    }  # fmt: skip


def _draw_mlstm(length: int) -> Tensors:
    return {
        "q": _normal(B, length, H, K), "k": _normal(B, length, H, K), "v": _normal(B, length, H, V),
        "i": _normal(B, length, H), "f": 3 + 2 * _normal(B, length, H),
        "C": _normal(B, H, K, V), "n": _normal(B, H, K), "m": _normal(B, H),
    }  # fmt: skip


def _draw_delta(length: int) -> Tensors:
    return {
        "q": F.normalize(_normal(B, length, H, K), dim=-1), "k": F.normalize(_normal(B, length, H, K), dim=-1),
        "v": _normal(B, length, H, V), "beta": _uniform(0, 2, B, length, H),
        "log_decay": -_uniform(-7, 0, B, length, H).exp(), "state": _normal(B, H, K, V),
    }  # fmt: skip


def _draw_experts(length: int) -> Tensors:
    """Two of E experts a token, some slots unused, some experts without a token."""
    scores = torch.rand(B * length, E - 1)
    indices = torch.where(torch.rand(B * length, 2) < 0.1, -1, scores.topk(2).indices)
    return {
        "x": _normal(B * length, D), "w_in": _normal(E, D, 2 * F_) * D**-0.5, "w_out": _normal(E, F_, D) * F_**-0.5,
        "indices": indices, "weights": _uniform(0, 1, B * length, 2),
    }  # fmt: skip


def _fast(op: str) -> tuple[str, ...]:
    return tuple(name for name in backends()[op] if name != "reference")


OPS = (
    Op("causal_conv1d", _draw_conv, _conv(None), ("auto",), packs=False),
    Op("causal_conv1d, silu", _draw_conv, _conv("silu"), ("auto",), packs=False),
    Op("selective_scan", _draw_scan, _recurrence(selective_scan), _fast("selective_scan")),
    Op("ssd", _draw_ssd, _recurrence(ssd), _fast("ssd")),
    Op("mlstm", _draw_mlstm, _mlstm, _fast("mlstm")),
    Op("delta_rule", _draw_delta, _recurrence(delta_rule), _fast("delta_rule")),
    Op("hebbian", _draw_delta, _recurrence(delta_rule, rule="hebbian"), _fast("delta_rule")),
    Op("expert_swiglu", _draw_experts, _experts, _fast("expert_swiglu"), packs=False),
)
