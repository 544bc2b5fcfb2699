"""OpenAI's shapes of an answer, whole and in chunks. Pure: pieces in, dictionaries out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from serving.generation import Generation, Piece, Route
from serving.requests import Done, PromptRead, PromptToken, Token
from serving.runtime import Runtime
from serving.tokens import Codec

Top = Sequence[tuple[int, float]]


class Answer(ABC):
    """Collects pieces; each also gives the chunks that a stream sends for it.

    Args:
        runtime: the server's parts.
        generation: where the pieces come from.
        logprobs: whether to report log-probabilities.
    """

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, runtime: Runtime, generation: Generation, *, logprobs: bool) -> None:
        self._codec, self._generation, self._logprobs = runtime.codec, generation, logprobs
        self._count = generation.count
        self._head = {
            "id": f"{self.prefix}-{generation.request_id.removeprefix('req-')}",
            "created": generation.created,
            "model": runtime.settings.model_id,
            "system_fingerprint": f"fp_{runtime.weights[:12]}",
            "seed": generation.seed,
            "session_id": generation.session.id if generation.session else None,
            "trace_id": generation.trace.id if generation.trace else None,
        }
        self._texts = ["" for _ in range(self._count)]
        self._finish: list[str | None] = [None] * self._count
        self._prompt_tokens: dict[int, int] = {}
        self._output_tokens = 0

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """The chunks in front of the first piece, sent before the prompt is read."""

    @abstractmethod
    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """Adds a piece; the chunks to send for it."""

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """One output, complete."""

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self.choice(index) for index in range(self._count)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read and written; a prompt with several outputs counts once."""
        read = sum(self._prompt_tokens.values())
        total = read + self._output_tokens
        return {"prompt_tokens": read, "completion_tokens": self._output_tokens, "total_tokens": total}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}

    def _chunk(self, choice: dict[str, Any], route: Route | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        return chunk if route is None else {**chunk, "route": route}

    def _note(self, piece: Piece) -> None:
        """What every shape keeps of a piece."""
        self._texts[piece.index] += piece.text
        if isinstance(piece.event, Done):
            self._finish[piece.index] = piece.event.finish
            self._prompt_tokens[piece.index // self._generation.choices] = piece.event.prompt_tokens
            self._output_tokens += piece.event.output_tokens


class CompletionAnswer(Answer):
    """The shape of /v1/completions.

    Args:
        runtime, generation, logprobs: as `Answer`.
        echo: the prompts' text comes first.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, runtime: Runtime, generation: Generation, *, logprobs: bool, echo: bool) -> None:
        super().__init__(runtime, generation, logprobs=logprobs)
        self._echo = echo
        self._entries: list[list[dict[str, Any]]] = [[] for _ in range(self._count)]

    def opening(self) -> list[dict[str, Any]]:
        """An empty text for each output, so that a client knows at once under which names it runs."""
        return [self._chunk(self._choice(index, "", None, [])) for index in range(self._count)]

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Answer`."""
        event, index, text = piece.event, piece.index, piece.text
        entries: list[dict[str, Any]] = []
        if isinstance(event, PromptRead):
            if not self._echo:
                return []
            text = self._codec.decode(self._generation.prompt(index))
            self._texts[index] += text
            entries = self._prompt_entries(event.logprobs or [], index)
        else:
            if isinstance(event, Token) and self._logprobs:
                offset = len(self._texts[index]) + _broken(self._codec, event.id, text)
                entries = [_entry(self._codec, event, offset)]
            self._note(piece)
        self._entries[index] += entries
        finish = event.finish if isinstance(event, Done) else None
        return [self._chunk(self._choice(index, text, finish, entries), piece.route)]

    def choice(self, index: int) -> dict[str, Any]:
        """See `Answer`."""
        return self._choice(index, self._texts[index], self._finish[index], self._entries[index])

    def _prompt_entries(self, scored: Sequence[PromptToken], index: int) -> list[dict[str, Any]]:
        """The records of a prompt's tokens, but for the opening one that the server put in front."""
        if not self._logprobs:
            return []
        prompt, offset, entries = self._generation.prompt(index), 0, []
        decoder = self._codec.decoder()
        for token in scored[len(scored) - len(prompt) :]:
            text = decoder.decode(self._codec.token_bytes(token.id))
            entries.append(_entry(self._codec, token, offset + _broken(self._codec, token.id, text)))
            offset += len(text)
        return entries

    def _choice(self, index: int, text: str, finish: str | None, entries: list[dict[str, Any]]) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {name: [entry[name] for entry in entries] for name in names}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatAnswer(Answer):
    """The shape of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, runtime: Runtime, generation: Generation, *, logprobs: bool) -> None:
        super().__init__(runtime, generation, logprobs=logprobs)
        self._entries: list[list[dict[str, Any]]] = [[] for _ in range(self._count)]

    def opening(self) -> list[dict[str, Any]]:
        """Whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(self._delta(index, delta, None, [])) for index in range(self._count)]

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Answer`."""
        event = piece.event
        self._note(piece)
        if isinstance(event, PromptRead):
            return []
        if isinstance(event, Done):
            delta = {"content": piece.text} if piece.text else {}
            return [self._chunk(self._delta(piece.index, delta, event.finish, []))]
        entries = [_chat_entry(self._codec, event)] if self._logprobs else []
        self._entries[piece.index] += entries
        return [self._chunk(self._delta(piece.index, {"content": piece.text}, None, entries), piece.route)]

    def choice(self, index: int) -> dict[str, Any]:
        """See `Answer`."""
        message = {"role": "assistant", "content": self._texts[index], "refusal": None}
        return {
            "index": index, "message": message, "logprobs": self._scores(self._entries[index]),
            "finish_reason": self._finish[index],
        }  # fmt: skip

    def _delta(
        self, index: int, delta: dict[str, str], finish: str | None, entries: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": self._scores(entries), "finish_reason": finish}

    def _scores(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self._logprobs else None


def token_text(codec: Codec, token: int) -> str:
    """A token's text; its bytes, where they are no text by themselves, and its name, where it has none."""
    data = codec.token_bytes(token)
    if not data:
        return codec.name(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data)


def _broken(codec: Codec, token: int, text: str) -> int:
    """How many characters of the `text` that came with a token are of half a character in front of it: 0 or 1."""
    alone = codec.decoder().decode(codec.token_bytes(token))
    return max(0, len(text) - len(alone))


def _entry(codec: Codec, token: Token | PromptToken, offset: int) -> dict[str, Any]:
    """The record of a token in a completion's logprobs."""
    top: Top = token.top
    return {
        "tokens": token_text(codec, token.id),
        "token_logprobs": token.logprob,
        "top_logprobs": None if token.logprob is None else {token_text(codec, other): score for other, score in top},
        "text_offset": offset,
    }


def _chat_entry(codec: Codec, token: Token) -> dict[str, Any]:
    """The record of a token in a chat's logprobs."""
    top = [_scored(codec, other, score) for other, score in token.top]
    return {**_scored(codec, token.id, token.logprob), "top_logprobs": top}


def _scored(codec: Codec, token: int, score: float) -> dict[str, Any]:
    return {"token": token_text(codec, token), "logprob": score, "bytes": list(codec.token_bytes(token))}
