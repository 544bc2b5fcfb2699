"""Parity by xor, S3 by moving three things about, both at the lengths they are trained and tested at."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import xor

import pytest
import torch

from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.base import IGNORED, test_batches, training_batch
from benchmarks.quality.tasks.tracking import ELEMENTS, PRODUCTS, parity_of_length, running_products


def moved(word: list[int]) -> list[int]:
    """The running products of a word, from where each of three things has gone."""
    things = [0, 1, 2]
    seen = []
    for element in word:
        things = [ELEMENTS[element][place] for place in things]
        seen.append(ELEMENTS.index(tuple(things)))
    return seen


def test_parity_is_the_xor_of_all_bits() -> None:
    task = TASKS["parity"]
    batches = [training_batch(task, task.protocols["cpu"], 0, step) for step in range(20)]
    for batch in [*batches, *test_batches(task, task.protocols["cpu"], 0)]:
        assert set(batch.ids.unique().tolist()) == {0, 1}
        assert (batch.targets[:, :-1] == IGNORED).all()
        assert torch.equal(batch.scored, batch.targets != IGNORED)
        assert batch.targets[:, -1].tolist() == [reduce(xor, row) for row in batch.ids.tolist()]


def test_parity_trains_on_3_to_40_bits_and_is_tested_on_40_to_256() -> None:
    task = TASKS["parity"]
    lengths = [training_batch(task, task.protocols["cpu"], 1, step).ids.shape[1] for step in range(600)]
    assert sorted(set(lengths)) == list(range(3, 41))
    for protocol in task.protocols.values():
        assert (min(protocol.test_lengths), max(protocol.test_lengths)) == (40, 256)
    tested = {batch.ids.shape[1] for batch in test_batches(task, task.protocols["cpu"], 0)}
    assert tested == set(task.protocols["cpu"].test_lengths)
    assert task.test_make is not None
    assert task.test_make(2, torch.Generator()).ids.shape == (2, 256)


def test_both_answers_of_parity_are_as_frequent() -> None:
    batch = parity_of_length(4000, torch.Generator().manual_seed(0), 7)
    assert batch.targets[:, -1].double().mean() == pytest.approx(0.5, abs=0.04)


def test_s3_replayed_with_three_things() -> None:
    task = TASKS["s3"]
    protocols = [replace(protocol, train_examples=None, batch_size=32) for protocol in task.protocols.values()]
    batches = [training_batch(task, protocol, 0, 0) for protocol in protocols]
    batches += [test_batches(task, protocol, 0)[-1] for protocol in protocols]
    assert [batch.ids.shape[1] for batch in batches] == [32, 128, 128, 512]  # tested on 4 times the training length
    for batch in batches:
        assert batch.scored.all()
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            assert targets == moved(ids)
        assert batch.targets[:, -1].unique().numel() == batch.ids.unique().numel() == 6


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_running_products_at_any_length(length: int) -> None:
    ids = torch.randint(6, (40, length))
    assert running_products(ids).tolist() == [moved(word) for word in ids.tolist()]


def test_s3_is_the_group_that_does_not_commute() -> None:
    assert sorted(ELEMENTS) == sorted(
        {(a, b, c) for a in range(3) for b in range(3) for c in range(3) if {a, b, c} == {0, 1, 2}}
    )
    assert PRODUCTS[0].tolist() == PRODUCTS[:, 0].tolist() == list(range(6))
    assert all(sorted(row) == list(range(6)) for row in [*PRODUCTS.tolist(), *PRODUCTS.T.tolist()])
    triples = torch.cartesian_prod(*[torch.arange(6)] * 3).unbind(1)
    left = PRODUCTS[PRODUCTS[triples[0], triples[1]], triples[2]]
    assert torch.equal(left, PRODUCTS[triples[0], PRODUCTS[triples[1], triples[2]]])
    assert not torch.equal(PRODUCTS, PRODUCTS.T)
