"""What a report counts, recomputed by hand, and that it is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge.cli import main
from merge.io import Checkpoint
from merge.picture import draw
from merge.report import Account, account, count, module_of, to_markdown

COUNTED = ("layers.1.memory", "layers.0.experts")


def test_one_tensor_by_hand() -> None:
    vectors = torch.tensor([[3.0, 4.0, -1.0, 0.0], [2.0, -1.0, 2.0, 0.0]])
    trimmed = torch.tensor([[3.0, 4.0, 0.0, 0.0], [2.0, -1.0, 2.0, 0.0]])
    sums = count(torch.tensor([1.0, 1.0, 1.0, 1.0]), vectors, trimmed)
    assert sums.numbers == 4
    assert sums.relative_norm == pytest.approx([math.sqrt(26) / 2, 1.5])
    assert sums.energy_kept == pytest.approx([25 / 26, 1.0])
    assert sums.kept.tolist() == [2, 3]
    assert sums.overlap == pytest.approx(2 / 3)  # the first two of the three that are touched
    assert sums.conflict == pytest.approx(1 / 2)  # the second of the two that are shared


@pytest.fixture
def found(zoo: Path) -> Account:
    base = Checkpoint(zoo / "base")
    return account(base, {name: Checkpoint(zoo / name) for name in "abc"}, [0.3, 0.3, 1.0])


@pytest.mark.parametrize("module", COUNTED)
def test_a_module_is_the_sum_of_its_tensors(zoo: Path, found: Account, module: str) -> None:
    base, *models = (Checkpoint(zoo / name) for name in ("base", "a", "b", "c"))
    names = [name for name in base.shapes if module_of(name) == module and base.dtypes[name].is_floating_point]
    assert any("norm" in name for name in names)
    assert found.modules[module].numbers == sum(base.tensor(name).numel() for name in names)
    theta = torch.cat([base.tensor(name).flatten() for name in names]).double()
    for index, model in enumerate(models):
        tau = torch.cat([(model.tensor(name) - base.tensor(name)).flatten() for name in names]).double()
        assert found.modules[module].relative_norm[index] == pytest.approx(float(tau.norm() / theta.norm()))
    kept = [sum(max(1, int(0.3 * base.tensor(name).numel())) for name in names)] * 2
    assert found.modules[module].kept.tolist()[:2] == kept
    assert found.modules[module].energy_kept[2] == pytest.approx(1.0)


def test_cosines_are_those_of_whole_task_vectors(zoo: Path, found: Account) -> None:
    base, *models = (Checkpoint(zoo / name) for name in ("base", "a", "b", "c"))
    names = [name for name in base.shapes if base.dtypes[name].is_floating_point]
    taus = [torch.cat([(one.tensor(name) - base.tensor(name)).flatten() for name in names]).double() for one in models]
    for i in range(3):
        for j in range(3):
            expected = float(torch.cosine_similarity(taus[i], taus[j], dim=0))
            assert float(found.cosines[i, j]) == pytest.approx(expected, abs=1e-6)


def test_layers_stand_in_order(tmp_path: Path) -> None:

    names = [f"layers.{layer}.mlp.weight" for layer in (10, 2, 0)] + ["head.weight"]
    save_file({name: torch.ones(3) for name in names}, tmp_path / "x.safetensors")
    one = Checkpoint(tmp_path / "x.safetensors")
    assert list(account(one, {"x": one}, 0.5).modules) == ["head", "layers.0.mlp", "layers.2.mlp", "layers.10.mlp"]


def test_layers_can_be_joined(found: Account) -> None:
    joined = found.joined()
    assert "layers.*.experts" in joined.modules
    assert joined.total.numbers == found.total.numbers
    both = sum(found.modules[f"layers.{layer}.experts"].touched for layer in range(2))
    assert joined.modules["layers.*.experts"].touched == both


def test_a_model_that_did_not_move_has_no_cosine(zoo: Path, tmp_path: Path) -> None:
    base = Checkpoint(zoo / "base")
    still = account(base, {"still": base, "a": Checkpoint(zoo / "a")}, 0.2)
    assert math.isnan(still.cosines[0, 1])
    assert "–" in to_markdown(still, "x.png")
    draw(still, tmp_path / "still.png")
    assert (tmp_path / "still.png").stat().st_size > 10_000


@pytest.mark.usefixtures("inside")
def test_a_merge_with_a_report() -> None:
    words = ["--base", "base", "--models", "a", "b", "c", "--out", "out", "--density", "0.25", "--quiet", "--report"]
    assert main(words) == 0
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert "a 25.0 %" in text
    assert "| layers.0.thalamus |" in text
    assert Path("out/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("inside")
def test_without_a_base_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "a", "b", "--method", "linear", "--out", "out", "--quiet", "--report"]) == 2
    assert "--report" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.usefixtures("inside")
def test_an_interrupted_report_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("merge.cli.write_report", stopped)
    words = ["--base", "base", "--models", "a", "b", "--out", "out", "--report", "--quiet"]
    assert main(words) == 130
    assert "the model is in out" in capsys.readouterr().err
    assert Checkpoint("out").shapes.keys() == Checkpoint("base").shapes.keys()
