"""On a GPU nothing is mixed with the CPU, and nobody waits for the device: shown where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.utils.cpp_extension import include_paths, library_paths

from synapse_arch import SynapseConfig
from tests.compiler import needs_compiler

pytestmark = [needs_compiler, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")]

GUARDS = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct Cuda final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {};
struct Mps final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> {};
}
C10_REGISTER_GUARD_IMPL(CUDA, Cuda)
C10_REGISTER_GUARD_IMPL(MPS, Mps)
"""
"""Switching to such a device does nothing."""

Found = dict[tuple[str, ...], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of each case, by device, variant, dtype and name, its error and what waited for the device."""
    folder = tmp_path_factory.mktemp("guards")
    (folder / "guards.cpp").write_text(GUARDS)
    where = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    build = [get_cpp_compiler(), "-shared", "-fPIC", "-std=c++20", folder / "guards.cpp", "-o", folder / "guards.so"]
    subprocess.run([*build, *where, "-lc10"], check=True, capture_output=True)
    program = [sys.executable, "-m", "tests.model.fake_device", folder / "guards.so"]
    told = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 0, told.stderr
    return {tuple(name.split(", ", 3)): case for name, case in json.loads(told.stdout).items()}


def test_all_tensors_of_a_call_lie_on_the_device(found: Found) -> None:
    """On a Mac's none is float64, which it does not have."""
    assert {name: case["error"] for name, case in found.items() if case["error"]} == {}
    assert {device for device, *_ in found} == {"cuda", "mps"}
    assert {variant for _, variant, _, _ in found} > {"default", "s6", "hebbian", "write-gate", "shared"}
    assert {name for _, variant, _, name in found if variant == "default"} > {"loss", "loss, packed", "trace", "step"}


def test_in_bfloat16_nobody_waits(found: Found) -> None:
    narrow = {name for name in found if name[2] == "bfloat16" or name[3] == "loss under autocast"}
    waits = {name: found[name]["waits"] for name in narrow if name[3] != "generate"}
    assert {name for *_, name in waits} >= {"loss", "loss under autocast", "trace", "step"}
    assert {name: places for name, places in waits.items() if places} == {}


def test_in_float32_experts_wait_once_a_pass(found: Found) -> None:
    """One transfer, of a number an expert; a second one in the backward pass."""
    numbers = SynapseConfig.preset("tiny").n_experts
    passes = {"loss": 2, "loss, packed": 2, "reading": 1, "step": 0, "step of four": 1, "trace": 1, "controls": 1}
    asked = {name for name in found if name[0] == "cuda" and name[2] == "float32" and name[3] in passes}
    assert {name for _, variant, _, name in asked if variant == "default"} == set(passes)
    for case in (case for case in asked if case[1] != "no-experts"):
        assert Counter(found[case]["waits"]) == Counter({"experts.py: _place": numbers * passes[case[3]]}), case


def test_a_token_is_told_as_soon_as_it_is_drawn(found: Found) -> None:
    """What generating waits for: the range of the prompt's ids, then each token with what is said of it."""
    waits = set(found["cuda", "default", "bfloat16", "generate"]["waits"])
    assert waits == {"decoder.py: _check_prompt", "decoder.py: choose"}
