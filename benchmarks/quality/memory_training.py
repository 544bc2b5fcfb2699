"""Training the models whose memory is measured: facts of training keys, told and asked in every mixture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import progress
from benchmarks.quality.memory_facts import VOCABULARY, Facts, filler, keys, make_facts
from synapse_arch import ExpertsConfig, MemoryConfig, SynapseConfig, SynapseModel, ThalamusConfig, XLSTMConfig

MODELS: dict[str, MemoryConfig | None] = {
    "delta": MemoryConfig(n_heads=2, d_key=32, d_value=32),
    "hebbian": MemoryConfig(n_heads=2, d_key=32, d_value=32, rule="hebbian"),
    "none": None,
}
"""The memories compared; all else is the library's default at this size."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained, by steps that mix the number of facts, tellings and the distance.

    Attributes:
        steps: optimiser steps.
        peak: learning rate, after `warmup` steps down to 0 in a line.
        warmup: steps.
        weight_decay: of AdamW with betas 0.9 and 0.95; gradients are clipped to norm 1.
        answers: asked a step, about; rows = answers / facts.
        max_rows: B at most.
        few_facts: facts a row at most in the first step; grows evenly to `max_facts` at half of the steps.
        max_facts: facts a row at most; a step takes any number up to the limit.
        max_filler: tokens between telling and asking at most; half of the steps have none.
    """

    steps: int = 800
    peak: float = 5e-3
    warmup: int = 30
    weight_decay: float = 0.01
    answers: int = 192
    max_rows: int = 48
    few_facts: int = 4
    max_facts: int = 16
    max_filler: int = 64


def configuration(memory: MemoryConfig | None) -> SynapseConfig:
    """The model around a memory."""
    return SynapseConfig(
        vocab_size=VOCABULARY,
        d_model=128,
        n_layers=2,
        thalamus=ThalamusConfig(head_dim=32, d_state=16),
        xlstm=XLSTMConfig(n_heads=2),
        experts=ExpertsConfig(n_experts=4, d_expert=64),
        memory=memory,
    )


def training_facts(generator: torch.Generator, training: Training, step: int) -> tuple[Facts, Tensor]:
    """What a step tells and asks, and the filler between."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    grown = min(1.0, 2 * step / training.steps)
    limit = round(training.few_facts + grown * (training.max_facts - training.few_facts))
    facts = draw(1, limit)
    retold = draw(0, 1) * draw(0, (facts + 1) // 2)
    rows = min(training.max_rows, -(-training.answers // facts))
    length = draw(0, 1) * draw(1, training.max_filler)
    made = make_facts(generator, keys(seen=True), rows, facts, retold=retold)
    return made, filler(generator, rows, length)


def train(
    config: SynapseConfig, seed: int, training: Training, what: str = "train"
) -> tuple[SynapseModel, list[float]]:
    """A model and its loss (nats an answer, mean over each tenth of the steps); a pure function of its arguments."""
    torch.manual_seed(seed)
    model = SynapseModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=training.weight_decay)
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    losses: list[float] = []
    for step in progress(range(training.steps), what):
        rate = min(1, (step + 1) / training.warmup) * (1 - step / training.steps)
        optimizer.param_groups[0]["lr"] = training.peak * rate
        facts, gap = training_facts(generator, training, step)
        state = model(torch.cat([facts.told, gap], 1)).state
        if config.memory is not None and step % 2:
            state = state.memory_only()
        output = model(facts.asked, state, targets=facts.answers)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.losses["language"].detach()))
    size = max(1, training.steps // 10)
    return model.eval(), [statistics.fmean(losses[start : start + size]) for start in range(0, len(losses), size)]
