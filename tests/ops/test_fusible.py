"""The backend "fusible": plain products over chunks are the recurrence, and a compiler for a GPU gets them unasked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch.ops import _kernels, _triton
from synapse_arch.ops._fusible import CHUNK
from tests.contracts.cases import OPS, Case, packing
from tests.helpers import Tensors, assert_same, cast, measure
from tests.ops.forms import check_extremes, check_padding

CASES = [case for case in OPS if "fusible" in case.backends]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


@EVERY
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [1, 2, 71, CHUNK, CHUNK + 1, 2 * CHUNK + 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_equals_the_definition(case: Case, dtype: torch.dtype, length: int, packed: bool) -> None:
    tensors, options = cast(case.draw(2, length), dtype), packing(2, length) if packed else {}
    expected = measure(lambda z: case.call(z, backend="reference", **options), tensors)
    assert_same(measure(lambda z: case.call(z, backend="fusible", **options), tensors), expected)


@EVERY
def test_gates_at_their_ends(case: Case) -> None:
    check_extremes(case, "fusible")


@EVERY
def test_rows_that_are_all_padding_and_a_fresh_state(case: Case) -> None:
    check_padding(case, "fusible")


@EVERY
def test_values_stay_narrow_and_states_wide(case: Case) -> None:
    tensors = cast(case.draw(2, 20), torch.float32)
    narrow = {name: x.bfloat16() if name in ("x", "B", "C", "q", "k", "v") else x for name, x in tensors.items()}
    for name, x in measure(lambda z: case.call(z, backend="fusible"), narrow).items():
        wide = name.startswith("state") or (name.startswith("grad") and narrow[name[5:]].dtype == torch.float32)
        assert x.dtype == (torch.float32 if wide else torch.bfloat16), name


@pytest.mark.filterwarnings("default")  # the compiler warns itself
@EVERY
def test_it_compiles_without_a_break(case: Case) -> None:
    torch.compiler.reset()
    tensors, options = cast(case.draw(2, CHUNK + 20), torch.float32), packing(2, CHUNK + 20)
    call: Any = torch.compile(lambda z: case.call(z, backend="fusible", **options), fullgraph=True, backend="aot_eager")
    assert_same(measure(call, tensors), measure(lambda z: case.call(z, backend="fusible", **options), tensors))


@pytest.mark.parametrize("op", ["ssd", "mlstm"])
def test_a_compiler_for_a_gpu_gets_it_unasked(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(backend: str = "auto", device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **widest: Any) -> str:
        values: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
        return _kernels.choose(op, backend, values, widest.get("widest", torch.float32), 64, 64)

    monkeypatch.setattr(_triton, "_missing", lambda: "there are none")
    assert chosen() == "chunked"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen() == "fusible"
    assert chosen("chunked") == "chunked"
    assert chosen(device="cpu") == "chunked"
    assert chosen(dtype=torch.float32) == "chunked"
    assert chosen(widest=torch.float64) == "chunked"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["sum", "maximum"])
def test_scans_in_blocks(kind: str, length: int) -> None:
    from synapse_arch.ops.mlstm import _blocked_scan, _largest  # type: ignore[attr-defined]

    x = torch.randn(2, length, 3, dtype=torch.float64)
    x[0, : length // 2, 1] = -torch.inf if kind == "maximum" else -3.0
    arguments: Any = (torch.cumsum, torch.add, 0.0) if kind == "sum" else (_largest, torch.maximum, -torch.inf)

    def run(z: Tensors, blocked: bool) -> Tensors:
        found: Tensor = _blocked_scan(z["x"], *arguments) if blocked else arguments[0](z["x"], 1)
        return {"y": found.exp()}

    assert_same(measure(lambda z: run(z, True), {"x": x}), measure(lambda z: run(z, False), {"x": x}))
