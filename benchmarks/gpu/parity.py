"""Every backend of every recurrence against the loop in float64: outputs, states and all gradients.

B batch, T time, H heads, M writes a position, K and N key and state width, V and P value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Figure, Tensors
from synapse_arch.errors import BackendUnavailable
from synapse_arch.ops import MLSTMState, delta_rule, mlstm, selective_scan, ssd
from tests.helpers import flatten, measure
from tests.tolerances import NARROW, NARROW_GRADIENT, NARROW_SUM, NEGLIGIBLE, RELATIVE

NARROWED = ("u", "x", "B", "C", "q", "k", "v")
"""The inputs that are bfloat16 in a bfloat16 model; gates and states are float32 there too."""

Form = tuple[str, torch.dtype]
"""A backend, and the dtype in which it is compared."""

CHUNKED: tuple[Form, ...] = (("chunked", torch.float32), ("chunked", torch.bfloat16))
TRITON: Form = ("triton", torch.bfloat16)
FUSIBLE: Form = ("fusible", torch.bfloat16)

Packing = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of the recurrences; the defaults are those of the default configuration.

    Attributes:
        heads: H of ssd, mlstm and the memory.
        state: N of ssd.
        scan: N of selective_scan, which has as many channels as ssd.
        head: P.
        key, value: K and V of mlstm.
        memory: K and V of the memory.
    """

    heads: tuple[int, int, int] = (8, 4, 2)
    state: int = 64
    scan: int = 16
    head: int = 64
    key: int = 32
    value: int = 64
    memory: int = 64


@dataclass(frozen=True)
class Case:
    """A recurrence.

    Attributes:
        draw: (B, T) -> float64 inputs with a state that is not fresh; what stands in NARROWED is exact in bfloat16.
        call: (inputs, backend, packing) -> named outputs.
        extremes: what drives gates and decays to their ends.
        forms: what is compared.
        settle: (inputs, packing) -> inputs at which it has a derivative.
    """

    draw: Callable[[int, int], Tensors]
    call: Callable[..., Tensors]
    extremes: tuple[dict[str, float], ...]
    forms: tuple[Form, ...]
    settle: Callable[[Tensors, Packing], Tensors] = lambda drawn, _: drawn


def cases(widths: Widths) -> dict[str, Case]:
    """The recurrences, all of which have kernels."""
    decays = ({"log_decay": -1e4}, {"log_decay": 0.0, "beta": 2.0}, {"beta": 0.0}, {"k": 0.0, "q": 0.0})
    steps = ({"dt": 1e-12}, {"dt": 1e3}, {"dt": 1e3, "A": -1e4})
    memory = partial(_draw_memory, widths)
    return {
        "selective_scan": Case(
            partial(_draw_scan, widths), partial(_call, selective_scan), steps,
            (*CHUNKED, ("mamba_ssm", torch.float32), ("mamba_ssm", torch.bfloat16)),
        ),
        "ssd": Case(
            partial(_draw_ssd, widths), partial(_call, ssd), steps,
            (*CHUNKED, FUSIBLE, TRITON, ("mamba_ssm", torch.bfloat16)),
        ),
        "mlstm": Case(
            partial(_draw_mlstm, widths), partial(_call, mlstm),
            ({"i": 80.0}, {"i": -80.0}, {"f": -1e3}, {"i": 80.0, "f": -1e3}, {"i": -1e3, "f": 1e3}, {"k": 0.0}),
            (*CHUNKED, FUSIBLE, TRITON), _off_the_kink,
        ),
        "delta_rule": Case(memory, partial(_call, delta_rule), decays, (*CHUNKED, TRITON)),
        "hebbian": Case(memory, partial(_call, delta_rule, rule="hebbian"), decays, (*CHUNKED, TRITON)),
    }  # fmt: skip


def errors(case: Case, batch: int, length: int, device: str, packing: Packing | None = None) -> dict[str, Tensors]:
    """How far each form is from the reference: by "backend dtype", by tensor, ‖difference‖ / ‖expected‖.

    A gradient that is a negligible share of the largest is measured by that share. Forms that cannot run are left out.
    """
    torch.manual_seed(0)
    packing = {name: x.to(device) for name, x in (packing or {}).items()}
    drawn = case.settle({name: x.to(device) for name, x in case.draw(batch, length).items()}, packing)
    expected = measure(partial(case.call, backend="reference", packing=packing), drawn)
    found: dict[str, Tensors] = {}
    for backend, dtype in case.forms:
        inputs = narrowed(drawn, dtype)
        try:
            outputs = measure(partial(case.call, backend=backend, packing=packing), inputs)
        except BackendUnavailable:
            continue
        found[f"{backend} {str(dtype).removeprefix('torch.')}"] = _distances(outputs, expected)
    return found


def narrowed(drawn: Tensors, dtype: torch.dtype) -> Tensors:
    """The inputs as a model of `dtype` has them."""
    return {name: x.to(dtype if name in NARROWED else torch.float32) for name, x in drawn.items()}


def goal(form: str, tensor: str) -> float:
    """The largest distance allowed."""
    if form.endswith("float32"):
        return RELATIVE[torch.float32]
    if tensor in ("grad A", "grad D"):
        return NARROW_SUM
    return NARROW_GRADIENT if tensor.startswith("grad") else NARROW


