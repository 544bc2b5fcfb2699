"""MQAR: a dictionary answers every query, nothing else is asked, and the gaps follow the power law."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.base import IGNORED, training_batch
from benchmarks.quality.tasks.mqar import SIZES, _distinct, mqar


@cache
def gaps(power: float = 0.01) -> Tensor:
    """(n, 4) of each pair in its order, how many places behind the pairs it is asked for; length 64."""
    batch = mqar(20_000, torch.Generator().manual_seed(1), length=64, pairs=4, power=power)
    order = (batch.targets[:, None, :] == batch.ids[:, 1:8:2, None]).long().argmax(dim=-1)
    return (order - 8) // 2


@pytest.mark.parametrize(("length", "pairs"), SIZES.items())
def test_a_dictionary_answers_every_query(length: int, pairs: int) -> None:
    task = TASKS[f"mqar-{length}"]
    for seed in range(2):
        batch = training_batch(task, task.protocols["cpu"], seed, 0)
        assert batch.ids.shape[1] == length
        assert torch.equal(batch.scored, batch.targets != IGNORED)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
            assert len(set(keys)) == len(set(values)) == pairs
            assert all(1 <= key < 4096 <= value < 8192 for key, value in zip(keys, values, strict=True))
            known = dict(zip(keys, values, strict=True))
            asked = [place for place, target in enumerate(targets) if target != IGNORED]
            assert sorted(ids[place] for place in asked) == sorted(keys)
            assert all(known[ids[place]] == targets[place] for place in asked)
            assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)


def test_the_first_gap_follows_the_power_law() -> None:
    weights = torch.arange(1, 29).double() ** -0.99
    expected = weights / weights.sum()
    measured = gaps()[:, 0].bincount(minlength=28) / len(gaps())
    assert len(measured) == 28
    assert (measured - expected).abs().max() < 4 * (expected.max() / len(gaps())).sqrt()
    assert (measured[:3] - expected[:3]).abs().max() < 0.012


def test_later_gaps_are_drawn_from_those_left() -> None:
    weights = torch.arange(1, 29).double() ** -0.99
    first, second = gaps()[:, 0], gaps()[:, 1]
    assert (gaps().sort(dim=1).values.diff(dim=1) > 0).all()
    for taken in (0, 1):
        left = weights.clone()
        left[taken] = 0
        expected = left / left.sum()
        measured = second[first == taken].bincount(minlength=28) / (first == taken).sum()
        assert (measured - expected).abs().max() < 0.03
        assert measured[taken] == 0


def test_a_power_of_one_spreads_the_queries_evenly() -> None:
    measured = gaps(1.0).flatten().bincount(minlength=28)
    assert (measured / measured.sum() - 1 / 28).abs().max() < 0.005


def test_other_positions_hold_any_token() -> None:
    batch = mqar(2000, torch.Generator().manual_seed(0), length=64, pairs=4)
    others = batch.ids[:, 8:][~batch.scored[:, 8:]].double()
    assert others.mean() / 8191 == pytest.approx(0.5, abs=0.01)
    assert (others == 0).double().mean() < 0.001
    assert others.max() > 8100


def test_drawing_without_repeats_is_even_over_all_orders() -> None:
    drawn = _distinct(6000, 3, 10, 13, torch.Generator().manual_seed(0))
    orders, counts = drawn.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert (counts - 1000).abs().max() < 130
