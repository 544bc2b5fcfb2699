"""Settings chosen on held-out text: the table is true, nothing is tried twice, the best recipe is what was read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from merge.candidates import grid
from merge.cli import main as merging
from merge.recipe import Recipe
from merge.run import merge
from merge.search import Search, main, open_search, read_text
from recipes.data import ByteTokenizer
from recipes.evaluation import held_out_bits
from recipes.tokenizer import train_bpe
from synapse_arch import SynapseConfig, SynapseModel
from tests.merge.conftest import perturbed
from tests.model.small import small_config


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders base, a and b that read bytes, and texts one.txt, two.txt and last.txt."""
    monkeypatch.chdir(tmp_path)
    config = SynapseConfig(**{**vars(small_config()), "vocab_size": 256})
    base = SynapseModel(config)
    base.save_pretrained("base")
    for index, name in enumerate("ab"):
        perturbed(base, index).save_pretrained(name)
    generator = random.Random(0)
    for name in ("one", "two", "last"):
        words = [generator.choice(["if", "while", "return", "x", "= 1\n"]) for _ in range(120)]
        Path(f"{name}.txt").write_text(" ".join(words), encoding="utf-8")
    Path("r.yaml").write_text("base: base\nmodels: [a, b]\n", encoding="utf-8")


def run(*words: str) -> int:
    return main(["--recipe", "r.yaml", "--data", "one.txt", "two.txt", "--out", "out", *words])


def found() -> dict[str, dict[str, object]]:
    rows = json.loads(Path("out/search.json").read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row for row in rows}


SMALL = ("--lambdas", "0.5", "1", "--densities", "0.3")


@pytest.mark.usefixtures("models")
def test_every_figure_is_that_of_the_saved_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--methods", "ties", "task_arithmetic", "--test", "last.txt") == 0
    rows = found()
    assert set(rows) == {"base", "a", "b", "average", "ties, best", "task_arithmetic, best"}
    best = yaml.safe_load(Path("out/best.yaml").read_text(encoding="utf-8"))
    merge(Recipe.load("out/best.yaml"), Path("merged"), progress=False)
    merge(Recipe(base="base", models=("a", "b"), method="linear"), Path("mean"), progress=False)
    candidates = {name: row for name, row in rows.items() if "method" in row["candidate"]}
    winner = min(candidates.values(), key=lambda row: row["mean"])
    for folder, row in (("base", rows["base"]), ("b", rows["b"]), ("mean", rows["average"]), ("merged", winner)):
        model = SynapseModel.from_pretrained(folder)
        for name, bits in {**row["bits"], **row["test"]}.items():
            assert held_out_bits(model, read_text(Path(f"{name}.txt"), ByteTokenizer())).per_byte == pytest.approx(
                bits, rel=1e-6
            )
    assert best["models"] == ["a", "b"]
    table = Path("out/search.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "| ties, best |" in table
    assert "last" in table


@pytest.mark.usefixtures("models")
def test_what_was_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*SMALL) == 0
    tried = []
    original = Search.tensors
    monkeypatch.setattr(Search, "tensors", lambda self, one: tried.append(dict(one)) or original(self, one))
    assert run("--lambdas", "0.5", "0.7", "1", "--densities", "0.3") == 0
    assert tried == [{"method": "ties", "lambda": 0.7, "density": 0.3}]


@pytest.mark.usefixtures("models")
def test_trials_survive_a_search_that_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Search.tensors

    def break_off(self: Search, candidate: dict[str, object]) -> object:
        if candidate.get("lambda") == 0.5:
            raise KeyboardInterrupt
        return original(self, candidate)

    monkeypatch.setattr(Search, "tensors", break_off)
    assert run(*SMALL) == 130
    assert len(Path("out/trials.jsonl").read_text(encoding="utf-8").splitlines()) == 1 + 4
    assert not Path("out/search.json").exists()


