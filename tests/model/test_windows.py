"""Long texts are read in windows where no gradient is wanted: the same numbers, traces and losses as in one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from synapse_arch import SynapseModel, TraceSpec
from synapse_arch.model import model as module
from synapse_arch.model.state import named_tensors
from tests.helpers import assert_close
from tests.model.small import small_config


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SynapseModel:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "WINDOW", 16)
    return SynapseModel(small_config()).double().eval()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_windows_equal_one_pass(model: SynapseModel, masked: bool) -> None:
    ids = torch.randint(model.config.vocab_size, (2, 50))
    mask = torch.rand(2, 50) > 0.3 if masked else None
    whole = model(ids, targets=ids, mask=mask)  # gradients wanted: one pass
    with torch.no_grad():
        cut = model(ids, targets=ids, mask=mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    assert_close(cut.logits[real], whole.logits[real].detach())
    assert_close(cut.loss, whole.loss.detach())
    assert cut.losses.keys() == whole.losses.keys()
    assert torch.equal(cut.expert_load, whole.expert_load)
    for (name, ours), (_, theirs) in zip(
        named_tensors(cut.state.layers), named_tensors(whole.state.layers), strict=True
    ):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(cut.state.position, whole.state.position)


@pytest.mark.parametrize("spec", [TraceSpec(level="full"), TraceSpec(level="gates", every=3, max_tokens=9)])
def test_traces_of_windows_are_one(model: SynapseModel, spec: TraceSpec) -> None:
    ids = torch.randint(model.config.vocab_size, (2, 50))
    whole = model(ids, trace=spec).trace
    with torch.no_grad():
        out = model(ids, trace=spec)
        assert torch.equal(out.logits, model(ids).logits)
    cut = out.trace
    assert cut is not None
    assert whole is not None
    assert torch.equal(cut.positions, whole.positions)
    assert torch.equal(cut.tokens, whole.tokens)
    for ours, theirs in zip(cut.layers, whole.layers, strict=True):
        assert torch.equal(ours.routing.experts, theirs.routing.experts)
        assert torch.equal(ours.routing.tokens, theirs.routing.tokens)
        assert_close(ours.gates.age_tokens, theirs.gates.age_tokens)
        torch.testing.assert_close(ours.memory.collision, theirs.memory.collision, equal_nan=True, rtol=1e-6, atol=1e-8)


def test_packed_documents_are_read_whole(model: SynapseModel) -> None:
    ids = torch.randint(model.config.vocab_size, (1, 40))
    segments = (torch.arange(40) >= 16).long()[None]  # a document begins where a window would
    with torch.no_grad():
        second = model(ids, segment_ids=segments).logits[:, 16:]
        assert_close(second, model(ids[:, 16:]).logits)


def test_the_stride_goes_on() -> None:
    spec = TraceSpec(every=3)
    assert spec.positions(7).tolist() == [0, 3, 6]
    assert replace(spec, start=7).positions(5).tolist() == [2]
    assert replace(spec, start=1).positions(1).tolist() == []
    assert replace(spec, start=1).keep(torch.ones(2, 1)).shape == (2, 0)
    assert replace(spec, start=7, max_tokens=1).positions(9).tolist() == [8]
