"""Traces of real modules and models: they change nothing, stream exactly, and never wait for the device."""

import weakref
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from synapse_arch import (
    XLSTM,
    ExpertsConfig,
    FastWeightMemory,
    MemoryConfig,
    SynapseConfig,
    SynapseModel,
    Thalamus,
    ThalamusConfig,
    XLSTMConfig,
)
from synapse_arch.introspection import SynapseTrace, TraceSpec, join_traces
from synapse_arch.introspection.probes import expert_trace
from synapse_arch.modules import experts, memory, thalamus, xlstm

B, T = 2, 21
LEVELS = ("routes", "gates", "full")
THALAMUS = ThalamusConfig(d_state=8, head_dim=16, top_k=2)
XLSTM_ = XLSTMConfig(n_heads=2)
MEMORY = MemoryConfig(n_heads=2, d_key=8, d_value=8, n_householder=1)


def config(**changes: object) -> SynapseConfig:
    parts = {
        "thalamus": THALAMUS,
        "xlstm": XLSTM_,
        "memory": MEMORY,
        "experts": ExpertsConfig(n_experts=4, d_expert=16),
    }
    return SynapseConfig(vocab_size=19, d_model=32, n_layers=2, **(parts | changes))


@pytest.fixture
def model() -> SynapseModel:
    return SynapseModel(config()).double().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 19, (B, T))


def tensors(record: object, name: str = "trace") -> Iterator[tuple[str, Tensor]]:
    if isinstance(record, Tensor):
        yield name, record
    elif isinstance(record, tuple):
        for n, item in enumerate(record):
            yield from tensors(item, f"{name}.{n}")
    elif is_dataclass(record):
        for field in fields(record):
            yield from tensors(getattr(record, field.name), f"{name}.{field.name}")


