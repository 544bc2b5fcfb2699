"""The training program end to end, on a model of a few thousand parameters: it learns, stops, resumes, refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipes import checkpoint, trainer
from recipes._accelerate import PartialState
from recipes.data import Batch, Windows
from recipes.train import main, precision, speedup_bf16
from synapse_arch import SynapseModel
from synapse_arch.errors import CheckpointError
from tests.recipes.running import ROOT, losses, same, strictly, weights

pytestmark = pytest.mark.usefixtures("fresh")


def test_a_run_learns_and_reports(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments[arguments.index("--sample-tokens") + 1] = "8"
    out = tmp_path / "run"
    assert main([*arguments, "--out", str(out), "--steps", "40", "--lr", "1e-2"]) == 0
    found = losses(out)
    assert len(found) == 4
    assert found[-1] < 0.8 * found[0]
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["step"] == 40
    assert result["bits_per_byte"].keys() == {"model", "gzip -9", "xz -9"}
    assert result["bits_per_byte"]["model"] < 6
    model = SynapseModel.from_pretrained(checkpoint.latest(out))
    assert model.config.d_model == 16
    shown = capsys.readouterr()
    assert "Held-out bits per byte" in shown.out
    assert "A sample, after" in shown.out
    assert "layer 0" in shown.out
    assert str(checkpoint.latest(out)) in shown.out
    assert "bits/byte" in shown.err
    files = ["curves.png", "log.jsonl", "result.json", "run.json", "step-00000040"]
    assert sorted(item.name for item in out.iterdir()) == files


@pytest.mark.parametrize("extra", [[], ["--set", "thalamus.noise=0.1", "--set", "thalamus.bias_rate=0.01"]])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, arguments: list[str], extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*arguments, *extra, "--out", str(whole), "--steps", "20"]) == 0
    interrupt_at(7, monkeypatch)
    assert main([*arguments, *extra, "--out", str(parts), "--steps", "20"]) == 0
    assert checkpoint.latest(parts).name == "step-00000008"
    monkeypatch.undo()
    torch.manual_seed(123)
    assert main(["--out", str(parts), "--resume", "--sample-tokens", "0"]) == 0
    assert same(weights(whole), weights(parts))
    assert losses(whole) == losses(parts)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Sends the signal while the batch of `step` is being made."""
    original = Windows.batch

    def batch(self: Windows, now: int, rank: int = 0, world: int = 1) -> Batch:
        if now == step:
            signal.raise_signal(number)
            signal.raise_signal(number)  # launchers repeat what the terminal sent
        return original(self, now, rank, world)

    monkeypatch.setattr(Windows, "batch", batch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    interrupt_at(3, monkeypatch, number)
    before = signal.getsignal(number)
    assert main([*arguments, "--out", str(tmp_path / "run"), "--minutes", "5"]) == 0
    assert signal.getsignal(number) is before
    assert checkpoint.latest(tmp_path / "run").name == "step-00000004"
    assert f"--out {tmp_path / 'run'} --resume" in capsys.readouterr().out
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_second_signal_later_on_interrupts_at_once(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.StopRequest, "GRACE", 0.0)
    interrupt_at(3, monkeypatch)
    assert main([*arguments, "--out", str(tmp_path), "--minutes", "5"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_budget_of_minutes_ends_on_time_with_the_learning_rate_down(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LOG_EVERY", 1)  # a loaded machine takes few steps
    assert main([*arguments, "--out", str(tmp_path), "--minutes", "0.03", "--warmup", "0"]) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert 1.8 <= result["seconds"] < 4
    assert log[0]["lr"] > log[-1]["lr"]


def test_looks_at_held_out_text_and_checkpoints_change_nothing(tmp_path: Path, arguments: list[str]) -> None:
    arguments = [*arguments, "--set", "thalamus.noise=0.3"]  # in training mode only
    often = ["--eval-minutes", "1e-9", "--save-minutes", "1e-9"]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--steps", "10", *often]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b"), "--steps", "10"]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert [item.name for item in (tmp_path / "a").glob("*step-*")] == ["step-00000010"]


def test_two_processes_reproduce_one(tmp_path: Path, arguments: list[str]) -> None:
    """At equal global batch, the balance loss and its load over all tokens included; and one goes on from two."""
    arguments += ["--steps", "20", "--lr", "3e-4", "--carry"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", "recipes/train.py", *arguments, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 × cpu" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["bytes"] == results[1]["bytes"]
    model = [result["bits_per_byte"]["model"] for result in results]
    assert model[0] == pytest.approx(model[1], rel=1e-4)
    for name in ("one", "two"):  # what two processes saved opens in one, their carried states included
        assert main(["--out", str(tmp_path / name), "--resume", "--steps", "30", "--sample-tokens", "0"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def poison(steps: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the gradient of these steps infinite."""
    original = trainer.Trainer.step

    def step(self: trainer.Trainer, started: float) -> bool:
        bad = self.progress.step in steps
        hook = self.model.embedding.weight.register_hook(lambda grad: grad * float("inf")) if bad else None
        try:
            return original(self, started)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(trainer.Trainer, "step", step)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(range(3, 6), monkeypatch)
    assert main([*arguments, "--out", str(tmp_path), "--steps", "20"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["skipped"] == 3
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_the_log_of_a_skipped_step_is_json_and_drawn(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison([9], monkeypatch)  # the first one that is logged
    assert main([*arguments, "--out", str(tmp_path), "--steps", "20"]) == 0
    lines = [strictly(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["norm"] is None] == [10]
    assert (tmp_path / "curves.png").exists()


def test_ten_in_a_row_stop_the_run_at_its_last_checkpoint(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(range(5, 99), monkeypatch)
    assert main([*arguments, "--out", str(tmp_path), "--steps", "50", "--save-minutes", "1e-9"]) == 2
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())
    said = capsys.readouterr().err
    assert "10 steps without one" in said
    assert str(checkpoint.latest(tmp_path)) in said


def test_a_disk_that_is_full_costs_no_checkpoint(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "5"]) == 0
    before = weights(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "optimizer_tensors", full)
    assert main(["--out", str(tmp_path), "--resume", "--steps", "9", "--save-minutes", "1e-9"]) == 2
    said = capsys.readouterr()
    assert "training goes on" in said.out
    assert "No space left on device" in said.err
    assert same(before, weights(tmp_path))
    assert not list(tmp_path.glob(".step-*"))


def test_too_little_space_is_known_before_training(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    assert main([*arguments, "--out", str(tmp_path), "--steps", "5"]) == 2
    assert "MB free" in capsys.readouterr().err


REFUSED = {
    "unknown preset": (["--preset", "tinny"], "tiny"),
    "unknown key": (["--set", "experts.n_expert=4"], "n_experts"),
    "no value": (["--set", "d_model"], "KEY=VALUE"),
    "vocabulary": (["--set", "vocab_size=300"], "the tokenizer's"),
    "missing data": (["--data", "/nowhere/text"], "/nowhere/text"),
    "short text": (["--length", "100000"], "--length"),
    "schedule": (["--schedule", "step"], "cosine"),
    "minutes": (["--minutes", "0"], "minutes"),
    "precision": (["--mixed-precision", "fp8"], "bf16"),
    "nothing to resume": (["--resume"], "run.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    extra, says = REFUSED[case]
    assert main([*arguments, *extra, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [["--length", "100000"], ["--set", "d_model=-1"], ["--data", "/nowhere"]])
def test_overwrite_takes_nothing_away_when_the_new_run_cannot_start(
    tmp_path: Path, arguments: list[str], extra: list[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    assert main([*arguments, *extra, "--out", str(tmp_path), "--steps", "3", "--overwrite"]) == 2
    assert checkpoint.latest(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 1}', '{"schema": 9, "config": {}, "corpus": "x"}'])
def test_a_damaged_run_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert main(["--out", str(tmp_path), "--resume"]) == 2
    assert "run.json" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_and_replaced_only_on_demand(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    first = [*arguments, "--out", str(tmp_path), "--steps", "3"]
    assert main(first) == 0
    before = weights(tmp_path)
    assert main([*first, "--seed", "1"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert same(before, weights(tmp_path))
    assert main([*first, "--seed", "1", "--overwrite"]) == 0
    assert not same(before, weights(tmp_path))
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_resume_refuses_another_run(
    tmp_path: Path, text: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(text, tmp_path / "text")
    given = [*arguments, "--data", str(own), "--out", str(tmp_path / "run")]
    assert main([*given, "--steps", "3"]) == 0
    assert main([*given, "--resume", "--steps", "6", "--lr", "1"]) == 2
    assert "--lr" in capsys.readouterr().err
    (own / "file_0.py").write_text("changed", encoding="utf-8")
    assert main([*given, "--resume", "--steps", "6"]) == 2
    assert "corpus" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["trainer.safetensors", "trainer.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    path = checkpoint.latest(tmp_path) / name
    path.write_bytes(path.read_bytes()[:40])
    assert main(["--out", str(tmp_path), "--resume", "--steps", "6"]) == 2
    assert name in capsys.readouterr().err


def test_a_trainer_state_of_another_step_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    folder = checkpoint.latest(tmp_path)
    values = checkpoint.read_json(folder / "trainer.json")
    checkpoint.write_json(folder / "trainer.json", {**values, "step": 4})
    model = SynapseModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="step 4"):
        checkpoint.restore(folder, model, trainer.adamw(model, weight_decay=0.1, betas=(0.9, 0.95)))


def test_precision_is_measured() -> None:
    assert speedup_bf16(torch.device("cpu")) > 0


@pytest.mark.parametrize(
    ("choice", "launched", "expected"), [("auto", "bf16", "bf16"), ("no", "bf16", "no"), ("bf16", "no", "bf16")]
)
def test_auto_is_what_the_launcher_asked_for(
    monkeypatch: pytest.MonkeyPatch, choice: str, launched: str, expected: str
) -> None:
    monkeypatch.setattr("recipes.train.speedup_bf16", lambda device: 1.0)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert precision(choice, PartialState(cpu=True)) == expected


def test_windows_with_borders_and_without_are_one_graph(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer is compiled anew for a call whose arguments are of another kind."""
    kinds = []

    def compiled(model: SynapseModel) -> None:
        model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: kinds.append(kwargs["segment_ids"] is None) if model.training else None,
            with_kwargs=True,
        )

    monkeypatch.setattr("recipes.trainer.compile_layers", compiled)
    assert main([*arguments, "--out", str(tmp_path), "--steps", "6", "--batch-size", "1", "--compile"]) == 0
    assert kinds == [False] * 6


def test_what_a_killed_run_left_half_written_is_ignored_and_swept(tmp_path: Path, arguments: list[str]) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    (tmp_path / ".step-00000009").mkdir()
    (tmp_path / ".step-00000009" / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2')
    assert main(["--out", str(tmp_path), "--resume", "--steps", "10", "--sample-tokens", "0"]) == 0
    assert checkpoint.latest(tmp_path).name == "step-00000010"
    assert not list(tmp_path.glob(".step-*"))
    assert len(losses(tmp_path)) == 1


def test_a_run_whose_logged_steps_were_all_lost_ends_without_curves(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed behind the first line of its log and before a checkpoint, it goes on with an empty one."""
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    (tmp_path / "log.jsonl").write_text('{"step": 10, "seconds": 1.0}\n', encoding="utf-8")
    assert main(["--out", str(tmp_path), "--resume", "--steps", "5", "--sample-tokens", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("error") == 0
    assert "Curves" not in shown.out


def test_a_model_that_diverged_is_reported_as_such(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "2", "--lr", "1e30"]) == 0
    shown = capsys.readouterr().out
    assert "this model    nan  not a finite number" in shown
    assert "a smaller learning rate" in shown
    assert strictly((tmp_path / "result.json").read_text())["bits_per_byte"]["model"] is None


def test_steps_lost_here_and_there_do_not_end_a_run(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison([*range(3, 9), *range(10, 16)], monkeypatch)
    assert main([*arguments, "--out", str(tmp_path), "--steps", "20"]) == 0


def test_what_a_lost_step_read_is_not_carried_on(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[bool] = []
    gradients, states = trainer.Trainer.gradients, trainer.Trainer.states

    def broken(self: trainer.Trainer, batch: Batch) -> list[trainer.Part]:
        parts = gradients(self, batch)
        if self.progress.step != 3:
            return parts
        return [part._replace(losses={name: loss * math.nan for name, loss in part.losses.items()}) for part in parts]

    def seen(self: trainer.Trainer, batch: Batch) -> object:
        fresh.append(self.state is None)
        return states(self, batch)

    monkeypatch.setattr(trainer.Trainer, "gradients", broken)
    monkeypatch.setattr(trainer.Trainer, "states", seen)
    assert main([*arguments, "--carry", "--out", str(tmp_path), "--steps", "6"]) == 0
    assert fresh == [True, False, False, False, True, False]


def test_the_time_of_what_is_resumed_counts(tmp_path: Path, arguments: list[str]) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    file = checkpoint.latest(tmp_path) / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"seconds": 1000.0}), encoding="utf-8")
    assert main(["--out", str(tmp_path), "--resume", "--steps", "5", "--sample-tokens", "0"]) == 0
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["seconds"] > 1000


def test_a_run_that_goes_on_has_no_result_yet(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "3"]) == 0
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: False)
    assert main(["--out", str(tmp_path), "--resume", "--steps", "9"]) == 0
    assert not (tmp_path / "result.json").exists()


def test_a_disk_must_hold_weights_and_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=23_000_000))
    with pytest.raises(CheckpointError, match=r"24\.0 MB free"):
        checkpoint.prepare_folder(tmp_path, parameters=10**6, keep=1, clear=True)
