"""Records of longer runs: what the run's own files say, and nothing of unfinished runs or other text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import longer
from recipes.train import main as train

TINY = [f"--set={setting}" for setting in ("d_model=32", "n_layers=1", "xlstm.n_heads=2", "thalamus.head_dim=32")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    text = folder / "text.txt"
    text.write_text("to be or not to be\n\n" * 4000)
    options = ["--data", str(text), "--steps", "12", "--length", "32", "--threads", "1", "--sample-tokens", "0"]
    assert train([*TINY, *options, "--cache", str(folder / "cache"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def built_in(folder: Path) -> Path:
    """The run as if it had been on the built-in corpus."""
    stored = json.loads((folder / "run.json").read_text())
    stored["config"]["data"] = None
    (folder / "run.json").write_text(json.dumps(stored))
    return folder


def test_other_text_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert longer.main([str(finished)]) == 2
    assert "expected bytes of the built-in corpus" in capsys.readouterr().err


def test_the_record_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    assert longer.main([str(built_in(finished)), "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    record, result = json.loads(file.read_text()), json.loads((finished / "result.json").read_text())
    assert record["score"] == result["bits_per_byte"]["model"]
    assert record["compressors"] == {name: result["bits_per_byte"][name] for name in ("gzip -9", "xz -9")}
    assert (record["steps"], record["seconds"]) == (12, result["seconds"])
    assert record["config"]["d_model"] == 32
    assert [point[0] for point in record["curve"]] == [10]
    assert record["parameters"] > record["active_parameters"] > record["state_numbers"] > 0


def test_a_run_that_diverged_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = built_in(finished) / "result.json"
    whole = file.read_text()
    result = json.loads(whole)
    file.write_text(json.dumps(result | {"bits_per_byte": result["bits_per_byte"] | {"model": None}}))
    assert longer.main([str(finished), "--results", str(tmp_path)]) == 2
    file.write_text(whole)
    assert "diverged" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (built_in(finished) / "result.json").unlink()
    assert longer.main([str(finished)]) == 2
    assert "finished run" in capsys.readouterr().err
