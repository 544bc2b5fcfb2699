"""Rows that are read on: all of the text, in order, the same for any number of processes; and packing is exact."""

from __future__ import annotations

import pytest
import torch

from recipes.data import SEPARATOR, Document, Rows, Windows, segments, to_stream
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import DataError
from tests.tolerances import RELATIVE

EXACT = RELATIVE[torch.float64]
SMALL = {
    "vocab_size": 256, "d_model": 16, "n_layers": 2, "thalamus.d_state": 4, "thalamus.head_dim": 8,
    "experts.n_experts": 4, "experts.d_expert": 16, "xlstm.n_heads": 2, "memory.n_heads": 2, "memory.d_key": 4,
    "memory.d_value": 4, "thalamus.load_balance": 0.0,
}  # fmt: skip


def stream(*sizes: int) -> torch.Tensor:
    draws = (torch.randint(1, 256, (size,)) for size in sizes)
    return to_stream([Document(name=str(n), data=bytes(draw.tolist())) for n, draw in enumerate(draws)])


def test_rows_go_on_where_they_were() -> None:
    rows = Rows(stream(70, 30, 145), length=8, batch_size=3, seed=1)
    assert rows.steps == 248 // 3 // 8
    for step in range(2 * rows.steps - 1):
        now, later = rows.batch(step), rows.batch(step + 1)
        assert torch.equal(now.ids[:, 1:], now.targets[:, :-1])
        assert torch.equal(now.targets[:, -1], later.ids[:, 0]) != rows.begins(step + 1)
    assert rows.begins(0)
    assert rows.begins(rows.steps)
    assert not torch.equal(rows.batch(0).ids, rows.batch(rows.steps).ids)


def test_an_epoch_reads_every_place_at_most_once_and_nearly_all() -> None:
    numbered = torch.arange(1000, dtype=torch.int32)
    rows = Rows(numbered, length=7, batch_size=4, seed=3)
    read = torch.cat([rows.batch(step).ids.flatten() for step in range(rows.steps)])
    assert len(read.unique()) == len(read) == rows.steps * 28
    assert len(read) >= 1000 - 4 * 8


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_and_parts_are_the_batch(world: int) -> None:
    rows = Rows(stream(200, 300), length=16, batch_size=4, seed=0)
    for step in (0, 3, 9):
        whole = rows.batch(step)
        assert torch.equal(torch.cat([rows.batch(step, rank, world).ids for rank in range(world)]), whole.ids)
        for part, ids in zip(whole.parts(2), whole.ids.chunk(2), strict=True):
            assert torch.equal(part.ids, ids)
            expected = segments(ids)
            assert (part.segment_ids is None) == (expected is None)


def test_too_short_a_text_for_the_rows_is_refused() -> None:
    with pytest.raises(DataError, match="more than 64 tokens"):
        Rows(torch.zeros(64, dtype=torch.uint8), length=16, batch_size=4, seed=0)


def test_packed_and_separate_documents_give_the_same_loss_and_gradients() -> None:
    model = SynapseModel(SynapseConfig.preset("tiny", **SMALL)).double()
    sizes = (21, 70, 5, 38)
    text = stream(*sizes).long()
    ids, targets = text[None], torch.cat([text[1:], torch.tensor([SEPARATOR])])[None]
    packed = model(ids, targets=targets, segment_ids=segments(ids))
    packed.loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss, start = torch.zeros((), dtype=torch.float64), 0
    for size in sizes:
        part = slice(start, start + size + 1)
        out = model(ids[:, part], targets=targets[:, part])
        loss = loss + out.loss * (size + 1) / ids.shape[1]
        start += size + 1
    loss.backward()
    assert torch.allclose(loss, packed.loss, rtol=EXACT, atol=0)
    scale = max(grad.abs().max() for grad in together.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - together[name]).abs().max() <= EXACT * scale, name
    unmarked = model(ids, targets=targets)
    assert not torch.allclose(unmarked.loss, packed.loss, rtol=1e-6)


def test_windows_of_a_wide_vocabulary() -> None:
    wide = torch.tensor([0, 40_000, 65_535, 7, 300], dtype=torch.int32).to(torch.uint16)
    batch = Windows(wide, length=4, batch_size=2, seed=0).batch(0)
    assert batch.ids[0].tolist() == [0, 40_000, 65_535, 7]
    assert batch.targets[0].tolist() == [40_000, 65_535, 7, 300]
