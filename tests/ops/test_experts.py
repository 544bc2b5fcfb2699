"""expert_swiglu against a loop over tokens, in every form, with unequal numbers of experts a token."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from synapse_arch.errors import BackendUnavailable, ShapeError
from synapse_arch.ops import expert_swiglu, experts
from synapse_arch.ops._backends import fall_back
from tests.contracts.cases import normal, uniform
from tests.helpers import Tensors, assert_equal, assert_same, cast, measure

E, D, WIDTH, K, TOKENS = 5, 16, 8, 3, 40
FORMS = pytest.mark.parametrize("backend", ["reference", "rowwise", "sorted", "grouped"])


def draw(dtype: torch.dtype = torch.float64) -> Tensors:
    tensors = {
        "x": normal(TOKENS, D), "w_in": normal(E, D, 2 * WIDTH), "w_out": normal(E, WIDTH, D),
        "weights": uniform(0, 1, TOKENS, K),
    }  # fmt: skip
    return cast(tensors, dtype)


def route(unused: float = 0.3, experts: int = E) -> Tensor:
    indices = torch.stack([torch.randperm(E)[:K].clamp(max=experts - 1) for _ in range(TOKENS)])
    return indices.masked_fill(torch.rand(TOKENS, K) < unused, -1)


def by_token(z: Tensors, indices: Tensor) -> Tensors:
    rows = []
    for n in range(len(indices)):
        y = torch.zeros_like(z["x"][n])
        for j, e in enumerate(indices[n].tolist()):
            if e >= 0:
                gate, up = (z["x"][n] @ z["w_in"][e]).split(WIDTH)
                y = y + z["weights"][n, j] * ((F.silu(gate) * up) @ z["w_out"][e])
        rows.append(y)
    return {"y": torch.stack(rows)}


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "grouped" else torch.float64  # the grouped product has no float64


def run(backend: str, indices: Tensor, tensors: Tensors) -> Tensors:
    return measure(lambda z: {"y": expert_swiglu(**z, indices=indices, backend=backend)}, tensors)


@FORMS
@pytest.mark.parametrize("unused", [0.0, 0.3, 1.0])
def test_equals_a_loop_over_tokens(backend: str, unused: float) -> None:
    tensors, indices = draw(dtype_of(backend)), route(unused)
    assert_same(run(backend, indices, tensors), measure(lambda z: by_token(z, indices), tensors))


@FORMS
@pytest.mark.parametrize("slots", [1, 2])
def test_equals_a_loop_with_fewer_experts_a_token(backend: str, slots: int) -> None:
    tensors, indices = draw(dtype_of(backend)), route()[:, :slots]
    tensors["weights"] = tensors["weights"][:, :slots]
    assert_same(run(backend, indices, tensors), measure(lambda z: by_token(z, indices), tensors))


@FORMS
def test_experts_without_tokens_and_one_expert_twice(backend: str) -> None:
    tensors, indices = draw(dtype_of(backend)), route(0.1, experts=2)
    result = run(backend, indices, tensors)
    assert_same(result, measure(lambda z: by_token(z, indices), tensors))
    assert not result["grad w_in"][2:].any()
    assert not result["grad w_out"][2:].any()


@FORMS
def test_what_is_not_visited_does_not_count(backend: str) -> None:
    """Neither tokens that go nowhere nor experts that nobody visits, whatever they hold."""
    tensors, indices = draw(dtype_of(backend)), route(0.1, experts=2)
    indices[3] = -1
    expected = run(backend, indices, tensors)
    broken = {name: x.clone() for name, x in tensors.items()}
    broken["x"][3] = broken["w_in"][2:] = broken["w_out"][2:] = torch.nan
    result = run(backend, indices, broken)
    assert_same({name: result[name] for name in ("y", "grad x")}, {name: expected[name] for name in ("y", "grad x")})


@FORMS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layouts(backend: str, dtype: torch.dtype) -> None:
    tensors, indices = draw(dtype_of(backend)), route()
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in tensors.items()}
    expected = run(backend, indices, tensors)
    assert_same(run(backend, indices.T.contiguous().T.to(dtype), strided), expected)
    total = measure(
        lambda z: {"y": expert_swiglu(**z, indices=indices, backend=backend).sum()}, tensors
    )  # expanded grad
    assert all(x.isfinite().all() for x in total.values())


@FORMS
def test_unused_slots_and_other_tokens_do_not_matter(backend: str) -> None:
    """NaN in an unused slot's weight and in another token: neither outputs nor gradients of the rest notice."""
    tensors, indices = draw(dtype_of(backend)), route()
    indices[7] = torch.tensor([0, -1, 1])
    other = torch.arange(TOKENS) != 7
    indices[3] = torch.tensor([-1, -1, -1])
    poisoned = tensors | {"weights": tensors["weights"].masked_fill(indices < 0, torch.nan), "x": tensors["x"].clone()}
    if backend != "reference":  # which sends every token through every expert
        poisoned["x"][3] = torch.nan
    expected = run(backend, indices, tensors)
    actual = run(backend, indices, poisoned)
    assert_same(actual, expected)
    poisoned["x"][7] = torch.nan
    y = expert_swiglu(**poisoned, indices=indices, backend=backend)
    assert_same({"y": y[other]}, {"y": expected["y"][other]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["in pairs", "to a multiple"])
def test_rows_are_filled_up_by_nobody_else(dtype: torch.dtype) -> None:
    """Of NaN in a token that no expert reads, rows that only fill up must not be made."""
    indices = torch.tensor([-1, *[0] * 17, *[1] * 16])[:, None]
    tensors = {name: normal(*shape).to(dtype) for name, shape in {
        "x": (34, D), "w_in": (2, D, 2 * WIDTH), "w_out": (2, WIDTH, D), "weights": (34, 1)}.items()}  # fmt: skip
    tensors["x"][0] = torch.nan
    order, counts = experts.sort_by_expert(indices, 2)
    rows = sum(size * len(together) for together, size in experts._place(tensors["x"], order, counts).groups)
    assert rows > 33
    for name, found in run("sorted", indices, tensors).items():
        assert (found[1:] if name in ("y", "grad x") else found).isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rowwise_gives_a_token_the_same_bits_wherever_the_others_go(dtype: torch.dtype) -> None:
    tensors = {name: x.to(dtype) for name, x in draw(torch.float32).items()}
    indices = route(0.2)
    together = expert_swiglu(**tensors, indices=indices, backend="rowwise")
    for token in range(TOKENS):
        alone = torch.where(torch.arange(TOKENS)[:, None] == token, indices, -1)
        poisoned = tensors | {"x": torch.full_like(tensors["x"], torch.nan)}
        poisoned["x"][token] = tensors["x"][token]
        assert torch.equal(expert_swiglu(**poisoned, indices=alone, backend="rowwise")[token], together[token])


@FORMS
def test_no_uninitialised_memory_is_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, indices = draw(dtype_of(backend)), route()
    expected = run(backend, indices, tensors)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=allocate, **k: f(*a, **k).fill_(torch.nan))
    assert_equal(run(backend, indices, tensors), expected)


