"""Text in, batches out: the byte tokenizer, the built-in corpus, held-out files, windows.

A corpus is a list of documents. As token ids it is one stream, each document opened by the byte 0, which text never
holds: `0 d o c u m e n t 0 a n o t h e r`. So the vocabulary stays at 256, every byte has something to be predicted
from, and a model that emits 0 has ended its document.
"""

from __future__ import annotations

import codecs
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from synapse_arch.errors import DataError, explain

SEPARATOR = 0
HELD_OUT_SHARE = 0.05
# Suites of tests repeat themselves, and these packages are generated tables: neither reads like source people write.
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
TEXT_SUFFIXES = frozenset(
    {".c", ".cpp", ".css", ".csv", ".go", ".h", ".html", ".java", ".jl", ".js", ".json", ".lua", ".md", ".py", ".pyi"}
    | {".r", ".rb", ".rs", ".rst", ".sh", ".sql", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"}
)


class ByteTokenizer:
    """Text as its UTF-8 bytes: ids 0 to 255, with 0 kept for the start and end of a document."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`.

        >>> ByteTokenizer().encode("né")
        [110, 195, 169]

        Raises:
            DataError: the text holds half a surrogate pair, which is no character.
        """
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            got = f"{text[error.start]!r} at {error.start}"
            raise DataError(explain("text", "characters", got, "remove lone surrogates")) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        >>> ByteTokenizer().decode([110, 195, 169])
        'né'
        """
        return bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` as it arrives: characters of several bytes come out once they are whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if text := decoder.decode(bytes((token,))):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text: `name` is its path inside the corpus, `data` its bytes, none of them 0."""

    name: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on and documents held out; no document's bytes are in both."""

    source: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any byte of the corpus or of its split."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            for document in side:
                digest.update(hashlib.sha256(document.data).digest())
            digest.update(b"|")
        return digest.hexdigest()[:16]


def load_corpus(path: Path | None = None) -> Corpus:
    """The built-in corpus, or that of a text file or a folder of text files.

    The built-in one is the source of Python's standard library as installed here, without tests and generated tables
    (`STDLIB_LEFT_OUT`). A folder gives every file under it whose suffix is in `TEXT_SUFFIXES`, in the order of the
    paths, hidden ones left out. Both are split by file: a file is held out when the hash of its relative path falls in
    the lowest 5 %; empty files and repeated contents are dropped first. Of a single file the last 5 % is held out.

    Raises:
        DataError: the path is missing, unreadable, empty or no text, or too small to split.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(file for file in root.rglob("*.py") if not STDLIB_LEFT_OUT & set(file.relative_to(root).parts))
        remedy = "this Python ships no library source: give a text file or folder with --data"
        return _split_by_file(root, files, "Python standard library", remedy)
    if not path.exists():
        raise DataError(explain(f"--data {path}", "a text file or folder", "nothing there", "check the path"))
    if path.is_file():
        return _split_inside(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and _visible(file, path))
    remedy = f"it needs two or more text files ending in {', '.join(sorted(TEXT_SUFFIXES))}"
    return _split_by_file(path, files, str(path), remedy)


def held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the file of this relative path is held out: decided by its hash alone, the same on every machine."""
    return _place(name) < share


def to_stream(documents: Iterable[Document]) -> Tensor:
    """The documents as one stream of ids, uint8 (n,): before each document a `SEPARATOR`."""
    return torch.frombuffer(bytearray(b"".join(b"\0" + document.data for document in documents)), dtype=torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Windows of text with their next tokens.

    Attributes:
        ids: (B, T) int64.
        targets: (B, T) int64, the ids one further on.
        segment_ids: (B, T) int64, which document of its window a token belongs to; None when no window of the batch
            crosses from one document into the next.
    """

    ids: Tensor
    targets: Tensor
    segment_ids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return Batch(self.ids.to(device), self.targets.to(device), segments)


def segments(ids: Tensor) -> Tensor | None:
    """Document numbers (B, T) int64 of a window, from its separators; None when no row holds more than one document."""
    opens = ids == SEPARATOR
    if not opens[:, 1:].any():
        return None
    return opens.long().cumsum(dim=1)


class Windows:
    """Random windows of a stream; the batch of a step depends on the seed and the step, and on nothing else.

    Args:
        stream: (n,) uint8 ids.
        length: tokens in a window.
        batch_size: windows in a step, over all processes.
        seed: of the run.

    Raises:
        DataError: the stream is shorter than a window and its next token.
    """

    def __init__(self, stream: Tensor, *, length: int, batch_size: int, seed: int) -> None:
        if len(stream) <= length:
            remedy = "lower --length or give more text with --data"
            raise DataError(explain("training text", f"more than {length} bytes", len(stream), remedy))
        self.stream, self.length, self.batch_size, self.seed = stream, length, batch_size, seed

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The share of process `rank` of `world` in the batch of `step`; the shares in order are the whole batch."""
        generator = torch.Generator().manual_seed(mix(self.seed, step))
        starts = torch.randint(len(self.stream) - self.length, (self.batch_size,), generator=generator)
        share = self.batch_size // world
        starts = starts[rank * share : (rank + 1) * share]
        window = self.stream[starts[:, None] + torch.arange(self.length + 1)].long()  # (B, T+1)
        ids = window[:, :-1]
        return Batch(ids, window[:, 1:], segments(ids))


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, without the patterns that adding them would leave."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1


def _place(name: str) -> float:
    """A number in [0, 1) drawn by the hash of `name`."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def _visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        remedy = "check its permissions or leave it out"
        raise DataError(explain(str(path), "a readable file", error.strerror or error, remedy)) from error
    position = data.find(SEPARATOR)
    if position >= 0:
        remedy = "leave it out or convert it to UTF-8"
        raise DataError(explain(str(path), "text", f"a binary file (byte 0 at {position})", remedy))
    return data


def _split_by_file(root: Path, files: list[Path], source: str, remedy: str) -> Corpus:
    documents, seen = [], set()
    for file in files:
        data = _read(file)
        if data and data not in seen:
            seen.add(data)
            documents.append(Document(name=file.relative_to(root).as_posix(), data=data))
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[held_out(document.name)].append(document)
    train, held = sides
    if not held and len(train) > 1:
        held.append(train.pop())
    if not held or not train:
        got = f"{len(documents)} of {len(files)} files with text in them"
        raise DataError(explain(str(root), "text to train on and text to hold out", got, remedy))
    held.sort(key=lambda document: _place(document.name))  # so that a part from the start is a sample of the whole
    return Corpus(source=source, train=tuple(train), held_out=tuple(held))


def _split_inside(path: Path) -> Corpus:
    data = _read(path)
    cut = len(data) - round(HELD_OUT_SHARE * len(data))
    while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # never inside a character
        cut += 1
    if not 0 < cut < len(data):
        raise DataError(explain(str(path), "some kilobytes of text", f"{len(data)} bytes", "give a longer text"))
    sides = [
        Document(name=f"{path.name}[{part}]", data=data[start:end])
        for part, start, end in (("train", 0, cut), ("held out", cut, len(data)))
    ]
    return Corpus(source=str(path), train=(sides[0],), held_out=(sides[1],))
