"""One-shot facts: told once, asked later, in the same context or in a new one that inherits only the memory.

A fact is a key of two symbols and a value. The keys asked about never occur in training, so nothing can be recalled but
what the state carried over.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from synapse_arch import (
    ExpertsConfig,
    MemoryConfig,
    SynapseConfig,
    SynapseModel,
    SynapseState,
    ThalamusConfig,
    XLSTMConfig,
)
from synapse_arch.model.state import LayerState

SYMBOLS, VALUES, FACTS, ROWS = 16, 16, 4, 64
STEPS, PEAK = 600, 5e-3
IGNORED = -100
CHANCE = 1 / VALUES
"""A model that has forgotten guesses a value; knowing which ones were told would make it 1 / FACTS."""


def keys(*, seen: bool) -> Tensor:
    """The pairs used in training, or the fifth that is kept from it."""
    pairs = torch.randperm(SYMBOLS**2, generator=torch.Generator().manual_seed(0))
    unseen = SYMBOLS**2 // 5
    return pairs[unseen:] if seen else pairs[:unseen]


def facts(pairs: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is told (rows, 3 FACTS), what is asked (rows, 2 FACTS), and the answers as its targets."""
    chosen = torch.stack([pairs[torch.randperm(len(pairs), generator=generator)[:FACTS]] for _ in range(rows)])
    first, second = chosen // SYMBOLS, chosen % SYMBOLS + SYMBOLS
    value = torch.randint(VALUES, chosen.shape, generator=generator) + 2 * SYMBOLS
    order = torch.stack([torch.randperm(FACTS, generator=generator) for _ in range(rows)])
    told = torch.stack([first, second, value], -1).flatten(1)
    asked = torch.stack([first.gather(1, order), second.gather(1, order)], -1).flatten(1)
    answers = torch.full_like(asked, IGNORED)
    answers[:, 1::2] = value.gather(1, order)
    return told, asked, answers


@torch.no_grad()
def recall(model: SynapseModel, *, keep: tuple[str, ...]) -> float:
    """Share of 2,048 facts with unseen keys answered right, when of the state only some regions' parts are kept."""
    told, asked, answers = facts(keys(seen=False), 2048 // FACTS, torch.Generator().manual_seed(1))
    state = model(told).state
    fresh = model.init_state(state.batch_size)
    layers = tuple(
        LayerState(*(getattr(old if name in keep else new, name) for name in LayerState._fields))
        for old, new in zip(state.layers, fresh.layers, strict=True)
    )
    predicted = model(asked, replace(state, layers=layers)).logits.argmax(-1)
    return float((predicted == answers)[answers != IGNORED].float().mean())


@torch.no_grad()
def recall_in_a_new_context(model: SynapseModel) -> float:
    """The same, with `memory_only`, which keeps the fast weights and nothing else."""
    told, asked, answers = facts(keys(seen=False), 2048 // FACTS, torch.Generator().manual_seed(1))
    state: SynapseState = model(told).state.memory_only()
    assert not state.position.any()
    predicted = model(asked, state).logits.argmax(-1)
    return float((predicted == answers)[answers != IGNORED].float().mean())


@pytest.fixture(scope="module")
def model() -> SynapseModel:
    """A small model trained to answer; in every second step the question opens a new context."""
    torch.manual_seed(0)
    config = SynapseConfig(
        vocab_size=2 * SYMBOLS + VALUES,
        d_model=128,
        n_layers=2,
        thalamus=ThalamusConfig(head_dim=32, d_state=16, expand=1),
        xlstm=XLSTMConfig(n_heads=2),
        experts=ExpertsConfig(n_experts=4, d_expert=64),
        memory=MemoryConfig(n_heads=2, d_key=32, d_value=32),
    )
    model = SynapseModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = PEAK * min(1, step / 30) * (1 - step / STEPS)
        told, asked, answers = facts(keys(seen=True), ROWS, generator)
        state = model(told).state
        loss = model(asked, state.memory_only() if step % 2 else state, targets=answers).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_facts_are_recalled(model: SynapseModel) -> None:
    assert recall(model, keep=("xlstm", "thalamus", "memory")) >= 0.99


def test_facts_are_recalled_in_a_new_context(model: SynapseModel) -> None:
    assert recall_in_a_new_context(model) >= 0.99


def test_the_memory_is_what_recalls(model: SynapseModel) -> None:
    assert recall(model, keep=("memory",)) >= 0.99
    assert recall(model, keep=("xlstm", "thalamus")) <= 2 * CHANCE
    assert recall(model, keep=()) <= 2 * CHANCE


def test_keys_are_unseen() -> None:
    assert not set(keys(seen=True).tolist()) & set(keys(seen=False).tolist())
