"""Fine-tuning end to end on a model of a few thousand parameters: adapters that work, runs that learn and resume."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from recipes import checkpoint, curves
from recipes.adapters import add_lora, expert_names, linear_names, load_lora
from recipes.checkpoint import model_folder
from recipes.finetune import Finetuner, main
from recipes.finetuning import FinetuneConfig, resumed
from recipes.pairs import Encoded, collate
from synapse_arch import ExpertsConfig, SynapseConfig, SynapseModel, ThalamusConfig
from synapse_arch.errors import CheckpointError, ConfigError
from tests.helpers import assert_close
from tests.model.small import small_config, small_model, tokens
from tests.recipes.running import ROOT, strictly

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def shaken(model: Any) -> Any:
    """The adapted model with adapters that have learned something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "ssd": {},
    "s6": {"thalamus": ThalamusConfig(mamba="s6", d_state=4, top_k=2)},
    "shared": {"experts": ExpertsConfig(n_experts=4, d_expert=6, d_shared=5)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_adapter_is_asked(variant: str) -> None:
    """Code that read a projection's weight instead of calling it would leave its adapter without a gradient."""
    model = small_model(**VARIANTS[variant])
    named = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = [name for name in named if name.rpartition(".")[2] in (*linear_names(model), "router", "head")]
    assert sorted(wanted) == sorted(named)
    modules = [*linear_names(model), "router", "head"]
    adapted = shaken(add_lora(model, rank=2, alpha=4, modules=modules, parameters=expert_names(model)))
    ids = tokens(3, 12)
    adapted(ids, targets=ids.roll(-1, 1)).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (len(named) + 2 * model.config.n_layers)
    silent = [name for name, grad in gradients.items() if grad is None or not grad.abs().max() > 0]
    assert silent == []


def test_a_new_adapter_changes_nothing_and_a_trained_one_does() -> None:
    model, ids = small_model(), tokens(2, 9)
    before = model(ids).logits
    adapted = add_lora(model, rank=2, alpha=4)
    assert_close(adapted(ids).logits, before)
    after = shaken(adapted)(ids).logits
    assert (after - before).abs().max() > 0.1 * before.abs().max()
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize("kind", ["projections", "experts"])
def test_an_adapter_merges_back_into_the_model(tmp_path: Path, kind: str) -> None:
    model, ids = small_model().double(), tokens(2, 9)
    targets: dict[str, Any] = (
        {"modules": linear_names(model)} if kind == "projections" else {"parameters": ["experts.w_in", "experts.w_out"]}
    )
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = shaken(add_lora(model, rank=2, alpha=4, **targets))
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    fresh = small_model().double()
    fresh.load_state_dict(base)
    merged = load_lora(fresh, tmp_path).merge_and_unload()
    assert isinstance(merged, SynapseModel)
    assert merged.state_dict().keys() == base.keys()
    assert_close(merged(ids).logits, expected)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, base[name])}
    part = "_proj.weight" if kind == "projections" else "experts.w_"
    assert changed
    assert all(part in name for name in changed)


def test_names_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LoRA modules.*'q_proj'"):
        add_lora(small_model(), rank=2, alpha=4, modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"LoRA parameters.*'experts\.w'"):
        add_lora(small_model(), rank=2, alpha=4, parameters=["experts.w"])
    with pytest.raises(CheckpointError, match="adapter"):
        load_lora(small_model(), tmp_path)