def same(got: SynapseTrace, want: SynapseTrace, **close: object) -> None:
    left, right = dict(tensors(got)), dict(tensors(want))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **close)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tracing_changes_no_bit(ids: Tensor, level: str, dtype: torch.dtype) -> None:
    model = SynapseModel(config()).to(dtype)
    plain, traced = model(ids, targets=ids), model(ids, targets=ids, trace=TraceSpec(level=level))
    assert plain.trace is None
    assert torch.equal(plain.logits, traced.logits)
    assert torch.equal(plain.loss, traced.loss)
    after = traced.state.to_tensors()
    assert all(torch.equal(value, after[name]) for name, value in plain.state.to_tensors().items())
    weights = list(model.parameters())
    grads, again = torch.autograd.grad(plain.loss, weights), torch.autograd.grad(traced.loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert not any(value.requires_grad for _, value in tensors(traced.trace))


def test_off_runs_no_probe(model: SynapseModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a probe ran although nothing is traced")

    for module, name in (
        (experts, "expert_trace"), (memory, "memory_trace"), (thalamus, "routing_trace"), (xlstm, "gate_trace"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    model(ids)
    with pytest.raises(AssertionError, match="a probe ran"):
        model(ids, trace=TraceSpec())


def test_levels_and_layers_decide_what_is_there(model: SynapseModel, ids: Tensor) -> None:
    for level in LEVELS:
        trace = model(ids, trace=TraceSpec(level=level, layers=(1,))).trace
        (layer,) = trace.layers
        assert layer.index == 1
        assert layer.routing is not None
        assert (layer.gates is not None) == (layer.memory is not None) == (level != "routes")
        assert (layer.experts is not None) == (layer.routing.logits is not None) == (level == "full")
    assert model(ids, trace=TraceSpec(layers=())).trace.layers == ()


def test_stride_and_limit_select_the_same_values(model: SynapseModel, ids: Tensor) -> None:
    whole = model(ids, trace=TraceSpec(level="full")).trace
    some = model(ids, trace=TraceSpec(level="full", every=4, max_tokens=3)).trace
    kept = [12, 16, 20]
    assert some.positions.tolist() == kept
    left, right = dict(tensors(some)), dict(tensors(whole))
    for name, value in left.items():
        want = right[name]
        if want.shape != value.shape:
            want = want[kept] if want.dim() == 1 else want[:, kept]
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)


def test_single_steps_joined_equal_the_full_pass(model: SynapseModel, ids: Tensor) -> None:
    spec = TraceSpec(level="full")
    whole = model(ids, trace=spec)
    for sizes in ([1] * T, [8, 1, 12]):
        state, steps = None, []
        for part in ids.split(sizes, dim=1):
            out = model(part, state, trace=spec)
            state = out.state
            steps.append(out.trace)
        same(join_traces(steps), whole.trace, rtol=1e-7, atol=1e-7)
        joined, full = state.to_tensors(), whole.state.to_tensors()
        assert joined.keys() == full.keys()
        for name in full:
            torch.testing.assert_close(joined[name], full[name], rtol=1e-7, atol=1e-7)


def test_last_norms_are_those_of_the_state(model: SynapseModel, ids: Tensor) -> None:
    out = model(ids, trace=TraceSpec(level="gates"))
    for layer, state in zip(out.trace.layers, out.state.layers, strict=True):
        torch.testing.assert_close(layer.memory.fro_norm[:, -1], state.memory.weights.norm(dim=(-2, -1)))
        torch.testing.assert_close(layer.memory.weights, state.memory.weights)
        cell = state.xlstm.cell
        torch.testing.assert_close(layer.gates.C_norm[:, -1], cell.C.norm(dim=(-2, -1)) * cell.m.exp())
        torch.testing.assert_close(layer.routing.coactivation, state.thalamus.coactivation)


def test_a_padded_row_reads_like_the_row_alone(model: SynapseModel, ids: Tensor) -> None:
    spec, short = TraceSpec(level="gates"), 8
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, : T - short] = False
    padded = dict(tensors(model(ids, mask=mask, trace=spec).trace))
    alone = dict(tensors(model(ids[1:, T - short :], trace=spec).trace))
    for name, value in alone.items():
        if name.endswith(("positions", "expert_ids")):
            continue
        got = padded[name][1:]
        if got.shape != value.shape:
            got = got[:, T - short :]
        torch.testing.assert_close(got, value, equal_nan=True, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_expert_activity_is_that_of_the_pool(model: SynapseModel, ids: Tensor) -> None:
    seen = []
    pool = model.layers[0].experts
    hook = pool.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    trace = model(ids, trace=TraceSpec(level="full")).trace.layers[0]
    hook.remove()
    x, routing = seen[0]
    assert trace.experts.tokens.tolist() == trace.routing.tokens.tolist()
    for row in range(B):
        for e in range(4):
            mine = x[row, (routing.indices[row] == e).any(-1)]
            gate, up = (mine @ pool.w_in[e]).chunk(2, -1)
            hidden = F.silu(gate) * up
            torch.testing.assert_close(
                trace.experts.out_norm[row, e], (hidden @ pool.w_out[e]).norm(dim=-1).mean(), equal_nan=True
            )
            share = float((hidden.abs() < 0.01).double().mean())
            assert trace.experts.sparsity[row, e] == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize("length", [1, T])
@pytest.mark.parametrize("level", LEVELS)
def test_records_made_later_are_the_same(model: SynapseModel, ids: Tensor, level: str, length: int) -> None:
    spec, state = TraceSpec(level=level, every=3, max_tokens=5), model(ids, trace=TraceSpec(level="gates")).state
    mask = torch.rand(B, length) > 0.2
    at_once = model(ids[:, :length], state, trace=spec, mask=mask)
    later = model(ids[:, :length], state, trace=replace(spec, later=True), mask=mask)
    assert later.trace is None
    assert at_once.pending is None
    assert torch.equal(later.logits, at_once.logits)
    same(later.pending(), at_once.trace, rtol=0, atol=0)


def test_what_is_made_later_holds_nothing_else_of_the_pass(model: SynapseModel, ids: Tensor) -> None:
    with torch.no_grad():
        out = model(ids[:, :1], model(ids).state, trace=TraceSpec(level="full", later=True))
    layer = out.state.layers[0]
    gone = [weakref.ref(x) for x in (layer.xlstm.cell.C, layer.xlstm.conv, layer.thalamus.mamba.ssm, out.logits)]
    pending = out.pending
    del out, layer
    assert [ref() for ref in gone] == [None] * 4
    assert pending().length == 1


def test_routes_made_later_cost_the_pass_nothing(model: SynapseModel, ids: Tensor) -> None:
    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    state, counts = model(ids).state, []
    for trace in (None, TraceSpec(later=True)):
        with torch.no_grad(), Counter() as counter:
            model(ids[:, :1], state, trace=trace)
        counts.append(counter.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("off", [{"xlstm": None}, {"memory": None}, {"experts": None}])
def test_regions_that_are_not_there_are_left_out(off: dict[str, None], ids: Tensor) -> None:
    trace = SynapseModel(config(**off))(ids, trace=TraceSpec(level="full")).trace
    for layer in trace.layers:
        assert (layer.gates is None) == ("xlstm" in off)
        assert (layer.memory is None) == ("memory" in off)
        assert (layer.routing is None) == (layer.experts is None) == ("experts" in off)
    assert "layer 1" in trace.report()
    assert len(trace.to_dict()["experts"]) == (0 if "experts" in off else 8)


def test_labels_are_the_users(ids: Tensor) -> None:
    named = ExpertsConfig(n_experts=2, d_expert=8, labels=("left", "right"))
    trace = SynapseModel(config(experts=named))(ids, trace=TraceSpec()).trace
    assert [stat.label for stat in trace.expert_stats(0)] == ["left", "right"]
    assert "right" in trace.report()


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(length: int, packed: bool) -> None:
    """Meta tensors hold no values: whatever asks for one (item, tolist, nonzero, if) fails."""
    spec = TraceSpec(level="full", every=2, max_tokens=7)
    x = torch.empty(B, length, 32, device="meta")
    pack = {}
    if packed:
        pack["mask"] = torch.empty(B, length, dtype=torch.bool, device="meta")
        pack["segment_ids"] = torch.empty(B, length, dtype=torch.long, device="meta")
    with torch.device("meta"):
        modules = [Thalamus(32, 4, THALAMUS), XLSTM(32, XLSTM_), FastWeightMemory(32, MEMORY)]
    for module in modules:
        state = module.init_state(B, device="meta")
        for _ in range(2):
            out = module(x, state, trace=spec, **pack)
            state = out.state
        assert all(value.is_meta for _, value in tensors(out.trace))
    indices = torch.empty(B, length, 2, dtype=torch.long, device="meta")
    w_in, w_out = torch.empty(4, 32, 16, device="meta"), torch.empty(4, 8, 32, device="meta")
    assert expert_trace(torch.empty(B, length, 32, device="meta"), w_in, w_out, indices).out_norm.is_meta


def test_tracing_under_autocast(ids: Tensor) -> None:
    model = SynapseModel(config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace = model(ids, trace=TraceSpec(level="full")).trace
    for layer in trace.layers:
        assert layer.memory.fro_norm.dtype == layer.gates.age_tokens.dtype == torch.float32
        assert layer.experts.out_norm.isfinite().all()
    assert "layer 0" in trace.report()


def test_record_is_bounded(model: SynapseModel) -> None:
    ids = torch.zeros(1, 300, dtype=torch.long)
    small = model(ids[:, :100], trace=TraceSpec(level="full", max_tokens=16)).trace
    large = model(ids, trace=TraceSpec(level="full", max_tokens=16)).trace
    for (name, a), (_, b) in zip(tensors(small), tensors(large), strict=True):
        assert a.shape == b.shape, name
        assert b.untyped_storage().nbytes() <= 4 * b.numel() * b.element_size() + 64, name
