"""FSDP2 over two gloo processes: the steps of one process, a checkpoint that comes back, and a whole model from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes import checkpoint, sharded, tokenizer
from recipes.optim import adamw, set_lr
from recipes.train import main
from synapse_arch import SynapseConfig, SynapseModel
from tests.recipes.running import ROOT, losses

SIZES = {
    "vocab_size": 32, "d_model": 16, "n_layers": 2, "thalamus.d_state": 4, "thalamus.head_dim": 8, "thalamus.top_k": 4,
    "experts.n_experts": 4, "experts.d_expert": 16, "xlstm.n_heads": 2, "memory.n_heads": 2, "memory.d_key": 4,
    "memory.d_value": 4, "thalamus.load_balance": 0.0,
}  # fmt: skip


def untrained() -> SynapseModel:
    torch.manual_seed(0)
    return SynapseModel(SynapseConfig.preset("tiny", **SIZES)).train()


def step(model: SynapseModel, optimizer: torch.optim.Optimizer, number: int, rank: int, world: int) -> None:
    ids = torch.randint(32, (4, 25), generator=torch.Generator().manual_seed(number)).chunk(world)[rank]
    set_lr(optimizer, 1e-3)
    loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
    assert loss is not None
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def trained(model: SynapseModel) -> torch.optim.Optimizer:
    return adamw(model, weight_decay=0.1, betas=(0.9, 0.95))


def work(folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = sharded.shard(untrained(), device="cpu")
    optimizer = trained(model)
    plain = trained(untrained())
    groups, whole = ([len(group["params"]) for group in one.param_groups] for one in (optimizer, plain))
    assert groups == whole  # marks of what must not decay have outlived the sharding
    for number in range(2):
        step(model, optimizer, number, rank, world)
    sharded.save(folder / "shards", model, optimizer)
    again = sharded.shard(untrained(), device="cpu")
    second = trained(again)
    sharded.load(folder / "shards", again, second)
    for one, other in ((model, optimizer), (again, second)):
        step(one, other, 2, rank, world)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.to_local(), other.to_local())  # type: ignore[attr-defined]
    held = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    assert held < 0.6 * sum(parameter.numel() for parameter in model.parameters())
    torch.distributed.destroy_process_group()


def test_shards_train_save_load_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"from pathlib import Path; from tests.recipes.test_sharded import work; work(Path({str(tmp_path)!r}))"
    (tmp_path / "work.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command.append(str(tmp_path / "work.py"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(item.name for item in tmp_path.iterdir()) == ["shards", "work.py"]
    assert sharded.main([str(tmp_path / "shards"), str(tmp_path / "model")]) == 0
    whole = SynapseModel.from_pretrained(tmp_path / "model")
    expected = untrained()
    optimizer = trained(expected)
    for number in range(2):
        step(expected, optimizer, number, 0, 1)
    for (name, parameter), other in zip(whole.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(parameter, other, atol=2e-5), name
    assert not torch.equal(whole.head.weight, untrained().head.weight)
    assert sharded.main([str(tmp_path / "none"), str(tmp_path / "model")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.usefixtures("fresh")
def test_a_sharded_run_reproduces_one_process_and_goes_on_in_one(tmp_path: Path, arguments: list[str]) -> None:
    """`--shard` over two processes, its checkpoints, and what the end of the run makes of them."""
    given = [*arguments, "--set", "n_layers=2", "--accumulate", "2", "--lr", "3e-4", "--carry", "--steps", "10"]
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["recipes/train.py", *given, "--shard", "--out", str(tmp_path / "two"), "--sample-tokens", "4"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "A sample, after" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    folder = checkpoint.latest(tmp_path / "two")
    parts = sorted(item.name for item in (folder / "shards").iterdir())
    assert parts == [".metadata", "__0_0.distcp", "__1_0.distcp", "config.json"]
    assert not list(tmp_path.glob("two/.*"))
    SynapseModel.from_pretrained(folder)
    assert sharded.main([str(folder), str(tmp_path / "whole")]) == 0  # a step folder
    for name in ("one", "two"):
        assert main(["--out", str(tmp_path / name), "--resume", "--steps", "20", "--sample-tokens", "0"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.usefixtures("fresh")
def test_a_step_folder_is_made_whole_in_place(tmp_path: Path, text: Path, arguments: list[str]) -> None:
    pytest.importorskip("tokenizers")
    made = tmp_path / "bpe.json"
    assert tokenizer.main(["--data", str(text), "--vocab-size", "300", "--out", str(made)]) == 0
    out = tmp_path / "run"
    assert main([*arguments, "--shard", "--tokenizer", str(made), "--out", str(out), "--steps", "1"]) == 0
    folder = str(checkpoint.latest(out))
    assert sharded.main([folder, folder]) == 0


@pytest.mark.usefixtures("fresh")
def test_damaged_shards_are_refused(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--shard", "--out", str(tmp_path), "--steps", "3"]) == 0
    (checkpoint.latest(tmp_path) / "shards" / "__0_0.distcp").unlink()
    assert main(["--out", str(tmp_path), "--resume", "--steps", "6"]) == 2
    assert "shards" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--resume", "--no-shard", "--steps", "6"]) == 2
    assert "--shard" in capsys.readouterr().err
