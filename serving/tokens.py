"""Text to tokens and back: whole, as it arrives, and up to where a stop string begins."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from serving.template import ChatTemplate, Message
from synapse_arch.errors import DataError, explain
from synapse_arch.letters import byte_letters
from synapse_arch.model.sampling import Found

DOCUMENT = 0
"""The id that opens and ends a document in every vocabulary of this library."""
OPENING = "<|document|>"
"""How a tokenizer's file calls it."""
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_ESCAPED = re.compile("([\udc80-\udcff])")
"""How Python escapes a byte that is no UTF-8."""

Encode = Callable[[str, bool], list[int]]
"""Text to ids; True reads the names of special tokens as these tokens, False as any other text."""


class Codec:
    """A model's tokens.

    Args:
        pieces: the bytes that each id stands for; none for special tokens, which are no text.
        encode: text to ids.
        opening: the id in front of whatever is read from a fresh state; None for none.
        ends: ids that end an output and are no part of it.
        template: how a chat is written.
        specials: the names of special tokens, by their ids.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        encode: Encode,
        *,
        opening: int | None = DOCUMENT,
        ends: Iterable[int] = (DOCUMENT,),
        template: ChatTemplate | None = None,
        specials: Mapping[int, str] | None = None,
    ) -> None:
        self._pieces, self._encode = tuple(pieces), encode
        self.opening, self.ends = opening, frozenset(ends)
        self.template = ChatTemplate.plain() if template is None else template
        self._bytes = {piece: token for token, piece in enumerate(self._pieces) if len(piece) == 1}
        self._names = dict(specials or {})
        self.specials = tuple(self._names.values())

    @property
    def vocab_size(self) -> int:
        """How many ids it knows."""
        return len(self._pieces)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, special tokens' names being text like any other; `decode` gives it back.

        >>> byte_codec().encode("né")
        [110, 195, 169]

        Raises:
            DataError: half a surrogate pair, or the character U+0000, which would open a document.
        """
        _check(text)
        return self._encode(text, False)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids that stand for `data`, which may be no text: characters as `encode` reads them, other bytes one by one.

        >>> byte_codec().encode_bytes(b"a" + "é".encode()[:1])
        [97, 195]
        """
        ids: list[int] = []
        for part in _ESCAPED.split(data.decode("utf-8", errors="surrogateescape")):
            if _ESCAPED.fullmatch(part):
                byte = part.encode("utf-8", errors="surrogateescape")
                ids += [self._bytes[byte]] if byte in self._bytes else self._encode("\ufffd", False)
            else:
                ids += self._encode(part, False)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; none for special ids and those beyond the tokenizer's."""
        return b"" if token in self.ends or token >= len(self._pieces) else self._pieces[token]

    def name(self, token: int) -> str:
        """What an id that stands for no bytes is called: as the tokenizer calls it, else by its number.

        >>> byte_codec().name(0)
        '<|document|>'
        """
        return self._names.get(token, f"<|{token}|>")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decoder(self) -> codecs.IncrementalDecoder:
        """Bytes to text as they arrive: `decode(data)` gives the characters that are whole, `final=True` the rest."""
        return codecs.getincrementaldecoder("utf-8")(errors="replace")

    def opened(self, ids: Sequence[int]) -> list[int]:
        """`ids` as a fresh state reads them: the opening token in front, unless it is there."""
        if self.opening is None or list(ids[:1]) == [self.opening]:
            return list(ids)
        return [self.opening, *ids]

    def chat(self, messages: Sequence[Message], *, follows: bool = False) -> list[int]:
        """The ids of a chat up to where the assistant's answer begins.

        Args:
            messages: in their order.
            follows: the state has read an earlier part of the chat that ends with the assistant's answer; only what
                comes after it is given.

        Raises:
            DataError: as `encode`, or the template does not take these messages.
        """
        ids: list[int] = []
        for text, is_template in self.template.render(messages, self.specials, follows=follows):
            _check(text)
            ids += self._encode(text, is_template)
        return ids if follows else self.opened(ids)


class TextStopMatcher:
    """Finds stop strings in the bytes of a growing output, wherever tokens begin and end in them.

    Args:
        stops: stop strings, none of them empty.
        codec: what the tokens stand for; its `ends` stop the output too.

    Attributes:
        rest: once matched, the bytes in front of the stop string that the token shares in which it begins: they are
            text of the output, while the token is none of it.
    """

    def __init__(self, stops: Sequence[str], codec: Codec) -> None:
        self._stops = tuple(stop.encode("utf-8") for stop in stops)
        self._codec = codec
        self._longest = max(map(len, self._stops), default=0)
        self._tail: deque[bytes] = deque()
        self._size = 0
        self.rest = b""

    def push(self, token: int) -> Found:
        """Takes the next token: how many of the last tokens end the output here, how many may begin to."""
        if token in self._codec.ends:
            return Found(1, 0)
        piece = self._codec.token_bytes(token)
        self._tail.append(piece)
        self._size += len(piece)
        while self._tail and self._size - len(self._tail[0]) >= self._longest + len(piece):
            self._size -= len(self._tail.popleft())
        data = b"".join(self._tail)
        starts = [at for stop in self._stops if (at := data.find(stop)) >= 0]
        if starts:
            matched, covered = self._tokens(len(data) - min(starts))
            self.rest = data[len(data) - covered : min(starts)]
            return Found(matched, 0)
        begun = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if data.endswith(stop[:n]))
        return Found(0, self._tokens(max(begun, default=0))[0])

    def left(self) -> list[int]:
        """Once matched: `rest` as tokens."""
        return self._codec.encode_bytes(self.rest)

    def _tokens(self, size: int) -> tuple[int, int]:
        """How many of the last tokens hold the last `size` bytes, and how many bytes they are."""
        count = covered = 0
        for piece in reversed(self._tail):
            if covered >= size:
                break
            count, covered = count + 1, covered + len(piece)
        return count, covered


