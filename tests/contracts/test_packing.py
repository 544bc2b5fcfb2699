"""Packed documents and padding: segments equal separate runs, masked positions equal absent ones, rows are alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import CASES, Case
from tests.contracts.transforms import segment_by_segment, unpadded, without_padding
from tests.helpers import Tensors, assert_same, measure

T = 70


def segments() -> Tensor:
    """(4, T): ids that return, are negative or huge, stand alone, or change at chunk borders; and one segment."""
    position = torch.arange(T)
    borders = (position >= 32).long() + (position >= 64).long()
    return torch.stack([(position // 9) % 2, -7 * (position // 23), 2**40 * borders, position.clamp(min=66)])


def masks() -> Tensor:
    """(4, T): left padding, right padding, holes, and a row that is all padding."""
    position = torch.arange(T)
    holes = torch.rand(T) > 0.4
    return torch.stack([position >= 33, position < 65, holes, torch.zeros(T, dtype=torch.bool)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_segments_equal_separate_runs(case: Case) -> None:
    tensors, ids = case.draw(4, T), segments()
    expected = measure(lambda z: segment_by_segment(case, z, ids), tensors)
    assert_same(measure(lambda z: case.call(z, segment_ids=ids), tensors), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_short_segments_equal_separate_runs(case: Case) -> None:
    """The last segment is shorter than the convolution: its state must hold nothing of the one before."""
    tensors = case.draw(3, 6)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 5], [3, 3, 3, 3, 3, 2]])
    expected = measure(lambda z: segment_by_segment(case, z, ids), tensors)
    assert_same(measure(lambda z: case.call(z, segment_ids=ids), tensors), expected)


@pytest.mark.parametrize("with_segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_equal_removal(case: Case, with_segments: bool) -> None:
    tensors, mask = case.draw(4, T), masks()
    ids = segments() if with_segments else None
    expected = measure(lambda z: without_padding(case, z, mask, ids), tensors)
    assert_same(measure(lambda z: unpadded(case.call(z, segment_ids=ids, mask=mask), mask), tensors), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padding_may_hold_anything_finite(case: Case) -> None:
    tensors, mask = case.draw(4, T), masks()
    expected = measure(lambda z: unpadded(case.call(z, mask=mask), mask), tensors)
    garbage = tensors | {
        name: torch.where(mask.reshape(4, T, *[1] * (x.dim() - 2)), x, 1e6 * x)
        for name, x in tensors.items()
        if name in case.sequence
    }
    outputs = case.call(garbage, mask=mask)
    assert all(x.isfinite().all() for x in outputs.values())
    assert_same(measure(lambda z: unpadded(case.call(z, mask=mask), mask), garbage), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mask_of_ones_and_one_segment_change_nothing(case: Case) -> None:
    tensors = case.draw(2, T)
    expected = measure(case.call, tensors)
    options = {"mask": torch.ones(2, T, dtype=torch.bool), "segment_ids": torch.full((2, T), 5, dtype=torch.int32)}
    assert_same(measure(lambda z: case.call(z, **options), tensors), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_independent(case: Case, packed: bool) -> None:
    """NaN in all other rows, of inputs and states, leaves a row's outputs, state and gradients as they are alone."""
    tensors = case.draw(4, T)
    options = {"segment_ids": segments(), "mask": masks()} if packed else {}
    row = slice(2, 3)

    def poison(x: Tensor) -> Tensor:
        poisoned = torch.full_like(x, torch.nan)
        poisoned[row] = x[row]
        return poisoned

    def owned(name: str) -> bool:
        return name in case.sequence or name.startswith("state")

    others_nan = {name: poison(x) if owned(name) else x for name, x in tensors.items()}
    alone = {name: x[row] if owned(name) else x for name, x in tensors.items()}
    local = {name: x[row] for name, x in options.items()}

    def of_row(outputs: Tensors) -> Tensors:
        return {name: x[row] for name, x in outputs.items()}

    actual = measure(lambda z: of_row(case.call(z, **options)), others_nan)
    expected = measure(lambda z: case.call(z, **local), alone)
    for name in tensors:  # parameters are shared: their gradient is the sum over rows, NaN ones included
        if owned(name):
            actual[f"grad {name}"] = actual[f"grad {name}"][row]
        else:
            del actual[f"grad {name}"], expected[f"grad {name}"]
    assert_same(actual, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_causality(case: Case) -> None:
    """Outputs before a position do not move, and have no gradient, when inputs from it on change."""
    tensors = case.draw(2, T)
    before = case.call(tensors)
    for cut in (1, 31, 32, 33, 64, 69):
        changed = {n: x.clone() for n, x in tensors.items()}
        for name in case.sequence:
            changed[name][:, cut:] = changed[name][:, cut:].flip(1) * 1.5
            changed[name].requires_grad_()
        after = case.call(changed)
        early = {n: x[:, :cut] for n, x in after.items() if not n.startswith("state")}
        assert_same({n: x.detach() for n, x in early.items()}, {n: before[n][:, :cut] for n in early})
        total = sum(x.sum() for x in early.values() if x.requires_grad)
        for grad in torch.autograd.grad(total, [changed[name] for name in case.sequence]):
            assert not grad[:, cut:].any()
