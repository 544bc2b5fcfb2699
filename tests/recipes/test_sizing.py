"""`--preset auto` end to end, on a text so short that the smallest model is chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from recipes import checkpoint
from recipes.train import main
from synapse_arch import SynapseModel
from synapse_arch.model import autosize


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_size_is_chosen_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(3):
        lines = (f"line {line} of file {number}\n" for line in range(60))
        (text / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "run"
    given = ["--data", str(text), "--out", str(out), "--cache", str(tmp_path / "cache"), "--steps", "2"]
    shape = ["--batch-size", "2", "--length", "32", "--threads", "1", "--mixed-precision", "no", "--sample-tokens", "0"]
    assert main([*given, *shape, "--preset", "auto", "--set", "norm_eps=1e-5"]) == 0
    shown = capsys.readouterr().out
    chosen = autosize.choose(memory=10**10, tokens=10**4, batch_size=2, length=32)
    assert chosen.why[-1] in shown
    assert "a step should take" in shown
    config = SynapseModel.from_pretrained(checkpoint.latest(out)).config
    assert config.norm_eps == 1e-5
    assert (config.d_model, config.n_layers) == (chosen.config.d_model, chosen.config.n_layers)
    stored = json.loads((out / "run.json").read_text(encoding="utf-8"))["config"]
    assert stored["preset"] == "auto"
    assert main(["--out", str(out), "--cache", str(tmp_path / "cache"), "--resume", "--steps", "3"]) == 0
    assert main(["--out", str(out), "--resume", "--print-config"]) == 0
    assert f'"d_model": {chosen.config.d_model}' in capsys.readouterr().out


def test_the_settings_of_a_size_not_chosen_yet_cannot_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "auto", "--print-config"]) == 2
    assert "--print-config" in capsys.readouterr().err
