"""The byte-level BPE: it loses nothing, is the same when loaded, and is refused when it is something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from recipes.data import SEPARATOR, Document
from recipes.tokenizer import OPENING, BPETokenizer, ByteTokenizer, load_tokenizer, main, train_bpe
from synapse_arch.errors import ConfigError, DataError

TEXTS = ["def one(x):\n    return x + 1\n", "def two(x):\n    return x + 2\n", f"é→🙂 {OPENING} ends"] * 3


SHARED = train_bpe(TEXTS, 320)


@pytest.fixture
def bpe() -> BPETokenizer:
    return SHARED


@given(st.text())
def test_nothing_is_lost(text: str) -> None:
    tokenizer = SHARED
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert SEPARATOR not in ids
    assert int(tokenizer.sizes[ids].sum()) == len(text.encode())


def test_common_strings_are_one_token(bpe: BPETokenizer) -> None:
    assert 257 < bpe.vocab_size <= 320
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_text_cannot_open_a_document(bpe: BPETokenizer) -> None:
    assert SEPARATOR not in bpe.encode(OPENING)
    assert bpe.sizes[SEPARATOR] == 0 == ByteTokenizer().sizes[SEPARATOR]


def test_documents_read_as_they_encode(bpe: BPETokenizer) -> None:
    documents = [Document(name=str(number), data=text.encode()) for number, text in enumerate(TEXTS)]
    assert [ids.tolist() for ids in bpe.read(documents)] == [bpe.encode(text) for text in TEXTS]
    with pytest.raises(DataError, match="bad: expected UTF-8, got a stray byte at 1"):
        bpe.read([Document(name="bad", data=b"a\xff")])


def test_saved_and_loaded_is_the_same(tmp_path: Path, bpe: BPETokenizer) -> None:
    bpe.save(tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(place)
        assert (again.pieces, again.fingerprint) == (bpe.pieces, bpe.fingerprint)
        assert again.encode(OPENING + TEXTS[0]) == bpe.encode(OPENING + TEXTS[0])
    assert train_bpe(TEXTS, 262).fingerprint != bpe.fingerprint
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": {"type": "BPE"}}', b"\xff\xfe"])
def test_another_file_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="missing"):
        load_tokenizer(tmp_path / "missing")


def test_a_foreign_vocabulary_is_refused(bpe: BPETokenizer) -> None:
    with pytest.raises(DataError, match="as id 0"):
        BPETokenizer(bpe.source.replace(OPENING, "<s>"))


@pytest.mark.parametrize("size", [0, 257])
def test_a_vocabulary_without_merges_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="more than 257"):
        train_bpe(TEXTS, size)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "made" / "bpe.json"
    assert main(["--data", str(tmp_path), "--vocab-size", "300", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert load_tokenizer(out).vocab_size <= 300
    assert main(["--data", str(tmp_path), "--vocab-size", "1" + "0" * 20, "--out", str(out)]) == 2
    assert "error: --vocab-size: expected up to 16777216" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: --data")
