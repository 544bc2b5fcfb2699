"""`--compile`: what the compiled layers give is what they give uncompiled, in values and gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from recipes.compiling import compile_layers, eagerly
from synapse_arch import SynapseConfig, SynapseModel, SynapseOutput
from synapse_arch.errors import ConfigError
from tests.compiler import needs_compiler
from tests.recipes.running import SMALL

# The compiler warns itself, and hides it where it would be shown: that cannot be where warnings are errors.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def small(*extra: str) -> SynapseModel:
    torch.manual_seed(0)
    changes = dict(override.split("=") for override in (*SMALL, *extra))
    numbers = {key: int(value) if value else None for key, value in changes.items()}
    return SynapseModel(SynapseConfig.preset("tiny", **numbers)).train()


def step(model: SynapseModel, bf16: bool = False) -> tuple[SynapseOutput, dict[str, torch.Tensor]]:
    """A step over two packed documents and two chunks, and its gradients; the forward pass under autocast or not."""
    ids = torch.randint(256, (2, 80), generator=torch.Generator().manual_seed(1))
    segment_ids = (torch.arange(80) > 50).long().expand(2, 80)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        out = model(ids, targets=ids.roll(-1, 1), segment_ids=segment_ids)
    assert out.loss is not None
    out.loss.backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_equal(eager: SynapseModel, compiled: SynapseModel, bf16: bool = False) -> None:
    (one, gradients), (other, others) = step(eager, bf16), step(compiled, bf16)
    torch.testing.assert_close(other.logits, one.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-6, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():  # some are small sums of large terms: rounding is of the terms' size
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)
    left, right = one.state.to_tensors(), other.state.to_tensors()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_a_layer_is_one_graph_without_a_break(bf16: bool) -> None:
    """Traced, with every part of a layer, but not translated to C++: that takes minutes."""
    eager = small("n_layers=2")
    traced = copy.deepcopy(eager)
    compile_layers(traced, backend="aot_eager")
    check_equal(eager, traced, bf16)
    found = torch._dynamo.utils.counters
    assert found["stats"]["unique_graphs"] == 1  # the second layer is served by the first one's
    assert not found["graph_break"]


@needs_compiler
def test_compiled_layers_equal_themselves() -> None:
    """Fused, on the part of a layer that is compiled soonest, and in plain C++."""
    eager = small("n_layers=1", "memory=", "thalamus.mamba=")
    compiled = copy.deepcopy(eager)
    compile_layers(compiled)
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        check_equal(eager, compiled)
    with eagerly(True):
        compiled(torch.zeros(1, 7, dtype=torch.long))  # another shape
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        compile_layers(small())
