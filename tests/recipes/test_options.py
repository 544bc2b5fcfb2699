"""Options of a run: each does what it says, and none costs the exact resume."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes import checkpoint, tokenizer, trainer
from recipes.data import load_corpus
from recipes.evaluation import Bits
from recipes.optim import adamw
from recipes.train import main
from recipes.windows import Batch
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.errors import CheckpointError
from synapse_arch.model import _files
from tests.model.small import read_state, small_model
from tests.recipes.running import ROOT, losses, same, weights

pytestmark = pytest.mark.usefixtures("fresh")


def log(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_parts_of_a_batch_make_the_same_steps(tmp_path: Path, arguments: list[str]) -> None:
    given = [*arguments, "--steps", "10", "--lr", "1e-3", "--set", "thalamus.load_balance=0.0"]
    assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    assert main([*given, "--out", str(tmp_path / "parts"), "--accumulate", "4"]) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    assert json.loads((tmp_path / "parts" / "result.json").read_text())["step"] == 10


def test_parts_that_do_not_divide_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--accumulate", "3"]) == 2
    assert "a multiple of 3, the processes (1) times the parts of each" in capsys.readouterr().err


def test_carried_state_resumes_exactly_and_matters(tmp_path: Path, arguments: list[str]) -> None:
    given = [*arguments, "--accumulate", "2", "--recompute"]
    assert main([*given, "--carry", "--out", str(tmp_path / "whole"), "--steps", "13"]) == 0
    rerun = tmp_path / "rerun"
    assert (
        main([*given, "--carry", "--out", str(rerun), "--steps", "13", "--save-minutes", "1e-9", "--keep", "99"]) == 0
    )
    for item in rerun.glob("step-*"):
        if item.name > "step-00000006":
            for file in item.iterdir():
                file.unlink()
            item.rmdir()
    state = SynapseState.load(checkpoint.latest(rerun) / "state.safetensors")
    assert (state.batch_size, max(state.position.tolist())) == (4, 6 * 32)
    assert main(["--out", str(rerun), "--resume", "--sample-tokens", "0"]) == 0
    assert same(weights(tmp_path / "whole"), weights(rerun))
    assert losses(tmp_path / "whole") == losses(rerun)
    kept = checkpoint.latest(rerun) / "state.safetensors"
    one, other = SynapseState.load(kept), SynapseState.load(checkpoint.latest(tmp_path / "whole") / "state.safetensors")
    assert same(one.to_tensors(), other.to_tensors())


def test_a_lost_state_is_not_made_up(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--carry", "--out", str(tmp_path), "--steps", "3"]) == 0
    (checkpoint.latest(tmp_path) / "state.safetensors").unlink()
    assert main(["--out", str(tmp_path), "--resume", "--steps", "6"]) == 2
    assert "state.safetensors" in capsys.readouterr().err


def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = iter([5.0, 4.0, 3.0, 3.5, 3.0, float("nan"), 6.0, 6.0, 6.0, 6.0])
    monkeypatch.setattr(trainer.Trainer, "judge", lambda self, windows=None: Bits(next(bits, 6.0), 1))
    often = ["--eval-minutes", "1e-9", "--save-minutes", "1e-9", "--keep", "2", "--keep-best"]
    assert main([*arguments, *often, "--out", str(tmp_path), "--steps", "9"]) == 0
    assert sorted(item.name for item in tmp_path.glob("step-*")) == ["step-00000003", "step-00000008", "step-00000009"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["best"], result["best_step"]) == (3.0, 3)
    assert (
        main(["--out", str(tmp_path), "--resume", "--steps", "12", "--eval-minutes", "9", "--sample-tokens", "0"]) == 0
    )
    assert (tmp_path / "step-00000003").is_dir()


def test_the_best_is_kept_where_a_better_one_could_not_be_written(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, save = iter([5.0, 4.0, 6.0, 6.0]), checkpoint.save
    monkeypatch.setattr(trainer.Trainer, "judge", lambda self, windows=None: Bits(next(bits, 6.0), 1))

    def full(out: Path, model: SynapseModel, optimizer: torch.optim.Optimizer, progress: checkpoint.Progress, **more):  # type: ignore[no-untyped-def]
        if progress.step == 2:
            raise CheckpointError("no space left")
        return save(out, model, optimizer, progress, **more)

    monkeypatch.setattr(checkpoint, "save", full)
    often = ["--eval-minutes", "1e-9", "--save-minutes", "1e-9", "--keep-best"]
    assert main([*arguments, *often, "--out", str(tmp_path), "--steps", "4"]) == 0
    assert sorted(item.name for item in tmp_path.glob("step-*")) == ["step-00000001", "step-00000004"]


def test_a_tokenizer_is_no_run(tmp_path: Path, text: Path, arguments: list[str]) -> None:
    pytest.importorskip("tokenizers")
    made = tmp_path / "tokenizer.json"
    assert tokenizer.main(["--data", str(text), "--vocab-size", "300", "--out", str(made)]) == 0
    assert main([*arguments, "--tokenizer", str(made), "--out", str(tmp_path), "--steps", "1"]) == 0


def test_another_tokenizer_is_not_replaced(
    tmp_path: Path, text: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    kept, other = tmp_path / "run" / "tokenizer.json", tmp_path / "other.json"
    for made, size in ((kept, "300"), (other, "262")):
        assert tokenizer.main(["--data", str(text), "--vocab-size", size, "--out", str(made)]) == 0
    before = kept.read_bytes()
    assert main([*arguments, "--tokenizer", str(other), "--out", str(kept.parent), "--steps", "1"]) == 2
    assert "tokenizer.json: expected the tokenizer of the run, got another" in capsys.readouterr().err
    assert [item.read_bytes() for item in kept.parent.iterdir()] == [before]


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = set(), os.fsync

    def watched(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    assert main([*arguments, "--out", str(tmp_path), "--steps", "1"]) == 0
    aside = tmp_path / ".step-00000001"
    assert {
        str(tmp_path),
        str(aside),
        str(tmp_path / ".run.json"),
        *(str(aside / item.name) for item in checkpoint.latest(tmp_path).iterdir()),
    } <= synced


def test_a_folder_another_run_writes_to_is_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoint.claim(tmp_path / "run"):
        assert main([*arguments, "--out", str(tmp_path / "run"), "--steps", "3"]) == 2
        assert "one in use" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="in use"), checkpoint.claim(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_a_run_on_subwords_keeps_its_tokenizer(
    tmp_path: Path, text: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    made = tmp_path / "bpe.json"
    assert tokenizer.main(["--data", str(text), "--vocab-size", "300", "--out", str(made)]) == 0
    out = tmp_path / "run"
    arguments[arguments.index("--sample-tokens") + 1] = "4"
    assert main([*arguments, "--tokenizer", str(made), "--out", str(out), "--steps", "10"]) == 0
    folder = checkpoint.latest(out)
    vocabulary = tokenizer.load_tokenizer(folder)
    assert SynapseModel.from_pretrained(folder).config.vocab_size == vocabulary.vocab_size > 257
    result = json.loads((out / "result.json").read_text())
    assert result["bytes"] == sum(len(document.data) for document in load_corpus(text).held_out)
    made.unlink()
    assert main(["--out", str(out), "--resume", "--steps", "12", "--sample-tokens", "0"]) == 0
    other = tokenizer.train_bpe(["def function(x)"], 262)
    other.save(out)
    capsys.readouterr()
    assert main(["--out", str(out), "--resume", "--steps", "14"]) == 2
    assert "vocabulary: expected" in capsys.readouterr().err


def test_the_log_tells_the_terms_and_the_router(tmp_path: Path, arguments: list[str]) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--steps", "10", "--eval-minutes", "1e-9"]) == 0
    (line,) = log(tmp_path)
    named = {"language", "balance", "z", "norm", "lr", "tokens_per_second", "matrix_share", "bits_per_byte"}
    assert named | {"held_out_bits_per_byte", "load_entropy", "dead_experts", "load"} <= line.keys()
    assert 0 < float(str(line["load_entropy"])) <= 1
    assert 0 < float(str(line["matrix_share"])) < 1


def test_tensorboard_gets_the_log(tmp_path: Path, arguments: list[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*arguments, "--out", str(tmp_path), "--steps", "20", "--trackers", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "trackers" / "synapse"))
    events.Reload()
    found = [event.value for event in events.Scalars("language")]
    assert found == pytest.approx(losses(tmp_path), rel=1e-6)


def trackio_works() -> bool:
    """Whether it can be imported: older versions cannot, beside newer libraries of those they use."""
    try:
        importlib.import_module("trackio")
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not trackio_works(), reason="no trackio that can be imported")
def test_trackio_gets_the_log(tmp_path: Path, arguments: list[str]) -> None:
    """In a process of its own, since trackio takes its folder from the environment when it is imported."""
    command = [sys.executable, "-m", "recipes.train", *arguments, "--steps", "20", "--trackers", "trackio"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackers" / "synapse.db")) as database:
        told = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    assert [values["language"] for values in told] == pytest.approx(losses(tmp_path), rel=1e-6)


def test_a_tracker_that_is_missing_is_refused(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([*arguments, "--out", str(tmp_path / "run"), "--trackers", "tensorboard"]) == 2
    assert "synapse-arch[trackers]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


FORKS = """
import os, sys
import recipes.train
for line in sys.stdin:
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)
        os._exit(recipes.train.main(line.split("\\t")[:-1]))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path: Path, arguments: list[str]) -> None:
    """Processes are forked from one that has everything imported; each is killed after a random while."""
    given, out = [*arguments, "--carry", "--steps", "24"], tmp_path / "killed"
    draw, kills = random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, env=environment, **pipes) as forks:

        def start(options: list[str]) -> int:
            forks.stdin.write("\t".join(options) + "\t\n")
            forks.stdin.flush()
            return int(forks.stdout.readline())

        start([*given, "--out", str(tmp_path / "whole")])
        assert int(forks.stdout.readline()) == 0
        child = start([*given, "--out", str(out), "--save-minutes", "1e-9"])
        while kills < 4:
            before = known_step(out)
            while known_step(out) == before and os.path.exists(f"/proc/{child}"):  # until it has come further
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert int(forks.stdout.readline()) == signal.SIGKILL, "it ended before it was killed"
            kills += 1
            child = start(["--out", str(out), "--resume", "--sample-tokens", "0"])
        assert int(forks.stdout.readline()) == 0
    assert same(weights(tmp_path / "whole"), weights(out))
    assert losses(tmp_path / "whole") == losses(out)


