"""One-shot facts: told once, asked later, in the same context or in a new one that inherits only the memory.

A fact is a key of two symbols and a value. The keys asked about never occur in training, so nothing can be recalled but
what the state carried over.
"""

from __future__ import annotations

from collections.abc import Callable

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

SYMBOLS, VALUES, FACTS = 16, 16, 4
IGNORED = -100
Cut = Callable[[SynapseState], SynapseState]


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


def small_model() -> SynapseModel:
    config = SynapseConfig(
        vocab_size=2 * SYMBOLS + VALUES,
        d_model=64,
        n_layers=2,
        thalamus=ThalamusConfig(head_dim=32, d_state=16, expand=1),
        xlstm=XLSTMConfig(n_heads=2),
        experts=ExpertsConfig(n_experts=4, d_expert=64),
        memory=MemoryConfig(n_heads=2, d_key=32, d_value=32),
    )
    return SynapseModel(config)


@torch.no_grad()
def recall(model: SynapseModel, cut: Cut) -> float:
    """Share of 1,024 facts with unseen keys that are answered right when the state between is cut."""
    told, asked, answers = facts(keys(seen=False), 1024 // FACTS, torch.Generator().manual_seed(1))
    predicted = model(asked, cut(model(told).state)).logits.argmax(-1)
    return float((predicted == answers)[answers != IGNORED].float().mean())
