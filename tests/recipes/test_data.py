"""Text to batches: the tokenizer, the split, the windows, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.data import (
    HELD_OUT_SHARE,
    SEPARATOR,
    STDLIB_LEFT_OUT,
    ByteTokenizer,
    Document,
    Windows,
    held_out,
    load_corpus,
    segments,
    to_stream,
)
from synapse_arch.errors import DataError


@given(st.text())
def test_tokenizer_returns_what_it_was_given(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_decode_alike_at_once_and_streamed(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_streamed_characters_come_out_whole() -> None:
    tokenizer = ByteTokenizer()
    assert list(tokenizer.decode_stream(tokenizer.encode("aé→🙂b"))) == ["a", "é", "→", "🙂", "b"]


def test_half_a_character_is_refused() -> None:
    with pytest.raises(DataError, match="at 1"):
        ByteTokenizer().encode("a\ud800")


def test_built_in_corpus_is_the_same_twice_and_split_cleanly() -> None:
    corpus = load_corpus()
    assert corpus == load_corpus()
    assert corpus.fingerprint == load_corpus().fingerprint
    train, held = ({document.name for document in side} for side in (corpus.train, corpus.held_out))
    assert not train & held
    assert not {document.data for document in corpus.train} & {document.data for document in corpus.held_out}
    assert not any(STDLIB_LEFT_OUT & set(Path(name).parts) for name in train | held)
    assert sum(len(document.data) for document in corpus.train) > 5_000_000
    assert 0.02 < len(held) / len(train | held) < 0.1


def test_held_out_share_is_met_over_many_names() -> None:
    picked = sum(held_out(f"pkg/module_{number}.py") for number in range(20_000))
    assert abs(picked / 20_000 - HELD_OUT_SHARE) < 0.005


def folder(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_folder_leaves_out_hidden_empty_repeated_and_other_files(tmp_path: Path) -> None:
    files = {"a.txt": "one", "sub/b.md": "two", "c.txt": "one", "empty.txt": "", ".git/d.txt": "no", "e.bin": "no"}
    corpus = load_corpus(folder(tmp_path, files))
    assert sorted(document.name for document in (*corpus.train, *corpus.held_out)) == ["a.txt", "sub/b.md"]


def test_a_changed_byte_changes_the_fingerprint(tmp_path: Path) -> None:
    before = load_corpus(folder(tmp_path, {"a.txt": "one", "b.txt": "two"})).fingerprint
    assert load_corpus(folder(tmp_path, {"b.txt": "twp"})).fingerprint != before


def test_single_file_keeps_its_end_apart_and_cuts_no_character(tmp_path: Path) -> None:
    text = "é→🙂" * 333
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    corpus = load_corpus(path)
    parts = [side[0].data.decode("utf-8") for side in (corpus.train, corpus.held_out)]
    assert "".join(parts) == text
    assert 0.04 < len(corpus.held_out[0].data) / path.stat().st_size < 0.06


@pytest.mark.parametrize(
    ("files", "path", "says"),
    [
        ({}, "missing", "nothing there"),
        ({}, ".", "0 of 0 files"),
        ({"a.txt": ""}, "a.txt", "0 bytes"),
        ({"a.txt": "x"}, "a.txt", "1 bytes"),
        ({"a.txt": "only one"}, ".", "1 of 1 files"),
        ({"a.txt": "te\0xt", "b.txt": "text"}, ".", "binary file (byte 0 at 2)"),
    ],
)
def test_unusable_data_is_refused_with_its_path(tmp_path: Path, files: dict[str, str], path: str, says: str) -> None:
    target = folder(tmp_path, files) / path
    with pytest.raises(DataError) as caught:
        load_corpus(target)
    assert says in str(caught.value)
    assert str(target) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser reads everything")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"a.txt": "one", "b.txt": "two"})
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        load_corpus(tmp_path)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="more than 4 tokens"):
        Windows(torch.zeros(4, dtype=torch.uint8), length=4, batch_size=1, seed=0)


@pytest.fixture
def windows() -> Windows:
    documents = [Document(name=str(size), data=bytes(range(1, size))) for size in (40, 90, 200)]
    return Windows(to_stream(documents), length=32, batch_size=6, seed=7)


def test_batches_depend_on_seed_and_step_alone(windows: Windows) -> None:
    first = windows.batch(3)
    windows.batch(4)
    torch.manual_seed(99)
    again = windows.batch(3)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.ids, windows.batch(4).ids)
    other = Windows(windows.stream, length=32, batch_size=6, seed=8)
    assert not torch.equal(first.ids, other.batch(3).ids)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_shares_of_the_processes_are_the_batch(windows: Windows, world: int) -> None:
    shares = torch.cat([windows.batch(5, rank, world).ids for rank in range(world)])
    assert torch.equal(shares, windows.batch(5).ids)


def test_windows_are_text_with_its_next_tokens(windows: Windows) -> None:
    stream = bytes(windows.stream.tolist())
    for step in range(20):
        batch = windows.batch(step)
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            assert bytes([*ids, targets[-1]]) in stream


def test_every_token_can_be_drawn() -> None:
    tiny = Windows(torch.arange(6, dtype=torch.uint8), length=4, batch_size=64, seed=0)
    batch = tiny.batch(0)
    assert set(batch.ids[:, 0].tolist()) == {0, 1}
    assert batch.targets.max() == 5


def test_segments_start_at_each_separator() -> None:
    ids = torch.tensor([[5, 6, SEPARATOR, 7], [SEPARATOR, 5, 6, 7]])
    found = segments(ids)
    assert found is not None
    assert found.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert segments(ids[1:]) is None
