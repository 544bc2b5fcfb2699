"""Settings from a file and the command line: typed, checked, shown, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.command import parse, resumed, settings
from recipes.config import RunConfig, read_config, show_config
from recipes.train import main
from synapse_arch.errors import ConfigError

YAML = """
preset: tiny
lr: 1e-3
steps: 20
carry: true
model:
  n_layers: 2
  memory: null
  experts: {n_experts: 4}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_yaml_file_is_read_with_its_model(tmp_path: Path) -> None:
    config = RunConfig.from_dict(read_config(write(tmp_path / "run.yaml", YAML)))
    assert (config.lr, config.steps, config.carry) == (1e-3, 20, True)
    model = config.model_config()
    assert (model.n_layers, model.memory, model.n_experts) == (2, None, 4)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", YAML)
    command = parse(["--config", str(path), "--lr", "0.01", "--set", "n_layers=1", "--minutes", "3", "--no-carry"])
    config = RunConfig.from_dict(settings(command))
    assert (config.lr, config.steps, config.minutes, config.carry) == (0.01, None, 3.0, False)
    assert config.model_config().n_layers == 1
    assert config.model_config().n_experts == 4


def test_what_is_shown_reads_back_to_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.yaml", YAML)
    assert main(["--config", str(path), "--out", str(tmp_path / "run"), "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    again = RunConfig.from_dict(read_config(write(tmp_path / "again.json", shown)))
    first = RunConfig.from_dict(read_config(path))
    assert again.model_config() == first.model_config()
    assert show_config(again, again.model_config()) + "\n" == shown
    assert json.loads(shown)["model"]["experts"]["n_experts"] == 4


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "lerning_rate: 1", "lerning_rate"),
        ("a.yaml", "batchsize: 4", "did you mean batch_size?"),
        ("a.yaml", "- 1", "expected a mapping of settings, got list"),
        ("a.yaml", "a: [1", "expected a readable file"),
        ("a.yaml", "model: 3", "model: expected a mapping"),
        ("a.yaml", "model: {n_layers: 1}\noverrides: null", "overrides: expected a list of KEY=VALUE, got None"),
        ("a.yaml", "overrides: null", "overrides: expected a list of KEY=VALUE, got None"),
        ("a.json", '{"lr": 1', "expected a readable file"),
        ("a.json", '{"lr": "fast"}', "lr: expected a number, got 'fast'"),
        ("a.json", '{"steps": 1.5}', "steps: expected a whole number, got 1.5"),
        ("a.json", '{"steps": true}', "steps: expected a whole number, got True"),
        ("a.json", '{"carry": "no"}', "carry: expected true or false, got 'no'"),
        ("a.json", '{"data": 5}', "data: expected a text, got 5"),
        ("a.json", '{"trackers": "tensorboard"}', "trackers: expected a list of texts"),
        ("a.json", '{"trackers": ["tensorbord"]}', "did you mean tensorboard?"),
        ("a.json", '{"model": {"experts": {"n_expert": 4}}}', "n_experts"),
        ("a.json", '{"accumulate": 0}', "accumulate: expected 1 or more"),
        ("a.json", '{"tokenizer": "/nowhere/bpe.json"}', "/nowhere/bpe.json"),
        ("none.json", None, "No such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, says: str
) -> None:
    path = tmp_path / name
    if text is not None:
        write(path, text)
    assert main(["--config", str(path), "--out", str(tmp_path / "run"), "--print-config"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


def test_overrides_of_a_file_are_checked_beside_those_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.yaml", "overrides: null")
    assert main(["--config", str(path), "--set", "n_layers=1", "--print-config"]) == 2
    assert "overrides: expected a list of KEY=VALUE, got None" in capsys.readouterr().err


def test_a_resumed_run_changes_only_budget_and_cadence() -> None:
    stored = RunConfig(steps=10, keep=2)
    assert resumed(stored, {"steps": 20, "keep": 3, "recompute": True}).steps == 20
    for change in ({"lr": 1.0}, {"carry": True}, {"accumulate": 2}, {"tokenizer": "/x"}):
        with pytest.raises(ConfigError, match="with --resume"):
            resumed(stored, change)
    assert resumed(RunConfig(lr=1e-3), {"lr": "1e-3"}).lr == 1e-3  # as YAML reads it
    with pytest.raises(ConfigError, match="trackers: expected a list of texts"):
        resumed(stored, {"trackers": None})
