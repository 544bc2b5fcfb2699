"""Dense specialists become one pool of experts, which loads, computes and learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge.upcycle import main, mixture
from synapse_arch import ExpertsConfig, SynapseConfig, SynapseModel, ThalamusConfig
from tests.helpers import assert_close
from tests.merge.conftest import perturbed
from tests.model.small import small_model, tokens

DENSE = {
    "experts": ExpertsConfig(n_experts=1, d_expert=6),
    "thalamus": ThalamusConfig(d_state=4, head_dim=8, top_k=1),
}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SynapseModel:
    """Folders base, a and b in the current one."""
    monkeypatch.chdir(tmp_path)
    base = small_model(**DENSE)
    base.save_pretrained("base")
    for index, name in enumerate("ab"):
        perturbed(base, index).save_pretrained(name)
    return base


def run(*words: str) -> int:
    return main(["--base", "base", "--out", "out", "--quiet", *words])


@pytest.mark.usefixtures("dense")
def test_folders_of_one_name_have_labels_apart() -> None:
    for name in "ab":
        Path("runs", name).mkdir(parents=True)
        Path(name).rename(Path("runs", name, "step-00000010"))
    assert run("--experts", "runs/a/step-00000010", "runs/b/step-00000010") == 0
    labels = ("runs/a/step-00000010", "runs/b/step-00000010")
    assert SynapseModel.from_pretrained("out").config.experts.labels == labels


@pytest.mark.usefixtures("dense")
def test_each_feed_forward_becomes_an_expert_and_the_rest_is_averaged() -> None:
    assert run("--experts", "a", "b") == 0
    a, b, made = (SynapseModel.from_pretrained(name) for name in ("a", "b", "out"))
    assert made.config.n_experts == 2
    assert made.config.thalamus.top_k == 2
    assert made.config.experts.labels == ("a", "b")
    assert made.layers[0].experts.expert_ids.tolist() == [0, 1]
    assert torch.equal(made.layers[1].experts.w_in[1], b.layers[1].experts.w_in[0])
    assert torch.equal(made.layers[1].experts.w_out[0], a.layers[1].experts.w_out[0])
    ours, theirs = a.state_dict(), b.state_dict()
    for name, tensor in made.state_dict().items():
        if not any(part in name for part in (".experts.", ".router.", ".router_bias", ".pathways")):
            torch.testing.assert_close(tensor, (ours[name] + theirs[name]) / 2)
    assert not made.layers[0].thalamus.router_bias.any()
    assert not made.layers[0].thalamus.pathways.any()
    assert "SHA-256" in Path("out/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_of_equal_specialists_it_is_the_dense_model(dense: SynapseModel, top_k: int) -> None:
    """Weights over the chosen experts sum to 1, so it does not matter whom a token visits."""
    assert run("--experts", "base", "base", "base", "--top-k", str(top_k)) == 0
    made, ids = SynapseModel.from_pretrained("out"), tokens(2, 50)
    with torch.no_grad():
        assert_close(made(ids).logits, dense(ids).logits)


@pytest.mark.usefixtures("dense")
def test_the_result_learns() -> None:
    assert run("--experts", "a", "b", "--include-base") == 0
    model = SynapseModel.from_pretrained("out").train()
    assert model.config.n_experts == 3
    ids = tokens(2, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert model.layers[0].thalamus.router.weight.grad.abs().sum() > 0
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("dense")
def test_the_router_is_of_its_seed() -> None:
    rows = [mixture(Path("base"), [Path("a"), Path("b")], seed=seed).routers for seed in (0, 0, 1)]
    assert torch.equal(rows[0][1], rows[1][1])
    assert not torch.equal(rows[0][1], rows[2][1])
    assert not torch.equal(rows[0][0], rows[0][1])


def test_a_router_that_starts_from_texts_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = SynapseConfig(**{**vars(small_model(**DENSE).config), "vocab_size": 256})
    SynapseModel(config).save_pretrained("base")
    words = {"letters": b"abcabbac" * 60, "digits": b"0110102 " * 60}
    for name, text in words.items():
        Path(name).write_bytes(text)
    assert run("--experts", "base", "base", "--texts", *words, "--labels", "a", "b", "--top-k", "1") == 0
    made = SynapseModel.from_pretrained("out")
    for expert, text in enumerate(words.values()):
        load = made(torch.tensor([list(text)])).expert_load
        assert load is not None
        assert load[0].argmax() == expert, load


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts", "a"], "two or more"),
        (["--experts", "a", "b", "--top-k", "3"], "1 to 2"),
        (["--experts", "a", "b", "--labels", "x"], "--labels"),
        (["--experts", "a", "nowhere"], "nowhere"),
        (["--experts", "a", "b", "--texts", "nowhere", "nowhere"], "readable text"),
        (["--experts", "a", "b", "--texts", "empty", "empty"], "an empty file"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").touch()
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.usefixtures("dense")
def test_an_output_that_holds_what_a_specialist_links_to_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    for path in Path("a").iterdir():
        Path("out", path.name).write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(Path("out", path.name).resolve())
    assert run("--experts", "a", "b", "--overwrite") == 2
    assert "apart from the inputs, got out, and a/" in capsys.readouterr().err
    assert not Path("a/model.safetensors").samefile("b/model.safetensors")


@pytest.mark.usefixtures("dense")
def test_specialists_whose_ids_stand_for_another_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, vocabulary in (("base", '{"x": 0, "y": 1}'), ("b", '{"y": 0, "x": 1}')):
        Path(name, "tokenizer.json").write_text(f'{{"model": {{"vocab": {vocabulary}}}}}', encoding="utf-8")
    assert run("--experts", "a", "b") == 2
    assert "tokenizer of b against base: expected the same token for each id" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.usefixtures("dense")
def test_texts_are_for_models_that_read_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("base/tokenizer.json").write_text("{}", encoding="utf-8")
    Path("text").write_bytes(b"some text")
    assert run("--experts", "a", "b", "--texts", "text", "text") == 2
    assert "a base that reads bytes" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_pool_is_not_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("base")
    assert run("--experts", "base", "base") == 2
    assert "n_experts=4" in capsys.readouterr().err