def byte_codec(template: ChatTemplate | None = None, ends: Iterable[int] = ()) -> Codec:
    """Text as its UTF-8 bytes, each its own id; the end of a document and `ends` end an output."""
    pieces = [bytes((value,)) for value in range(256)]

    def encode(text: str, _: bool) -> list[int]:
        return list(text.encode("utf-8"))

    return Codec(pieces, encode, ends={DOCUMENT, *ends}, template=template, specials={DOCUMENT: OPENING})


def load_codec(folder: Path, vocab_size: int) -> Codec:
    """The tokenizer and the chat template of a model's folder; bytes where it has no tokenizer.json.

    Raises:
        DataError: a file is damaged, no byte-level tokenizer, or not for a vocabulary of that size.
    """
    config = _read_json(folder / TOKENIZER_CONFIG)
    names = {key: _name(config.get(key)) for key in ("bos_token", "eos_token")}
    template = _template(folder, config, names)
    given = _read_json(folder / GENERATION_CONFIG).get("eos_token_id")
    ended = [end for end in (given if isinstance(given, list) else [given]) if isinstance(end, int)]
    path = folder / TOKENIZER
    if not path.is_file():
        if vocab_size != 256:
            remedy = f"put the {TOKENIZER} that the model was trained with into its folder"
            raise DataError(explain(str(folder), f"a {TOKENIZER} for {vocab_size} entries", "none", remedy))
        return byte_codec(template, ended)
    inner = _read_tokenizer(path)
    pieces = _pieces(inner, path)
    if len(pieces) > vocab_size:
        remedy = "it is another model's tokenizer"
        raise DataError(explain(str(path), f"at most {vocab_size} entries", len(pieces), remedy))
    opening = DOCUMENT if inner.id_to_token(DOCUMENT) == OPENING else inner.token_to_id(names["bos_token"] or "")
    ends = {end for end in (opening, inner.token_to_id(names["eos_token"] or ""), *ended) if end is not None}
    specials = {number: token.content for number, token in inner.get_added_tokens_decoder().items() if token.special}

    def encode(text: str, is_template: bool) -> list[int]:
        inner.encode_special_tokens = not is_template
        ids: list[int] = inner.encode(text, add_special_tokens=False).ids
        return ids

    return Codec(pieces, encode, opening=opening, ends=ends, template=template, specials=specials)


def _template(folder: Path, config: Mapping[str, Any], names: Mapping[str, str | None]) -> ChatTemplate | None:
    """The checkpoint's own, None for none; a file counts more than the tokenizer's configuration."""
    path = folder / TEMPLATE
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several with names
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if source is None:
        return None
    if not isinstance(source, str):
        raise DataError(explain(f"{folder}: chat_template", "a template", type(source).__name__))
    return ChatTemplate(source, variables={key: name or "" for key, name in names.items()})


def _name(token: object) -> str | None:
    """The name of a token, which may be written with its properties."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(explain(str(path), "a JSON file", error, "copy it again")) from error
    if not isinstance(values, dict):
        raise DataError(explain(str(path), "a JSON object", type(values).__name__, "copy it again"))
    return values


def _read_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(explain(str(path), "a tokenizer's file", error, "copy it again")) from error


def _pieces(inner: Any, path: Path) -> list[bytes]:
    """The bytes of each id of a byte-level tokenizer: none for special tokens, plain UTF-8 for other added ones."""
    letters, added = byte_letters(), inner.get_added_tokens_decoder()
    by_id = {token: piece for piece, token in inner.get_vocab(with_added_tokens=True).items()}
    pieces = []
    try:
        for token in range(max(by_id, default=-1) + 1):
            if token in added:
                pieces.append(b"" if added[token].special else added[token].content.encode("utf-8"))
            else:
                pieces.append(bytes(letters[letter] for letter in by_id.get(token, "")))
    except KeyError as error:
        remedy = "train one with python -m recipes.tokenizer"
        raise DataError(explain(str(path), "a byte-level tokenizer", f"the letter {error}", remedy)) from error
    return pieces


def _check(text: str) -> None:
    """Raises DataError for what is no character, or none that a document may hold."""
    if found := _NO_TEXT.search(text):
        remedy = "remove NUL and lone surrogates"
        raise DataError(explain("text", "characters of a text", f"{found[0]!r} at {found.start()}", remedy))