def known_step(out: Path) -> str:
    return max((item.name for item in out.glob("step-*")), default="")


def test_torch_is_seeded_by_the_step_alone(tmp_path: Path, arguments: list[str]) -> None:
    noisy = [*arguments, "--set", "thalamus.noise=0.3", "--steps", "4"]
    assert main([*noisy, "--out", str(tmp_path / "a")]) == 0
    torch.manual_seed(99)
    assert main([*noisy, "--recompute", "--out", str(tmp_path / "b")]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def carrying(*, begins: bool) -> Any:
    """What `Trainer.states` asks of a trainer that carries a state on, at the begin of an epoch or not."""
    model = small_model()
    return SimpleNamespace(
        config=SimpleNamespace(accumulate=1),
        state=read_state(model, 2),
        model=model,
        windows=SimpleNamespace(begins=lambda step: begins),
        progress=SimpleNamespace(step=1),
    )


def test_nothing_is_carried_into_another_document() -> None:
    found, ids = carrying(begins=False), torch.tensor([[0, 5], [5, 0]])  # the first row begins with a separator
    (state,) = trainer.Trainer.states(found, Batch(ids, ids, None))
    assert state is not None
    assert state.position.tolist() == [0, int(found.state.position[1])]


def test_nothing_is_carried_into_another_epoch() -> None:
    ids = torch.tensor([[5, 5], [5, 5]])
    assert trainer.Trainer.states(carrying(begins=True), Batch(ids, ids, None)) == [None]


def test_a_checkpoint_s_name_is_on_the_disk_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    synced: list[Path] = []
    monkeypatch.setattr(_files, "sync_directory", synced.append)
    checkpoint.save(tmp_path, model, optimizer, checkpoint.Progress(step=1))
    assert synced[-1] == tmp_path
