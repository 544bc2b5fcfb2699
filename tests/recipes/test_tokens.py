"""The cache of tokens: right, written once, whole or not at all, and shared by processes."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import tokens
from recipes.data import ByteTokenizer, Tokenizer, load_corpus, open_source, to_stream
from recipes.tokenizer import train_bpe
from recipes.tokens import load, prepare, survey
from synapse_arch.errors import DataError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"document {number} " * (number + 1), encoding="utf-8")
    return folder


def test_streams_are_those_of_the_corpus_in_memory(text: Path, tmp_path: Path) -> None:
    corpus, read = load_corpus(text), []
    folder = prepare(open_source(text), ByteTokenizer(), tmp_path / "cache", read.append)
    found = load(folder, "text")
    assert torch.equal(found.train, to_stream(corpus.train))
    assert torch.equal(found.held_out, to_stream(corpus.held_out))
    assert found.survey.fingerprint == corpus.fingerprint
    assert found.survey.documents == (len(corpus.train), len(corpus.held_out))
    assert sum(read) == 2 * sum(found.survey.bytes)


def test_bpe_streams_decode_to_the_text(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(tokens, "GROUP", 500)
    corpus = load_corpus(text)
    tokenizer = train_bpe((document.data.decode() for document in corpus.train), 300)
    found = load(prepare(open_source(text), tokenizer, tmp_path / "cache"), "text")
    assert found.train.dtype == torch.uint16
    assert tokenizer.decode_bytes(found.train.long().tolist()) == b"".join(document.data for document in corpus.train)
    assert int((found.train.long() == 0).sum()) == len(corpus.train)


def test_written_once_and_anew_for_another_text_or_vocabulary(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    cache, bpe = tmp_path / "cache", train_bpe(["document"], 260)
    first = prepare(open_source(text), ByteTokenizer(), cache)
    written = (first / "train.bin").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "_write", lambda *_: pytest.fail("written twice"))
        assert prepare(open_source(text), ByteTokenizer(), cache) == first
    assert (first / "train.bin").stat().st_mtime_ns == written
    assert prepare(open_source(text), bpe, cache) != first
    (text / "3.txt").write_text("document x" * 3, encoding="utf-8")
    assert prepare(open_source(text), ByteTokenizer(), cache) != first


def _prepare(text: Path, cache: Path, results: multiprocessing.Queue[str]) -> None:
    results.put(str(prepare(open_source(text), ByteTokenizer(), cache)))


def test_processes_that_come_together_write_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, cache, original = multiprocessing.get_context("fork"), tmp_path / "cache", tokens._write
    writes = context.Value("i", 0)

    def counted(*arguments: object) -> None:
        with writes.get_lock():
            writes.value += 1
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens, "_write", counted)
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(text, cache, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert writes.value == 1


class Failing(ByteTokenizer):
    def read(self, documents: object) -> list[torch.Tensor]:
        raise OSError(28, "No space left on device")


def test_a_writer_that_fails_leaves_nothing(text: Path, tmp_path: Path) -> None:
    failing: Tokenizer = Failing()
    with pytest.raises(DataError, match="No space left"):
        prepare(open_source(text), failing, tmp_path / "cache")
    assert not [item for item in (tmp_path / "cache").iterdir() if item.is_dir()]


def test_what_a_killed_writer_left_is_replaced(text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    good = prepare(open_source(text), ByteTokenizer(), cache)
    (good / "tokens.json").unlink()
    (good / "train.bin").write_bytes(b"half")
    (cache / f".{good.name}").mkdir()
    (cache / f".{good.name}" / "train.bin").write_bytes(b"half")
    again = load(prepare(open_source(text), ByteTokenizer(), cache), "text")
    assert torch.equal(again.train, to_stream(load_corpus(text).train))
    assert not (cache / f".{good.name}").exists()


def test_too_full_a_disk_is_known_before(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="MB free"):
        prepare(open_source(text), ByteTokenizer(), tmp_path / "cache")


@pytest.mark.parametrize("damage", ["short", "gone", "json"])
def test_a_damaged_cache_is_refused(text: Path, tmp_path: Path, damage: str) -> None:
    folder = prepare(open_source(text), ByteTokenizer(), tmp_path / "cache")
    if damage == "short":
        (folder / "train.bin").write_bytes(b"x")
    elif damage == "gone":
        (folder / "held_out.bin").unlink()
    else:
        (folder / "tokens.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="remove it"):
        load(folder, "text")


def test_a_survey_keeps_nothing_but_counts(text: Path) -> None:
    found = survey(open_source(text))
    assert sum(found.documents) == 60
    assert found.fingerprint == load_corpus(text).fingerprint


def test_tokens_of_another_length_than_was_written_are_refused(text: Path, tmp_path: Path) -> None:
    folder = prepare(open_source(text), ByteTokenizer(), tmp_path / "cache")
    with (folder / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="folder of tokens"):
        load(folder, "text")


def test_a_text_that_changes_while_it_is_read_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*given: Any) -> Any:
        found = survey(*given)
        (text / "1.txt").write_text("another", encoding="utf-8")
        return found

    monkeypatch.setattr(tokens, "survey", changed)
    with pytest.raises(DataError, match="text that stays as it is"):
        prepare(open_source(text), ByteTokenizer(), tmp_path / "cache")
