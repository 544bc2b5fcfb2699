"""Whatever the configuration: in pieces, padded, packed, traced, saved or recomputed, a model computes the same.

Each region's own contracts are tested one by one; here the options are drawn at random, to meet in one model.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from synapse_arch import (
    ExpertsConfig,
    MemoryConfig,
    Sampling,
    SynapseConfig,
    SynapseModel,
    SynapseState,
    ThalamusConfig,
    TraceSpec,
    XLSTMConfig,
)
from tests.helpers import assert_close

LENGTHS = (1, 2, 31, 32, 33, 65, 97)
"""Around one, two and three chunks."""


def drawn_config(draw: random.Random) -> SynapseConfig:
    """A configuration in which every option may have any of several values."""
    one = draw.choice
    experts = ExpertsConfig(n_experts=one([2, 3, 8]), d_expert=one([1, 8, 12]), d_shared=one([0, 0, 8]))
    thalamus = ThalamusConfig(
        mamba=one(["ssd", "ssd", "s6", None]), context=one([True, True, False]), d_state=one([1, 4, 16]),
        expand=2, d_conv=one([2, 4, 5]), head_dim=one([1, 4, 8]), n_groups=one([1, 1, 2]), top_k=one([1, 2]),
        noise=one([0.0, 0.5]), bias_rate=one([0.0, 1e-3]),
    )  # fmt: skip
    xlstm = XLSTMConfig(
        d_hidden=one([None, 8, 16]), n_heads=one([1, 2]), qk_ratio=one([0.5, 1.0]), d_conv=one([2, 4]),
        input_gate_bias=one([0.0, -10.0]), forget_gate_bias=one([(3.0, 6.0), (-1.0, 8.0)]),
    )  # fmt: skip
    memory = MemoryConfig(
        n_heads=one([1, 2, 3]), d_key=one([1, 4, 12]), d_value=one([1, 4, 8]), rule=one(["delta", "delta", "hebbian"]),
        n_householder=one([1, 2, 3]), write_gate=one([False, True]), d_conv=one([2, 4]), beta_max=one([1.0, 2.0]),
    )  # fmt: skip
    return SynapseConfig(
        vocab_size=one([2, 17, 300]), d_model=one([8, 16, 24, 40]), n_layers=one([1, 2, 3]),
        tie_embeddings=one([True, False]), thalamus=thalamus, experts=one([experts, experts, None]),
        xlstm=one([xlstm, xlstm, None]), memory=one([memory, memory, None]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_any_configuration(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = SynapseModel(drawn_config(draw)).double().eval()
    ids = torch.randint(model.config.vocab_size, (draw.choice([1, 2, 3]), draw.choice(LENGTHS)))
    with torch.no_grad():
        _reads_alike(model, ids, draw)
        _keeps_alike(model, ids, tmp_path)
    _learns_alike(model, ids)


def _reads_alike(model: SynapseModel, ids: Tensor, draw: random.Random) -> None:
    whole, length = model(ids), ids.shape[1]

    cuts = sorted({0, length, *(draw.randrange(length + 1) for _ in range(3))})
    state, pieces = None, []
    for start, end in itertools.pairwise(cuts):
        out = model(ids[:, start:end], state)
        state, pieces = out.state, [*pieces, out.logits]
    assert_close(torch.cat(pieces, dim=1), whole.logits, "in pieces")

    traced = model(ids, trace=TraceSpec(level="full"))
    assert torch.equal(traced.logits, whole.logits)
    assert traced.trace.report()

    kept = torch.rand(length) < 0.7
    kept[draw.randrange(length)] = True
    padded, short = model(ids, mask=kept.expand_as(ids)), model(ids[:, kept])
    assert_close(padded.logits[:, kept], short.logits, "padded")
    assert_close(model(ids[:, :1], padded.state).logits, model(ids[:, :1], short.state).logits, "after padding")

    border = draw.randrange(length + 1)
    packed = model(ids, segment_ids=(torch.arange(length) >= border).long().expand_as(ids)).logits
    apart = [model(part).logits for part in (ids[:, :border], ids[:, border:]) if part.shape[1]]
    assert_close(packed, torch.cat(apart, dim=1), "packed")


def _keeps_alike(model: SynapseModel, ids: Tensor, folder: Path) -> None:
    whole = model(ids)
    model.save_pretrained(folder / "model")
    assert torch.equal(SynapseModel.from_pretrained(folder / "model").double().eval()(ids).logits, whole.logits)

    whole.state.save(folder / "state.safetensors")
    then = model(ids[:, :1], whole.state).logits
    assert torch.equal(model(ids[:, :1], SynapseState.load(folder / "state.safetensors")).logits, then)
    backwards = list(reversed(range(len(ids))))
    assert_close(model(ids[backwards, :1], whole.state.select(backwards)).logits, then[backwards], "selected")

    assert len(list(model.stream(ids[:1], sampling=Sampling(max_tokens=3, seed=0)))) == 3


def _learns_alike(model: SynapseModel, ids: Tensor) -> None:
    model.train()
    gradients = []
    for model.recompute in (False, True):
        torch.manual_seed(0)  # of the router's noise
        model.zero_grad()
        model(ids, targets=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, gradients[1][name]), name
