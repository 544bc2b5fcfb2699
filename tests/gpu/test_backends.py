"""Every backend on the GPU against the loop in float64: outputs, states and all gradients."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.parity import FORMS, Case, Widths, cases, errors, goal, narrowed, packing
from synapse_arch import ops
from synapse_arch.errors import BackendUnavailable
from synapse_arch.ops import _triton
from tests.helpers import Tensors, measure

CASES = cases(Widths())
ALL = pytest.mark.parametrize("name", CASES)


def judge(distances: dict[str, Tensors]) -> None:
    """Fails with everything that is too far off."""
    off = [
        f"{form}, {tensor}: {float(distance):.1e}, allowed {goal(form, tensor):.0e}"
        for form, found in distances.items()
        for tensor, distance in found.items()
        if not float(distance) <= goal(form, tensor)
    ]
    assert not off, "; ".join(off)


def kernels_or_skip() -> None:
    if reason := _triton.missing():
        pytest.skip(reason)


@ALL
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
def test_backends_equal_the_definition(name: str, length: int) -> None:
    found = errors(CASES[name], 2, length, "cuda")
    judge(found)
    expected = [backend for backend, _ in FORMS if backend in CASES[name].backends]
    assert len(found) == len(expected) - bool(_triton.missing())


@ALL
@pytest.mark.parametrize("length", [65, 300])
def test_packed_and_padded(name: str, length: int) -> None:
    judge(errors(CASES[name], 2, length, "cuda", packing(2, length)))


@ALL
def test_gates_at_their_ends(name: str) -> None:
    kernels_or_skip()
    case: Case = CASES[name]
    for changed in case.extremes:
        drawn = case.draw(2, 130)
        drawn |= {key: torch.full_like(drawn[key], value) for key, value in changed.items()}
        inputs = narrowed({key: x.cuda() for key, x in drawn.items()}, torch.bfloat16)
        found = measure(lambda z, c=case: c.call(z, backend="triton", packing={}), inputs)
        assert all(x.isfinite().all() for x in found.values()), changed


@ALL
def test_auto_takes_the_kernels_and_compiles_to_one_graph(name: str) -> None:
    kernels_or_skip()
    torch.compiler.reset()
    case: Case = CASES[name]
    inputs = narrowed({key: x.cuda() for key, x in case.settle(case.draw(2, 130), {}).items()}, torch.bfloat16)
    expected = measure(lambda z: case.call(z, backend="triton", packing={}), inputs)
    compiled = torch.compile(lambda z: case.call(z, backend="auto", packing={}), fullgraph=True)
    found = measure(compiled, inputs)
    for key, x in expected.items():
        off = (found[key].double() - x.double()).norm() / x.double().norm().clamp(min=1e-30)
        assert off <= goal("triton bfloat16", key), (key, float(off))


def test_float32_is_not_narrowed_unasked() -> None:
    q = torch.randn(1, 70, 2, 32, device="cuda")
    z = {"q": q, "k": q, "v": q, "i": q[..., 0], "f": q[..., 0]}
    with pytest.raises(BackendUnavailable, match="bfloat16"):
        ops.mlstm(**z, backend="triton")
    for found, expected in zip(ops.mlstm(**z), ops.mlstm(**z, backend="chunked"), strict=True):
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, expected)
