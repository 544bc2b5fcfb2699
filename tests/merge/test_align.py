"""Matching experts: a renumbered model is the same function, and is put back exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge.align import Aligned, align, assign, by_activations, by_weights, find_pools, products
from merge.cli import main
from synapse_arch import ExpertsConfig, SynapseConfig, SynapseModel
from synapse_arch.errors import ShapeError
from tests.helpers import assert_close, assert_equal
from tests.model.small import small_config, small_model, tokens

E = 4


@dataclass
class InMemory:
    """A checkpoint that is a dictionary, and what was read of it."""

    tensors: dict[str, Tensor]
    read: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name]


def weights(model: SynapseModel) -> InMemory:
    """A copy of a model's weights."""
    return InMemory({name: tensor.clone() for name, tensor in model.state_dict().items()})


def used(model: SynapseModel) -> SynapseModel:
    """The model with a router whose rows, biases and pathways all matter for who is chosen."""
    with torch.no_grad():
        for layer in model.layers:
            layer.thalamus.router.weight.mul_(20)
            layer.thalamus.router_bias.normal_(std=0.5)
            layer.thalamus.pathways.normal_()
    return model


def whole(tensors: Aligned) -> dict[str, Tensor]:
    return {name: tensors.tensor(name) for name in tensors.shapes}


def renumber(source: InMemory, seed: int = 1) -> tuple[InMemory, dict[str, Tensor]]:
    """The same experts under other numbers in every pool, and the orders used; the ids move too."""
    generator = torch.Generator().manual_seed(seed)
    pools = find_pools(source.shapes)
    orders = {name: torch.randperm(pool.size, generator=generator) for name, pool in pools.items()}
    renumbered = InMemory(whole(Aligned(source, InMemory({}), orders)))
    for name, order in orders.items():
        if (ids := f"{name}.experts.expert_ids") in renumbered.tensors:
            renumbered.tensors[ids] = source.tensors[ids][order]
    return renumbered, orders


def loaded(model: SynapseModel, tensors: dict[str, Tensor]) -> SynapseModel:
    other = SynapseModel(model.config).eval()
    other.load_state_dict(tensors)
    return other


def test_renumbering_the_experts_leaves_the_function_as_it_was() -> None:
    model = used(small_model())
    renumbered, orders = renumber(weights(model))
    assert any((order != torch.arange(E)).any() for order in orders.values())
    assert not torch.equal(renumbered.tensors["layers.0.experts.w_in"], model.layers[0].experts.w_in)
    ids = tokens(2, 40)
    other = loaded(model, renumbered.tensors)
    assert int((model(ids).expert_load > 0).sum()) >= 6
    assert_close(other(ids).logits, model(ids).logits, least=1.0)


