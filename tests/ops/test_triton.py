"""The backend "triton" around its kernels, which are replaced by loops: what they are handed makes every op exact.

The kernels themselves are compared in tests/gpu.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch import ops
from synapse_arch.errors import BackendUnavailable
from synapse_arch.ops import _kernels, _mamba_ssm, _triton
from synapse_arch.ops._backends import BACKENDS, _log_once
from tests.contracts.cases import OPS, Case, packing
from tests.helpers import assert_same, cast, measure
from tests.ops.forms import check_extremes, check_padding, loop, loop_backward

CASES = [case for case in OPS if "triton" in case.backends and "write" not in case.sequence]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(q: Tensor, dtype: torch.dtype) -> Tensor:
        return q.new_zeros(*q.shape[:3], _triton.CHUNK, dtype=dtype)

    def gla_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        assert all(x.is_contiguous() for x in (q, k, v, g, state))
        return *loop(q, k, v, None, g, state), scores(q, torch.float32)

    def kda_forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        assert all(x.is_contiguous() for x in (q, k, v, beta, g, state))
        return *loop(q, k, v, beta, g, state), scores(q, q.dtype), scores(q, q.dtype)

    def gla_backward(*z: Tensor) -> tuple[Tensor, ...]:
        return loop_backward(*z[:3], None, *z[3:5], *z[6:])

    def kda_backward(*z: Tensor) -> tuple[Tensor, ...]:
        return loop_backward(*z[:6], *z[8:])

    for double in (gla_forward, gla_backward, kda_forward, kda_backward):
        monkeypatch.setattr(_triton, double.__name__, double)
    monkeypatch.setattr(_triton, "obstacle", lambda *_: "")
    monkeypatch.setattr(_kernels, "_elsewhere", lambda _: "")
    monkeypatch.setattr(_triton, "_missing", lambda: "")


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [2, 64, 71])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_definition(case: Case, length: int, packed: bool) -> None:
    tensors, options = case.draw(2, length), packing(2, length) if packed else {}
    expected = measure(lambda z: case.call(z, backend="reference", **options), tensors)
    assert_same(measure(lambda z: case.call(z, backend="triton", **options), tensors), expected)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gates_at_their_ends(case: Case) -> None:
    check_extremes(case, "triton")


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_that_are_all_padding_and_a_fresh_state(case: Case) -> None:
    check_padding(case, "triton")


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_get_narrow_values_and_wide_gates(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, ...]] = []
    for name in ("gla_forward", "kda_forward"):
        double = getattr(_triton, name)
        monkeypatch.setattr(
            _triton, name, lambda *z, f=double: (seen.append(tuple(x.dtype for x in z)), f(*z))[1]
        )  # fmt: skip
    tensors = cast(case.draw(2, 20), torch.float32)
    narrow = {name: x.bfloat16() if name in ("x", "B", "C", "q", "k", "v") else x for name, x in tensors.items()}
    found = measure(lambda z: case.call(z, backend="triton"), narrow)
    (dtypes,) = seen
    assert dtypes[:3] == (torch.bfloat16,) * 3
    assert set(dtypes[3:]) == {torch.float32}
    for name, x in found.items():
        wide = name.startswith("state") or (name.startswith("grad") and narrow[name[5:]].dtype == torch.float32)
        assert x.dtype == (torch.float32 if wide else torch.bfloat16), name


@pytest.mark.usefixtures("loops")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_compiles_without_a_break(case: Case) -> None:
    torch.compiler.reset()
    tensors, options = cast(case.draw(2, 20), torch.float32), packing(2, 20)
    call: Any = torch.compile(lambda z: case.call(z, backend="triton", **options), fullgraph=True, backend="aot_eager")
    assert_same(measure(call, tensors), measure(lambda z: case.call(z, backend="triton", **options), tensors))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_needs_no_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "linear", None)
    monkeypatch.setattr(_triton, "delta", None)
    tensors = case.draw(2, 1)
    with torch.no_grad():
        assert_same(case.call(tensors, backend="triton"), case.call(tensors, backend="reference"))
    expected = measure(lambda z: case.call(z, backend="reference"), tensors)
    assert_same(measure(lambda z: case.call(z, backend="triton"), tensors), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_gpu_it_says_so(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    tensors = case.draw(2, 6)
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot run here: .*CUDA.*on cpu; use 'chunked' or 'auto'"):
        case.call(tensors, backend="triton")
    with caplog.at_level(logging.WARNING):
        case.call(tensors)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("dtype", "widest", "key", "value", "reason"),
    [
        (torch.float32, torch.float32, 64, 64, "bfloat16, not in torch.float32: use autocast"),
        (torch.bfloat16, torch.float64, 64, 64, "not in torch.float64"),
        (torch.bfloat16, torch.float32, 512, 64, "up to 256"),
        (torch.bfloat16, torch.float32, 64, 40, "multiples of 16, not 64 and 40"),
    ],
)
def test_what_the_kernels_cannot_take(
    dtype: torch.dtype, widest: torch.dtype, key: int, value: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = type("OnCuda", (), {"device": torch.device("cuda"), "dtype": dtype})()
    with pytest.raises(BackendUnavailable, match=reason):
        _kernels.choose("ssd", "triton", there, widest, key, value)
    _log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert _kernels.choose("ssd", "auto", there, widest, key, value) == "chunked"
    assert reason in caplog.text


def test_write_strengths_have_no_kernel() -> None:
    z = {"q": torch.ones(1, 2, 1, 16), "k": torch.ones(1, 2, 1, 16), "v": torch.ones(1, 2, 1, 16)}
    with pytest.raises(BackendUnavailable, match="write"):
        ops.delta_rule(**z, beta=torch.ones(1, 2, 1), write=torch.ones(1, 2, 1, 16), backend="triton")


def test_looking_for_the_package_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> str:
        torch._dynamo.graph_break()
        return "none"

    monkeypatch.setattr(_triton, "_missing", looked)
    call: Any = torch.compile(lambda x: x + len(_triton.missing()), fullgraph=True, backend="eager")
    assert call(torch.zeros(1)).item() == 4


def test_a_missing_or_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    assert "pip install 'synapse-arch[kernels]'" in _triton._missing.__wrapped__()
    for version, reason in (("0.5.2", "0.5.2 is too old"), ("0.6.0", ""), ("1.0", "")):
        package = type("Package", (), {"__version__": version, "__path__": []})()
        for name in ("fla", "fla.ops", "fla.ops.gla", "fla.ops.kda"):
            monkeypatch.setitem(__import__("sys").modules, name, package)
        assert reason in _triton._missing.__wrapped__()
        assert bool(reason) == bool(_triton._missing.__wrapped__())


def test_the_report_holds_kernels_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {"triton", "mamba_ssm"} & set(ops.backends()["ssd"])
    monkeypatch.setattr(_triton, "_missing", lambda: "")
    assert "triton" in ops.backends()["ssd"]
    monkeypatch.setattr(_mamba_ssm, "_missing", lambda _: "")
    assert ops.backends() == BACKENDS
