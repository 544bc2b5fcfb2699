"""Which size of model suits a machine and a text, and what a training step of it will take.

Nothing comes from tables of machines: memory is counted on a model of one and of two layers, time is measured on them,
and both are straight lines in the number of layers. D model width, L layers, E experts.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, explain
from synapse_arch.model import accounting
from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.model import SynapseModel
from synapse_arch.modules import ExpertsConfig, MemoryConfig, ThalamusConfig, XLSTMConfig

TOKENS_A_PARAMETER = 20
"""Tokens to read for each active parameter, the best use of a budget (Hoffmann et al. 2022)."""
EPOCHS = 4
"""How often a text can be read at nearly the worth of new text (Muennighoff et al. 2023)."""
MEMORY_SHARE = 0.5
"""Of the memory there is. A step was measured to hold 1.4 to 1.6 times at its peak what `training_memory` counts: the
backward pass's passing values, and fragments between tensors; the rest is for the program and its libraries."""
WIDTHS = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64)
POOLS = (16, 8, 4)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A size that was chosen.

    Attributes:
        config: the architecture.
        memory: bytes that a training step takes, as predicted.
        why: the reasons, a line each.
    """

    config: SynapseConfig
    memory: int
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a training step takes.

    Attributes:
        seconds: of forward and backward pass and AdamW's step, in float32.
        memory: bytes at the peak: weights, gradients, AdamW's averages, and what the backward pass needs.
    """

    seconds: float
    memory: int


