"""A chat as one text, written by the checkpoint's template or a plain one.

What people say can hold the name of a special token; only the template may mean it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from synapse_arch.errors import DataError, explain

PLAIN = r"""
{%- for message in messages -%}
{{- {"user": "User:\n", "assistant": "Assistant:\n"}.get(message.role, "") ~ message.content ~ "\n\n" -}}
{%- endfor -%}
{{- "Assistant:\n" if add_generation_prompt -}}
"""
"""For a model that has none: `User:`, `Assistant:` and the texts on lines of their own, an empty line between turns."""
PLAIN_STOP = "\n\nUser:"


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class ChatTemplate:
    """A Jinja template in a sandbox, with what templates of Hugging Face's format expect.

    Args:
        source: the template.
        variables: what else it can name, such as bos_token.
        stops: strings that end an answer in the absence of a token for that.

    Raises:
        DataError: no valid template.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str] | None = None, stops: Sequence[str] = ()) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(explain("chat template", "a Jinja template", error, "correct it in the folder")) from error
        self._variables = dict(variables or {})
        self.stops = tuple(stops)

    @classmethod
    def plain(cls) -> ChatTemplate:
        """The one for models without their own."""
        return cls(PLAIN, stops=(PLAIN_STOP,))

    def render(
        self, messages: Sequence[Message], specials: Sequence[str] = (), *, follows: bool = False
    ) -> Iterator[tuple[str, bool]]:
        """The chat in pieces: (text, True) by the template, (text, False) where a message has a special token's name.

        Args:
            messages: in their order.
            specials: the names of special tokens.
            follows: only what comes after an assistant's answer that stands in front of `messages`.

        Raises:
            DataError: the template does not take these messages.
        """
        shield, answer = _Shield(specials), secrets.token_hex(16)
        turns = [{"role": role, "content": shield.cover(content)} for role, content in messages]
        text = self._write([*_earlier(answer), *turns] if follows else turns)
        if follows:
            _, found, text = text.rpartition(answer)
            if not found:
                raise DataError(explain("chat template", "to write every message", "not the assistant's"))
        return shield.uncover(text)

    def _write(self, turns: list[dict[str, str]]) -> str:
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._variables)
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(explain("messages", "what the model's chat template takes", error)) from error


class _Shield:
    """Stands nonces, which nobody can guess, in the place of special tokens' names while a template is at work."""

    def __init__(self, specials: Sequence[str]) -> None:
        self._mark = secrets.token_hex(16)
        self._names = sorted(specials, key=len, reverse=True)

    def cover(self, text: str) -> str:
        for number, name in enumerate(self._names):
            text = text.replace(name, f"{self._mark}.{number}.")
        return text

    def uncover(self, text: str) -> Iterator[tuple[str, bool]]:
        first, *others = text.split(f"{self._mark}.")
        if first:
            yield first, True
        for other in others:
            number, _, rest = other.partition(".")
            yield self._names[int(number)], False
            if rest:
                yield rest, True


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are written as they are."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _earlier(answer: str) -> list[dict[str, str]]:
    """A chat with this answer, a nonce that can be found again in what the template writes."""
    return [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
