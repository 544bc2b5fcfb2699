"""`python -m serving.chat`: talk to a server in a terminal, and see which experts each token went to."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

import httpx

SHADES = " ░▒▓█"
SESSIONS = "/api/sessions"
COMMANDS = "/new forgets, /fork branches off, /session says where you are, /quit or Ctrl-D ends"
EPILOG = f"""in the conversation: {COMMANDS}

examples:
  python -m serving.chat
  python -m serving.chat --url http://127.0.0.1:9000 --temperature 0.7 --seed 1
  python -m serving.chat --session sess-0123456789abcdef0123456789abcdef
  SYNAPSE_API_KEY=$(cat key) python -m serving.chat --url https://models.example.org
  echo "Write a haiku" | python -m serving.chat --no-routes
"""


class ServerError(Exception):
    """The server refused, in its own words, or cannot be reached."""


class Client:
    """A conversation with a server.

    Args:
        http: where the server is, and the key.
        options: sampling fields of every request.
        session: a session to go on with; None begins one with the first message.
    """

    def __init__(self, http: httpx.Client, options: dict[str, Any], session: str | None = None) -> None:
        self._http, self._options, self.session = http, options, session

    def say(self, text: str) -> Iterator[dict[str, Any]]:
        """The chunks of the answer, as they come.

        Raises:
            ServerError: it did not come to its end.
        """
        if self.session is None:
            self.session = self._call("POST", SESSIONS)["id"]
        body = {
            "messages": [{"role": "user", "content": text}], "stream": True, "session_id": self.session,
            "stream_options": {"include_usage": True}, **self._options,
        }  # fmt: skip
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise ServerError(_reason(response))
            for line in _lines(response.iter_bytes()):
                data = line.removeprefix(b"data: ")
                if data == line or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ServerError(chunk["error"]["message"])
                yield chunk

    def fork(self) -> None:
        """Goes on in a branch; the session up to here stays as it is."""
        if self.session is not None:
            self.session = self._call("POST", f"{SESSIONS}/{self.session}/fork")["id"]

    def about(self) -> str:
        """Where the conversation stands."""
        if self.session is None:
            return "no session yet"
        found = self._call("GET", f"{SESSIONS}/{self.session}")
        return f"{found['id']}: {found['tokens']} tokens in {found['bytes']} bytes, version {found['version']}"

    def _call(self, method: str, path: str) -> dict[str, Any]:
        response = self._http.request(method, path)
        if response.is_error:
            raise ServerError(_reason(response))
        found: dict[str, Any] = response.json()
        return found


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Lines as an event stream has them: what else separates lines of text is text here."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


class Screen:
    """Text that grows in a terminal, with one line below it that changes.

    Args:
        out: the terminal.
        width: its columns.
    """

    def __init__(self, out: TextIO, width: int) -> None:
        self._out, self._width, self._column = out, width, 0

    def write(self, text: str, below: str) -> None:
        """Adds to the text, and shows what stands below it now."""
        for letter in plain(text):
            size = 2 if unicodedata.east_asian_width(letter) in "WF" else 0 if unicodedata.combining(letter) else 1
            if letter == "\n" or self._column + size > self._width:
                self._out.write("\n\033[K")
                self._column = 0
            if letter != "\n":
                self._out.write(letter)
                self._column += size
        self._out.write(f"\n\033[2m{below[: self._width - 1]}\033[0m\033[K\033[A\033[{self._column + 1}G")
        self._out.flush()

    def end(self) -> None:
        """Leaves the last line below, and goes on under it."""
        self._out.write("\n\n")
        self._out.flush()


def show(chunks: Iterable[dict[str, Any]], out: TextIO, *, width: int | None) -> None:
    """Writes an answer as it comes, and below it the experts of each token; without a width the text alone."""
    screen = None if width is None else Screen(out, width)
    below = ""
    for chunk in chunks:
        text = "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
        below = routing_line(chunk["route"]) if "route" in chunk else below
        if usage := chunk.get("usage"):
            below = f"{usage['prompt_tokens']} tokens read, {usage['completion_tokens']} written  {below}"
        if screen is None:
            out.write(plain(text))
            out.flush()
        else:
            screen.write(text, below)
    if screen is None:
        out.write("\n")
    else:
        screen.end()


def routing_line(route: Sequence[Sequence[Sequence[float]]]) -> str:
    """One cell a layer: its experts, each with a shade for its weight.

    >>> routing_line([[[3, 0.8], [1, 0.2]], [[0, 0.5], [2, 0.5]]])
    'L0 3█1░ L1 0▓2▓'
    """
    cells = []
    for layer, experts in enumerate(route):
        shaded = (f"{int(expert)}{SHADES[min(4, 1 + int(weight * 4))]}" for expert, weight in experts)
        cells.append(f"L{layer} {''.join(shaded)}")
    return " ".join(cells)


def plain(text: str) -> str:
    r"""Text without what would steer the terminal.

    >>> plain("a\x1b[2Jb\tc")
    'a?[2Jb\tc'
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)


def _reason(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m serving.chat", description="Talk to a server in a terminal; it remembers the conversation.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = made.add_argument
    add("--url", default="http://127.0.0.1:8000", help="where the server is (http://127.0.0.1:8000)")
    add("--session", metavar="ID", help="go on with this one (a new one)")
    add("--max-tokens", type=int, metavar="N", help="of an answer (the server's default)")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token (1)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this probability together (1)")
    add("--top-k", type=int, metavar="K", help="draw from the k likeliest tokens (all)")
    add("--seed", type=int, metavar="N", help="makes the draws repeatable")
    add("--no-routes", action="store_true", help="do not show which experts each token went to")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Talks until the input ends; returns 0 then, 2 after an error."""
    given = parser().parse_args(arguments)
    fields = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    options = {name: getattr(given, name) for name in fields if getattr(given, name) is not None}
    routes = sys.stdout.isatty() and not given.no_routes
    if routes:
        options["trace"] = {"level": "routes", "inline": True}
    key = os.environ.get("SYNAPSE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(10, read=None)
    try:
        with httpx.Client(base_url=given.url, headers=headers, timeout=timeout) as http:
            talk(Client(http, options, given.session), routes=routes)
    except (ServerError, httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"error: {given.url}: {error}", file=sys.stderr)
        return 2
    return 0


def talk(client: Client, *, routes: bool) -> None:
    """Reads lines and shows answers. A refusal ends it where nobody sits in front of it.

    Raises:
        ServerError, httpx.HTTPError: the first answer, or one to input that is no terminal, failed.
    """
    watched = sys.stdin.isatty()
    if watched:
        print(COMMANDS)
    while True:
        try:
            text = input("> " if watched else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/quit":
            return
        try:
            answer(client, text, routes=routes)
        except KeyboardInterrupt:
            print("\n(given up; the session is as it was before)")
        except ServerError as error:
            if not watched:
                raise
            print(f"error: {error}", file=sys.stderr)


def answer(client: Client, text: str, *, routes: bool) -> None:
    """Does what one line of input asks for."""
    if text == "/new":
        client.session = None
    elif text == "/fork":
        client.fork()
        print(client.about())
    elif text == "/session":
        print(client.about())
    elif text.startswith("/"):
        print(COMMANDS)
    elif text:
        show(client.say(text), sys.stdout, width=shutil.get_terminal_size().columns if routes else None)


if __name__ == "__main__":
    sys.exit(main())
