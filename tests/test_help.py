"""Every program explains itself."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("recipes", "merge", "serving", "benchmarks", "paper")
    for file in (ROOT / package).rglob("*.py")
    if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
)


def test_programs_are_found() -> None:
    assert {"recipes.train", "merge", "merge.ties", "serving", "benchmarks.gpu", "paper.build"} <= set(PROGRAMS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_printed(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out
