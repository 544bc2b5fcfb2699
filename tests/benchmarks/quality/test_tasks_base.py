"""Batches depend on seed and step alone, epochs shuffle one set, tests never train, and scores are what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.quality.tasks import TASKS, base
from benchmarks.quality.tasks.base import (
    IGNORED,
    Batch,
    Protocol,
    Task,
    accuracy,
    accuracy_by_length,
    scaled,
    test_batches,
    training_batch,
)
from synapse_arch.errors import ConfigError, ShapeError

NAMES = [name for name in TASKS if name != "bytes"]
SMALL = Protocol(
    train_examples=None, test_examples=10, batch_size=4, steps=6, lrs=(1e-3,), weight_decays=(0.0,), d_model=8,
    n_layers=1, stop_at=None, eval_every=2,
)  # fmt: skip


def noise(n: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(2**40, (n, 3), generator=generator)
    return Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))


def task_of(metric: str = "micro", n_classes: int = 3, make: base.Make = noise) -> Task:
    return Task(
        name="t", vocab_size=9, n_classes=n_classes, make=make, protocols={}, metric=metric, description=""
    )  # type: ignore[arg-type]  # fmt: skip


def batch_of(targets: list[list[int]]) -> Batch:
    ids = torch.tensor(targets)
    return Batch(ids.clamp(min=0), ids, ids != IGNORED)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rows(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for batch in batches for row in batch.ids.tolist())


def forget() -> None:
    for cached in (base._training_set, base._order, base.test_batches):
        cached.cache_clear()


def test_every_task_is_there_at_both_scales() -> None:
    recall = ["mqar-64", "mqar-128", "mqar-256"]
    mad = ["memorization", "memorization-8192", "in-context-recall", "compression", "selective-copy"]
    assert [*mad, *recall, "parity", "s3"] == NAMES
    for name in NAMES:
        assert TASKS[name].name == name
        assert {"cpu", "published"} <= set(TASKS[name].protocols)
        assert all(0 <= score <= 100 for score in TASKS[name].published.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_keeps_the_contract(name: str) -> None:
    task = TASKS[name]
    protocol = task.protocols["cpu"]
    for batch in (training_batch(task, protocol, 0, 0), *test_batches(task, protocol, 0)[-1:]):
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert batch.scored.dtype == torch.bool
        assert batch.ids.shape == batch.targets.shape == batch.scored.shape
        assert 0 <= batch.ids.min() <= batch.ids.max() < task.vocab_size
        asked = batch.targets[batch.targets != IGNORED]
        assert 0 <= asked.min() <= asked.max() < task.n_classes
        assert batch.scored.any(dim=1).all()
        assert (batch.targets[batch.scored] != IGNORED).all()
    assert training_batch(task, protocol, 0, 0).ids.shape[0] == protocol.batch_size


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_depends_on_seed_and_step_alone(name: str) -> None:
    task = TASKS[name]
    protocol = task.protocols["cpu"]
    forget()
    later = training_batch(task, protocol, 3, 7)
    test = test_batches(task, protocol, 3)
    forget()
    torch.manual_seed(99)
    for step in range(3):
        training_batch(task, protocol, 3, step)
    assert same(later, training_batch(task, protocol, 3, 7))
    assert all(same(a, b) for a, b in zip(test, test_batches(task, protocol, 3), strict=True))
    for other in (training_batch(task, protocol, 3, 8), training_batch(task, protocol, 4, 7)):
        assert later.ids.shape != other.ids.shape or not same(later, other)
    assert not same(test[0], test_batches(task, protocol, 4)[0])


def test_every_epoch_is_the_fixed_set_in_another_order() -> None:
    protocol = replace(SMALL, train_examples=12)
    task = task_of()
    epochs = [[training_batch(task, protocol, 5, step) for step in range(3 * e, 3 * e + 3)] for e in range(3)]
    assert len(rows(epochs[0])) == 12
    assert rows(epochs[0]) == rows(epochs[1]) == rows(epochs[2])
    orders = {tuple(torch.cat([batch.ids for batch in epoch]).flatten().tolist()) for epoch in epochs}
    assert len(orders) == 3


def test_what_fills_no_batch_sits_the_epoch_out() -> None:
    protocol = replace(SMALL, train_examples=14)
    task = task_of()
    epochs = [rows([training_batch(task, protocol, 0, step) for step in range(3 * e, 3 * e + 3)]) for e in range(20)]
    assert all(len(epoch) == 12 for epoch in epochs)
    assert len(sum(epochs, Counter())) == 14


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one batch of 4, got 3"):
        training_batch(task_of(), replace(SMALL, train_examples=3), 0, 0)


def test_no_example_is_drawn_from_a_seed_used_elsewhere() -> None:
    seeds: list[int] = []

    def spied(n: int, generator: torch.Generator) -> Batch:
        seeds.append(generator.initial_seed())
        return noise(n, generator)

    task = task_of(make=spied)
    for seed in range(20):
        for step in range(5):
            training_batch(task, SMALL, seed, step)
        training_batch(task, replace(SMALL, train_examples=8), seed, 0)
        test_batches(task, SMALL, seed)
    assert len(seeds) == len(set(seeds)) == 20 * (5 + 1 + 3)


def test_the_test_set_has_its_size_and_new_examples() -> None:
    task = TASKS["in-context-recall"]
    protocol = replace(task.protocols["cpu"], train_examples=1280, test_examples=300, batch_size=128)
    batches = test_batches(task, protocol, 0)
    assert [len(batch.ids) for batch in batches] == [128, 128, 44]
    trained = rows([training_batch(task, protocol, 0, step) for step in range(10)])
    assert not trained & rows(batches)


def test_test_lengths_share_the_examples() -> None:
    protocol = TASKS["parity"].protocols["cpu"]
    sizes: Counter[int] = Counter()
    for batch in test_batches(TASKS["parity"], protocol, 0):
        sizes[batch.ids.shape[1]] += len(batch.ids)
    assert sizes == dict.fromkeys(protocol.test_lengths, protocol.test_examples // len(protocol.test_lengths))


def test_impossible_test_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match="the task's one length"):
        test_batches(task_of(), replace(SMALL, test_lengths=(3, 4)), 0)
    with pytest.raises(ConfigError, match="an example of each test length"):
        test_batches(task_of(), replace(SMALL, test_examples=0), 0)


def test_micro_counts_answers_and_macro_counts_classes() -> None:
    # Answers 0 0 0 1 and 0 2; right are two of the four 0, none of the 1, all of the 2. No answer is 3.
    batches = [batch_of([[0, 0, 0, 1]]), batch_of([[IGNORED, 0, IGNORED, 2]])]
    predictions = [torch.tensor([[0, 0, 1, 3]]), torch.tensor([[2, 1, 2, 2]])]
    assert accuracy(task_of("micro", 4), predictions, batches) == pytest.approx(3 / 6)
    assert accuracy(task_of("macro", 4), predictions, batches) == pytest.approx((2 / 4 + 0 + 1) / 3)


def test_predictions_may_be_those_of_the_scored_positions() -> None:
    batch = batch_of([[IGNORED, 1, 2], [0, IGNORED, 2]])
    whole = torch.tensor([[5, 1, 0], [0, 5, 2]])
    for metric in ("micro", "macro"):
        task = task_of(metric)
        assert accuracy(task, [whole], [batch]) == accuracy(task, [torch.tensor([1, 0, 0, 2])], [batch])
    assert accuracy(task_of(), [whole], [batch]) == 0.75


def test_only_scored_positions_count() -> None:
    batch = batch_of([[1, 2, 0]])._replace(scored=torch.tensor([[False, True, False]]))
    assert accuracy(task_of(), [torch.tensor([[0, 2, 1]])], [batch]) == 1.0
    assert accuracy(task_of(), [torch.tensor([[1, 0, 0]])], [batch]) == 0.0


def test_of_several_lengths_the_longest_scores() -> None:
    batches = [batch_of([[IGNORED, 1]]), batch_of([[IGNORED, IGNORED, 0], [IGNORED, IGNORED, 1]]), batch_of([[0, 1]])]
    predictions = [torch.tensor([1]), torch.tensor([1, 1]), torch.tensor([1, 1])]
    assert accuracy(task_of(), predictions, batches) == 0.5
    assert accuracy_by_length(task_of(), predictions, batches) == {2: pytest.approx(2 / 3), 3: 0.5}


def test_predictions_that_fit_no_batch_are_refused() -> None:
    batch = batch_of([[IGNORED, 1, 2]])
    with pytest.raises(ShapeError, match="one for each of 1"):
        accuracy(task_of(), [], [batch])
    with pytest.raises(ShapeError, match="one for each of 0"):
        accuracy(task_of(), [], [])
    with pytest.raises(ShapeError, match=r"expected \(1, 3\) or \(2,\), got \(3,\)"):
        accuracy(task_of(), [torch.tensor([1, 1, 2])], [batch])


def test_scaled_accuracy_puts_chance_at_zero() -> None:
    assert (scaled(0.5, 2), scaled(1.0, 6), scaled(1 / 6, 6)) == (0.0, 1.0, 0.0)
    assert scaled(0.25, 2) == -0.5


@pytest.mark.parametrize(
    ("name", "classes"), [("in-context-recall", 16), ("parity", 2), ("s3", 6), ("compression", 16)]
)
def test_guessing_scores_at_chance(name: str, classes: int) -> None:
    task = TASKS[name]
    batches = test_batches(task, replace(task.protocols["cpu"], test_examples=1280), 0)
    guesses = [torch.randint(classes, batch.ids.shape) for batch in batches]
    assert accuracy(task, guesses, batches) == pytest.approx(1 / classes, abs=0.1 if name == "parity" else 0.01)