@pytest.mark.usefixtures("models")
def test_trials_of_other_texts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL) == 0
    Path("two.txt").write_text("something else entirely, and more of it\n" * 9, encoding="utf-8")
    assert run(*SMALL) == 2
    assert "trials of these models, recipe and texts" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_optuna_stays_within_the_bounds_and_repeats_itself() -> None:
    pytest.importorskip("optuna")
    words = ("--optuna", "4", "--methods", "ties", "linear", "--lambdas", "0.5", "1.5", "--densities", "0.2", "0.6")
    assert run(*words) == 0
    first = Path("out/trials.jsonl").read_bytes()
    trials = [json.loads(line)["candidate"] for line in first.splitlines()[1:]]
    assert len(trials) >= 5
    for trial in trials[4:]:
        assert 0.5 <= trial["lambda"] <= 1.5
        assert 0.2 <= trial.get("density", 0.2) <= 0.6
    assert run(*words) == 0
    assert Path("out/trials.jsonl").read_bytes() == first


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test", "nowhere"], "nowhere"),
        (["--densities", "2"], "density"),
        (["--optuna", "0"], "--optuna: expected 1 or more trials"),
    ],
)
def test_errors_are_a_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_grid_asks_a_method_only_for_what_it_knows() -> None:
    assert grid(["linear"], [1.0], [0.1, 0.2]) == [{"method": "linear", "lambda": 1.0}]
    assert grid(["slerp"], [1.0], [0.1]) == [{"method": "slerp"}]
    assert len(grid(["ties"], [0.5, 1.0], [0.1, 0.2, 1.0])) == 6
    assert [one["density"] for one in grid(["della"], [1.0], [0.05, 0.5, 1.0])] == [0.5]


@pytest.mark.usefixtures("models")
def test_every_document_of_a_file_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", "two", "three", "three")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert bytes(read_text(tmp_path / "t.jsonl", ByteTokenizer()).tolist()) == b"\0one\0two\0three\0three"


@pytest.mark.usefixtures("models")
def test_models_of_one_name_have_a_row_each() -> None:
    for name in "ab":
        Path("runs", name).mkdir(parents=True)
        Path(name).rename(Path("runs", name, "step-00000010"))
    Path("b").symlink_to(Path("runs/b/step-00000010"))
    Path("base").rename("start")
    Path("runs/b/step-00000010").rename("base")  # a model called as a reference is
    recipe = "base: start\nmodels: [runs/a/step-00000010, base]\n"
    Path("r.yaml").write_text(recipe, encoding="utf-8")
    assert run("--methods", "linear", "--lambdas", "0.5") == 0
    assert set(found()) == {"base", "step-00000010", str(Path("base").resolve()), "average", "linear, best"}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    "more",
    [
        'overrides: [{pattern: "*.experts.*", density: 0.5}]',
        "method: task_arithmetic\nweights: [1, -1]",
        'overrides: [{pattern: "*", skip: true}, {pattern: "*.experts.*", density: 0.5}]',
        "method: della\nepsilon: 0.5",
    ],
)
def test_recipes_that_merge_can_be_searched(more: str) -> None:
    Path("r.yaml").write_text(f"base: base\nmodels: [a, b]\n{more}\n", encoding="utf-8")
    assert run("--lambdas", "1", "--densities", "0.2", "0.5") == 0
    assert any(name.endswith(", best") for name in found())


@pytest.mark.usefixtures("models")
def test_optuna_takes_bounds_as_they_are() -> None:
    pytest.importorskip("optuna")
    assert run("--optuna", "3", "--methods", "della", "--lambdas", "0", "1", "--densities", "0.2", "0.3") == 0
    trials = [json.loads(line)["candidate"] for line in Path("out/trials.jsonl").read_text().splitlines()[1:]]
    assert run("--optuna", "1", "--methods", "della", "--densities", "1") == 2
    assert all(0.2 <= trial["density"] <= 0.3 for trial in trials if "density" in trial)


