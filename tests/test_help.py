"""Every program explains itself."""

from __future__ import annotations

import runpy
import sys

import pytest

PROGRAMS = (
    "recipes.train", "recipes.finetune", "recipes.evaluate", "recipes.tokenizer", "recipes.curves", "recipes.sharded",
    "merge", "merge.ties", "merge.search", "merge.upcycle", "serving", "serving.chat",
    "benchmarks.autosize", "benchmarks.core", "benchmarks.gpu", "benchmarks.merge", "benchmarks.merging.digits",
    "benchmarks.merging.language", "benchmarks.peers", "benchmarks.quality", "benchmarks.quality.consolidation",
    "benchmarks.quality.longer", "benchmarks.quality.memory", "benchmarks.quality.routing", "benchmarks.serving",
    "benchmarks.training", "paper.build",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_printed(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out
