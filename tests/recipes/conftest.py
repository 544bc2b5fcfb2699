"""What tests of whole runs start from: a text, and the options of a model of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.recipes.running import SMALL


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        lines = (f"def function_{number}_{line}(x):\n    return x + {line}\n" for line in range(30))
        (folder / f"file_{number}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def arguments(text: Path) -> list[str]:
    given = ["--data", str(text), "--batch-size", "4", "--length", "32", "--mixed-precision", "no", "--threads", "1"]
    return [*given, "--sample-tokens", "0", *(word for value in SMALL for word in ("--set", value))]
