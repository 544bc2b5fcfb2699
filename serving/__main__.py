"""`python -m serving`, `synapse-serve`: loads a model, opens the port, serves until it is told to stop."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from serving.app import create_app
from serving.server import Server
from serving.settings import Settings
from serving.stores.sealed import read_key
from serving.tokens import load_codec
from synapse_arch import SynapseModel
from synapse_arch.errors import CheckpointError, ConfigError, SynapseError, explain

UNREAD = 2**17
"""Bytes that the system may hold for a client that does not read."""
DEMO = Path("runs/demo")
STEP = re.compile(r"step-\d+")
SIZE = re.compile(r"(\d+)([KMG]?)")
EPILOG = """environment:
  SYNAPSE_API_KEY       a key that every request must bring (or several, one a line, with --api-key-file)
  SYNAPSE_SESSION_KEY   32 bytes in base64 that seal kept sessions (or --session-key-file)

examples:
  python -m serving                                       # the model of `make demo`, at http://127.0.0.1:8000
  python -m serving --model my_model --port 9000
  synapse-serve --model my_model --session-store sqlite:sessions.db
  SYNAPSE_API_KEY=$(cat key) synapse-serve --model my_model --host 0.0.0.0 --allowed-host models.example.org
  synapse-serve --model my_model --session-store redis://cache:6379/0 --session-key-file session.key
"""


def parser() -> argparse.ArgumentParser:
    """The command line; options that are not given are left to `Settings`."""
    made = argparse.ArgumentParser(
        prog="synapse-serve", description="Serve a SynapseModel: OpenAI's API, sessions, and a page to look inside.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )  # fmt: skip
    add = made.add_argument
    add("--model", type=Path, default=None, metavar="FOLDER", help=f"a model, or a run of several steps ({DEMO})")
    add("--model-id", metavar="NAME", help="what the API calls it (the folder's name)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: a GPU where there is one)")
    add("--threads", type=int, default=None, metavar="N", help="of the processor (as many as torch takes)")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(info)")
    net = made.add_argument_group("network").add_argument
    net("--host", metavar="ADDRESS", help="where to listen; others than loopback need a key (127.0.0.1)")
    net("--port", type=int, metavar="N", help="0 for any free one (8000)")
    net("--allowed-host", dest="allowed_hosts", action="append", metavar="NAME", help="under which it may be called")
    net("--api-key-file", type=Path, default=None, metavar="FILE", help="keys, one a line")
    net("--patience", type=float, metavar="SECONDS", help="for slow headers, bodies and readers (30)")
    net("--drain", type=float, metavar="SECONDS", help="that running answers get at the end (30)")
    work = made.add_argument_group("work").add_argument
    work("--slots", type=int, metavar="N", help="sequences decoded side by side (8)")
    work("--queue", type=int, metavar="N", help="requests that may wait (64)")
    work("--prefill-chunk", type=int, metavar="N", help="tokens of a prompt between two decode steps (64)")
    work("--max-prompt-tokens", type=int, metavar="N", help="of a request (131072)")
    work("--max-output-tokens", type=int, metavar="N", help="of an output (4096)")
    kept = made.add_argument_group("sessions").add_argument
    kept("--session-store", metavar="WHERE", help="memory, sqlite:PATH or redis://HOST:PORT/DB (memory)")
    kept("--session-ttl", type=float, metavar="SECONDS", help="until an unused one is forgotten (86400)")
    kept(
        "--session-bytes",
        type=_size,
        metavar="SIZE",
        help="of all together, such as 512M (1G); beyond, whoever holds most loses the longest unused",
    )
    kept("--session-count", type=int, metavar="N", help="most of one owner (1000)")
    kept("--session-key-file", type=Path, default=None, metavar="FILE", help="a key that seals what is kept")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; returns 0 then, and 2 after an error, before the port is opened."""
    options = vars(parser().parse_args(arguments))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=options.pop("log_level").upper())
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # the guard logs every request and failure itself
    try:
        return serve(options)
    except (SynapseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before it served
        return 130


def serve(options: dict[str, object]) -> int:
    """Builds the server that the options describe, and runs it.

    Raises:
        SynapseError: something cannot be loaded or is out of its range. OSError: the port is taken.
    """
    folder = find_model(_path(options.pop("model")))
    keys = _secrets("SYNAPSE_API_KEY", _path(options.pop("api_key_file")))
    sealing = _secrets("SYNAPSE_SESSION_KEY", _path(options.pop("session_key_file")))
    device, threads = str(options.pop("device")), options.pop("threads")
    if "allowed_hosts" in options:
        options["allowed_hosts"] = tuple(options["allowed_hosts"])  # type: ignore[arg-type]
    options.setdefault("model_id", folder.parent.name if STEP.fullmatch(folder.name) else folder.resolve().name)
    settings = Settings(api_keys=keys, **options)  # type: ignore[arg-type]
    session_key = read_key(sealing[0]) if sealing else None
    if isinstance(threads, int):
        if threads < 1:
            raise ConfigError(explain("--threads", "1 or more", threads))
        torch.set_num_threads(threads)
    model = SynapseModel.from_pretrained(folder, device=find_device(device))
    codec = load_codec(folder, model.config.vocab_size)
    app = create_app(model, codec, settings, session_key=session_key)
    try:
        with listen(settings.host, settings.port) as listening:
            host, port = listening.getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            started = partial(print, f"{settings.model_id} is at {address} (Ctrl-C ends)", flush=True)
            Server(app, started).run(sockets=[listening])
    finally:
        app.state.runtime.close()
    return 0


def find_model(folder: Path | None) -> Path:
    """The folder of a model: the one given, the newest step of a run, or the demo's.

    Raises:
        CheckpointError: there is none.
    """
    wanted = DEMO if folder is None else folder
    if (wanted / "config.json").is_file():
        return wanted
    steps = [item for item in wanted.iterdir() if STEP.fullmatch(item.name)] if wanted.is_dir() else []
    if steps:
        return max(steps, key=lambda item: int(item.name.removeprefix("step-")))
    if folder is None:
        remedy = "make one with `make demo` (10 minutes), or name a model with --model FOLDER"
        raise CheckpointError(explain("--model", f"a folder, or the demo's in {DEMO}", "neither", remedy))
    got = "a folder without them" if wanted.is_dir() else "no such folder"
    raise CheckpointError(explain(f"--model {wanted}", "a folder with config.json and weights", got, "check the path"))


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(explain("--device", "a device of this machine", f"{name}: {reason}", "try cpu")) from error
    return device


def listen(host: str, port: int) -> socket.socket:
    """A socket to listen on. What it holds for a client that does not read is bounded.

    Raises:
        ConfigError: the address is taken or not of this machine.
    """
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        remedy = "choose another with --port or --host"
        raise ConfigError(explain(f"{host}:{port}", "a free address of this machine", error, remedy)) from error
    return listening


def _secrets(variable: str, file: Path | None) -> tuple[str, ...]:
    """The lines of a file, else of an environment variable."""
    try:
        text = os.environ.get(variable, "") if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(explain(f"the key file {file}", "a readable text", error, "check the path")) from error
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not found:
        raise ConfigError(explain(f"the key file {file}", "a key", "nothing", "write one into it"))
    return found


def _path(value: object) -> Path | None:
    return value if isinstance(value, Path) else None


def _size(text: str) -> int:
    """Bytes from "1024", "512M", "2G".

    >>> _size("2K")
    2048
    """
    match = SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number with K, M or G, got {text!r}")
    return int(match[1]) << 10 * " KMG".index(match[2] or " ")


if __name__ == "__main__":
    sys.exit(main())
