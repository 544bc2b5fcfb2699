"""Exact cuts, whatever the sample said and however often magnitudes repeat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merge import select
from merge.select import NOTHING_CUT, Cut, cut, kept


def expected_mask(magnitudes: Tensor, k: int) -> Tensor:
    """The k largest, equal ones in order of their index, by a stable sort."""
    mask = torch.zeros(len(magnitudes), dtype=torch.bool)
    mask[magnitudes.argsort(descending=True, stable=True)[:k]] = True
    return mask


def mask_of(found: Cut, magnitudes: Tensor) -> Tensor:
    mask = magnitudes > found.value
    mask[(magnitudes == found.value).nonzero().flatten()[: found.equals]] = True
    return mask


def in_blocks(magnitudes: Tensor, size: int = 7) -> Iterator[Tensor]:
    return (block.clone() for block in magnitudes.split(size))


NUMBERS = st.lists(
    st.one_of(st.floats(0, 2, width=32), st.sampled_from([0.0, 0.5, 1.0, 1e-40])), min_size=1, max_size=80
)


@settings(deadline=None, max_examples=200)
@given(NUMBERS, st.floats(0.01, 1), st.integers(0, 3))
def test_exactly_k_are_kept_and_ties_go_by_index(numbers: list[float], density: float, sampled: int) -> None:
    magnitudes = torch.tensor(numbers)
    k = kept(len(magnitudes), density)
    sample = [magnitudes, magnitudes[::5], magnitudes[:1], torch.tensor([7.0])][sampled]  # the last two mislead
    found = cut(lambda: in_blocks(magnitudes), len(magnitudes), k, sample)
    expected = expected_mask(magnitudes, k)
    assert torch.equal(mask_of(found, magnitudes) & (magnitudes > 0), expected & (magnitudes > 0))


def test_counting_by_bits_equals_the_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitudes = torch.randn(5000, generator=torch.Generator().manual_seed(0)).abs()
    magnitudes[::3] = magnitudes[0]
    for k in (1, 40, 1500, 1667, 3000, 4999):
        direct = cut(lambda: in_blocks(magnitudes, 512), 5000, k, magnitudes[::7])
        with monkeypatch.context() as patch:
            patch.setattr(select, "INSIDE", 0)
            counted = cut(lambda: in_blocks(magnitudes, 512), 5000, k, magnitudes[::7])
        assert torch.equal(mask_of(direct, magnitudes), mask_of(counted, magnitudes))
        assert int(mask_of(counted, magnitudes).sum()) == k


def test_a_good_sample_needs_one_pass() -> None:
    magnitudes, passes = torch.rand(200_000, generator=torch.Generator().manual_seed(1)), []

    def blocks() -> Iterator[Tensor]:
        passes.append(1)
        return in_blocks(magnitudes, 4096)

    cut(blocks, 200_000, 40_000, magnitudes[::13])
    assert len(passes) == 1


def test_everything_kept_cuts_nothing() -> None:
    assert cut(lambda: in_blocks(torch.ones(5)), 5, 5, torch.ones(5)) == NOTHING_CUT


def test_a_guess_that_has_exactly_as_many_above_it() -> None:
    numbers = torch.tensor([4.0, 3.0, 2.0, 1.0])
    found = cut(lambda: iter([numbers.clone()]), 4, 2, torch.full((10,), 2.5), draws=10**9)
    assert (int((numbers > found.value).sum()), found.equals) == (2, 0)
