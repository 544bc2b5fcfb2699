"""A compiled step: one graph, for every step of a generation, that says what the eager one says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from synapse_arch import BackendUnavailable, ConfigError, Sampling, ThalamusConfig, TraceSpec
from synapse_arch.model._products import FEW, StreamedProducts
from synapse_arch.model.compiling import GraphedStep, compiled_step
from synapse_arch.model.generation import generate, stream
from tests.helpers import assert_same
from tests.model.small import small_model, tokens


def has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


# The compiler warns itself, and hides it where it would be shown: that cannot be where warnings are errors.
pytestmark = pytest.mark.filterwarnings("default")
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("batch", [1, 3])
def test_all_steps_are_one_graph_without_a_break(batch: int) -> None:
    """Traced, not translated to C++: that takes minutes. The prompt's state, and a fresh one, need no other graph."""
    model = small_model().eval()
    mask = None if batch == 1 else torch.tensor([[True]] * (batch - 1) + [[False]])
    with torch.no_grad():
        for state in (model(tokens(batch, 9)).state, model.init_state(batch)):
            other = state
            for _ in range(3):
                ids = tokens(batch, 1)
                expected = model(ids, state, mask=mask)
                logits, other = compiled_step("eager")(model, ids, other, mask)
                state = expected.state
                assert_same({"logits": logits, **other.to_tensors()}, {"logits": expected.logits, **state.to_tensors()})
    found = torch._dynamo.utils.counters
    assert found["stats"]["unique_graphs"] == 1
    assert not found["graph_break"]


@needs_compiler
def test_compiled_generation_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, on a model that is compiled soon, in plain C++, without a product left; rows end at different steps."""
    left, streamed = [], StreamedProducts.__call__

    def watched(self: StreamedProducts, graph: Graph) -> None:
        streamed(self, graph)
        left.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)))

    monkeypatch.setattr(StreamedProducts, "__call__", watched)
    model = small_model(memory=None, thalamus=ThalamusConfig(mamba=None)).double().eval()
    prompt, sampling = tokens(2, 6), Sampling(temperature=0, max_tokens=6)
    stops = Sampling(temperature=0, max_tokens=6, stop=(tuple(generate(model, prompt, sampling=sampling).ids[0][2:3]),))
    expected = generate(model, prompt, sampling=stops)
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with uncached, torch._inductor.config.patch({"cpp.simdlen": 1, "fx_graph_cache": False}):
        found = generate(model, prompt, sampling=stops, compile=True)
    assert found.ids == expected.ids
    assert found.finish == expected.finish
    assert_same(found.state.to_tensors(), expected.state.to_tensors())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert left == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1])
def test_products_of_few_rows_become_sums(rows: int, dtype: torch.dtype) -> None:
    def two_layers(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (x.relu() @ first.T).sigmoid() @ second

    arguments = [torch.randn(*shape, dtype=dtype) for shape in ((rows, 6), (5, 6), (5, 4))]
    traced = make_fx(two_layers, tracing_mode="fake")(*arguments)
    StreamedProducts()(traced.graph)
    traced.recompile()
    left = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert len(left) == (0 if rows <= FEW else 2)
    torch.testing.assert_close(traced(*arguments), two_layers(*arguments))


def test_a_trace_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="compile: expected no trace"):
        stream(small_model(), tokens(1, 3), trace=TraceSpec(), compile=True)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        generate(small_model(), tokens(1, 3), compile=True)


def test_a_cuda_graph_needs_a_gpu() -> None:
    model = small_model()
    with pytest.raises(BackendUnavailable, match="GraphedStep: expected a model on a CUDA device, got cpu"):
        GraphedStep(model, model.init_state(1))
