"""Text on disk as documents, read one at a time: files, folders, JSON lines, Parquet, saved `datasets`, Python itself.

A source can be read any number of times; nothing of it is kept. What is malformed is named with its file and line.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synapse_arch.errors import DataError, explain

SEPARATOR = 0
"""The token that opens a document; as a byte, text never holds it."""
# Suites of tests repeat themselves, and these packages are generated tables: neither reads like source people write.
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
TEXT_SUFFIXES = frozenset(
    {".c", ".cpp", ".css", ".csv", ".go", ".h", ".html", ".java", ".jl", ".js", ".json", ".lua", ".md", ".py", ".pyi"}
    | {".r", ".rb", ".rs", ".rst", ".sh", ".sql", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"}
)
ROWS = 1024
"""Rows of a table that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text: `name` is its path inside the corpus, `data` its bytes, none of them 0."""

    name: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from.

    Attributes:
        name: what it is called.
        root: what the documents' names are relative to.
        files: what is read, in this order.
        remedy: what to do where it holds too little.
        field: which field of a JSON line or column of a table is the text.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    remedy: str
    field: str = "text"

    @property
    def single_text(self) -> bool:
        """Whether it is one text file: its end is held out then, instead of whole documents."""
        return self.root.is_file() and self.root.suffix.lower() not in READERS

    def documents(self) -> Iterator[Document]:
        """Every document, empty ones included.

        Raises:
            DataError: a file that is unreadable, binary or malformed.
        """
        for file in self.files:
            name = file.name if file == self.root else file.relative_to(self.root).as_posix()
            reader = _saved_dataset if file.is_dir() else READERS.get(file.suffix.lower())
            if reader is not None:
                yield from _records(file, name, reader(file, self.field))
            else:
                yield Document(name=name, data=_checked(_read(file), str(file)))


def open_source(path: Path | None = None, *, field: str = "text") -> Source:
    """The source at a path, or the built-in one: Python's standard library as installed, without `STDLIB_LEFT_OUT`.

    A file is JSON lines (.jsonl) or Parquet (.parquet), each line or row a document, or else one text. A folder is what
    `datasets.Dataset.save_to_disk` wrote, or gives every file under it that is one of those or whose suffix is in
    `TEXT_SUFFIXES`, in the order of the paths, hidden ones left out.

    Raises:
        DataError: the path is missing, or a folder holds no such file.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(file for file in root.rglob("*.py") if not STDLIB_LEFT_OUT & set(file.relative_to(root).parts))
        remedy = "this Python ships no library source: give a text file or folder with --data"
        return Source(name="Python standard library", root=root, files=tuple(files), remedy=remedy)
    if not path.exists():
        raise DataError(explain(f"--data {path}", "a text file or folder", "nothing there", "check the path"))
    known = TEXT_SUFFIXES | READERS.keys()
    if path.is_file() or _is_saved_dataset(path):
        remedy = "give a longer text, or more documents"
        return Source(name=str(path), root=path, files=(path,), remedy=remedy, field=field)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and _visible(file, path))
    remedy = f"it needs two or more text files ending in {', '.join(sorted(known))}"
    return Source(name=str(path), root=path, files=tuple(files), remedy=remedy, field=field)


def _json_lines(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Each line that is not blank, as its place and the value of its field."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                remedy = "correct the line or take it out"
                raise DataError(explain(f"{path}, {place}", "a JSON object", f"{error}", remedy)) from error
            if not isinstance(record, dict):
                raise DataError(explain(f"{path}, {place}", "a JSON object", type(record).__name__))
            if field not in record:
                raise DataError(_no_field(f"{path}, {place}", field, record))
            yield place, record[field]


def _parquet(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Each row of a Parquet file, as its place and the value of its column."""
    parquet = _optional("pyarrow.parquet", "reading Parquet")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise DataError(_no_field(str(path), field, names))
            number = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", value
    except (OSError, _optional("pyarrow", "reading Parquet").ArrowException) as error:
        raise DataError(explain(str(path), "a Parquet file", error, "write it again or leave it out")) from error


def _saved_dataset(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Each row of a folder that `datasets` saved, as its place and the value of its column."""
    datasets = _optional("datasets", "reading a saved dataset")
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(explain(str(path), "a dataset saved by datasets", error)) from error
    if field not in table.column_names:
        raise DataError(_no_field(str(path), field, table.column_names))
    for number, row in enumerate(table.select_columns([field]), start=1):
        yield f"row {number}", row[field]


Reader = Callable[[Path, str], Iterator[tuple[str, object]]]
READERS: dict[str, Reader] = {".jsonl": _json_lines, ".parquet": _parquet}
"""The formats of many documents a file, by suffix."""


def _records(path: Path, name: str, records: Iterator[tuple[str, object]]) -> Iterator[Document]:
    """The documents of a file of many."""
    for place, value in records:
        if not isinstance(value, str):
            remedy = "choose the field of the text with --field"
            raise DataError(explain(f"{path}, {place}", "a text", type(value).__name__, remedy))
        try:
            data = value.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"{value[error.start]!r} at {error.start}"
            raise DataError(explain(f"{path}, {place}", "characters", got, "remove lone surrogates")) from error
        yield Document(name=f"{name}:{place.split()[1]}", data=_checked(data, f"{path}, {place}"))


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        data: bytes = file.read()
        return data


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        remedy = "check its permissions or leave it out"
        raise DataError(explain(str(path), "a readable file", error.strerror or error, remedy)) from error


def _checked(data: bytes, place: str) -> bytes:
    position = data.find(SEPARATOR)
    if position >= 0:
        remedy = "leave it out or convert it to UTF-8"
        raise DataError(explain(place, "text", f"a binary file (byte 0 at {position})", remedy))
    return data


def _no_field(where: str, field: str, found: Iterable[str]) -> str:
    has = ", ".join(map(repr, found)) or "none"
    return explain(where, f"a field {field!r}", has, "name the field of the text with --field")


def _optional(module: str, purpose: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = "pip install 'synapse-arch[data]'"
        raise DataError(explain(purpose, module.partition(".")[0], "not installed", remedy)) from error


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
