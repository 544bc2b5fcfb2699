"""The terminal client: what it shows, what it sends, and what a server cannot make a terminal do."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator

import httpx
import pytest

from serving import chat
from tests.serving.servers import cycle_model, listening, make_app


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(make_app()) as found:
        yield found


class Terminal(io.StringIO):
    """A terminal of so many columns that understands what a Screen sends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        rows: list[list[str]] = [[]]
        row = column = 0
        for code, letter in re.findall(r"(\033\[\d*[AGKm])|([^\033])", self.getvalue()):
            if code.endswith("A"):
                row -= 1
            elif code.endswith("G"):
                column = int(code[2:-1]) - 1
            elif code.endswith("K"):
                del rows[row][column:]
            elif letter == "\n":
                row, column = row + 1, 0
                rows += [[] for _ in range(row + 1 - len(rows))]
            elif letter:
                rows[row] += [" "] * (column + 1 - len(rows[row]))
                assert column < self.width, "the terminal itself would break the line"
                rows[row][column] = letter
                column += 1
        return ["".join(cells).rstrip() for cells in rows]


def test_text_grows_above_a_line_that_changes() -> None:
    out = Terminal(10)
    screen = chat.Screen(out, 10)
    screen.write("Hello", "L0 a")
    assert out.lines == ["Hello", "L0 a"]
    screen.write(", wor", "L0 long, too long")
    assert out.lines == ["Hello, wor", "L0 long,"]
    screen.write("ld\nnew", "L0 c")
    assert out.lines == ["Hello, wor", "ld", "new", "L0 c"]
    screen.end()
    assert out.lines == ["Hello, wor", "ld", "new", "L0 c", ""]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What will be typed."""
    lines: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def typed(_: str = "") -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    return lines


def test_a_conversation(address: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", address, "--temperature", "0", "--max-tokens", "6"]
    said += ["Hello", "/session", "And then?"]
    assert chat.main(options) == 0
    first, about, second, _ = capsys.readouterr().out.split("\n")
    name, tokens = re.fullmatch(r"(sess-\w+): (\d+) tokens in \d+ bytes, version 2", about).groups()  # type: ignore[union-attr]
    assert int(tokens) == len("\0User:\nHello\n\nAssistant:\n") + 6
    with httpx.Client(base_url=address) as client:
        messages = [
            {"role": "user", "content": "Hello"}, {"role": "assistant", "content": first},
            {"role": "user", "content": "And then?"},
        ]  # fmt: skip
        body = {"messages": messages, "temperature": 0, "max_tokens": 6}
        whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert second == whole
    said += ["/fork", "/new", "/session", "/help"]
    assert chat.main([*options, "--session", name]) == 0
    branch, nothing, commands, _ = capsys.readouterr().out.split("\n")
    assert branch.startswith("sess-")
    assert name not in branch
    assert nothing == "no session yet"
    assert commands == chat.COMMANDS


def test_a_live_line_of_routes(address: str, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal(80)
    monkeypatch.setattr(sys, "stdout", out)
    said += ["Hello"]
    assert chat.main(["--url", address, "--seed", "1", "--top-k", "1", "--max-tokens", "5"]) == 0
    *text, below, _ = out.lines
    assert re.fullmatch(r"\d+ tokens read, 5 written  L0 (\d[░▒▓█]){2} L1 (\d[░▒▓█]){2}", below)
    assert text


@pytest.mark.parametrize("word", ["x\x1b]0;title\x07", "\x1b[2J", "a\rb", "\x9b31m"])
def test_a_server_cannot_steer_the_terminal(word: str) -> None:
    out = io.StringIO()
    chat.show([{"choices": [{"delta": {"content": word}}]}], out, width=None)
    assert not set(out.getvalue()) & set("\x1b\x07\r\x9b")


def test_refusals_end_it(address: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said += ["Hello"]
    assert chat.main(["--url", address, "--session", "sess-" + "0" * 32]) == 2
    assert "there is no such session" in capsys.readouterr().err
    said += ["Hello"]
    assert chat.main(["--url", address, "--temperature", "9"]) == 2
    assert "temperature" in capsys.readouterr().err
    said += ["Hello"]
    assert chat.main(["--url", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: http://127.0.0.1:9: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("letter", ["\u0085", "\u2028", "\r", "\x0b"])
def test_what_separates_lines_elsewhere_is_text(
    letter: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said += ["Hello"]
    with listening(make_app(cycle_model(f"a{letter}b"))) as url:
        assert chat.main(["--url", url, "--temperature", "0", "--max-tokens", "9"]) == 0
    assert chat.plain(f"a{letter}b") in capsys.readouterr().out


def test_a_stream_that_fails_says_why(address: str) -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text='data: {"error": {"message": "shutting down"}}\n\n')

    with (
        httpx.Client(transport=httpx.MockTransport(broken), base_url=address) as http,
        pytest.raises(chat.ServerError, match="shutting down"),
    ):
        list(chat.Client(http, {}, "sess-x").say("x"))
