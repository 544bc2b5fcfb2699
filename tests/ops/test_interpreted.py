"""What mamba_ssm computes, on a CPU: its Triton kernels interpreted, and its own definition of the scan.

Both are in the package without CUDA, beside Triton: pip install triton, then
MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch.ops import _kernels, _mamba_ssm
from tests.contracts.cases import OPS, packing
from tests.helpers import assert_same, cast, measure
from tests.ops import test_mamba_ssm as loops

FOUND = [importlib.util.find_spec(name) for name in ("triton", "mamba_ssm")]

pytestmark = [
    pytest.mark.skipif(not all(FOUND), reason="needs triton and mamba_ssm"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here: tests/gpu"),
    pytest.mark.filterwarnings("default"),  # theirs
]


def _first_config(self: Any, *arguments: Any, **options: Any) -> Any:
    """In place of Triton's autotuner, which needs a GPU's clock."""
    config = self.best_config = self.configs[0]
    if config.pre_hook is not None:
        config.pre_hook(dict(zip(self.arg_names, arguments, strict=False)) | options | config.all_kwargs())
    return self.fn.run(*arguments, **options, **config.kwargs)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package without its parts that need CUDA, its kernels run by Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    package: Any = ModuleType("mamba_ssm")
    package.__path__ = FOUND[1].submodule_search_locations  # type: ignore[union-attr]
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    monkeypatch.setattr("triton.runtime.autotuner.Autotuner.run", _first_config)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=8))
    monkeypatch.setattr(_kernels, "_elsewhere", lambda _: "")
    monkeypatch.setattr(_mamba_ssm, "obstacle", lambda *_: "")
    monkeypatch.setattr(_mamba_ssm, "_missing", lambda _: "")
    yield
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
        del sys.modules[name]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [20, 128, 140, 300])
def test_the_kernels_of_ssd_equal_the_definition(length: int, packed: bool) -> None:
    """In float32, which the interpreter multiplies exactly; it has no bfloat16."""
    case = next(case for case in OPS if case.name == "ssd")
    tensors, options = cast(case.draw(2, length), torch.float32), packing(2, length) if packed else {}
    wide = cast(tensors, torch.float64)
    expected = measure(lambda z: case.call(z, backend="reference", **options), wide)
    assert_same(measure(lambda z: case.call(z, backend="mamba_ssm", **options), tensors), expected)


@pytest.mark.usefixtures("interpreted")
def test_gates_at_their_ends() -> None:
    case = next(case for case in OPS if case.name == "ssd")
    for changed in case.extremes:
        tensors = case.draw(2, 20)
        tensors |= {name: torch.full_like(tensors[name], value) for name, value in changed.items()}
        narrow = cast(tensors, torch.float32)
        found = measure(lambda z: case.call(z, backend="mamba_ssm"), narrow)
        assert all(x.isfinite().all() for x in found.values()), changed
        expected = case.call(cast(narrow, torch.float64), backend="reference")
        assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.usefixtures("interpreted")
def test_the_loop_that_stands_for_the_scan_is_the_packages_own() -> None:
    reference = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    case = next(case for case in OPS if case.name == "selective_scan")
    drawn = cast(case.draw(2, 20), torch.float32)
    u, dt, B, C = (drawn[name].transpose(1, 2).contiguous() for name in ("u", "dt", "B", "C"))
    y: Tensor = reference(u, dt, drawn["A"], B, C)
    assert_same({"y": loops.scan_forward(u, dt, drawn["A"], B, C)[0]}, {"y": y})
