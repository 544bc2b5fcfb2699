"""Formats of text: what is read from each, and what is refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.data import load_corpus, open_source
from synapse_arch.errors import DataError

TEXTS = [f"text {number} with é→🙂" for number in range(40)]


def lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.data.decode() for document in open_source(path, field=field).documents()]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"body": text, "text": 3} for text in TEXTS])
    path.write_text(path.read_text(encoding="utf-8") + "\n  \n", encoding="utf-8")
    assert texts(path, "body") == TEXTS
    names = [document.name for document in open_source(path, field="body").documents()]
    assert names[:2] == ["a.jsonl:1", "a.jsonl:2"]
    corpus = load_corpus(path, field="body")
    assert sorted(document.data.decode() for document in (*corpus.train, *corpus.held_out)) == sorted(TEXTS)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"n": list(range(40)), "text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    assert texts(tmp_path / "a.parquet") == TEXTS
    with pytest.raises(DataError, match=r"a field 'body', got 'n', 'text'"):
        texts(tmp_path / "a.parquet", "body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"b\.parquet: expected a Parquet file"):
        texts(tmp_path / "b.parquet")


def test_saved_dataset_rows_are_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(40))}).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == TEXTS
    with pytest.raises(DataError, match="a field 'body'"):
        texts(tmp_path / "saved", "body")


def test_a_folder_mixes_formats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    lines(tmp_path / "sub" / "b.jsonl", [{"text": "one"}, {"text": "two"}])
    assert texts(tmp_path) == ["plain", "one", "two"]
    assert [document.name for document in open_source(tmp_path).documents()] == [
        "a.txt",
        "sub/b.jsonl:1",
        "sub/b.jsonl:2",
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "cut', "line 3: expected a JSON object"),
        ("[1, 2]", "line 3: expected a JSON object, got list"),
        ('{"body": "x"}', "line 3: expected a field 'text', got 'body'"),
        ('{"text": 5}', "line 3: expected a text, got int"),
        ('{"text": null}', "line 3: expected a text, got NoneType"),
        ('{"text": "a\\u0000b"}', "line 3: expected text, got a binary file (byte 0 at 1)"),
        ('{"text": "\\ud800"}', "line 3: expected characters"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        texts(path)
    assert str(caught.value).startswith(f"{path}, ")
    assert says in str(caught.value)


def test_a_binary_file_of_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(DataError, match="line 1"):
        texts(path)


@pytest.mark.parametrize("records", [[], [{"text": ""}], [{"text": "alone"}], [{"text": "twice"}, {"text": "twice"}]])
def test_too_few_documents_are_refused(tmp_path: Path, records: list[object]) -> None:
    with pytest.raises(DataError, match=r"text to hold out, got [01] documents"):
        load_corpus(lines(tmp_path / "a.jsonl", records))
