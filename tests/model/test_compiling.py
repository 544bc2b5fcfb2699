"""A compiled step: one graph, for every step of a generation, that says what the eager one says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from synapse_arch import BackendUnavailable, ConfigError, Sampling, ThalamusConfig, TraceSpec
from synapse_arch.model._products import FEW, StreamedProducts
from synapse_arch.model.compiling import GUARDED, GraphedStep, compiled_step, settled
from synapse_arch.model.generation import generate, stream
from synapse_arch.ops import expert_swiglu
from tests.compiler import needs_compiler
from tests.helpers import assert_same
from tests.model.small import small_model, tokens

# The compiler warns itself, and hides it where it would be shown: that cannot be where warnings are errors.
pytestmark = pytest.mark.filterwarnings("default")


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
                logits, other = compiled_step(backend="eager")(model, ids, other, mask)
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
        targets = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        left.append(sum(len(graph.find_nodes(op="call_function", target=target)) for target in targets))

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inputs", [5, 32])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_products_of_many_matrices_become_sums(rows: int, inputs: int, dtype: torch.dtype) -> None:
    arguments = [torch.randn(*shape, dtype=dtype) for shape in ((3, rows, inputs), (3, inputs, 7))]
    traced = make_fx(torch.bmm, tracing_mode="fake")(*arguments)
    StreamedProducts()(traced.graph)
    traced.recompile()
    left = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    assert len(left) == (0 if rows <= FEW else 1)
    torch.testing.assert_close(traced(*arguments), torch.bmm(*arguments))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_gpu_streams_one_row(rows: int) -> None:
    """On a device that is no CPU, and computes nothing."""
    shapes = (rows, 32), (32, 7), (1, rows, 32), (1, 32, 7)
    arguments = [torch.randn(*shape, device="meta") for shape in shapes]
    traced = make_fx(lambda a, b, c, d: (a @ b, torch.bmm(c, d)), tracing_mode="fake")(*arguments)
    StreamedProducts()(traced.graph)
    targets = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    left = sum(len(traced.graph.find_nodes(op="call_function", target=target)) for target in targets)
    assert left == (0 if rows == 1 else 2)
    traced.recompile()
    assert [x.shape for x in traced(*arguments)] == [(rows, 7), (1, rows, 7)]


@needs_compiler
def test_a_compiled_token_goes_through_its_experts() -> None:
    """As many as it has: none where the slot is unused."""
    generator = torch.Generator().manual_seed(0)
    x, w_in, w_out = (torch.randn(*s, generator=generator) for s in ((1, 32), (4, 32, 48), (4, 24, 32)))
    weights = torch.tensor([[0.7, 0.3]])
    options = {"post_grad_custom_pre_pass": StreamedProducts()}
    step = torch.compile(lambda indices: expert_swiglu(x, w_in, w_out, indices, weights), options=options)
    with torch.no_grad():
        for indices in ([[3, 1]], [[-1, 2]], [[0, -1]]):
            expected = expert_swiglu(x, w_in, w_out, torch.tensor(indices), weights, backend="reference")
            torch.testing.assert_close(step(torch.tensor(indices)), expected)


def test_a_settled_step_is_guarded_at_first_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    step = torch.compile(lambda model, ids, state, mask: (ids * model.factor, state), backend="eager")
    monkeypatch.setattr(torch.compiler, "set_stance", lambda **how: looked.append(how) or contextlib.nullcontext())
    model, run = SimpleNamespace(factor=2), settled(step)
    others = [threading.current_thread()]
    monkeypatch.setattr(threading, "enumerate", lambda: others)
    for _ in range(GUARDED + 2):
        assert run(model, torch.ones(1, 1), None, None)[0] == 2
    assert looked == [{"skip_guard_eval_unsafe": True}] * 2
    others.append(threading.Thread())
    assert run(model, torch.ones(1, 1), None, None)[0] == 2
    assert len(looked) == 2


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
