"""What a byte of source text is: labels to hold the experts' choices against.

Every labelling gives each byte of a stream of documents one class.
"""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.data import Document

TOKEN_CLASSES = (
    *("comment", "docstring", "string", "keyword", "name", "number", "operator"),
    *("indentation", "space", "newline", "other"),
)
BYTE_CLASSES = ("lower", "upper", "digit", "punctuation", "space", "newline", "control", "non-ASCII")
BYTE_VALUES = tuple(f"{value:02x}" for value in range(256))
PROSE_CLASSES = ("code", "prose")
PROSE = ("comment", "docstring")
SINGLE_MODULES = "modules"
TEXT_BEGINS = (tokenize.ENCODING, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
NO_TEXT = (tokenize.NL, tokenize.COMMENT)
OPENS = tuple(getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START"))
CLOSES = tuple(getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END"))
"""Newer Pythons give formatted strings in pieces, between these."""
BOM = b"\xef\xbb\xbf"


class Labelling(NamedTuple):
    """One class a byte."""

    classes: tuple[str, ...]
    ids: Tensor
    """(n,) int64 below len(classes)."""
    whole: bool = False
    """Every document is of one class."""

    @property
    def shares(self) -> dict[str, float]:
        """What share of the bytes each class has."""
        counts = torch.bincount(self.ids, minlength=len(self.classes)) / len(self.ids)
        return dict(zip(self.classes, counts.tolist(), strict=True))


class Piece(NamedTuple):
    """A stretch of bytes of one token class."""

    start: int
    end: int
    name: str


def labellings(documents: Sequence[Document], limit: int | None = None) -> dict[str, Labelling]:
    """All labellings of the documents' bytes, one document behind the other, or of the first `limit` bytes.

    "byte_value" is the byte itself, "byte" the kind of character, "token" Python's lexical class, "next_token" that of
    the byte to be predicted, "prose" comments and docstrings against code, "package" the top folder of the document's
    path; files in no folder are one group.
    """
    tokens = [token_classes(document.data) for document in documents]
    token, following = torch.cat(tokens), torch.cat([torch.cat((ids[1:], ids[-1:])) for ids in tokens])
    data = torch.frombuffer(bytearray(b"".join(document.data for document in documents)), dtype=torch.uint8).long()
    prose = torch.tensor([name in PROSE for name in TOKEN_CLASSES]).long()
    groups = [package(document.name) for document in documents]
    names = tuple(sorted(set(groups)))
    sizes = torch.tensor([len(document.data) for document in documents])
    found = {
        "byte_value": Labelling(BYTE_VALUES, data),
        "byte": Labelling(BYTE_CLASSES, _byte_table()[data]),
        "token": Labelling(TOKEN_CLASSES, token),
        "next_token": Labelling(TOKEN_CLASSES, following),
        "prose": Labelling(PROSE_CLASSES, prose[token]),
        "package": Labelling(names, torch.tensor([names.index(g) for g in groups]).repeat_interleave(sizes), True),
    }
    return {name: labelling._replace(ids=labelling.ids[:limit]) for name, labelling in found.items()}


def package(name: str) -> str:
    """The top folder of a path inside the corpus.

    >>> package("json/decoder.py"), package("chunk.py")
    ('json', 'modules')
    """
    folder, inside, _ = name.partition("/")
    return folder if inside else SINGLE_MODULES


def token_classes(data: bytes) -> Tensor:
    """The token class of every byte (n,) int64, an index into TOKEN_CLASSES.

    Of text that is no Python all bytes but white space are "other"; see `is_python`.
    """
    ids = _white_space(data)
    try:
        pieces = list(_pieces(data))
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return ids
    for piece in pieces:
        ids[piece.start : piece.end] = TOKEN_CLASSES.index(piece.name)
    return ids


def is_python(data: bytes) -> bool:
    """Whether Python's tokenizer reads it to the end."""
    try:
        return sum(1 for _ in tokenize.tokenize(io.BytesIO(data).readline)) > 0
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return False


def _pieces(data: bytes) -> Iterator[Piece]:
    """The stretches that tokens cover, in order; a docstring is a string that is a statement by itself."""
    lines = io.BytesIO(data).readlines()
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    tokens = list(_whole_strings(tokenize.tokenize(io.BytesIO(data).readline)))
    codec = "utf-8" if tokens[0].string == "utf-8-sig" else tokens[0].string

    def offset(place: tuple[int, int]) -> int:
        row, column = place
        if row > len(lines):
            return len(data)
        bom = len(BOM) if row == 1 and data.startswith(BOM) else 0
        text = lines[row - 1][bom:].decode(codec)
        return starts[row - 1] + bom + len(text[:column].encode(codec))

    words = [token for token in tokens if token.type not in NO_TEXT]
    alone = {
        word.start
        for before, word, after in zip(words, words[1:], words[2:], strict=False)
        if word.type == tokenize.STRING
        and before.type in TEXT_BEGINS
        and after.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
    }
    for token in tokens:
        if name := _name(token, alone):
            yield Piece(offset(token.start), offset(token.end), name)


def _whole_strings(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """The tokens with every formatted string as one."""
    opened: list[tokenize.TokenInfo] = []
    for token in tokens:
        if token.type in OPENS:
            opened.append(token)
        elif token.type in CLOSES:
            first = opened.pop()
            if not opened:
                yield first._replace(type=tokenize.STRING, end=token.end)
        elif not opened:
            yield token


def _name(token: tokenize.TokenInfo, alone: set[tuple[int, int]]) -> str | None:
    """The class of a token; None where it covers white space alone."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type == tokenize.STRING:
        return "docstring" if token.start in alone else "string"
    names = {tokenize.COMMENT: "comment", tokenize.NUMBER: "number", tokenize.OP: "operator"}
    return names.get(token.type)


def _white_space(data: bytes) -> Tensor:
    """Indentation, spaces and newlines; the rest is "other"."""
    ids = torch.full((len(data),), TOKEN_CLASSES.index("other"))
    indentation, space, newline = (TOKEN_CLASSES.index(name) for name in ("indentation", "space", "newline"))
    begins = True
    for index, byte in enumerate(data):
        if byte in b"\r\n":
            ids[index], begins = newline, True
        elif byte in b" \t\f":
            ids[index] = indentation if begins else space
        else:
            begins = False
    return ids


def _byte_table() -> Tensor:
    """(256,) int64: the index into BYTE_CLASSES of every byte."""

    def name(byte: int) -> str:
        character = bytes((byte,))
        if byte >= 128:
            return "non-ASCII"
        if character in b"\r\n":
            return "newline"
        if character.isspace():
            return "space"
        kinds = {"lower": character.islower(), "upper": character.isupper(), "digit": character.isdigit()}
        return next(
            (kind for kind, fits in kinds.items() if fits), "control" if byte < 32 or byte == 127 else "punctuation"
        )

    return torch.tensor([BYTE_CLASSES.index(name(byte)) for byte in range(256)])