def packing(batch: int, length: int) -> Packing:
    """Segments of uneven lengths, and padding."""
    position = torch.arange(length)
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) > 0.2
    return {"segment_ids": (position // 37).expand(batch, -1).contiguous(), "mask": mask}


def figures(widths: Widths, lengths: tuple[int, ...], device: str) -> tuple[list[Figure], set[str]]:
    """One figure a recurrence and form: the largest distance over what is allowed; and "name backend" of all sound."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for name, case in cases(widths).items():
        runs = [(length, None) for length in lengths] + [(lengths[-1], packing(2, lengths[-1]))]
        for length, packed in runs:
            for form, distances in errors(case, 2, length, device, packed).items():
                for tensor, distance in distances.items():
                    share = float(distance) / goal(form, tensor)
                    what = f"{tensor}, T {length}{', packed' if packed else ''}: {float(distance):.1e}"
                    if not share <= worst.get((name, form), (-1.0, ""))[0]:
                        worst[name, form] = share if math.isfinite(share) else 1e9, what
    found = [
        Figure(
            what=f"parity of {name}, {form}: distance from float64 over what is allowed", values=(share,), unit="ratio",
            goal=1.0, exact=True, details={"worst": what},
        )
        for (name, form), (share, what) in worst.items()
    ]  # fmt: skip
    unsound = {f"{name} {form.split()[0]}" for (name, form), (share, _) in worst.items() if share > 1}
    return found, {f"{name} {form.split()[0]}" for name, form in worst} - unsound


def _distances(found: Tensors, expected: Tensors) -> Tensors:
    largest = max(x.norm() for name, x in expected.items() if name.startswith("grad"))
    distances = {}
    for name, x in expected.items():
        size = x.double().norm()
        if name.startswith("grad"):
            size = torch.maximum(size, NEGLIGIBLE * largest)
        off = (found[name].double() - x.double()).norm()
        distances[name] = torch.where(off == 0, 0.0, off / size).cpu()
    return distances


def _call(op: Callable[..., Any], inputs: Tensors, *, backend: str, packing: Packing, **options: Any) -> Tensors:
    """Outputs at unmasked positions, and the final state."""
    arguments = {name: x for name, x in inputs.items() if not name.startswith("state")}
    state = inputs.get("state")
    if "state.C" in inputs:
        state = MLSTMState(*(inputs[f"state.{name}"] for name in MLSTMState._fields))  # type: ignore[assignment]
    y, final = op(**arguments, state=state, backend=backend, **packing, **options)
    if "mask" in packing:
        y = torch.where(packing["mask"].view(*y.shape[:2], *[1] * (y.dim() - 2)), y, 0.0)
    return {"y": y, **flatten(final, "state")}


def _exact(*shape: int) -> Tensor:
    """Normal numbers that bfloat16 holds."""
    return torch.randn(*shape).bfloat16().double()


def _uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64)


def _draw_scan(w: Widths, batch: int, length: int) -> Tensors:
    channels = w.heads[0] * w.head
    return {
        "u": _exact(batch, length, channels), "dt": _uniform(-7, 0, batch, length, channels).exp(),
        "A": -_uniform(0.1, 16, channels, w.scan), "B": _exact(batch, length, w.scan),
        "C": _exact(batch, length, w.scan), "D": torch.randn(channels).double(),
        "state": torch.randn(batch, channels, w.scan).double(),
    }  # fmt: skip


def _draw_ssd(w: Widths, batch: int, length: int) -> Tensors:
    heads = w.heads[0]
    return {
        "x": _exact(batch, length, heads, w.head), "dt": _uniform(-7, 0, batch, length, heads).exp(),
        "A": -_uniform(0.1, 16, heads), "B": _exact(batch, length, 1, w.state), "C": _exact(batch, length, 1, w.state),
        "D": torch.randn(heads).double(), "state": torch.randn(batch, heads, w.head, w.state).double(),
    }  # fmt: skip


def _draw_mlstm(w: Widths, batch: int, length: int) -> Tensors:
    heads = w.heads[1]
    keys, values = (batch, length, heads, w.key), (batch, length, heads, w.value)
    return {
        "q": _exact(*keys), "k": _exact(*keys), "v": _exact(*values), "i": torch.randn(keys[:-1]).double() - 2,
        "f": 3 + 2 * torch.randn(keys[:-1]).double(), "state.C": torch.randn(batch, heads, w.key, w.value).double(),
        "state.n": torch.randn(batch, heads, w.key).double(), "state.m": torch.randn(batch, heads).double() - 2,
    }  # fmt: skip


def _off_the_kink(drawn: Tensors, packing: Packing) -> Tensors:
    """Queries a quarter longer where |nᵀq| is nearly e^-m: mLSTM has no derivative there, and rounding picks a side."""
    with torch.no_grad():  # of ones it reads min(|nᵀq| e^m, 1)
        halved = drawn | {"q": drawn["q"] / 2, "v": torch.ones_like(drawn["v"])}
        halved["state.C"] = drawn["state.n"][..., None].expand_as(drawn["state.C"])
        ratio = 2 * _call(mlstm, halved, backend="reference", packing=packing)["y"][..., :1].abs()
    near = (ratio > 0.95) & (ratio < 1.05)
    return drawn | {"q": torch.where(near, 1.25 * drawn["q"], drawn["q"]).bfloat16().double()}


def _draw_memory(w: Widths, batch: int, length: int) -> Tensors:
    """Two writes a position."""
    heads, steps = w.heads[2], 2
    keys = F.normalize(torch.randn(batch, length, 1 + steps, heads, w.memory), dim=-1).bfloat16().double()
    return {
        "q": keys[:, :, 0], "k": keys[:, :, 1:], "v": _exact(batch, length, steps, heads, w.memory),
        "beta": _uniform(0, 2, batch, length, steps, heads),
        "log_decay": -_uniform(-7, 0, batch, length, heads).exp(),
        "state": torch.randn(batch, heads, w.memory, w.memory).double(),
    }  # fmt: skip
