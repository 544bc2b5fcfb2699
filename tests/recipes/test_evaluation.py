"""Bits per byte against a recomputation document by document, and against what is known exactly."""

from __future__ import annotations

import gzip
import itertools
import math

import pytest
import torch

from recipes import evaluation
from recipes.data import Document, to_stream
from recipes.evaluation import ROWS, compressors, held_out_bits
from synapse_arch import SynapseConfig, SynapseModel

SMALL = {
    "vocab_size": 256, "d_model": 16, "n_layers": 1, "thalamus.d_state": 4, "thalamus.head_dim": 8,
    "experts.n_experts": 4, "experts.d_expert": 16, "xlstm.n_heads": 2, "memory.n_heads": 2, "memory.d_key": 4,
    "memory.d_value": 4,
}  # fmt: skip


@pytest.fixture
def model() -> SynapseModel:
    return SynapseModel(SynapseConfig.preset("tiny", **SMALL)).eval()


def documents(*sizes: int) -> list[Document]:
    draws = (torch.randint(1, 256, (size,)) for size in sizes)
    return [Document(name=str(number), data=bytes(draw.tolist())) for number, draw in enumerate(draws)]


def alone(model: SynapseModel, ids: torch.Tensor, targets: torch.Tensor) -> float:
    """Bits of `targets` after `ids`, in one pass over a document."""
    logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
    return -float(logprobs.gather(-1, targets[:, None]).sum()) / math.log(2)


@torch.no_grad()
def test_bits_are_those_of_each_document_read_alone(model: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ROWS", 1)
    monkeypatch.setattr(evaluation, "WINDOW", 16)
    stream = to_stream(documents(15, 7, 16, 40, 1)).long()  # the second begins with a window
    starts = [*(stream == 0).nonzero()[:, 0].tolist(), len(stream)]
    expected = 0.0
    for start, end in itertools.pairwise(starts):
        last = min(end, len(stream) - 1)  # the mark after the last document is not in the stream
        expected += alone(model, stream[start:last], stream[start + 1 : last + 1])
    found = held_out_bits(model, stream)
    assert found.bits == pytest.approx(expected, rel=1e-5)
    assert found.count == 15 + 7 + 16 + 40 + 1


def test_every_byte_counts_once_over_any_number_of_processes(model: SynapseModel) -> None:
    stream = to_stream(documents(300, 21, 450))
    whole = held_out_bits(model, stream)
    assert whole.count == 771
    for world in (2, 3, ROWS + 1):
        shares = [held_out_bits(model, stream, rank=rank, world=world) for rank in range(world)]
        assert sum(share.count for share in shares) == 771
        assert sum(share.bits for share in shares) == pytest.approx(whole.bits, rel=1e-5)


def test_a_model_that_knows_nothing_needs_eight_bits(model: SynapseModel) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    found = held_out_bits(model, to_stream(documents(500)))
    assert found.per_byte == pytest.approx(8.0)


def test_fewer_windows_read_a_part(model: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "WINDOW", 8)
    found = held_out_bits(model, to_stream(documents(2000)), windows=2)
    assert found.count == ROWS * 16


def test_compressors_are_the_real_ones() -> None:
    data = b"to be or not to be " * 50
    found = compressors(data)
    assert gzip.decompress(gzip.compress(data, 9)) == data
    assert found["gzip -9"] == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert 0 < found["xz -9"] < 8