def choose(*, memory: int, tokens: int, vocab_size: int = 256, batch_size: int = 4, length: int = 256) -> Choice:
    """The largest model whose training fits into the memory and whose size the text can fill.

    A text of `tokens` tokens, read up to `EPOCHS` times, teaches one active parameter for every `TOKENS_A_PARAMETER`
    tokens read, and no more parameters in all than it has tokens. Width goes before experts.

    Args:
        memory: bytes there are for the training.
        tokens: of text to train on.
        vocab_size: the tokenizer's.
        batch_size: windows a step.
        length: tokens of each.

    Raises:
        ConfigError: not even the smallest model fits, or an argument is below 1.
    """
    given = {"memory": memory, "tokens": tokens, "vocab_size": vocab_size, "batch_size": batch_size, "length": length}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(explain(name, "1 or more", value))
    budget = int(MEMORY_SHARE * memory)
    most = max(EPOCHS * tokens // TOKENS_A_PARAMETER, 1)
    smallest = _shape(WIDTHS[-1], POOLS[-1], vocab_size)
    for width, experts in product(WIDTHS, POOLS):
        config = _shape(width, experts, vocab_size)
        active, total = _learning(config)
        taught = config == smallest or (active <= most and total <= max(tokens, most))
        if not taught or 16 * total > budget:
            continue
        needed = training_memory(config, batch_size=batch_size, length=length)
        if needed <= budget:
            megabytes = [f"{size / 1e6:,.0f} MB" for size in (needed, budget, memory)]
            why = (
                f"text: {tokens:,} tokens read {EPOCHS} times teach {most:,} active parameters; it has {active:,}",
                f"memory: {megabytes[0]} for a step of {batch_size} × {length} tokens, "
                f"of {megabytes[1]}, {MEMORY_SHARE:.0%} of {megabytes[2]}",
                f"so: {config.n_layers} layers of {width} channels, {experts} experts, {total:,} parameters",
            )
            return Choice(config=config, memory=needed, why=why)
    needed = training_memory(smallest, batch_size=batch_size, length=length)
    remedy = "lower batch_size or length"
    raise ConfigError(
        explain("memory", f"{needed / MEMORY_SHARE / 1e6:,.0f} MB or more", f"{memory / 1e6:,.0f}", remedy)
    )


def available_memory(device: torch.device | str | None = None) -> int:
    """Bytes that are free on a device now; None is the machine's GPU, or the CPU's memory where there is none.

    Raises:
        ConfigError: the system does not say.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return 1024 * kilobytes["MemAvailable"]
    except (OSError, KeyError):
        pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE") if name in os.sysconf_names}
    if len(pages) < 2:
        raise ConfigError(explain("memory", "a system that says how much there is", "none", "give memory="))
    return pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"] // 2


def training_memory(config: SynapseConfig, *, batch_size: int, length: int) -> int:
    """Bytes that a training step takes at its peak, in float32 with AdamW.

    Weights and AdamW's averages are always there, 12 bytes a parameter. To them come either all that the backward pass
    needs, at its start, or, at its end, the gradients.
    """
    _, total = _learning(config)
    # Experts that get no token leave nothing behind, and how many there are does not matter to those that do.
    few = config.experts and replace(config.experts, n_experts=config.thalamus.top_k, labels=None)
    probe = replace(config, experts=few)
    one, two = (saved_bytes(replace(probe, n_layers=layers), length=length) for layers in (1, 2))
    saved = batch_size * (one + (config.n_layers - 1) * (two - one))
    logits = 4 * batch_size * length * config.vocab_size
    return 12 * total + max(saved + logits, 4 * total)


def saved_bytes(config: SynapseConfig, *, length: int) -> int:
    """Bytes that one row of so many tokens leaves for the backward pass, weights not counted; counted on the CPU."""
    model = SynapseModel(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor  # held, so that no other tensor gets its place
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids, targets=ids)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def predict(
    config: SynapseConfig,
    *,
    batch_size: int = 4,
    length: int = 256,
    device: torch.device | str = "cpu",
    repeats: int = 3,
) -> Prediction:
    """What a training step takes here: measured on one and two layers, and drawn on to all of them.

    Args:
        config: the architecture.
        batch_size: windows a step.
        length: tokens of each.
        device: where the training will run.
        repeats: steps of which the fastest counts, after one that warms up.
    """
    shape: Any = {"batch_size": batch_size, "length": length}
    depths = sorted({1, min(2, config.n_layers)})
    times = [
        step_seconds(replace(config, n_layers=layers), device=device, repeats=repeats, **shape) for layers in depths
    ]
    seconds = times[0] + (config.n_layers - 1) * (times[-1] - times[0])
    return Prediction(seconds=max(seconds, times[-1]), memory=training_memory(config, **shape))


def step_seconds(
    config: SynapseConfig, *, batch_size: int, length: int, device: torch.device | str = "cpu", repeats: int = 3
) -> float:
    """Seconds of a training step on random tokens: the fastest of `repeats`, after one that warms up."""
    model = SynapseModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    times = []
    for _ in range(repeats + 1):
        ids = torch.randint(config.vocab_size, (batch_size, length), device=device)
        start = _now(device)
        loss = model(ids, targets=ids).loss
        assert loss is not None, "targets were given"
        with torch.enable_grad():
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(_now(device) - start)
    return min(times[1:])


def _shape(width: int, experts: int, vocab_size: int) -> SynapseConfig:
    """A model of one of our sizes: as deep as it is wide, in the proportions of the presets."""
    heads = max(width // 64, 2)
    wide = width >= 1024
    return SynapseConfig(
        vocab_size=vocab_size,
        d_model=width,
        n_layers=max(width // 64, 2),
        thalamus=ThalamusConfig(d_state=128) if wide else ThalamusConfig(),
        xlstm=XLSTMConfig(n_heads=4),
        experts=ExpertsConfig(n_experts=experts, d_expert=2 * width),
        memory=MemoryConfig(n_heads=8, d_key=128, d_value=128) if wide else MemoryConfig(n_heads=min(heads, 8)),
    )


@cache
def _learning(config: SynapseConfig) -> tuple[int, int]:
    """Active parameters, and all: a straight line through one layer and two, since layers are alike."""
    found = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = SynapseModel(replace(config, n_layers=layers))
        found.append((accounting.active_parameters(model), sum(accounting.parameters(model).values())))
    one, two = found
    more = config.n_layers - 1
    return one[0] + more * (two[0] - one[0]), one[1] + more * (two[1] - one[1])


def _now(device: torch.device | str) -> float:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