@FORMS
def test_autocast_runs_the_products_in_its_dtype(backend: str) -> None:
    tensors, indices = draw(torch.float32), route()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(backend, indices, tensors)
    expected = measure(lambda z: by_token(z, indices), tensors)
    assert result["y"].dtype == torch.bfloat16
    for name, x in expected.items():
        assert (result[name].float() - x).norm() < 0.03 * x.norm(), name
        if name.startswith("grad"):
            assert result[name].dtype == torch.float32


@pytest.mark.parametrize("backend", ["sorted", "rowwise", "reference"])
def test_autocast_leaves_float64_alone(backend: str) -> None:
    tensors, indices = draw(torch.float64), route()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(backend, indices, tensors)
        with pytest.raises(ShapeError, match="w_in: expected x's dtype"):
            expert_swiglu(**{**tensors, "w_in": tensors["w_in"].float()}, indices=indices, backend=backend)
    assert_equal(result, run(backend, indices, tensors))


@pytest.mark.parametrize("frozen", ["x", "w_in", "w_out", "weights"])
def test_gradients_that_nobody_wants_are_not_needed(frozen: str) -> None:
    tensors, indices = draw(), route()
    expected = run("sorted", indices, tensors)
    fixed = tensors[frozen]
    rest = {name: x for name, x in tensors.items() if name != frozen}
    actual = measure(lambda z: {"y": expert_swiglu(**z, **{frozen: fixed}, indices=indices)}, rest)
    assert_same(actual, {name: x for name, x in expected.items() if name != f"grad {frozen}"})


