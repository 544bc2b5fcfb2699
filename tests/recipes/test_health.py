"""Figures of the router, the picture of a run, and what recomputing layers must not change."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recipes import curves
from recipes.health import load_entropy, matrix_rate, router_health
from synapse_arch import SynapseConfig, SynapseModel

SMALL = {
    "vocab_size": 256, "d_model": 16, "n_layers": 2, "thalamus.d_state": 4, "thalamus.head_dim": 8,
    "experts.n_experts": 4, "experts.d_expert": 16, "xlstm.n_heads": 2, "memory.n_heads": 2, "memory.d_key": 4,
    "memory.d_value": 4, "thalamus.noise": 0.5,
}  # fmt: skip


def test_entropy_and_dead_experts() -> None:
    load = torch.tensor([[4, 4, 4, 4], [8, 8, 0, 0], [16, 0, 0, 0]])
    assert load_entropy(load).tolist() == pytest.approx([1.0, 0.5, 0.0])
    health = router_health(load)
    assert health["load_entropy"] == pytest.approx(0.5)
    assert health["dead_experts"] == 5
    assert health["load"][1] == [0.5, 0.5, 0.0, 0.0]


def test_entropy_is_that_of_the_definition() -> None:
    load = torch.randint(1, 50, (3, 8))
    for row, found in zip(load.tolist(), load_entropy(load).tolist(), strict=True):
        shares = [value / sum(row) for value in row]
        assert found == pytest.approx(-sum(share * math.log(share, 8) for share in shares))


def test_matrix_rate_is_measured() -> None:
    assert matrix_rate(torch.device("cpu"), torch.float32, (64, 64, 64)) > 1e6


def line(step: int, **more: object) -> str:
    load = [[0.25 + 0.001 * step, 0.25 - 0.001 * step, 0.25, 0.25]]
    values = {"step": step, "language": 5 / step, "balance": 0.01, "z": 0.001, "norm": 1.0, "bits_per_byte": 7 / step}
    return json.dumps({**values, "load": load, "load_entropy": 0.99, "dead_experts": 0, **more}) + "\n"


def test_a_picture_is_drawn_from_the_log(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = "".join(line(step, **({"held_out_bits_per_byte": 2.0} if step == 50 else {})) for step in range(10, 110, 10))
    (tmp_path / "log.jsonl").write_text(log, encoding="utf-8")
    assert curves.main([str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


def test_a_run_without_experts_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text('{"step": 10, "language": 5.0, "norm": 1.0, "bits_per_byte": 7.0}\n')
    assert curves.main([str(tmp_path)]) == 0


@pytest.mark.parametrize("content", [None, "", "{"])
def test_no_log_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert curves.main([str(tmp_path)]) == 2
    assert "log.jsonl" in capsys.readouterr().err


def gradients(model: SynapseModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_recomputed_layers_give_the_same_bits_noise_included() -> None:
    model, ids = SynapseModel(SynapseConfig.preset("tiny", **SMALL)).train(), torch.randint(256, (2, 40))
    kept = gradients(model, ids)
    calls: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    again = gradients(model, ids)
    assert len(calls) == 2
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_shared_load_makes_the_mean_of_the_parts_the_balance_loss_of_the_whole() -> None:
    model, ids = SynapseModel(SynapseConfig.preset("tiny", **SMALL)).double().eval(), torch.randint(256, (4, 30))
    whole = model(ids, targets=ids)
    parts = [model(part, targets=part, reduce_load=lambda _: whole.expert_load) for part in ids.chunk(2)]
    mean = sum(part.losses["balance"] for part in parts) / 2
    assert torch.allclose(mean, whole.losses["balance"], rtol=1e-12)
    alone = sum(model(part, targets=part).losses["balance"] for part in ids.chunk(2)) / 2
    assert not torch.allclose(alone, whole.losses["balance"], rtol=1e-6)
