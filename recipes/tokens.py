"""A corpus as tokens on disk, mapped into memory: written once, whole or not at all, and shared by all who read it.

    CACHE/3f2a…-bytes/train.bin  held_out.bin  tokens.json

The folder's name is the content's fingerprint and the tokenizer's: another text or vocabulary is another folder, and a
folder that is there is right. Writers wait for each other at a lock that the system lifts when its holder dies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock
from torch import Tensor

from recipes.data import digest, fingerprint, place, split
from recipes.sources import SEPARATOR, Document, Source
from recipes.tokenizer import Tokenizer
from synapse_arch.errors import DataError, explain

TOKENS_FILE = "tokens.json"
SCHEMA = 1
SIDES = ("train", "held_out")
GROUP = 1 << 22
"""Bytes of documents that are encoded together."""
Tick = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a corpus holds.

    Attributes:
        fingerprint: as `recipes.data.Corpus.fingerprint`.
        bytes: of the text to train on, and of the text held out.
        documents: how many of each.
    """

    fingerprint: str
    bytes: tuple[int, int]
    documents: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Streams of token ids, each document opened by a `SEPARATOR`.

    Attributes:
        source: what the corpus is called.
        survey: what it holds.
        train: (n,) integer ids to train on.
        held_out: (m,) integer ids held out.
    """

    source: str
    survey: Survey
    train: Tensor = field(repr=False)
    held_out: Tensor = field(repr=False)


def default_cache() -> Path:
    """Where tokens are kept unless told otherwise: `$XDG_CACHE_HOME/synapse_arch`, or the same under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synapse_arch"


def survey(source: Source, tick: Tick = lambda size: None) -> Survey:
    """Reads a corpus through without keeping it.

    Args:
        source: the corpus.
        tick: told the bytes of each document as it has been read.

    Raises:
        DataError: as `recipes.data.split`.
    """
    return _Tally().over(split(source), tick)


def prepare(source: Source, tokenizer: Tokenizer, cache: Path, tick: Tick = lambda size: None) -> Path:
    """The folder with the tokens of a corpus, made where it is missing.

    Args:
        source: the corpus; it is read through to know its content.
        tokenizer: what makes ids of it.
        cache: the folder of all such folders.
        tick: told the bytes read; twice as many where the tokens have to be made.

    Raises:
        DataError: as `recipes.data.split`; or the cache cannot be written to, or its disk is too full.
    """
    found = survey(source, tick)
    folder = cache / f"{found.fingerprint}-{tokenizer.fingerprint}"
    if (folder / TOKENS_FILE).exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{folder.name}.lock"):
            if not (folder / TOKENS_FILE).exists():
                _write(source, tokenizer, folder, found, tick)
    except OSError as error:
        remedy = "free some space or choose another --cache"
        raise DataError(explain(f"--cache {cache}", "a folder to write to", error.strerror or error, remedy)) from error
    return folder


def load(folder: Path, source: str) -> Tokens:
    """Maps what `prepare` wrote into memory; pages are read when they are touched, and shared between processes.

    Raises:
        DataError: the folder is damaged.
    """
    try:
        values = json.loads((folder / TOKENS_FILE).read_text(encoding="utf-8"))
        dtype = getattr(torch, values["dtype"])
        streams = []
        for side, count in zip(SIDES, values["tokens"], strict=True):
            path = folder / f"{side}.bin"
            if path.stat().st_size != count * dtype.itemsize:
                raise ValueError(f"{path.name} is {path.stat().st_size} bytes long, not {count * dtype.itemsize}")
            streams.append(torch.from_file(str(path), shared=False, size=count, dtype=dtype))
        found = Survey(
            **{**values["survey"], **{name: tuple(values["survey"][name]) for name in ("bytes", "documents")}}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(explain(str(folder), "a folder of tokens", error, "remove it; it will be made anew")) from error
    return Tokens(source=source, survey=found, train=streams[0], held_out=streams[1])


class _Tally:
    """Counts and digests of the documents that pass."""

    def __init__(self) -> None:
        self.train: list[bytes] = []
        self.held: list[tuple[float, bytes]] = []
        self.bytes = [0, 0]

    def over(self, documents: Iterator[tuple[Document, bool]], tick: Tick) -> Survey:
        """The survey of all documents, which are let go."""
        for document, held in documents:
            self.add(document, held)
            tick(len(document.data))
        return self.survey()

    def add(self, document: Document, held: bool) -> None:
        self.bytes[held] += len(document.data)
        if held:
            self.held.append((place(document.name), digest(document)))
        else:
            self.train.append(digest(document))

    def survey(self) -> Survey:
        held = [content for _, content in sorted(self.held, key=lambda pair: pair[0])]
        return Survey(
            fingerprint=fingerprint(self.train, held),
            bytes=(self.bytes[0], self.bytes[1]),
            documents=(len(self.train), len(held)),
        )


def _write(source: Source, tokenizer: Tokenizer, folder: Path, expected: Survey, tick: Tick) -> None:
    """Writes the folder aside and renames it. Only the held-out side is in memory, as it has to be sorted."""
    needed = sum(expected.bytes) * tokenizer.dtype.itemsize + sum(expected.documents) * tokenizer.dtype.itemsize
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        remedy = "free some space or choose another --cache"
        got = f"{free / 1e6:.1f} MB"
        raise DataError(explain(f"--cache {folder.parent}", f"{needed / 1e6:.1f} MB free", got, remedy))
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of a writer that was killed: the lock is ours
    aside.mkdir()
    try:
        tally, kept, counts = _Tally(), [], [0, 0]
        with (aside / "train.bin").open("wb") as file:
            for group in _groups(split(source)):
                for (document, held), ids in zip(group, tokenizer.read([pair[0] for pair in group]), strict=True):
                    tally.add(document, held)
                    tick(len(document.data))
                    if held:
                        kept.append((place(document.name), ids))
                    else:
                        counts[0] += _append(file, ids)
        with (aside / "held_out.bin").open("wb") as file:
            for _, ids in sorted(kept, key=lambda pair: pair[0]):
                counts[1] += _append(file, ids)
        if tally.survey() != expected:
            raise DataError(explain(source.name, "text that stays as it is", "another the second time", "start again"))
        values = {"schema": SCHEMA, "dtype": str(tokenizer.dtype).removeprefix("torch."), "tokens": counts}
        values |= {"survey": asdict(expected), "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        (aside / TOKENS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # damaged: without its last file
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _groups(documents: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    """The documents in lists of about `GROUP` bytes."""
    group: list[tuple[Document, bool]] = []
    size = 0
    for pair in documents:
        group.append(pair)
        size += len(pair[0].data)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _append(file: BinaryIO, ids: Tensor) -> int:
    """Writes a separator and the ids of a document; returns how many tokens these are."""
    opened = torch.cat([ids.new_full((1,), SEPARATOR), ids])
    file.write(opened.numpy().tobytes())
    return len(opened)
