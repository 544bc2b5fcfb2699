"""TIES: a case worked by hand, other people's implementations, and what must hold for any input."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge import vectors
from merge.select import kept
from merge.ties import ties
from merge.vectors import Delta
from synapse_arch.errors import ConfigError, ShapeError
from tests.helpers import assert_close

SHAPES = [(), (1,), (2,), (7,), (64,), (5, 3), (32, 33), (3, 4, 5), (2, 3, 4, 5), (1, 1), (257, 129)]


def close_1e6(actual: Tensor, expected: Tensor) -> None:
    """The issue's 1e-6 in float32, on numbers of size 1."""
    assert float((actual.double() - expected.double()).abs().max()) <= 1e-6


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"{actual} is not {expected}"


def models(shape: tuple[int, ...], count: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]


def test_three_models_by_hand() -> None:
    """n = 5, density 0.4: two numbers of each task vector stay."""
    base = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    vectors_ = [
        torch.tensor([4.0, -3.0, 1.0, 0.5, 0.0]),  # keeps +4, −3
        torch.tensor([2.0, 1.0, -1.0, 0.0, 3.0]),  # keeps +2, +3
        torch.tensor([-8.0, 0.5, 1.0, -2.0, 0.0]),  # keeps −8, −2
    ]
    given_ = [base + vector for vector in vectors_]
    # number 0: 4 + 2 − 8 < 0 elects −, only −8 agrees; 1: −3; 2: none; 3: −2; 4: +3
    assert_same_bits(ties(base, given_, density=0.4), base + torch.tensor([-8.0, -3.0, 0.0, -2.0, 3.0]))
    # by count two of three say +: (4 + 2) / 2
    assert_same_bits(
        ties(base, given_, density=0.4, election="count"), base + torch.tensor([3.0, -3.0, 0.0, -2.0, 3.0])
    )
    # weights 3, 1, 1: 12 + 2 − 8 elects +; by count (12 + 2) / 2, by weights (12 + 2) / (3 + 1)
    weighted: dict[str, Any] = {"density": 0.4, "weights": [3, 1, 1], "lam": 0.5}
    assert_same_bits(ties(base, given_, **weighted), base + torch.tensor([3.5, -4.5, 0.0, -1.0, 1.5]))
    by_weights = ties(base, given_, **weighted, normalize="weights")
    assert_same_bits(by_weights, base + torch.tensor([1.75, -1.5, 0.0, -1.0, 1.5]))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in ((), (1,), (1, 1), (2,))])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("election", ["mass", "count"])
