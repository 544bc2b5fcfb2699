"""On a Mac, whose GPU has no float64 and was never tried, everything computes on the CPU unasked."""

from __future__ import annotations

import json
from pathlib import Path

import accelerate.state
import pytest
import torch

from recipes import checkpoint, evaluate, finetune, train
from recipes._accelerate import PartialState

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(autouse=True)
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch and Accelerate find on such a machine."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(accelerate.state, "is_mps_available", lambda *_: True)


def test_all_recipes_run(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out, judged, tuned, pairs = (tmp_path / name for name in ("run", "judged", "tuned", "pairs.jsonl"))
    assert train.main([*arguments, "--out", str(out), "--steps", "2"]) == 0
    assert PartialState().device.type == "cpu"
    assert "on 1 × cpu" in capsys.readouterr().out
    data = arguments[arguments.index("--data") + 1]
    assert evaluate.main(["--model", str(out), "--data", data, "--context", "16", "--out", str(judged)]) == 0
    pairs.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n", encoding="utf-8")
    base, what = str(checkpoint.latest(out)), ["--task", "sft", "--method", "full", "--epochs", "1"]
    assert finetune.main(["--base", base, "--data", str(pairs), "--out", str(tuned), *what]) == 0
