"""Text in, batches out: what is held out, the corpus in memory, and the names of the data modules in one place.

A corpus is a list of documents. As token ids it is one stream, each document opened by the id 0, which no text holds:
`0 d o c u m e n t 0 a n o t h e r`. So every token has something to be predicted from, and a model that emits 0 has
ended its document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recipes.sources import SEPARATOR, STDLIB_LEFT_OUT, TEXT_SUFFIXES, Document, Source, open_source
from recipes.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from recipes.windows import Batch, Rows, Windows, mix, segments
from synapse_arch.errors import DataError, explain

__all__ = [
    "Batch", "ByteTokenizer", "Corpus", "Document", "Rows", "SEPARATOR", "STDLIB_LEFT_OUT", "Source", "TEXT_SUFFIXES",
    "Tokenizer", "Windows", "held_out", "load_corpus", "load_tokenizer", "mix", "open_source", "segments", "split",
    "to_stream",
]  # fmt: skip

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on and documents held out; no document's bytes are in both."""

    source: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any byte of the corpus or of its split."""
        return fingerprint(*([digest(document) for document in side] for side in (self.train, self.held_out)))


def load_corpus(path: Path | None = None, *, field: str = "text") -> Corpus:
    """The built-in corpus, or that of a path, in memory; see `open_source` and `split`.

    Raises:
        DataError: the path is missing, unreadable, empty or no text, or too small to split.
    """
    source = open_source(path, field=field)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document, held in split(source):
        sides[held].append(document)
    sides[1].sort(key=lambda document: place(document.name))
    return Corpus(source=source.name, train=tuple(sides[0]), held_out=tuple(sides[1]))


def split(source: Source) -> Iterator[tuple[Document, bool]]:
    """Each document with whether it is held out, one at a time.

    Held out is a document when the hash of its name (relative path, with the line or row) falls in the lowest 5 %, or
    the last one when no other is; empty documents and repeated contents are dropped first. Of a single text file the
    last 5 % is held out. Those who keep the held-out documents sort them by `place`, so that a part from the start is
    a sample of the whole.

    Raises:
        DataError: too few documents, or too short a text, for two sides; or as `Source.documents`.
    """
    if source.single_text:
        yield from _split_inside(next(source.documents()), str(source.root))
        return
    seen: set[bytes] = set()
    last: Document | None = None  # a document kept back, so that it can be held out when none was
    count = [0, 0]
    for document in source.documents():
        content = digest(document)
        if not document.data or content in seen:
            continue
        seen.add(content)
        if held_out(document.name):
            count[1] += 1
            yield document, True
            continue
        if last is not None:
            yield last, False
        last = document
        count[0] += 1
    alone = count[1] == 0
    if not count[0] or (alone and count[0] == 1):
        got = f"{sum(count)} of {len(source.files)} files with text in them"
        if source.root.is_file():
            got = f"{sum(count)} documents with text in them"
        raise DataError(explain(str(source.root), "text to train on and text to hold out", got, source.remedy))
    if last is not None:
        yield last, alone


def held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the document of this name is held out: decided by its hash alone, the same on every machine."""
    return place(name) < share


def place(name: str) -> float:
    """A number in [0, 1) drawn by the hash of `name`."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def digest(document: Document) -> bytes:
    """The hash of a document's content."""
    return hashlib.sha256(document.data).digest()


def fingerprint(*sides: Iterable[bytes]) -> str:
    """Sixteen hex digits of a corpus, from the digests of its documents, side by side."""
    whole = hashlib.sha256()
    for side in sides:
        for content in side:
            whole.update(content)
        whole.update(b"|")
    return whole.hexdigest()[:16]


def to_stream(documents: Iterable[Document]) -> Tensor:
    """The documents as one stream of bytes, uint8 (n,): before each document a `SEPARATOR`."""
    return torch.frombuffer(bytearray(b"".join(b"\0" + document.data for document in documents)), dtype=torch.uint8)


def _split_inside(document: Document, path: str) -> Iterator[tuple[Document, bool]]:
    data = document.data
    cut = len(data) - round(HELD_OUT_SHARE * len(data))
    while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:  # never inside a character
        cut += 1
    if not 0 < cut < len(data):
        raise DataError(explain(path, "some kilobytes of text", f"{len(data)} bytes", "give a longer text"))
    yield Document(name=f"{document.name}[train]", data=data[:cut]), False
    yield Document(name=f"{document.name}[held out]", data=data[cut:]), True
