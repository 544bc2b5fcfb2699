"""MAD's generators, replayed by hand: every answer that counts can be given, and is the one asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.base import IGNORED, Batch, test_batches, training_batch
from benchmarks.quality.tasks.mad import TO_COPY, in_context_recall, memorization, selective_copy


def drawn(name: str, seed: int = 0) -> list[Batch]:
    """The 256 examples of a training set in two batches, and 256 tests."""
    task = TASKS[name]
    protocol = replace(task.protocols["published"], train_examples=256, test_examples=256, batch_size=128)
    trained = [training_batch(task, protocol, seed, step) for step in range(2)]
    return [*trained, *test_batches(task, protocol, seed)]


@pytest.mark.parametrize(("name", "vocab"), [("memorization", 256), ("memorization-8192", 8192)])
def test_memorization_asks_for_one_fixed_bijection(name: str, vocab: int) -> None:
    n_keys = (vocab - 1) // 2
    known: dict[int, int] = {}
    for batch in drawn(name, 0) + drawn(name, 1):
        assert batch.ids.shape[1] == 32
        assert torch.equal(batch.scored, batch.targets != IGNORED)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            assert set(ids[1::2]) == {vocab - 1}
            assert set(targets[0::2]) == {IGNORED}
            for key, value in zip(ids[0::2], targets[1::2], strict=True):
                assert 0 <= key < n_keys <= value < vocab - 1
                assert known.setdefault(key, value) == value
    assert len(set(known.values())) == len(known) > 0.95 * n_keys
    assert [known[key] for key in sorted(known)] != sorted(known.values())


def test_memorization_trains_every_key_of_the_small_vocabulary_only() -> None:
    assert TASKS["memorization"].protocols["published"].train_examples == 256
    for name, share in (("memorization", 1.0), ("memorization-8192", 1 - (1 - 1 / 4095) ** 4096)):
        keys = {int(key) for batch in drawn(name)[:2] for key in batch.ids[:, 0::2].flatten()}
        assert len(keys) / ((TASKS[name].vocab_size - 1) // 2) == pytest.approx(share, abs=0.03)


def test_memorization_draws_keys_evenly() -> None:
    keys = memorization(4000, torch.Generator().manual_seed(0)).ids[:, 0::2]
    counts = keys.flatten().bincount(minlength=127).double()
    assert len(counts) == 127
    assert (counts - counts.mean()).abs().max() < 5 * counts.mean() ** 0.5


def test_recall_scores_exactly_the_values_a_dictionary_knows() -> None:
    for batch in drawn("in-context-recall"):
        assert batch.ids.shape[1] == 127
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
        for ids, targets, scored in zip(*(part.tolist() for part in batch), strict=True):
            known: dict[int, int] = {}
            for place in range(0, 127, 2):
                key, value = ids[place], targets[place]
                assert key < 8 <= value < 16
                assert scored[place] == (key in known)
                assert known.setdefault(key, value) == value
            assert not any(scored[1::2])
            assert scored[-1]


def test_recall_maps_change_and_repeat_values() -> None:
    batch = drawn("in-context-recall")[0]
    first = Counter((ids[0], ids[1]) for ids in batch.ids.tolist())
    assert len(first) > 40
    values = [len(set(ids[1::2])) for ids in batch.ids.tolist()]
    assert min(values) < 8  # two keys may share a value


def test_the_last_key_of_recall_is_even_among_those_presented() -> None:
    batch = in_context_recall(20_000, torch.Generator().manual_seed(0), vocab_size=4, length=8)
    keys = batch.ids[:, 0::2].tolist()
    last = Counter(row[3] for row in keys if row[:3] == [0, 0, 1])
    assert last[0] / sum(last.values()) == pytest.approx(0.5, abs=0.05)  # by how often they came it were 2/3
    assert all(row[3] in row[:3] for row in keys)


def test_selective_copy_repeats_the_tokens_in_order() -> None:
    for batch in drawn("selective-copy"):
        assert batch.ids.shape[1] == 256
        assert torch.equal(batch.scored, batch.targets != IGNORED)
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            copy = ids.index(15)
            noticed = [token for token in ids[:copy] if token != 14]
            assert len(noticed) == TO_COPY
            assert copy == 239
            assert set(ids[copy + 1 :]) == {14}
            assert targets[copy + 1 :] == noticed
            assert set(targets[: copy + 1]) == {IGNORED}
            assert ids[copy - 1] != 14


def test_selective_copy_strews_blanks_evenly_before_the_tokens() -> None:
    ids = selective_copy(4000, torch.Generator().manual_seed(0)).ids[:, :239]
    places = (ids != 14).nonzero()[:, 1].unflatten(0, (4000, TO_COPY)).double()
    gaps = torch.diff(places, dim=1, prepend=torch.full((4000, 1), -1.0).double()) - 1
    assert torch.allclose(gaps.mean(dim=0), torch.full((TO_COPY,), 223 / TO_COPY).double(), atol=0.3)
    assert torch.allclose(gaps.var(dim=0), torch.full((TO_COPY,), 223 * 15 / 256).double(), rtol=0.15)


def test_compression_is_to_rebuild_its_input() -> None:
    for batch in drawn("compression"):
        assert batch.ids.shape[1] == 32
        assert torch.equal(batch.ids, batch.targets)
        assert batch.scored.all()
        assert (batch.ids[:, -1] == 15).all()
        assert batch.ids[:, :-1].unique().tolist() == list(range(15))
