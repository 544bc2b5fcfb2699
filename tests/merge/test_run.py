"""Merges from files to files: real model folders in, a model folder out that loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge import writer
from merge.__main__ import main as package_main
from merge.cli import main
from merge.io import Checkpoint
from merge.methods import METHODS
from merge.recipe import Override, Recipe
from merge.run import open_inputs, plan, stream
from merge.select import kept
from merge.ties import ties
from merge.vectors import Delta
from synapse_arch import SynapseModel
from tests.helpers import assert_close
from tests.merge.folders import assert_same_tensors, expected_ties, left_over, merging, weights

pytestmark = pytest.mark.usefixtures("inside")


def test_a_merge_of_synapse_models_loads_and_is_what_ties_says() -> None:
    assert merging("--density", "0.3", "--weights", "1", "2", "1", "--lambda", "0.8") == 0
    assert_same_tensors(weights("out"), expected_ties(density=0.3, weights=[1, 2, 1], lam=0.8))
    model = SynapseModel.from_pretrained("out")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert model.config == SynapseModel.from_pretrained("base").config
    assert left_over() == ["out"]


def test_the_model_card_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert merging("--density", "0.3") == 0
    card = Path("out/README.md").read_text()
    digest = subprocess.run(
        ["sha256sum", "a/model.safetensors"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    for words in (digest, "| density | `(0.3,)` |", "| lambda | `1.0` |", "| election | `mass` |", torch.__version__):
        assert words in card
    recipe = json.loads(card.split("```json")[1].split("```")[0])
    assert Recipe.from_dict(recipe) == Recipe(base="base", models=("a", "b", "c"), density=(0.3,))
    assert "merged 3 models by ties into out" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_the_command_line(method: str) -> None:
    models = "ab" if method == "slerp" else "abc"
    assert merging("--method", method, "--no-hashes", models=models) == 0
    base, others = weights("base"), [weights(name) for name in models]
    result = weights("out")
    for name, tensor in base.items():
        if tensor.is_floating_point():
            seeded = {"name": name} if "seed" in METHODS[method].uses else {}
            assert torch.equal(result[name], METHODS[method].merge(tensor, [one[name] for one in others], **seeded))
    SynapseModel.from_pretrained("out")


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_methods_that_need_no_base(method: str) -> None:
    assert merging("--method", method, "--weights", "0.5", "0.5", base=None, models="ab") == 0
    SynapseModel.from_pretrained("out")


def test_a_method_of_mergekits() -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    assert (
        merging("--method", "mergekit:ties", "--density", "0.3", "--weights", "1", "--parameter", "normalize=true") == 0
    )
    for name, tensor in expected_ties(density=0.3).items():
        if tensor.numel() > 3:
            assert_close(weights("out")[name], tensor, name)


def test_trimming_whole_models() -> None:
    """One cut over all numbers but those that stand alone, exactly the share, ties by name and index."""
    for name in "ab":  # many equal magnitudes
        rough = {key: (t * 64).round() / 64 if t.is_floating_point() else t for key, t in weights(name).items()}
        Path(f"{name}2").mkdir()
        save_file(rough, f"{name}2/model.safetensors", metadata=Checkpoint("base").metadata)
    recipe = Recipe(base="base", models=("a2", "b2"), trim="global", density=(0.1, 0.4))
    base, others = weights("base"), [weights("a2"), weights("b2")]
    names = sorted(name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel() > 1)
    thinned: list[dict[str, Tensor]] = []
    for model, share in zip(others, (0.1, 0.4), strict=True):
        delta = torch.cat([(model[name] - base[name]).flatten() for name in names])
        stays = torch.zeros(len(delta), dtype=torch.bool)
        stays[delta.abs().argsort(descending=True, stable=True)[: kept(len(delta), share)]] = True
        pieces = (delta * stays).split([base[name].numel() for name in names])
        thinned.append({name: piece.view(base[name].shape) for name, piece in zip(names, pieces, strict=True)})
    result = dict(stream(recipe, open_inputs(recipe)))
    for name in names:
        assert torch.equal(result[name], ties(base[name], [Delta(one[name]) for one in thinned], density=1.0)), name


def test_sharding_and_order_do_not_matter() -> None:
    for name in ("base", "a", "b", "c"):
        tensors = list(weights(name).items())[::-1]
        Path(f"sharded-{name}").mkdir()
        shards = {f"model-{n:05d}-of-00004.safetensors": dict(tensors[n - 1 :: 4]) for n in range(1, 5)}
        for file, shard in shards.items():
            save_file(shard, f"sharded-{name}/{file}", metadata=Checkpoint("base").metadata)
        index = {"metadata": {}, "weight_map": {key: file for file, shard in shards.items() for key in shard}}
        Path(f"sharded-{name}/model.safetensors.index.json").write_text(json.dumps(index))
        Path(f"sharded-{name}/config.json").write_bytes(Path("base/config.json").read_bytes())
    words = ["--method", "dare_ties", "--trust-base"]
    assert merging(*words) == 0
    sharded = [f"sharded-{name}" for name in "abc"]
    command = [
        "--base",
        "sharded-base",
        "--models",
        *sharded,
        "--out",
        "other",
        "--quiet",
        "--max-shard",
        "1e-5",
        *words,
    ]
    assert main(command) == 0
    assert len(list(Path("other").glob("*.safetensors"))) > 3
    assert_same_tensors(weights("other"), weights("out"))
    assert SynapseModel.from_pretrained("other").config == SynapseModel.from_pretrained("out").config


def test_a_hugging_face_folder_with_tied_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
        torch.manual_seed(0)
        base = GPT2LMHeadModel(config)
        base.save_pretrained("hf-base", max_shard_size="8kB")
        Path("hf-base/tokenizer.json").write_text("{}")
        for name in "xy":
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            base.save_pretrained(f"hf-{name}")
        assert len(list(Path("hf-base").glob("*.safetensors"))) > 1
        assert main(["--base", "hf-base", "--models", "hf-x", "hf-y", "--out", "out", "--quiet"]) == 0
        merged = GPT2LMHeadModel.from_pretrained("out")
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert Path("out/tokenizer.json").read_text() == "{}"
    expected = ties(
        weights("hf-base")["transformer.wte.weight"], [weights(f"hf-{name}")["transformer.wte.weight"] for name in "xy"]
    )
    assert torch.equal(merged.transformer.wte.weight, expected)


def test_single_files_and_dtypes() -> None:
    files = [f"{name}.safetensors" for name in ("base", "a", "b")]
    for file in files:
        tensors = {
            "w": torch.randn(6, 5).bfloat16(),
            "n": torch.tensor(3),
            "flag": torch.tensor([True]),
            "e": torch.zeros(0).bfloat16(),
        }
        save_file(tensors, file)
    assert main(["--base", files[0], "--models", *files[1:], "--out", "out", "--quiet"]) == 0
    result = weights("out")
    one, two, three = (load_file(file)["w"] for file in files)
    assert torch.equal(result["w"], ties(one, [two, three]))
    assert result["n"] == 3
    assert result["e"].shape == (0,)
    command = ["--base", files[0], "--models", *files[1:], "--out", "wide", "--quiet", "--dtype", "float32"]
    assert main(command) == 0
    assert torch.equal(weights("wide")["w"], ties(one, [two, three], dtype=torch.float32))
    assert weights("wide")["n"].dtype == torch.int64
    assert weights("wide")["e"].dtype == torch.float32


def test_trimming_as_a_whole_where_nothing_can_be_trimmed() -> None:
    for value, file in enumerate(("base", "a", "b")):
        save_file({"scale": torch.tensor(float(value))}, f"{file}.safetensors")
    command = ["--base", "base.safetensors", "--models", "a.safetensors", "b.safetensors", "--trim", "global"]
    assert main([*command, "--out", "out", "--quiet"]) == 0
    assert weights("out")["scale"] == 1.5


def test_overrides_and_recipe_files(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        "base": "base",
        "models": ["a", "b"],
        "lambda": 0.5,
        "overrides": [
            {"pattern": "*", "density": 0.6},
            {"pattern": "*.experts.*", "weights": [1, 3]},
            {"pattern": "*norm.weight", "skip": True},
        ],
    }
    Path("r.yaml").write_text(json.dumps(recipe))  # JSON is YAML too
    assert main(["--recipe", "r.yaml", "--override", "head.*", "copy=0", "--out", "out", "--quiet"]) == 0
    result, base, a, b = weights("out"), weights("base"), weights("a"), weights("b")
    for name, tensor in base.items():
        given = [a[name], b[name]]
        if name.startswith("head."):
            expected = a[name]
        elif name.endswith("norm.weight") or not tensor.is_floating_point():
            expected = tensor
        elif ".experts." in name:
            expected = ties(tensor, given, weights=[1, 3], lam=0.5)
        else:
            expected = ties(tensor, given, density=0.6, lam=0.5)
        assert torch.equal(result[name], expected), name
    capsys.readouterr()
    assert main(["--recipe", "r.yaml", "--override", "head.*", "copy=0", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "head.weight  (23, 16)  float32  copied from model 0" in listed
    assert "norm.weight  (16,)  float32  the base's, kept" in listed
    assert "merged with lam=0.5, density=(0.6,)" in listed
    assert len(listed.splitlines()) == len(base) + 1


@pytest.mark.parametrize("words", [[], ["--override", "head.*", "skip"], ["--parameter", "int8_mask=false"]])
def test_keys_with_nothing_behind_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text("base: base\nmodels: [a, b]\noverrides:\nparameters:\n")
    method = ["--method", "mergekit:ties"] if "--parameter" in words else []
    if method:
        pytest.importorskip("mergekit", reason="mergekit is not installed")
    assert main(["--recipe", "r.yaml", *words, *method, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("the base's, kept") == ("skip" in words)
    for key in ("overrides", "parameters"):
        Path("r.yaml").write_text(f"base: base\nmodels: [a, b]\n{key}: 3\n")
        assert main(["--recipe", "r.yaml", *words, *method, "--dry-run"]) == 2
        assert f"{key}: expected a " in capsys.readouterr().err


def test_a_recipe_and_its_dictionary_are_inverse() -> None:
    recipe = Recipe(
        base="base",
        models=("a", "b"),
        method="della",
        density=(0.5,),
        weights=(1.0, 2.0),
        lam=0.3,
        epsilon=0.2,
        seed=4,
        overrides=(
            Override(pattern="x", copy=0),
            Override(pattern="y", skip=True),
            Override(pattern="z", density=(0.1,)),
        ),
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_experts_are_aligned_first() -> None:
    """A model and itself with its experts renumbered merge into that model."""
    model = weights("a")
    order = torch.randperm(model["layers.0.experts.w_in"].shape[0], generator=torch.Generator().manual_seed(1))
    for name in model:
        if ".experts." in name or ".router." in name or name.endswith("router_bias"):
            model[name] = model[name][order]
        elif name.endswith("pathways"):
            model[name] = model[name][order][:, order]
    Path("moved").mkdir()
    save_file(model, "moved/model.safetensors", metadata=Checkpoint("a").metadata)
    shutil.copy("a/config.json", "moved/config.json")
    command = ["--base", "a", "--models", "moved", "--density", "1", "--out", "out", "--quiet", "--align-experts"]
    assert main(command) == 0
    for name, tensor in weights("a").items():
        assert_close(weights("out")[name], tensor, name)


def test_the_programs_and_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        package_main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in (*METHODS, "mergekit:NAME", "merge.ties", "merge.upcycle", "merge.search", "examples:"):
        assert name in text


def test_the_bar_counts_every_pass(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", "base", "--models", "a", "b", "--out", "out", "--trim", "global"]
    assert main(words) == 0
    assert "merging" in capsys.readouterr().err


def test_a_narrow_result_keeps_what_loading_keeps() -> None:
    """Decay rates, routers and their biases; the merged model is the base, loaded narrow, in its dtypes."""
    assert main(["--base", "base", "--models", "a", "b", "--dtype", "bfloat16", "--out", "narrow", "--quiet"]) == 0
    merged = SynapseModel.from_pretrained("narrow")
    loaded = SynapseModel.from_pretrained("base", dtype=torch.bfloat16)
    assert {n: x.dtype for n, x in merged.state_dict().items()} == {n: x.dtype for n, x in loaded.state_dict().items()}


def test_a_narrow_result_of_hugging_face_folders_keeps_it_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from synapse_arch.hf import SynapseForCausalLM

    for name in ("base", "a"):
        SynapseForCausalLM.from_core(SynapseModel.from_pretrained(name)).save_pretrained(f"hf-{name}")
    assert main(["--base", "hf-base", "--models", "hf-a", "--dtype", "bfloat16", "--out", "out", "--quiet"]) == 0
    loaded = SynapseModel.from_pretrained("base", dtype=torch.bfloat16)
    expected = {f"model.{name}": tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in weights("out").items()} == expected
    assert len(set(expected.values())) > 1
    assert json.loads(Path("out/config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    merged = SynapseForCausalLM.from_pretrained("out").state_dict()
    assert {name: tensor.dtype for name, tensor in merged.items()} == expected


@pytest.mark.parametrize("words", [["--lambda", "1e300"], ["--weights", "1e300", "1"]])
def test_numbers_that_float32_does_not_have_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", "base", "--models", "a", "b", "--out", "out", "--quiet", *words]) == 2
    assert "finite number" in capsys.readouterr().err


def test_a_plan_names_every_tensor_once_wide_dtypes_first() -> None:
    recipe = Recipe(base="base", models=("a",), dtype="bfloat16")
    steps = plan(recipe, open_inputs(recipe))
    assert sorted(step.name for step in steps) == sorted(weights("base"))
    sizes = [step.dtype.itemsize for step in steps]
    assert sizes == sorted(sizes, reverse=True)


def test_a_write_that_takes_a_part_is_gone_on_with() -> None:
    """Linux takes at most 2 GiB a call."""

    class Short(bytearray):
        def write(self, data: bytes) -> int:
            self += bytes(data[:5])
            return min(5, len(data))

    file = Short()
    writer._write(file, torch.arange(4.0))  # type: ignore[arg-type]
    assert bytes(file) == torch.arange(4.0).numpy().tobytes()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_weights_are_on_the_disk_when_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    entry = writer.Entry("a", torch.float32, (2,), 8)
    writer.write_weights(tmp_path, [entry], iter([("a", torch.zeros(2))]), {}, max_shard_bytes=100)
    assert synced == [str(tmp_path / "model.safetensors")]
