"""Runs: the same twice, resumed to the bit, kept once, chosen by the best median."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality import budget, runs, training
from benchmarks.quality.models import build
from benchmarks.quality.records import best
from benchmarks.quality.runs import Run, experiment, perform
from benchmarks.quality.table import table
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.base import Task
from benchmarks.quality.training import Trainer
from synapse_arch.errors import ConfigError

RUN = Run(task="tiny", model="synapse", lr=3e-3, weight_decay=0.0, seed=0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    """Memorization, small: eight steps of eight sequences on a narrow model."""
    whole = TASKS["memorization"]
    protocol = replace(
        whole.protocols["cpu"], train_examples=16, test_examples=16, batch_size=8, steps=8, lrs=(1e-3, 3e-3),
        weight_decays=(0.0,), d_model=32, n_layers=1, eval_every=4,
    )  # fmt: skip
    task = replace(whole, name="tiny", protocols={"cpu": protocol})
    monkeypatch.setitem(TASKS, "tiny", task)
    return task


def folders(tmp_path: Path) -> dict[str, Any]:
    return {"results": tmp_path / "results", "unfinished": tmp_path / "unfinished"}


def made_up(model: str, lr: float, seed: int, score: float, **others: Any) -> dict[str, Any]:
    record = {"task": "parity", "scale": "cpu", "model": model, "lr": lr, "weight_decay": 0.0, "seed": seed}
    return record | {"score": score, "metric": "accuracy", "steps": 10} | others


def test_a_record_says_what_ran_and_is_not_made_twice(tiny: Task, tmp_path: Path) -> None:
    record = perform(RUN, **folders(tmp_path))
    assert record["steps_done"] == record["steps"] == 8
    assert [entry[0] for entry in record["curve"]] == [4, 8]
    assert record["score"] == record["curve"][-1][2]
    assert record["parameters"] > record["active_parameters"] > 0
    file = tmp_path / "results" / "tiny" / "synapse__lr0.003_wd0_s0.json"
    assert json.loads(file.read_text()) == record
    file.write_text(json.dumps(record | {"score": 7}))
    assert perform(RUN, **folders(tmp_path))["score"] == 7
    file.write_text(json.dumps(record | {"score": 7, "parameters": 1}))  # of another configuration
    anew = perform(RUN, **folders(tmp_path))
    assert [anew[key] for key in ("score", "curve", "parameters")] == [
        record[key] for key in ("score", "curve", "parameters")
    ]


def test_another_precision_is_another_run(tiny: Task, tmp_path: Path) -> None:
    assert perform(RUN, **folders(tmp_path))["machine"]["autocast"] == "no"
    assert perform(RUN, bf16=True, **folders(tmp_path))["machine"]["autocast"] == "bf16"


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perform(RUN, **folders(tmp_path / "whole"))
    step = Trainer.step

    def killed(trainer: Trainer) -> None:
        if trainer.progress.step == 6:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        perform(RUN, **folders(tmp_path))
    monkeypatch.setattr(Trainer, "step", step)
    kept = tmp_path / "unfinished" / f"{RUN.path}.pt"
    other = torch.load(kept, weights_only=True)
    other["plan"]["parameters"] += 1  # begun by another configuration: not gone on with
    begun = tmp_path / "other" / "unfinished" / f"{RUN.path}.pt"
    begun.parent.mkdir(parents=True)
    torch.save(other | {"model": {}}, begun)
    assert perform(RUN, **folders(tmp_path / "other"))["curve"] == whole["curve"]
    torch.manual_seed(99)
    record = perform(RUN, **folders(tmp_path))
    assert [entry[2] for entry in record["curve"]] == [entry[2] for entry in whole["curve"]]
    assert record["curve"][-1][1] == whole["curve"][-1][1]
    assert not kept.exists()


def test_it_learns(tiny: Task) -> None:
    torch.manual_seed(0)
    protocol = replace(tiny.protocols["cpu"], steps=40, eval_every=40)
    trainer = Trainer(build("synapse", task=tiny, protocol=protocol), tiny, protocol, seed=0, lr=1e-2, weight_decay=0.0)
    before = trainer.score()
    trainer.run()
    assert trainer.progress.curve[-1][2] > 10 * before
    assert trainer.progress.curve[-1][2] > 0.1


def test_training_stops_where_the_protocol_says(tiny: Task) -> None:
    protocol = replace(tiny.protocols["cpu"], stop_at=0.0)
    trainer = Trainer(build("synapse", task=tiny, protocol=protocol), tiny, protocol, seed=0, lr=1e-3, weight_decay=0.0)
    trainer.run()
    assert trainer.progress.step == protocol.eval_every
    trainer.run()  # taken up again after it was good enough
    assert trainer.progress.step == protocol.eval_every


def test_steps_without_a_finite_gradient_are_skipped_counted_and_at_last_refused(tiny: Task) -> None:
    protocol = replace(tiny.protocols["cpu"], steps=100, eval_every=100)
    learner = build("synapse", task=tiny, protocol=protocol)
    trainer = Trainer(learner, tiny, protocol, seed=0, lr=1e-3, weight_decay=0.0)
    with torch.no_grad():
        next(learner.head.parameters()).fill_(float("nan"))
    kept = [parameter.clone() for parameter in learner.body.parameters()]
    with pytest.raises(FloatingPointError, match="without a finite gradient"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(kept, learner.body.parameters(), strict=True))


def test_bits_are_those_of_a_uniform_guess_when_nothing_is_known() -> None:
    task = TASKS["bytes"]
    protocol = replace(task.protocols["cpu"], test_examples=4, d_model=32, n_layers=1)
    learner = build("synapse", task=task, protocol=protocol)
    with torch.no_grad():
        next(learner.head.parameters()).zero_()
    assert Trainer(learner, task, protocol, seed=0, lr=1e-3, weight_decay=0.0).score() == pytest.approx(8.0)


def test_the_grid_chooses_and_all_seeds_follow(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Run] = []

    def pretend(run: Run, **options: Any) -> dict[str, Any]:
        ran.append(run)
        return made_up("synapse", run.lr, run.seed, score=run.lr)

    monkeypatch.setattr(runs, "perform", pretend)
    experiment("tiny", "synapse", scale="cpu", seeds=(0, 1, 2))
    assert [(run.lr, run.seed) for run in ran] == [(1e-3, 0), (3e-3, 0), (3e-3, 0), (3e-3, 1), (3e-3, 2)]


def test_a_learning_rate_that_diverges_is_left_out(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "MOST_FAILURES", 2)
    done = experiment(
        "tiny", "synapse", scale="cpu", seeds=(0, 1), cells=((1e30, 0.0), (1e-3, 0.0)), **folders(tmp_path)
    )
    assert [(record["lr"], record["seed"]) for record in done] == [(1e-3, 0), (1e-3, 1)]
    assert "synapse__lr1e+30_wd0_s0 diverged and is left out: tiny: 3 steps without" in capsys.readouterr().err
    (file,) = (tmp_path / "results").rglob("*.diverged")
    assert json.loads(file.read_text())["lr"] == 1e30
    assert "1e+30" not in table(tmp_path / "results")
    one = {"scale": "cpu", "seeds": (0,), **folders(tmp_path)}
    assert experiment("tiny", "synapse", cells=((1e30, 0.0), (2e30, 0.0)), **one) == []
    monkeypatch.setattr(Trainer, "step", lambda trainer: vars(trainer.progress).update(step=trainer.progress.step + 1))
    assert len(experiment("tiny", "synapse", cells=((1e30, 0.0),), **one)) == 1  # tried again
    assert not file.exists()


def test_a_score_that_is_not_finite_is_never_a_record(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = perform(RUN, **folders(tmp_path))
    (file,) = (tmp_path / "results").rglob("*.json")
    file.write_text(json.dumps(record | {"score": float("nan")}))
    assert table(tmp_path / "results") == ""
    assert perform(RUN, **folders(tmp_path))["score"] == record["score"]  # made anew
    file.unlink()
    monkeypatch.setattr(Trainer, "score", lambda trainer: float("nan"))
    with pytest.raises(FloatingPointError, match="a score of nan"):
        perform(RUN, **folders(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("metric", ["accuracy", "bits_per_byte"])
def test_best_never_takes_what_is_not_finite(metric: str) -> None:
    scores = {1: (float("nan"), 0.9), 2: (float("inf"), -float("inf")), 3: (0.1,)}
    found = [made_up("m", lr, s, score, metric=metric) for lr in scores for s, score in enumerate(scores[lr])]
    assert best(found).lr == (1 if metric == "accuracy" else 3)
    assert best(found).scores == [0.9 if metric == "accuracy" else 0.1]
    assert not best(found[2:4]).found


def test_best_takes_the_median_and_knows_that_fewer_bits_are_better() -> None:
    records = [
        made_up("m", lr, s, score)
        for lr, scores in ((1, (0.2, 0.9, 0.3)), (2, (0.4, 0.5, 0.4)))
        for s, score in enumerate(scores)
    ]
    assert best(records).lr == 2
    assert best(record | {"metric": "bits_per_byte"} for record in records).lr == 1


def test_table_compares_equal_training(tmp_path: Path) -> None:
    records = [made_up("synapse", 1e-3, seed, score) for seed, score in enumerate((0.5, 0.7, 0.6))]
    records += [made_up("synapse", 3e-3, 0, 0.9), made_up("mamba2", 3e-3, 0, 0.25)]
    records += [made_up("mamba2", 3e-3, 0, 0.99, steps=5)]
    assert best(record for record in records if record["model"] == "synapse").scores == [0.5, 0.7, 0.6]
    for index, record in enumerate(records):
        file = tmp_path / "parity" / f"{index}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record))
    steps = records[0]["steps"]
    heading, _, columns, _, *rows = table(tmp_path).splitlines()
    assert heading.startswith("parity (cpu); bar 100; published: ")
    assert columns == "| model | steps | score | seeds | learning rate | tried |"
    assert rows == [
        f"| synapse | {steps:,} | 60.0 (50.0–70.0) | 3 | 0.001 | 2 |",
        "| mamba2 | 5 | 99.0 | 1 | 0.003 | 1 |",
        f"| mamba2 | {steps:,} | 25.0 | 1 | 0.003 | 1 |",
    ]


def test_equal_time_is_counted_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SPEEDS", tmp_path)
    timed = {"step_seconds": {"synapse": 0.5, "mlstm": 0.25}, "bf16": False}
    (tmp_path / "bytes.json").write_text(json.dumps(timed))
    assert budget.steps("bytes", ["synapse", "mlstm"], seconds=60) == {"synapse": 120, "mlstm": 240}
    with pytest.raises(ConfigError, match="mamba2"):
        budget.steps("bytes", ["mamba2"], seconds=60)
    with pytest.raises(ConfigError, match="expected without --bf16, as the steps were timed, got with --bf16"):
        budget.steps("bytes", ["synapse"], seconds=60, bf16=True)
    with pytest.raises(ConfigError, match="also mlstm, timed before"):
        budget.measure("bytes", ["synapse", "mamba2"], bf16=False)


def test_nothing_is_trained_before_every_time_is_known(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "SPEEDS", tmp_path)
    monkeypatch.setattr(command, "processes", None)
    (tmp_path / "parity.json").write_text(json.dumps({"step_seconds": {"synapse": 0.5}, "bf16": False}))
    assert command.main(["--task", "parity", "--model", "synapse", "mlstm", "--seconds", "1"]) == 2
    assert "mlstm" in capsys.readouterr().err


def test_a_record_of_a_task_that_is_gone_is_left_out(tiny: Task, tmp_path: Path) -> None:
    perform(RUN, **folders(tmp_path))
    known = table(tmp_path / "results")
    for file in (tmp_path / "results").rglob("*.json"):
        file.with_name("gone.json").write_text(file.read_text().replace('"tiny"', '"gone"'))
    assert table(tmp_path / "results") == known


def test_command(tiny: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert "memorization" in capsys.readouterr().out
    assert command.main([]) == 2
    assert "--task" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["--task", "nonsense"])
    for wrong, named in (
        (["--jobs", "0"], "--jobs"),
        (["--seconds", "-1"], "--seconds"),
        (["--steps", "0"], "--steps"),
        (["--weight-decay", "0.1"], "--weight-decay"),
        (["--lr", "1e-3", "0"], "--lr: expected positive numbers, got [0.001, 0.0]"),
        (["--lr", "nan"], "--lr"),
        (["--device", "cuda:99"], "--device: expected a device of this machine, got cuda:99"),
        (["--time", "--scale", "published"], "--time"),
        (["--time", "--results", "elsewhere"], "--time: expected no --results"),
    ):
        assert command.main(["--task", "parity", *wrong]) == 2
        assert named in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["--task", "parity", "--steps", "2", "--seconds", "2"])
    record = perform(RUN, **folders(tmp_path))
    assert command.main(["--table", "--results", str(tmp_path / "results")]) == 0
    assert f"{100 * record['score']:.1f}" in capsys.readouterr().out


def test_steps_are_as_many_as_asked_for(tmp_path: Path) -> None:
    task = ["--task", "memorization", "--model", "transformer", "--lr", "1e-3", "--seeds", "0"]
    assert command.main([*task, "--steps", "2", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    assert file.name == "transformer__lr0.001_wd0_s0_n2.json"
    assert json.loads(file.read_text())["steps_done"] == 2