def test_equals_peft(shape: tuple[int, ...], density: float, election: str) -> None:
    """But for tensors so small that peft keeps nothing of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft.utils.merge_utils", reason="peft is not installed")
    base, given_ = models(shape, seed=len(shape))
    method = {"mass": "total", "count": "frequency"}[election]
    theirs = peft.ties([one - base for one in given_], torch.ones(3), density, majority_sign_method=method)
    close_1e6(ties(base, given_, density=density, election=election), base + theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weights", "lam"), [([1.0, 1.0, 1.0], 1.0), ([0.5, 2.0, 1.0], 0.7)])
def test_equals_mergekit(shape: tuple[int, ...], weights: list[float], lam: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")
    base, given_ = models(shape, seed=7)
    inputs = {"base": {"x": base}, **{str(index): {"x": one} for index, one in enumerate(given_)}}
    parameters = {"weight": dict(zip("012", weights, strict=True)), "density": 0.3, "lambda": lam}
    theirs = api.merge_state_dicts(inputs, "ties", parameters=parameters, base="base")["x"]
    close_1e6(ties(base, given_, density=0.3, weights=weights, lam=lam, normalize="weights"), theirs)


def steps(count: int) -> st.SearchStrategy[list[list[int]]]:
    """Task vectors of small whole numbers, whose sums are exact in any order."""
    return st.integers(1, 30).flatmap(
        lambda n: st.lists(st.lists(st.integers(-4, 4), min_size=n, max_size=n), min_size=count, max_size=count)
    )


@settings(deadline=None)
@given(steps(3), st.floats(0.05, 1), st.permutations(range(3)), st.sampled_from(["mass", "count"]))
def test_the_order_of_models_of_equal_weight_does_not_matter(
    rows: list[list[int]], density: float, order: list[int], election: str
) -> None:
    given_ = [torch.tensor(row, dtype=torch.float32) for row in rows]
    base = torch.zeros(len(rows[0]))
    moved = [given_[index] for index in order]
    assert_close(
        ties(base, moved, density=density, election=election), ties(base, given_, density=density, election=election)
    )


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.integers(0, 9))
def test_one_model_at_density_1_is_that_model(numbers: list[float], seed: int) -> None:
    base = torch.randn(len(numbers), generator=torch.Generator().manual_seed(seed))
    model = torch.tensor(numbers)
    assert_close(ties(base, [model], density=1.0), model, least=float(base.abs().max()))


@settings(deadline=None)
@given(st.integers(1, 3000), st.floats(0.001, 1))
def test_the_share_kept_is_exact_even_where_all_magnitudes_are_equal(n: int, density: float) -> None:
    signs = torch.ones(n)
    signs[::2] = -1
    merged = ties(torch.zeros(n), [signs], density=density)
    assert int(merged.count_nonzero()) == kept(n, density) == max(1, int(density * n))
    assert bool((merged[: kept(n, density)] != 0).all())  # equal magnitudes in order of their index


def test_it_is_deterministic_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    base, given_ = models((40, 50))
    given_ = [(one * 16).round() / 16 for one in given_]  # many ties
    whole = ties(base, given_)
    assert_same_bits(ties(base, given_), whole)
    monkeypatch.setattr(vectors, "BLOCK", 33)
    assert_same_bits(ties(base, given_), whole)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_alone_is_never_trimmed(shape: tuple[int, ...]) -> None:
    merged = ties(torch.zeros(shape), [torch.full(shape, 2.0), torch.full(shape, 4.0)], density=0.01)
    assert_same_bits(merged, torch.full(shape, 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_and_wide_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    base, given_ = models((30, 30))
    base, given_ = base.to(dtype), [one.to(dtype) for one in given_]
    merged = ties(base, given_, density=0.3)
    assert merged.dtype == dtype
    assert_same_bits(merged, ties(base.float(), [one.float() for one in given_], density=0.3).to(dtype))
    assert ties(base, given_, dtype=torch.float32).dtype == torch.float32


def test_inputs_are_not_changed_and_may_be_views() -> None:
    base, given_ = models((8, 9))
    copies = [base.clone(), *(one.clone() for one in given_)]
    turned = ties(base.T, [one.T for one in given_])
    assert_close(turned.T, ties(base, given_))
    for one, copy in zip([base, *given_], copies, strict=True):
        assert_same_bits(one, copy)


def test_a_delta_is_a_task_vector() -> None:
    """Where base and change differ in size by 2^30, the sum in float32 would have lost the change."""
    base, change = torch.full((4,), 2.0**20), torch.tensor([2.0**-10, -(2.0**-12), 0.0, 2.0**-11])
    merged = ties(torch.zeros(4), [Delta(change)], density=0.5)
    assert_same_bits(merged, torch.tensor([2.0**-10, 0.0, 0.0, 2.0**-11]))
    assert_same_bits(ties(base, [Delta(change)]), base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"election": "vote"}, "election: expected mass or count"),
        ({"normalize": "sum"}, "normalize: expected count or weights"),
        ({"weights": [1, -1]}, "weights: expected 0 or more"),
        ({"weights": [1, 1, 1]}, "weights: expected 1 value or 2"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ties(torch.zeros(3), [torch.ones(3), torch.ones(3)], **arguments)


def test_wrong_tensors() -> None:
    with pytest.raises(ShapeError, match=r"model 1: expected shape \(3,\)"):
        ties(torch.zeros(3), [torch.ones(3), torch.ones(4)])
    with pytest.raises(ShapeError, match="floating"):
        ties(torch.zeros(3, dtype=torch.int64), [torch.ones(3)])


def test_of_equal_numbers_in_several_blocks_as_many_are_kept_as_asked_for() -> None:
    n = 2 * vectors.BLOCK
    assert int(ties(torch.zeros(n), [torch.ones(n)], density=0.25).count_nonzero()) == n // 4
