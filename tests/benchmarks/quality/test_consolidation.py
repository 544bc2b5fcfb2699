"""Pathways are switched on, off and misplaced as the benchmark says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import consolidation
from benchmarks.quality.consolidation import GAINS, consolidated, give, measure, misplaced, summary, visited
from recipes.data import Corpus, Document, to_stream
from recipes.evaluation import held_out_bits
from synapse_arch import ExpertsConfig, MemoryConfig, SynapseConfig, SynapseModel, ThalamusConfig, XLSTMConfig

CONFIG = SynapseConfig(
    vocab_size=256, d_model=16, n_layers=2, thalamus=ThalamusConfig(d_state=4, head_dim=8),
    xlstm=XLSTMConfig(n_heads=2), experts=ExpertsConfig(n_experts=4, d_expert=8),
    memory=MemoryConfig(n_heads=2, d_key=4, d_value=4),
)  # fmt: skip


@pytest.fixture
def corpus() -> Corpus:
    def text(seed: int, length: int) -> bytes:
        draw = torch.Generator().manual_seed(seed)
        return bytes(torch.randint(97, 123, (length,), generator=draw).tolist())

    return Corpus(
        source="made up",
        train=(Document(name="a", data=text(0, 6000)),),
        held_out=(Document(name="b", data=text(1, 5000)),),
    )


@pytest.fixture
def model() -> SynapseModel:
    torch.manual_seed(0)
    return SynapseModel(CONFIG).eval()


def test_a_gain_of_nothing_is_off_and_a_large_one_moves_tokens(model: SynapseModel, corpus: Corpus) -> None:
    stream = to_stream(corpus.held_out)
    off, before = held_out_bits(model, stream).bits, visited(model, stream)
    own = consolidated(model, to_stream(corpus.train))
    assert all(float(values.abs().max()) > 0 for values in own)
    assert all(torch.equal(layer.thalamus.pathways, values) for layer, values in zip(model.layers, own, strict=True))
    give(model, own, 0.0)
    assert held_out_bits(model, stream).bits == off
    assert torch.equal(visited(model, stream), before)
    give(model, own, 100.0)
    assert held_out_bits(model, stream).bits != off
    assert not torch.equal(visited(model, stream), before)


def test_misplaced_pathways_join_other_experts() -> None:
    values = torch.arange(16.0).view(4, 4)
    [moved] = misplaced([values], torch.Generator().manual_seed(0))
    assert sorted(moved.flatten().tolist()) == sorted(values.flatten().tolist())
    assert sorted(moved.diagonal().tolist()) == sorted(values.diagonal().tolist())
    assert not bool((moved.diagonal() == values.diagonal()).any())
    assert torch.equal(misplaced([torch.zeros(1, 1)], torch.Generator())[0], torch.zeros(1, 1))


def test_report_is_what_the_parts_say(model: SynapseModel, corpus: Corpus) -> None:
    report = measure(model, corpus, 5000, torch.Generator().manual_seed(0))
    stream = to_stream(corpus.held_out)[:5000]
    give(model, [torch.zeros(4, 4)] * 2, 0.0)
    own = consolidated(model, to_stream(corpus.train))
    give(model, own, GAINS[-1])
    assert report["on"]["bits"][-1] == held_out_bits(model, stream).per_byte
    again = summary([report])
    assert again["off"] == report["off"]
    assert again["on"][0] == report["on"]["bits"][0] - report["off"]
    assert again["changed"] == report["on"]["changed"]


def test_command(model: SynapseModel, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidation, "load_corpus", lambda: corpus)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "report.json"
    assert consolidation.main([str(tmp_path / "model"), "--bytes", "4500", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["bytes"] == 4500
    assert len(report["models"]) == 1


def test_command_refuses_what_it_cannot_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert consolidation.main([str(tmp_path / "none")]) == 2
    assert "error:" in capsys.readouterr().err
    assert consolidation.main([str(tmp_path), "--bytes", "10"]) == 2
    assert "--bytes: expected 4096 or more, got 10" in capsys.readouterr().err
