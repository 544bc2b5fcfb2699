"""The small models that the tests of this folder share."""

from __future__ import annotations

from typing import Any

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

VOCABULARY = 23

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "s6": {"thalamus": ThalamusConfig(mamba="s6", d_state=4, top_k=2)},
    "router alone": {"thalamus": ThalamusConfig(mamba=None)},
    "no thalamus": {"thalamus": ThalamusConfig(mamba=None), "experts": None},
    "two writes": {"memory": MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=2, write_gate=True)},
    "no experts": {"experts": None},
    "no memory": {"memory": None},
    "no language module": {"xlstm": None},
    "relay only": {"experts": None, "memory": None, "xlstm": None},
    "tied": {"tie_embeddings": True},
}


def small_config(**changes: Any) -> SynapseConfig:
    """Two layers of every region, a few thousand parameters."""
    parts: dict[str, Any] = {
        "thalamus": ThalamusConfig(d_state=4, head_dim=8, top_k=2),
        "xlstm": XLSTMConfig(n_heads=2),
        "experts": ExpertsConfig(n_experts=4, d_expert=6),
        "memory": MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=1),
    }
    return SynapseConfig(vocab_size=VOCABULARY, d_model=16, n_layers=2, **(parts | changes))


def small_model(**changes: Any) -> SynapseModel:
    """A model in evaluation mode whose logits are far enough apart for its choices to differ."""
    model = SynapseModel(small_config(**changes)).eval()
    with torch.no_grad():
        model.head.weight.mul_(20 if not model.config.tie_embeddings else 1)
    return model


def tokens(batch: int, length: int) -> Tensor:
    """(B, T) random ids."""
    return torch.randint(VOCABULARY, (batch, length))


@torch.no_grad()
def read_state(model: SynapseModel, batch: int = 3, length: int = 7) -> SynapseState:
    """A state in which every tensor is in use."""
    return model(tokens(batch, length)).state
