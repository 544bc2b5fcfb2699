"""The material of the merging experiments is what they say it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.merging import domains, language
from benchmarks.merging.digits import rotated
from recipes.data import Corpus, Document, to_stream


def test_quarter_turns_are_exact() -> None:
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(rotated(images, 0), images)
    torch.testing.assert_close(rotated(images, 180), images.rot90(2, (2, 3)))
    assert any(torch.allclose(rotated(images, 90), images.rot90(k, (2, 3)), atol=1e-5) for k in (1, 3))


def test_texts_to_choose_by_to_judge_by_and_to_train_on_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "HELD_OUT_BYTES", {"choice": 5, "test": 9})
    held = tuple(Document(name=str(n), data=bytes([65 + n]) * 4) for n in range(5))
    sides = domains.held_out_text(Corpus(source="", train=(), held_out=held))
    assert sides == {"choice": b"AAAAC", "test": b"BBBBDDDD"}


def test_every_domain_is_there() -> None:
    prose = domains._prose()
    assert {one.name for one in prose.train}.isdisjoint(one.name for one in prose.held_out)
    assert sum(len(one.data) for one in prose.train) > 100_000
    assert all(0 not in one.data for one in (*prose.train, *prose.held_out))


def test_the_base_sees_the_domains_by_turns() -> None:
    streams = [to_stream([Document(name="", data=bytes([65 + n]) * 600)]) for n in range(3)]
    turns = domains.Turns(streams, seed=0)
    assert [chr(int(turns.batch(step).targets.max())) for step in range(4)] == ["A", "B", "C", "A"]
    assert torch.equal(turns.batch(5).ids, domains.Turns(streams, seed=0).batch(5).ids)


def test_the_summary_is_the_mean_over_seeds() -> None:
    rows = [{"name": "base", "test": {"x": 1.0, "y": 3.0}}, {"name": "a", "test": {"x": 1.0, "y": 1.0}}]
    other = [rows[0], {"name": "a", "test": {"x": 2.0, "y": 2.0}}]
    found = language.summary([{"rows": rows}, {"rows": other}])
    assert list(found) == ["a", "base"]
    assert found["a"] == {"x": 1.5, "y": 1.5, "mean": 1.5, "low": 1.0, "high": 2.0}


def test_sources_say_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Corpus(source="/somewhere", train=(), held_out=())
    monkeypatch.setattr(domains, "load_corpus", lambda *_: replace(empty, source="Python standard library"))
    assert all("/" not in one.source[0] for one in domains.corpora().values())
