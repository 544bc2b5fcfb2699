"""Text to tokens and back: bytes as they are, or a byte-level BPE trained here.

    python -m recipes.tokenizer --data my_notes/ --vocab-size 2048 --out my_notes.tokenizer.json

Every vocabulary keeps id 0 for the start of a document; every other id stands for a fixed string of bytes.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sources import SEPARATOR, Document, open_source
from synapse_arch.errors import ConfigError, DataError, SynapseError, explain
from synapse_arch.letters import byte_letters

BYTES = "bytes"
"""The name of the tokenizer that needs no file."""
TOKENIZER_FILE = "tokenizer.json"
OPENING = "<|document|>"
"""How a BPE's file calls id 0; text that reads so is split like any other."""
MOST_ENTRIES = 1 << 24
"""The library makes room for all of them at once."""
EPILOG = """examples:
  python -m recipes.tokenizer --data my_notes/ --vocab-size 2048 --out notes.json
  python -m recipes.tokenizer --data pairs.jsonl --field prompt --vocab-size 8192 --out pairs.json
  accelerate launch recipes/train.py --data my_notes/ --tokenizer notes.json
"""


class Tokenizer(ABC):
    """Ids that stand for strings of bytes.

    Args:
        pieces: the bytes of each id; of `SEPARATOR` they are not part of any text.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = tuple(pieces)
        self.vocab_size = len(self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest integers that hold every id."""
        return torch.uint8 if self.vocab_size <= 2**8 else torch.uint16 if self.vocab_size <= 2**16 else torch.int32

    @cached_property
    def sizes(self) -> Tensor:
        """(V,) int64: bytes of text each id stands for, 0 for the separator."""
        return torch.tensor([0 if token == SEPARATOR else len(piece) for token, piece in enumerate(self.pieces)])

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What tells two tokenizers apart."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            DataError: the text holds half a surrogate pair, which is no character.
        """

    @abstractmethod
    def read(self, documents: Sequence[Document]) -> list[Tensor]:
        """The ids of each document, of `dtype`, without a separator.

        Raises:
            DataError: a document is not UTF-8, where that is needed.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` needs into a folder."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for."""
        return b"".join(self.pieces[token] for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        >>> ByteTokenizer().decode([110, 195, 169])
        'né'
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` as it arrives: characters of several tokens come out once they are whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if text := decoder.decode(self.pieces[token]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class ByteTokenizer(Tokenizer):
    """Text as its UTF-8 bytes: ids 0 to 255, with 0 kept for the start and end of a document."""

    vocab_size = 256
    fingerprint = BYTES

    def __init__(self) -> None:
        super().__init__([bytes((value,)) for value in range(256)])

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`.

        >>> ByteTokenizer().encode("né")
        [110, 195, 169]

        Raises:
            DataError: the text holds half a surrogate pair, which is no character.
        """
        return list(_utf8(text))

    def read(self, documents: Sequence[Document]) -> list[Tensor]:
        """The bytes of each document, uint8, UTF-8 or not."""
        return [torch.frombuffer(bytearray(document.data), dtype=torch.uint8) for document in documents]

    def save(self, folder: Path) -> None:
        """Nothing: bytes need no file."""


class BPETokenizer(Tokenizer):
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) in the file format of the tokenizers library.

    Args:
        source: the file's text; `train_bpe` makes one.

    Raises:
        DataError: it is no such file, or its id 0 is not `OPENING`.
    """

    def __init__(self, source: str) -> None:
        library = _tokenizers()
        try:
            self._inner = library.Tokenizer.from_str(source)
            vocabulary: dict[str, int] = self._inner.get_vocab()
            by_id = {token: piece for piece, token in vocabulary.items()}
            letters = byte_letters()
            pieces = [bytes(letters[letter] for letter in by_id[token]) for token in range(1, len(by_id))]
        except Exception as error:  # the library raises bare Exceptions
            remedy = "make one with python -m recipes.tokenizer"
            raise DataError(explain("tokenizer", "a byte-level BPE's file", error, remedy)) from error
        if by_id.get(SEPARATOR) != OPENING:
            remedy = "make one with python -m recipes.tokenizer"
            raise DataError(explain("tokenizer", f"{OPENING} as id {SEPARATOR}", repr(by_id.get(SEPARATOR)), remedy))
        self._inner.encode_special_tokens = True  # text cannot open a document
        self.source = source
        super().__init__([b"", *pieces])

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any entry of the vocabulary or merge."""
        return hashlib.sha256(json.dumps(json.loads(self.source), sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
            DataError: the text holds half a surrogate pair, which is no character.
        """
        _utf8(text)
        ids: list[int] = self._inner.encode(text).ids
        return ids

    def read(self, documents: Sequence[Document]) -> list[Tensor]:
        """The ids of each document.

        Raises:
            DataError: a document is not UTF-8.
        """
        encodings = self._inner.encode_batch_fast([_text(document) for document in documents])
        return [torch.tensor(encoding.ids, dtype=torch.int32).to(self.dtype) for encoding in encodings]

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json`."""
        (folder / TOKENIZER_FILE).write_text(self.source, encoding="utf-8")


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer called "bytes", or that of a file, or of a folder that has one; a folder without one means bytes.

    Raises:
        DataError: no such file, or none of a tokenizer.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER_FILE
        if not path.exists():
            return ByteTokenizer()
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        remedy = f'give "{BYTES}" or a file that python -m recipes.tokenizer wrote'
        raise DataError(explain(f"tokenizer {path}", "a readable file", error, remedy)) from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of at most `vocab_size` entries: id 0, the 256 bytes, and merges of the commonest pairs.

    Raises:
        ConfigError: a vocabulary without room for merges, or of more than `MOST_ENTRIES`.
    """
    library = _tokenizers()
    if vocab_size <= 257:
        remedy = "that many are the separator and the bytes; without merges use the byte tokenizer"
        raise ConfigError(explain("--vocab-size", "more than 257", vocab_size, remedy))
    if vocab_size > MOST_ENTRIES:
        raise ConfigError(explain("--vocab-size", f"up to {MOST_ENTRIES}", vocab_size))
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[OPENING],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BPETokenizer(inner.to_str())


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError as error:
        remedy = "pip install 'synapse-arch[train]', or use bytes"
        raise DataError(explain("a byte-level BPE", "the tokenizers library", "not installed", remedy)) from error
    return tokenizers


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"{text[error.start]!r} at {error.start}"
        raise DataError(explain("text", "characters", got, "remove lone surrogates")) from error


def _text(document: Document) -> str:
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "convert it, leave it out, or use the byte tokenizer"
        raise DataError(explain(document.name, "UTF-8", f"a stray byte at {error.start}", remedy)) from error


def main(argv: list[str] | None = None) -> int:
    """Trains a tokenizer on the part of a corpus that is trained on; returns 0, or 2 after an error."""
    from recipes._accelerate import tqdm
    from recipes.data import split

    parser = argparse.ArgumentParser(
        prog="python -m recipes.tokenizer",
        description="Train a byte-level BPE on text, for recipes/train.py --tokenizer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="text, folder, .jsonl or .parquet; without it, Python's own source")
    parser.add_argument("--field", default="text", help="which field or column is the text (text)")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="INT", help="entries, at most (2048)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    options = parser.parse_args(argv)
    try:
        sides: tuple[list[Document], list[Document]] = ([], [])
        for document, held in split(open_source(options.data, field=options.field)):
            sides[held].append(document)
        texts = (_text(document) for document in tqdm(sides[0], "reading", unit=" documents"))
        tokenizer = train_bpe(texts, options.vocab_size)
        tokens = sum(len(ids) for ids in tokenizer.read(sides[1]))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(tokenizer.source, encoding="utf-8")
    except (SynapseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    share = sum(len(document.data) for document in sides[1]) / max(tokens, 1)
    print(f"{tokenizer.vocab_size} entries, {share:.2f} bytes a token on held-out text, in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