@pytest.mark.parametrize("other", [{"n_layers": 1}, {"n_layers": 3}, {"memory": None}], ids=str)
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    """Of whatever fits by its shapes peft says nothing."""
    add_lora(small_model(), rank=2, alpha=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"an adapter of this model, got \d+ tensors missing and \d+ too many"):
        load_lora(SynapseModel(dataclasses.replace(small_config(), **other)), tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    config = SynapseConfig.from_dict({**small_config().to_dict(), "vocab_size": 256})
    torch.manual_seed(0)
    model = SynapseModel(config)
    with torch.no_grad():
        model.head.weight.mul_(20)  # adapters leave the head alone: it has to be worth something
    model.save_pretrained(folder / "base")
    words = ["ab", "cd", "ef", "gh"]
    answers = ({"prompt": f"{word}=", "completion": word[::-1]} for word in words)
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    pairs = ({"prompt": f"{word}=", "chosen": word[::-1], "rejected": word} for word in words)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return folder


def arguments(files: Path, out: Path, task: str, *more: str) -> list[str]:
    data = files / ("sft.jsonl" if task == "sft" else "pairs.jsonl")
    given = ["--base", str(files / "base"), "--data", str(data), "--out", str(out), "--task", task]
    return [*given, "--batch-size", "2", "--lr", "3e-2", "--schedule", "linear", *more]


def log(out: Path) -> list[dict[str, Any]]:
    return [strictly(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_that_diverges_is_stopped_and_its_log_is_json(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(files, tmp_path, "sft", "--lr", "1e30", "--epochs", "20", "--method", "full")) == 2
    assert "lower --lr" in capsys.readouterr().err
    assert [line["language"] for line in log(tmp_path)].count(None) > 0


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("task", ["sft", "dpo", "orpo"])
def test_a_run_learns(tmp_path: Path, files: Path, task: str, method: str) -> None:
    held_out = str(files / ("sft.jsonl" if task == "sft" else "pairs.jsonl"))
    more = ["--epochs", "10", "--method", method, "--rank", "4", "--held-out", held_out]
    assert main(arguments(files, tmp_path, task, *more)) == 0
    lines, term = log(tmp_path), "language" if task == "sft" else task
    assert lines[-1]["step"] == 20
    first, last = (sum(line[term] for line in part) for part in (lines[:4], lines[-4:]))
    assert last < 0.8 * first
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    if task != "sft":
        assert result["held_out"]["accuracy"] == 1
    if task == "dpo":
        assert lines[0]["dpo"] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are still the same
    folder = checkpoint.latest(tmp_path)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "who may read one file of a checkpoint may read all"
    base = SynapseModel.from_pretrained(files / "base")
    ids = tokens(1, 5)
    before = base(ids).logits
    tuned = load_lora(base, folder) if method == "lora" else SynapseModel.from_pretrained(folder)
    assert (tuned(ids).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize(("task", "method"), [("sft", "lora"), ("dpo", "full")])
def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(
    tmp_path: Path, files: Path, task: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--epochs", "3", "--method", method]
    assert main(arguments(files, tmp_path / "whole", task, *more)) == 0
    from recipes.finetune import Finetuner

    step = Finetuner.step

    def stopped(self: Finetuner) -> dict[str, float]:
        self.stop.made = self.progress.step == 2
        return step(self)

    monkeypatch.setattr(Finetuner, "step", stopped)
    assert main(arguments(files, tmp_path / "parts", task, *more)) == 0
    assert checkpoint.latest(tmp_path / "parts").name == "step-00000003"
    monkeypatch.setattr(Finetuner, "step", step)
    assert main(["--out", str(tmp_path / "parts"), "--resume"]) == 0
    one, other = (checkpoint.latest(tmp_path / name) for name in ("whole", "parts"))
    assert one.name == other.name == "step-00000006"
    weights = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    for name in (weights, "trainer.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(log(tmp_path / "parts")) == 6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_bf16_too_a_policy_starts_as_its_reference(tmp_path: Path, files: Path, method: str) -> None:
    pair = {"prompt": "say ", "chosen": "ab" * 40, "rejected": "ba" * 30}
    (tmp_path / "long.jsonl").write_text("\n".join([json.dumps(pair)] * 4), encoding="utf-8")
    more = ["--data", str(tmp_path / "long.jsonl"), "--mixed-precision", "bf16", "--method", method, "--epochs", "1"]
    assert main(arguments(files, tmp_path / "out", "dpo", *more)) == 0
    assert log(tmp_path / "out")[0]["margin"] == 0.0


def test_a_run_goes_on_in_its_own_precision(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher's where none was given; another one on resuming is refused, and the launcher's does not count."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(arguments(files, tmp_path, "sft", "--epochs", "1")) == 0
    assert "mixed precision bf16" in capsys.readouterr().out
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert main(["--out", str(tmp_path), "--resume", "--epochs", "2"]) == 0
    assert "mixed precision bf16" in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--resume", "--mixed-precision", "no"]) == 2
    assert "--mixed-precision with --resume: expected bf16" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert main(arguments(files, tmp_path / "other", "sft")) == 2
    assert "accelerate launch --mixed_precision: expected no or bf16, got fp16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rank", "0"], "rank: expected 1 or more"),
        (["--lora-modules", "nowhere"], "LoRA modules"),
        (["--method", "full", "--lora-modules", "in_proj"], "method full"),
        (["--length", "4"], "line 1: expected at most 4 tokens"),
        (["--base", "nowhere"], "expected a model, or a run with a checkpoint in it, got no such folder"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "dpo"], "line 1: expected the fields prompt, chosen, rejected"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, files: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(files, tmp_path / "out", "sft"), *change]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("error: ")
    assert message in shown


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (4, 10, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert model_folder(tmp_path, "--base") == tmp_path / "step-00000010"
    (tmp_path / "config.json").touch()
    assert model_folder(tmp_path, "--base") == tmp_path


def test_a_folder_in_use_and_a_changed_run_are_refused(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(files, tmp_path, "sft", "--epochs", "1")
    assert main(given) == 0
    assert main(given) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*given, "--resume", "--rank", "3"]) == 2
    assert "--rank with --resume" in capsys.readouterr().err


def test_a_second_stage_keeps_the_model_of_the_first(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(files, out, "sft", "--epochs", "1", "--method", "full")) == 0
    again = ["--base", str(out), "--epochs", "2"]
    assert main([*arguments(files, out, "sft", *again), "--overwrite"]) == 2
    assert "expected a model outside" in capsys.readouterr().err
    assert checkpoint.latest(out).name == "step-00000002"
    data = checkpoint.latest(out) / "data.jsonl"
    data.write_bytes((files / "sft.jsonl").read_bytes())
    assert main([*arguments(files, out, "sft", "--data", str(data)), "--overwrite"]) == 2
    assert f"--data {data} with --overwrite" in capsys.readouterr().err
    assert data.is_file()
    second = arguments(files, tmp_path / "second", "sft", *again)
    assert main(second) == 0
    assert main([*second, "--resume", "--epochs", "3"]) == 0  # the same command, with the run as its base
    assert checkpoint.latest(tmp_path / "second").name == "step-00000006"
    assert main(arguments(files, tmp_path / "third", "sft", "--base", str(tmp_path / "second"))) == 2
    assert "got an adapter; merge it into its base first" in capsys.readouterr().err


def test_only_the_run_of_a_step_folder_stands_for_it() -> None:
    stored = asdict(FinetuneConfig(base="/models/a", data="/d.jsonl"))
    with pytest.raises(ConfigError, match="--base with --resume"):
        resumed(stored, {"base": "/models"})


def test_a_run_that_ended_meanwhile_is_not_cleared(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import finetune

    configure = finetune.configure

    def slowly(command: finetune.Command) -> object:
        found = configure(command)
        monkeypatch.setattr(finetune, "configure", configure)
        assert main(arguments(files, tmp_path, "sft", "--epochs", "1")) == 0
        return found

    monkeypatch.setattr(finetune, "configure", slowly)
    assert main(arguments(files, tmp_path, "sft", "--epochs", "2")) == 2
    assert "holds a run" in capsys.readouterr().err
    assert checkpoint.latest(tmp_path).name == "step-00000002"


def test_its_log_is_not_drawn_as_a_training_s(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(arguments(files, tmp_path, "sft", "--epochs", "1")) == 0
    assert curves.main([str(tmp_path)]) == 2
    assert "expected the log of recipes/train.py" in capsys.readouterr().err


def test_held_out_figures_do_not_depend_on_the_batch(tmp_path: Path, files: Path) -> None:
    rows = (
        {"prompt": f"{word}=", "completion": word * count} for count, word in enumerate(("ab", "cd", "ef"), start=1)
    )
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = []
    for size in ("1", "2", "3"):
        more = ["--epochs", "1", "--lr", "1e-9", "--held-out", str(tmp_path / "held.jsonl"), "--batch-size", size]
        assert main(arguments(files, tmp_path / size, "sft", *more)) == 0
        result = json.loads((tmp_path / size / "result.json").read_text(encoding="utf-8"))
        found.append(result["held_out"]["language"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@pytest.mark.parametrize(("task", "method"), [("sft", "lora"), ("orpo", "full")])
def test_two_processes_reproduce_one(tmp_path: Path, files: Path, task: str, method: str) -> None:
    """At equal global batch and unequal lengths; and one goes on from what two saved."""
    fields = {"sft": ("completion",), "orpo": ("chosen", "rejected")}[task]
    lines = ({"prompt": "say " * n, **{name: f"{name[n:]}" * n for name in fields}} for n in range(1, 5))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    given = ["--base", str(files / "base"), "--data", str(tmp_path / "data.jsonl"), "--task", task, "--method", method]
    given += ["--batch-size", "4", "--lr", "1e-3"]
    assert main([*given, "--out", str(tmp_path / "one"), "--epochs", "4"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["recipes/finetune.py", *given, "--out", str(tmp_path / "two"), "--epochs", "4"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for name in ("language", "balance", "z", task):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-6), (one["step"], name)
    assert len(log(tmp_path / "two")) == 4
    assert main(["--out", str(tmp_path / "two"), "--resume"]) == 0


def test_what_dpo_compares_with_has_no_noise_and_the_policy_keeps_its_mode() -> None:
    noisy = ThalamusConfig(d_state=4, head_dim=8, top_k=2, noise=10.0)
    model = add_lora(small_model(thalamus=noisy), rank=2, alpha=2.0).train()
    batch = collate([Encoded([0, 5, 6], ([7, 8, 0], [9, 0]))])
    held: Any = SimpleNamespace(model=model, reference=None)
    one, other = (Finetuner.compared(held, batch) for _ in range(2))
    assert torch.equal(one[0].total, other[0].total)
    assert model.training
