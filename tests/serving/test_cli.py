"""`python -m serving`: what it needs, what it says before the port opens, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from serving import __main__ as cli
from synapse_arch.errors import CheckpointError
from tests.serving.programs import redis_server, serving
from tests.serving.servers import byte_model, cycle_model, listening, make_app, running, runtime, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    byte_model().save_pretrained(path)
    return path


def fails(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on the way out with code 2: one line, before any port is opened."""
    assert cli.main(arguments) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


class TestBeforeThePortOpens:
    @pytest.fixture(autouse=True)
    def _no_port(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("a port was opened")

        monkeypatch.setattr(cli, "listen", refuse)

    def test_no_demo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(tmp_path)
        assert "make one with `make demo`" in fails([], capsys)

    def test_no_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no such folder; check the path" in fails(["--model", str(tmp_path / "none")], capsys)
        assert "a folder without them" in fails(["--model", str(tmp_path)], capsys)

    @pytest.mark.parametrize("damage", ["weights missing", "weights cut off", "a pickle", "no JSON"])
    def test_a_damaged_model(
        self, folder: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        weights = broken / "model.safetensors"
        if damage == "weights missing":
            weights.unlink()
        elif damage == "weights cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif damage == "a pickle":
            weights.write_bytes(b"\x80\x04" + weights.read_bytes())
        else:
            (broken / "config.json").write_text("{")
        said = fails(["--model", str(broken)], capsys)
        assert str(broken) in said
        assert ";" in said  # a remedy

    def test_a_damaged_tokenizer(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken)
        (broken / "tokenizer.json").write_text("{")
        assert "tokenizer.json" in fails(["--model", str(broken)], capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--host", "0.0.0.0"], "an API key, as others can reach it, got none; give --api-key-file"),
            (["--slots", "0"], "--slots: expected above 0, got 0"), (["--port", "70000"], "--port: expected 0 to"),
            (["--api-key-file", "/none"], "the key file /none"), (["--device", "tpu9"], "--device: expected a device"),
            (["--session-ttl", "nan"], "--session-ttl: expected above 0, got nan"), (["--threads", "0"], "--threads"),
            (["--session-ttl", "inf"], "--session-ttl: expected a finite number of seconds, got inf; such as 1e9"),
            (["--drain", "inf"], "--drain: expected a finite"), (["--patience", "inf"], "--patience: expected a"),
        ],
    )  # fmt: skip
    def test_settings(
        self, folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert message in fails(["--model", str(folder), *arguments], capsys)

    def test_a_bad_sealing_key(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("SYNAPSE_SESSION_KEY", "not a key")
        said = fails(["--model", str(folder)], capsys)
        assert "32 bytes in base64" in said
        assert "not a key" not in said


def test_a_taken_port_and_a_bad_store(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "a free address" in fails(["--model", str(folder), "--port", port], capsys)
    assert "--session-store" in fails(["--model", str(folder), "--port", "0", "--session-store", "disk"], capsys)


def test_the_newest_step_of_a_run(folder: Path, tmp_path: Path) -> None:
    for step in (9, 10, 100):
        shutil.copytree(folder, tmp_path / f"step-{step:08d}")
    assert cli.find_model(tmp_path).name == "step-00000100"
    assert cli.find_model(folder) == folder
    with pytest.raises(CheckpointError, match="no such folder"):
        cli.find_model(tmp_path / "none")


def test_help_ends_with_examples() -> None:
    text = cli.parser().format_help()
    assert "python -m serving" in text.partition("examples:")[2]
    named = set(re.findall(r"--[a-z-]+", text))
    assert {"--model", "--session-store", "--allowed-host", "--drain"} <= named


class TestEnding:
    def test_sigterm_lets_running_answers_end(self, tmp_path: Path) -> None:
        """Not ready from the first moment, while the stream goes on to its last token; then exit 0, nothing said."""
        cycle_model("abcdefgh").save_pretrained(tmp_path)
        body = {"prompt": "a", "max_tokens": 150, "temperature": 0, "stream": True}
        with serving("--model", str(tmp_path), "--log-level", "error") as server:
            with httpx.Client(base_url=server.address) as client:
                assert client.get("/ready").status_code == 200
                with client.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.iter_lines()
                    next(lines)
                    server.process.terminate()
                    wait_for(lambda: httpx.get(f"{server.address}/ready").status_code == 503)
                    assert httpx.get(f"{server.address}/health").status_code == 200
                    late = httpx.post(f"{server.address}/v1/completions", json={"prompt": "x"})
                    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
                    *_, last, done = [line for line in lines if line]
            assert done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            _, said = server.process.communicate(timeout=30)
            assert (server.process.returncode, said) == (0, "")

    def test_what_takes_too_long_ends_in_an_error_frame(self) -> None:
        app = make_app(cycle_model("abcdefgh"), max_output_tokens=100_000, drain=0.3)
        body = {"prompt": "a", "max_tokens": 100_000, "temperature": 0, "stream": True}
        with running(app) as (server, address):
            with httpx.stream("POST", f"{address}/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                server.handle_exit(signal.SIGTERM, None)
                *_, last = [line for line in lines if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
            wait_for(lambda: server.should_exit)


class TestReplicas:
    """Two servers, one Redis: either goes on with a conversation, with the same bits."""

    TURNS = ("Once upon a time", " there was", " a thalamus")

    @staticmethod
    def say(address: str, session: str, prompt: str) -> dict[str, object]:
        body = {"prompt": prompt, "session_id": session, "max_tokens": 6, "seed": 3, "logprobs": 3}
        response = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        choice: dict[str, object] = response.json()["choices"][0]
        return choice

    def test_one_is_killed_and_the_other_goes_on(self, folder: Path, tmp_path: Path) -> None:
        key = tmp_path / "session.key"
        key.write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
        options = ("--model", str(folder), "--log-level", "error", "--session-key-file", str(key))
        with redis_server(tmp_path) as url:
            shared = (*options, "--session-store", url)
            with serving(*shared) as first, serving(*shared) as second:
                session = httpx.post(f"{first.address}/api/sessions", json={}).json()["id"]
                expected = [self.say(first.address, session, turn) for turn in self.TURNS]
                session = httpx.post(f"{first.address}/api/sessions", json={}).json()["id"]
                found = [self.say(first.address, session, self.TURNS[0])]

                body = {"prompt": "x", "session_id": session, "max_tokens": 4000, "stream": True}
                with httpx.stream("POST", f"{first.address}/v1/completions", json=body) as response:
                    reading = response.iter_raw()
                    next(reading)
                    first.process.kill()  # in the middle of an answer, of which nothing may be kept
                    first.process.wait()
                found += [self.say(second.address, session, turn) for turn in self.TURNS[1:]]
                assert found == expected
                listed = httpx.get(f"{second.address}/api/sessions").json()["data"]
                assert [one["version"] for one in listed] == [4, 4]
                second.process.send_signal(signal.SIGINT)  # Ctrl-C
                _, said = second.process.communicate(timeout=30)
                assert (second.process.returncode, said) == (0, "")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return make_app(cycle_model("abcdefgh"), patience=1.0, max_output_tokens=100_000, slots=2)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with listening(app) as found:
        yield found


class TestBadClients:
    """Slow, stalled or gone: the slot is free soon, and others are served all the while."""

    BODY = json.dumps({"prompt": "a", "max_tokens": 100_000, "temperature": 0, "stream": True}).encode()

    @classmethod
    def send(cls, address: str, body: bytes) -> socket.socket:
        host, port = address.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {max(len(cls.BODY), len(body))}\r\n\r\n".encode() + body)
        return connection

    @staticmethod
    def idle(app: FastAPI) -> bool:
        stats = runtime(app).engine.stats
        return stats.busy == stats.queued == 0

    def served(self, address: str) -> None:
        answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 2, "temperature": 0})
        assert answer.json()["choices"][0]["text"] == "bc"

    def test_gone_before_the_first_token(self, app: FastAPI, address: str) -> None:
        for _ in range(5):
            self.send(address, self.BODY).close()
        wait_for(lambda: self.idle(app))
        self.served(address)

    def test_gone_in_the_middle(self, app: FastAPI, address: str) -> None:
        connection = self.send(address, self.BODY)
        assert connection.recv(100)
        wait_for(lambda: not self.idle(app))
        connection.close()
        wait_for(lambda: self.idle(app))
        self.served(address)

    def test_gone_with_several_outputs(self, app: FastAPI, address: str) -> None:
        connection = self.send(address, self.BODY.replace(b"{", b'{"n": 4, '))
        assert connection.recv(100)
        wait_for(lambda: runtime(app).engine.stats.queued == 2)
        connection.close()
        wait_for(lambda: self.idle(app))
        self.served(address)

    def test_gone_while_an_answer_is_sent_whole(self, app: FastAPI, address: str) -> None:
        body = self.BODY.replace(b"true", b"null")
        connection = self.send(address, body)
        wait_for(lambda: not self.idle(app))
        connection.close()
        wait_for(lambda: self.idle(app))

    def test_a_reader_that_stalls(self, app: FastAPI, address: str) -> None:
        connection = self.send(address, self.BODY.replace(b"{", b'{"logprobs": 20, '))
        wait_for(lambda: not self.idle(app))
        self.served(address)
        wait_for(lambda: self.idle(app), 45)  # what the system itself holds for the reader comes first
        connection.close()

    def test_headers_a_byte_at_a_time(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            ended = threading.Event()

            def drip() -> None:
                try:
                    for value in b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 100:
                        connection.sendall(bytes((value,)))
                        time.sleep(0.1)
                except OSError:
                    ended.set()

            thread = threading.Thread(target=drip)
            thread.start()
            self.served(address)
            thread.join(10)
            assert ended.is_set()

    def test_a_body_that_does_not_come(self, address: str) -> None:
        connection = self.send(address, self.BODY[:10])
        self.served(address)
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        connection.close()
        self.served(address)

    def test_no_http(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        for data in (
            b"\x16\x03\x01\x02\x00",
            b"GET\r\n\r\n",
            os.urandom(500),
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 9000,
        ):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(data)
                connection.settimeout(10)
                try:
                    answer = connection.recv(100)
                except ConnectionResetError:
                    answer = b""
                assert not answer or answer.startswith(b"HTTP/1.1 4")
        self.served(address)