@pytest.mark.usefixtures("models")
def test_trials_of_models_that_changed_are_refused_and_a_broken_line_is_tried_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ("--methods", "linear", "--lambdas", "0.5")
    assert run(*small) == 0
    path = Path("out/trials.jsonl")
    whole = path.read_text(encoding="utf-8")
    for broken in (whole[:-20], whole.splitlines()[0][:9], ""):
        path.write_text(broken, encoding="utf-8")
        assert run(*small) == 0
        assert path.read_text(encoding="utf-8") == whole
    perturbed(SynapseModel.from_pretrained("base"), 7).save_pretrained("a")
    assert run(*small) == 2
    assert "trials of these models" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_trials_with_another_calibration_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    more = "align: activations\ncalibration: last.txt\n"
    Path("r.yaml").write_text(f"base: base\nmodels: [a, b]\nmethod: linear\n{more}", encoding="utf-8")
    assert run("--lambdas", "0.5") == 0
    assert run("--lambdas", "0.5") == 0
    Path("last.txt").write_text("another text of the same name", encoding="utf-8")
    assert run("--lambdas", "0.5") == 2
    assert "trials of these models" in capsys.readouterr().err
    Path("last.txt").unlink()
    assert run("--lambdas", "0.5") == 2
    assert "calibration: expected a readable text" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_trials_of_an_adapter_whose_scale_changed_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = SynapseModel.from_pretrained("base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["head"])).save_pretrained("lora")
    Path("r.yaml").write_text("base: base\nmodels: [a, lora]\nmethod: linear\n", encoding="utf-8")
    assert run("--lambdas", "0.5") == 0
    assert run("--lambdas", "0.5") == 0
    path = Path("lora/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"lora_alpha": 99}), encoding="utf-8")
    assert run("--lambdas", "0.5") == 2
    assert "trials of these models" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_texts_are_read_as_the_models_tokenizer_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = train_bpe(["if while return x = 1"] * 3, 262)
    Path("r.yaml").write_text("base: own\nmodels: [own-a]\n", encoding="utf-8")
    base = SynapseModel(SynapseConfig(**{**vars(small_config()), "vocab_size": tokenizer.vocab_size}))
    for name, model in (("own", base), ("own-a", perturbed(base, 0))):
        model.save_pretrained(name)
    assert run("--methods", "linear", "--lambdas", "1") == 2
    assert "tokenizer of own: expected" in capsys.readouterr().err
    for name in ("own", "own-a"):
        tokenizer.save(Path(name))
    assert run("--methods", "linear", "--lambdas", "1") == 0
    stream = read_text(Path("one.txt"), tokenizer)
    assert tokenizer.decode(stream[1:].tolist()) == Path("one.txt").read_text(encoding="utf-8")
    bits = held_out_bits(SynapseModel.from_pretrained("own"), stream, sizes=tokenizer.sizes).per_byte
    assert found()["base"]["bits"]["one"] == pytest.approx(bits, rel=1e-6)  # type: ignore[index]
    words = ["--base", "own", "--models", "own-a", "--align-experts", "activations", "--calibration", "one.txt"]
    assert merging([*words, "--out", "aligned", "--quiet"]) == 2
    assert "models that read bytes" in capsys.readouterr().err


@pytest.mark.usefixtures("models")
def test_models_whose_ids_stand_for_another_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, vocabulary in (("a", '{"x": 0, "y": 1}'), ("b", '{"y": 0, "x": 1}')):
        Path(name, "tokenizer.json").write_text(f'{{"model": {{"vocab": {vocabulary}}}}}', encoding="utf-8")
    Path("r.yaml").write_text("method: linear\nmodels: [a, b]\n", encoding="utf-8")
    assert run("--lambdas", "1") == 2
    assert "tokenizer of b against a: expected the same token for each id" in capsys.readouterr().err


def test_a_folder_is_one_stream_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("later", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    assert bytes(read_text(tmp_path, ByteTokenizer()).tolist()) == b"\0first\0later"
    (tmp_path / "c.txt").write_text("x" * 40, encoding="utf-8")
    assert bytes(read_text(tmp_path / "c.txt", ByteTokenizer()).tolist()) == b"\0" + b"x" * 40
    assert read_text(tmp_path / "c.txt", ByteTokenizer()).dtype == torch.uint8


@pytest.mark.usefixtures("models")
def test_overrides_that_match_the_same_tensors_all_count() -> None:
    more = 'overrides: [{pattern: "*", weights: [1, 3]}, {pattern: "*.experts.*", density: 0.5}]'
    Path("r.yaml").write_text(f"base: base\nmodels: [a, b]\n{more}\n", encoding="utf-8")
    search = open_search(Recipe.load("r.yaml"), [Path("one.txt")], Path("out"))
    assert len(search.merging({"method": "linear", "lambda": 1.0}).overrides) == 2