@pytest.mark.parametrize("part", ["router.weight", "router_bias", "pathways"])
def test_each_part_of_the_router_has_to_move(part: str) -> None:
    model = used(small_model())
    renumbered, _ = renumber(weights(model))
    name = f"layers.0.thalamus.{part}"
    renumbered.tensors[name] = model.state_dict()[name]
    ids = tokens(2, 40)
    assert not torch.allclose(loaded(model, renumbered.tensors)(ids).logits, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_renumbered_copy_is_put_back_exactly(by: str, seed: int) -> None:
    model = used(small_model())
    original = weights(model)
    renumbered, orders = renumber(original, seed)
    similarity = None
    if by == "activations":
        similarity = by_activations(model, loaded(model, renumbered.tensors), tokens(2, 30), window=16)
    back = align(original, renumbered, similarity)
    assert_equal(whole(back), original.tensors)
    assert back.moved == sum(int((order != torch.arange(E)).sum()) for order in orders.values())


def test_a_renumbered_specialist_is_matched_through_its_training() -> None:
    base = weights(used(small_model()))
    trained = InMemory({name: x + 0.1 * torch.randn_like(x.float()) for name, x in base.tensors.items()})
    for name, x in base.tensors.items():
        trained.tensors[name] = trained.tensors[name].to(x.dtype) if x.is_floating_point() else x
    renumbered, _ = renumber(trained)
    assert_equal(whole(align(base, renumbered)), trained.tensors)


def test_ids_are_the_references() -> None:
    """Two models trained apart both count from 0; what was matched goes by one id."""
    base = weights(small_model())
    renumbered, _ = renumber(base)
    for layer in range(2):
        renumbered.tensors[f"layers.{layer}.experts.expert_ids"] = torch.arange(E)
        base.tensors[f"layers.{layer}.experts.expert_ids"] = torch.tensor([7, 5, 6, 9])
    back = align(base, renumbered)
    assert torch.equal(back.tensor("layers.1.experts.expert_ids"), torch.tensor([7, 5, 6, 9]))


def test_the_assignment_is_the_best_of_all() -> None:
    similarity = torch.randn(5, 5, dtype=torch.float64)
    every = torch.tensor([list(order) for order in permutations(range(5))])
    best = similarity[torch.arange(5), every].sum(1).max()
    assert similarity[torch.arange(5), assign(similarity)].sum() == pytest.approx(float(best))


def test_experts_alike_stay_where_they_are() -> None:
    assert assign(torch.ones(6, 6)).tolist() == list(range(6))


def test_similarity_is_the_inner_product_over_weights_and_router_rows() -> None:
    a, b = weights(small_model()), weights(small_model())
    pool = find_pools(a.shapes)["layers.0"]
    names = ("layers.0.experts.w_in", "layers.0.experts.w_out", "layers.0.thalamus.router.weight")
    flat = [torch.cat([x.tensors[name].flatten(1) for name in names], dim=1).double() for x in (a, b)]
    torch.testing.assert_close(by_weights(pool, a, b), flat[0] @ flat[1].T)


def test_products_are_cut_without_a_seam() -> None:
    a, b = torch.randn(2, 300_001), torch.randn(2, 300_001)
    torch.testing.assert_close(products(a, b), a.double() @ b.double().T)


def hugging_face(kind: str) -> InMemory:
    """Two layers as Mixtral (a tensor an expert) or gpt-oss (stacked) name them, and tensors that must not move."""
    tensors = {"model.norm.weight": torch.randn(8)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        tensors[f"{block}.self_attn.gate.weight"] = torch.randn(E, 8)
        tensors[f"{block}.mlp.shared_experts.down_proj.weight"] = torch.randn(8, E)
        if kind == "separate":
            tensors[f"{block}.mlp.gate.weight"] = torch.randn(E, 8)
            tensors[f"{block}.mlp.gate.e_score_correction_bias"] = torch.randn(E)
            for expert in range(E):
                tensors[f"{block}.mlp.experts.{expert}.up_proj.weight"] = torch.randn(6, 8)
                tensors[f"{block}.mlp.experts.{expert}.down_proj.weight"] = torch.randn(8, 6)
        else:
            tensors[f"{block}.mlp.router.weight"] = torch.randn(E, 8)
            tensors[f"{block}.mlp.router.bias"] = torch.randn(E)
            tensors[f"{block}.mlp.experts.gate_up_proj"] = torch.randn(E, 8, 12)
            tensors[f"{block}.mlp.experts.gate_up_proj_bias"] = torch.randn(E, 12)
            tensors[f"{block}.mlp.experts.down_proj"] = torch.randn(E, 6, 8)
    return InMemory(tensors)


@pytest.mark.parametrize("kind", ["separate", "stacked"])
def test_layouts_of_others(kind: str) -> None:
    original = hugging_face(kind)
    renumbered, _ = renumber(original)
    moved = {name for name, x in original.tensors.items() if not torch.equal(x, renumbered.tensors[name])}
    assert moved
    assert all(".mlp." in name and "shared" not in name for name in moved)
    back = align(original, renumbered)
    assert back.moved > 0
    assert_equal(whole(back), original.tensors)


def test_a_tensor_is_read_only_when_it_is_asked_for() -> None:
    original = weights(small_model())
    aligned = align(original, renumber(original)[0])
    source = aligned.source
    assert isinstance(source, InMemory)
    assert {name.split(".", 2)[-1] for name in source.read} == {
        "experts.w_in", "experts.w_out", "thalamus.router.weight"
    }  # fmt: skip
    source.read.clear()
    aligned.tensor("layers.1.experts.w_out")
    assert source.read == ["layers.1.experts.w_out"]


def test_other_numbers_of_experts_are_refused() -> None:
    a, b = weights(small_model()), weights(small_model(experts=ExpertsConfig(n_experts=3, d_expert=6)))
    with pytest.raises(ShapeError, match=r"layers.0: 4 and 3.*upcycle"):
        align(a, b)


def test_a_model_without_experts_is_refused() -> None:
    a = weights(small_model(experts=None))
    with pytest.raises(ShapeError, match="no experts"):
        align(a, a)


def test_a_pool_that_contradicts_itself_is_refused() -> None:
    a = hugging_face("separate")
    del a.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(ShapeError, match="one number of experts"):
        align(a, a)


def test_weights_that_are_not_finite_are_refused() -> None:
    a = weights(small_model())
    a.tensors["layers.0.experts.w_in"][0, 0, 0] = torch.nan
    with pytest.raises(ShapeError, match="finite"):
        align(a, a)


def test_a_mixture_is_aligned_with_nothing_else_changed() -> None:
    """Merging the base with its renumbered copy gives the base; without alignment it does not."""
    base = weights(used(small_model()))
    renumbered, _ = renumber(base)
    back = align(base, renumbered)
    for name, x in base.tensors.items():
        if x.is_floating_point():
            assert torch.equal((x + back.tensor(name)) / 2, x)
    name = "layers.0.experts.w_in"
    assert not torch.allclose((base.tensors[name] + renumbered.tensors[name]) / 2, base.tensors[name])


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_renumbered_folder_merges_back_exactly(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = used(SynapseModel(SynapseConfig(**{**vars(small_config()), "vocab_size": 256})))
    model.save_pretrained("base")
    renumbered, orders = renumber(weights(model))
    loaded(model, renumbered.tensors).save_pretrained("renumbered")
    assert any((order != torch.arange(E)).any() for order in orders.values())
    Path("text").write_bytes(bytes(range(1, 200)))
    words = ["--base", "base", "--models", "renumbered", "base", "--density", "1", "--out", "out", "--quiet"]
    calibration = ["--calibration", "text"] if by == "activations" else []
    assert main([*words, "--align-experts", by, *calibration]) == 0
    assert_equal(dict(SynapseModel.from_pretrained("out").state_dict()), dict(model.state_dict()))
    assert main([*words, "--overwrite", "--override", "*.expert_ids", "skip"]) == 0
    mixed = SynapseModel.from_pretrained("out").layers[0].experts.w_in
    assert not torch.equal(mixed, model.layers[0].experts.w_in)


def test_folders_with_other_numbers_of_experts_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("four")
    small_model(experts=ExpertsConfig(n_experts=3, d_expert=6)).save_pretrained("three")
    words = ["--base", "four", "--models", "three", "four", "--out", "out", "--quiet", "--align-experts"]
    assert main(words) == 2
    assert "merge.upcycle" in capsys.readouterr().err


def test_answers_do_not_depend_on_the_window() -> None:
    model, other, ids = small_model().double(), small_model().double(), tokens(2, 30)
    parts, whole = (by_activations(model, other, ids, window=window) for window in (8, 30))
    for name in whole:
        assert_close(parts[name], whole[name], name)
