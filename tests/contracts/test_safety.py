"""Nothing is written where it should not be, nothing is read that was not written, nothing overflows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch.introspection import TraceSpec
from tests.contracts.cases import CASES, MODULES, OPS, RECURRENT, Case
from tests.helpers import Tensors, assert_close, assert_equal, assert_same, cast, flatten, measure
from tests.tolerances import RELATIVE


@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_and_state_are_left_as_they_are(case: Case, length: int) -> None:
    tensors = case.draw(2, length)
    before = copy.deepcopy(tensors)
    outputs = case.call(tensors)
    for x in outputs.values():
        x.fill_(7)  # an output that shared memory with an input would change it
    assert_equal(tensors, before)


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_share_no_memory(case: Case, length: int) -> None:
    """A state leaf holds its own bytes and no more: it can be saved, and keeps nothing else alive."""
    outputs = case.call(case.draw(2, length))
    states = {name: x for name, x in outputs.items() if name.startswith("state")}
    for name, x in states.items():
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), name
    assert len({x.untyped_storage().data_ptr() for x in states.values()}) == len(states)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_uninitialised_memory_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.draw(2, 70)
    options = {"segment_ids": torch.arange(70).expand(2, -1) // 30, "mask": torch.rand(2, 70) > 0.2}
    expected = [measure(case.call, tensors), measure(lambda z: case.call(z, **options), tensors)]

    def poisoned(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.dtype.is_floating_point else x.fill_(2**30)

        return allocated

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    actual = [measure(case.call, tensors), measure(lambda z: case.call(z, **options), tensors)]
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)


RUNS = [(case, None) for case in CASES if case.extremes] + [(case, "reference") for case in RECURRENT]


@pytest.mark.parametrize(("case", "backend"), RUNS, ids=lambda value: str(value or "auto"))
def test_extreme_gates_stay_finite(case: Case, backend: str | None) -> None:
    """At both ends of every gate, everywhere and at every third position, fresh and not."""
    options = {"backend": backend} if backend else {}
    for extreme in case.extremes:
        for everywhere in (True, False):
            tensors = cast(case.draw(2, 20 if backend else 130), torch.float32)
            for name, value in extreme.items():
                if everywhere or name not in case.sequence:
                    tensors[name] = torch.full_like(tensors[name], value)
                else:
                    tensors[name][:, ::3] = value
            stateless = {name: x for name, x in tensors.items() if not name.startswith("state")}
            for inputs in (tensors, stateless):
                for name, x in measure(lambda z: case.call(z, **options), inputs).items():
                    assert x.isfinite().all(), f"{name} at {extreme}, everywhere={everywhere}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_layout_changes_nothing(case: Case) -> None:
    tensors = case.draw(2, 70)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    expected = measure(case.call, tensors)
    for layout in (strided, transposed):
        assert_same(measure(lambda z, f=layout: case.call({n: f(x) for n, x in z.items()}), tensors), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expanded_inputs_and_gradients(case: Case) -> None:
    """Inputs expanded from one row, and the expanded gradient that `.sum()` sends back."""

    def owned(name: str) -> bool:
        return name in case.sequence or name.startswith("state")

    tensors = case.draw(1, 40)

    def total(outputs: Tensors) -> Tensors:
        return {name: x.sum() for name, x in outputs.items() if x.requires_grad}

    one = measure(lambda z: total(case.call(z)), tensors)
    three = measure(
        lambda z: total(case.call({n: x.expand(3, *x.shape[1:]) if owned(n) else x for n, x in z.items()})), tensors
    )
    names = [name for name in one if name.startswith("grad")]
    assert_same({n: three[n] for n in names}, {n: 3 * one[n] for n in names})


@pytest.mark.parametrize("case", OPS, ids=str)
def test_autocast_does_not_narrow_an_op(case: Case) -> None:
    """float32 inputs: as without autocast. bfloat16 inputs: as float32 on the same numbers, rounded once at the end."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = cast(cast(case.draw(2, 70), torch.bfloat16), torch.float32)
        expected = case.call(inputs)
        narrow = {name: x if name.startswith("state") else x.to(dtype) for name, x in inputs.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = case.call(narrow)
        assert actual["y"].dtype == dtype
        assert_same(actual, expected)
        assert_same(case.call(narrow), expected)


@pytest.mark.parametrize("case", OPS, ids=str)
def test_autocast_does_not_narrow_gradients(case: Case) -> None:
    """Where backward() too runs inside it: float32 inputs, as without."""
    tensors = cast(case.draw(2, 70), torch.float32)
    expected = measure(case.call, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = measure(case.call, tensors)
    assert_same(actual, expected)


@pytest.mark.filterwarnings("default")  # the compiler warns itself
@pytest.mark.parametrize("case", OPS, ids=str)
def test_autocast_does_not_narrow_compiled_gradients(case: Case) -> None:
    """torch.compile runs a backward pass under the autocast that the forward pass was compiled in."""
    tensors = cast(case.draw(2, 70), torch.float32)
    expected = measure(case.call, tensors)
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = measure(torch.compile(case.call, backend="aot_eager"), tensors)
    torch.compiler.reset()
    assert_same(actual, expected)


@pytest.mark.parametrize("case", MODULES, ids=str)
def test_modules_under_autocast(case: Case) -> None:
    tensors = cast(case.draw(2, 70), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = measure(case.call, tensors)
    expected = measure(case.call, tensors)
    assert all(x.isfinite().all() for x in actual.values())
    for name in {"y", "grad x"} & expected.keys():
        error = (actual[name].float() - expected[name]).abs().mean() / expected[name].abs().mean()
        assert error < 8 * RELATIVE[torch.bfloat16], f"{name}: {error:.3f}"


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_keep_their_dtype_and_shape(case: Case, autocast: bool) -> None:
    """From the fresh state on, a state's leaves keep dtype and shape, float32 at least."""
    tensors = cast(case.draw(2, 5), torch.float32)
    if case.module is not None:
        fresh = cast(flatten(case.module.init_state(2), "state"), torch.float32)
        tensors = {name: x for name, x in tensors.items() if not name.startswith("state")} | fresh
    elif autocast:
        tensors = {name: x if name.startswith("state") else x.bfloat16() for name, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = case.call(tensors)
    for name, x in tensors.items():
        if name.startswith("state"):
            assert outputs[name].dtype == torch.float32, name
            assert outputs[name].shape == x.shape, name


@pytest.mark.parametrize("case", MODULES, ids=str)
def test_nothing_mutable_lives_on_a_module(case: Case) -> None:
    module = copy.deepcopy(case.module).train()
    x = torch.randn(2, 12, module.d_model, dtype=torch.float64)
    attributes, weights = dict(vars(module)), copy.deepcopy(module.state_dict())
    first = flatten(module(x, segment_ids=torch.arange(12).expand(2, -1) // 5)._replace(trace=None), "")
    module(torch.randn(3, 7, module.d_model, dtype=torch.float64))
    again = flatten(module(x, segment_ids=torch.arange(12).expand(2, -1) // 5)._replace(trace=None), "")
    assert_equal(again, first)
    assert_equal(dict(module.state_dict()), dict(weights))
    assert vars(module).keys() == attributes.keys()
    assert all(vars(module)[name] is value for name, value in attributes.items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_host_synchronisation(case: Case) -> None:
    """Tensors without data: whatever asked for a value of one would fail."""
    options: dict[str, Any] = {"segment_ids": torch.arange(70).expand(2, -1) // 30, "mask": torch.rand(2, 70) > 0.2}
    if case.module is not None:
        options["trace"] = TraceSpec(level="full")
    tensors = case.draw(2, 70)
    meta = {name: x.to("meta") for name, x in tensors.items()}
    expected = case.call(tensors, **options)
    options |= {name: options[name].to("meta") for name in ("segment_ids", "mask")}
    outputs = measure(lambda z: case.call(z, **options), meta)
    for name, x in expected.items():
        assert outputs[name].shape == x.shape, name
        assert outputs[name].dtype == x.dtype, name


@pytest.mark.parametrize("level", ["routes", "gates", "full"])
@pytest.mark.parametrize("case", MODULES, ids=str)
def test_a_trace_changes_no_bit(case: Case, level: str) -> None:
    tensors = cast(case.draw(2, 70), torch.float32)
    silent = measure(case.call, tensors)
    traced = measure(
        lambda z: {n: x for n, x in case.call(z, trace=TraceSpec(level=level)).items() if n in silent}, tensors
    )
    assert_equal(traced, silent)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_row_is_a_batch_like_any_other(case: Case) -> None:
    tensors = case.draw(3, 20)
    full = case.call(tensors)
    first = {n: x[:1] if n in case.sequence or n.startswith("state") else x for n, x in tensors.items()}
    for name, x in case.call(first).items():
        assert_close(x, full[name][:1], name)
