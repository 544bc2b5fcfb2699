"""Where a benchmark's report goes, and how often it measures, is looked at before it measures for minutes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

PROGRAMS = ("autosize", "core", "gpu.__main__", "merge", "peers.__main__", "serving.__main__", "training")


def refused(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", ["a benchmark", *arguments])
    with pytest.raises(SystemExit, match="2"):
        program.main()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_report_that_could_not_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    refused(name, ["--out", str(tmp_path / "file" / "report.json")], monkeypatch)
    assert "argument --out: expected a file that can be written, got " in capsys.readouterr().err
    refused(name, ["--out", str(tmp_path)], monkeypatch)
    assert "argument --out: expected a file, got the folder " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["merge", "training"])
@pytest.mark.parametrize("rounds", ["0", "-1", "1.5", "many"])
def test_no_rounds(name: str, rounds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    refused(name, [f"--rounds={rounds}"], monkeypatch)
    assert f"argument --rounds: expected a whole number, 1 or more, got {rounds}" in capsys.readouterr().err
