"""Every backend on the GPU against the loop in float64: outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.parity import Case, Form, Widths, cases, errors, goal, narrowed, packing
from synapse_arch import ops
from synapse_arch.errors import BackendUnavailable
from synapse_arch.ops import _kernels
from synapse_arch.ops._backends import KERNELS
from tests.helpers import Tensors, measure

CASES = cases(Widths())
ALL = pytest.mark.parametrize("name", CASES)
KERNEL_FORMS = [(name, form) for name, case in CASES.items() for form in case.forms if form[0] in KERNELS]
EACH = pytest.mark.parametrize(
    ("name", "form"), KERNEL_FORMS, ids=lambda x: x if isinstance(x, str) else f"{x[0]}-{x[1]}"
)  # fmt: skip


def judge(distances: dict[str, Tensors]) -> None:
    """Fails with everything that is too far off."""
    off = [
        f"{form}, {tensor}: {float(distance):.1e}, allowed {goal(form, tensor):.0e}"
        for form, found in distances.items()
        for tensor, distance in found.items()
        if not float(distance) <= goal(form, tensor)
    ]
    assert not off, "; ".join(off)


def absent(name: str, kernels: str) -> str:
    return _kernels.missing(kernels, name.replace("hebbian", "delta_rule"))


def kernels_or_skip(name: str, kernels: str) -> None:
    if reason := absent(name, kernels):
        pytest.skip(reason)


@ALL
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
def test_backends_equal_the_definition(name: str, length: int) -> None:
    found = errors(CASES[name], 2, length, "cuda")
    judge(found)
    forms = CASES[name].forms
    assert len(found) == sum(backend not in KERNELS or not absent(name, backend) for backend, _ in forms)


@ALL
@pytest.mark.parametrize("length", [65, 300])
def test_packed_and_padded(name: str, length: int) -> None:
    judge(errors(CASES[name], 2, length, "cuda", packing(2, length)))


@EACH
def test_gates_at_their_ends(name: str, form: Form) -> None:
    kernels, dtype = form
    kernels_or_skip(name, kernels)
    case: Case = CASES[name]
    for changed in case.extremes:
        drawn = case.draw(2, 130)
        drawn |= {key: torch.full_like(drawn[key], value) for key, value in changed.items()}
        inputs = narrowed({key: x.cuda() for key, x in drawn.items()}, dtype)
        found = measure(lambda z, c=case: c.call(z, backend=kernels, packing={}), inputs)
        assert all(x.isfinite().all() for x in found.values()), changed


@EACH
def test_auto_compiles_to_one_graph_and_equals_the_kernels(name: str, form: Form) -> None:
    kernels, dtype = form
    kernels_or_skip(name, kernels)
    torch.compiler.reset()
    case: Case = CASES[name]
    inputs = narrowed({key: x.cuda() for key, x in case.settle(case.draw(2, 130), {}).items()}, dtype)
    expected = measure(lambda z: case.call(z, backend=kernels, packing={}), inputs)
    compiled = torch.compile(lambda z: case.call(z, backend="auto", packing={}), fullgraph=True)
    found = measure(compiled, inputs)
    for key, x in expected.items():
        off = (found[key].double() - x.double()).norm() / x.double().norm().clamp(min=1e-30)
        assert off <= goal("kernels bfloat16", key), (key, float(off))


def test_float32_is_not_narrowed_unasked() -> None:
    q = torch.randn(1, 70, 2, 32, device="cuda")
    z = {"q": q, "k": q, "v": q, "i": q[..., 0], "f": q[..., 0]}
    with pytest.raises(BackendUnavailable, match="bfloat16"):
        ops.mlstm(**z, backend="triton")
    for found, expected in zip(ops.mlstm(**z), ops.mlstm(**z, backend="chunked"), strict=True):
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, expected)
