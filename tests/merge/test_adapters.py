"""peft's LoRA adapters, made by peft: what we add is what peft merges in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge.adapters import Adapter
from merge.io import Checkpoint
from merge.recipe import Recipe
from merge.run import open_inputs, stream
from merge.vectors import Delta
from synapse_arch import SynapseModel
from synapse_arch.errors import CheckpointError
from tests.helpers import assert_close
from tests.model.small import small_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(torch.randn(3, 6, 8))  # E, in, out or out, in: peft decides
        self.first = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zoo(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.wide = nn.Linear(8, 6)
        self.deep = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.conv = nn.Conv1d(4, 5, 3)
        self.experts = Experts()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


def adapted(model: nn.Module, folder: Path, **settings: Any) -> tuple[Checkpoint, Path, dict[str, Tensor]]:
    """A base on disk, an adapter of peft's on disk, and the weights that peft merges from the two."""
    torch.manual_seed(0)
    if isinstance(model, SynapseModel):
        model.save_pretrained(folder / "base")
    else:
        (folder / "base").mkdir()
        save_file(
            {name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "base/model.safetensors"
        )
    wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **settings))
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    return Checkpoint(folder / "base"), folder / "adapter", merged


CASES: dict[str, dict[str, Any]] = {
    "linear": {"r": 2, "lora_alpha": 3, "target_modules": ["wide", "deep.0"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": ["wide"], "use_rslora": True},
    "patterns": {
        "r": 2, "lora_alpha": 3, "target_modules": ["wide", "0", "1"],
        "rank_pattern": {"wide": 3, "deep.1": 1}, "alpha_pattern": {"deep.0": 9, r"w\w+": 5},
    },
    "embedding": {"r": 2, "target_modules": ["embed"]},
    "convolution": {"r": 2, "target_modules": ["conv"]},
    "saved whole": {"r": 2, "target_modules": ["wide"], "modules_to_save": ["head"]},
    "stacked": {
        "r": 2, "lora_alpha": 5, "target_modules": [], "target_parameters": ["experts.first", "experts.second"],
    },
    "stacked, ranks by name": {
        "r": 2, "lora_alpha": 5, "target_modules": ["wide"], "target_parameters": ["experts.first", "experts.second"],
        "rank_pattern": {"experts.first": 3}, "alpha_pattern": {"experts.second": 11},
    },
    "matrix as parameter": {"r": 2, "target_modules": [], "target_parameters": ["wide.weight"]},
}  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_adds_what_peft_adds(case: str, transposed: bool, tmp_path: Path) -> None:
    model = Zoo()
    model.experts.is_transposed = transposed  # as transformers marks experts stored as (E, in, out)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base, path, merged = adapted(model, tmp_path, **CASES[case])
    adapter = Adapter(path, base)
    changed = 0
    for name, expected in merged.items():
        assert_close(adapter.tensor(name), expected, name)
        given = adapter.given(name, before[name])
        if isinstance(given, Delta):
            assert_close(given.value, expected - before[name], name)
            changed += 1
        elif given is before[name]:
            assert torch.equal(expected, before[name])
    assert changed + 2 * (case == "saved whole") > 0


def test_experts_of_a_synapse_model(tmp_path: Path) -> None:
    model = small_model()
    settings = {"r": 2, "target_modules": ["head"], "target_parameters": ["experts.w_in", "experts.w_out"]}
    base, path, merged = adapted(model, tmp_path, **settings)
    recipe = Recipe(base=str(base.path), models=(str(path),), method="task_arithmetic")
    result = dict(stream(recipe, open_inputs(recipe)))
    moved = 0
    for name, expected in merged.items():
        assert_close(result[name], expected, name)
        moved += not torch.equal(expected, base.tensor(name))
    assert moved == 1 + 2 * len(model.layers)


def test_square_experts_that_could_lie_either_way_are_refused(tmp_path: Path) -> None:
    model = Zoo()
    model.experts.first = nn.Parameter(torch.randn(3, 8, 8))
    base, path, _ = adapted(model, tmp_path, r=2, target_modules=[], target_parameters=["experts.first"])
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        Adapter(path, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_what_is_not_plain_lora_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, path, _ = adapted(Zoo(), tmp_path, r=2, target_modules=["wide"], **settings)
    with pytest.raises(CheckpointError, match=f"expected plain LoRA, got {message}"):
        Adapter(path, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"peft_type": "IA3"}, "expected LORA, got IA3"), ({"init_lora_weights": "pissa"}, "changes the base")],
)
def test_other_configurations_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base, path, _ = adapted(Zoo(), tmp_path, r=2, target_modules=["wide"])
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        Adapter(path, base)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, path, _ = adapted(Zoo(), tmp_path, r=2, target_modules=["wide"])
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(
        {key.replace("wide", "tall"): tensor for key, tensor in tensors.items()}, path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"tall\.lora_A"):
        Adapter(path, base)


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    base, path, _ = adapted(Zoo(), tmp_path, r=2, target_modules=["wide"])
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="never loaded"):
        Adapter(path, base)


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    _, path, _ = adapted(Zoo(), tmp_path, r=2, target_modules=["wide"])
    with pytest.raises(Exception, match="the checkpoint that the adapters are for"):
        open_inputs(Recipe(models=(str(path),), method="linear"))


def test_a_base_layer_that_was_saved_with_the_adapter_counts(tmp_path: Path) -> None:
    """As peft does where a vocabulary was resized."""
    base, path, merged = adapted(Zoo(), tmp_path, r=2, target_modules=["embed"])
    file, moved = path / "adapter_model.safetensors", base.tensor("embed.weight") + 1
    save_file(load_file(file) | {"base_model.model.embed.base_layer.weight": moved}, file)
    assert_close(Adapter(path, base).tensor("embed.weight"), merged["embed.weight"] + 1, "embed")