@pytest.mark.parametrize(("width", "dtype"), [(WIDTH, torch.float64), (6, torch.float32), (12, torch.bfloat16)])
def test_grouped_says_what_it_cannot_run(width: int, dtype: torch.dtype) -> None:
    z = cast({"x": normal(4, D), "w_in": normal(E, D, 2 * width), "w_out": normal(E, width, D)}, dtype)
    with pytest.raises(BackendUnavailable, match=r"'grouped' cannot run here: .*; use 'sorted' or 'auto'"):
        expert_swiglu(**z, indices=torch.zeros(4, 1).long(), weights=torch.ones(4, 1), backend="grouped")


def test_a_fall_back_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert fall_back("expert_swiglu", "auto", "grouped", "sorted", "of a test") == "sorted"
    assert caplog.messages == ["expert_swiglu: 'sorted' runs in place of 'grouped': of a test"]


@pytest.mark.parametrize("multiple", [4, 64])
def test_rows_filled_up_to_a_multiple_change_nothing(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    tensors, indices = draw(), route(0.3, experts=E - 1)
    expected = measure(lambda z: by_token(z, indices), tensors)
    monkeypatch.setattr(experts, "_in_pairs", lambda _: False)
    monkeypatch.setattr(experts, "_row_multiple", lambda *_: multiple)
    assert_same(run("sorted", indices, tensors), expected)


def test_narrow_products_meet_few_shapes() -> None:
    """Each new shape of a narrow product is compiled by the library that computes it."""
    shapes = set()
    for _ in range(20):
        order, counts = experts.sort_by_expert(route(), E)
        groups = experts._place(torch.zeros(TOKENS, D, dtype=torch.bfloat16), order, counts).groups
        shapes |= {size for _, size in groups}
        assert all(counts[e] <= size < counts[e] + 64 for (e,), size in groups)
    assert shapes <= {8, 16, 24, 32, 40}


def test_experts_of_like_loads_are_multiplied_together() -> None:
    counts = [67, 0, 64, 3, 60, 200, 60, 2]
    pairs = [((5,), 200), ((0, 2), 67), ((4, 6), 60), ((3,), 3), ((7,), 2)]
    assert experts._groups(counts, 1, True) == pairs
    assert experts._groups(counts, 8, False)[:3] == [((5,), 200), ((0,), 72), ((2,), 64)]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_pairs_take_no_more_rows_than_are_there(counts: list[int]) -> None:
    groups = experts._groups(counts, 1, True)
    rows = sum(size * len(together) for together, size in groups)
    assert rows <= experts._most_rows(torch.zeros(1), sum(counts), len(counts))
    assert sorted(e for together, _ in groups for e in together) == [e for e, count in enumerate(counts) if count]


@FORMS
def test_bfloat16(backend: str) -> None:
    tensors, indices = draw(torch.float32), route()
    expected = run("reference", indices, tensors)
    narrow = run(backend, indices, {name: x.bfloat16() for name, x in tensors.items()})
    for name, value in expected.items():
        assert (narrow[name].float() - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_by_gathered_weights(dtype: torch.dtype) -> None:
    tensors, indices = draw(dtype), route()
    indices[0] = -1
    for token in range(4):
        z = tensors | {name: tensors[name][token : token + 1] for name in ("x", "weights")}
        expected = expert_swiglu(**z, indices=indices[token : token + 1], backend="reference")
        found = experts._gathered_step(
            *(z[name] for name in ("x", "w_in", "w_out")), indices[token : token + 1], z["weights"]
        )
        assert_same({"y": found}, {"y": expected})


@pytest.mark.parametrize("backend", ["sorted", "grouped", "rowwise"])
def test_under_autocast_weights_are_narrowed_as_if_before(backend: str) -> None:
    """Expert by expert or all at once: the same bits, and gradients in each tensor's own dtype."""
    tensors, indices = draw(torch.float32), route()

    def narrowed(z: Tensors) -> Tensors:
        narrow = {name: z[name].bfloat16() for name in ("x", "w_in", "w_out")}
        return {"y": expert_swiglu(**narrow, weights=z["weights"], indices=indices, backend=backend)}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(backend, indices, tensors)
    expected = measure(narrowed, tensors)
    assert_equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_the_cpu_one_token_sorts_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts' weights are gathered; shown on a device that computes nothing."""
    monkeypatch.delattr(experts, "sort_by_expert")
    x, w_in, w_out = (torch.empty(*s, device="meta", dtype=dtype) for s in ((1, 16), (4, 16, 64), (4, 32, 16)))
    indices, weights = torch.zeros(1, 2, device="meta", dtype=torch.long), torch.empty(1, 2, device="meta")
    with torch.no_grad():
        assert expert_swiglu(x, w_in, w_out, indices, weights).shape == x.shape
