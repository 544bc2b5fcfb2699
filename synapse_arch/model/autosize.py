"""Which size of model suits a machine and a text, and what a training step of it will take.

Nothing comes from tables of machines: memory is counted on steps of one and of two layers, time is measured on them,
and both are straight lines in the number of layers. D model width, L layers, E experts, B rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

from synapse_arch.errors import ConfigError, explain
from synapse_arch.model import accounting
from synapse_arch.model._live import Live
from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.model import SynapseModel
from synapse_arch.modules import ExpertsConfig, MemoryConfig, ThalamusConfig, XLSTMConfig

TOKENS_A_PARAMETER = 20
"""Tokens to read for each active parameter, the best use of a budget (Hoffmann et al. 2022)."""
EPOCHS = 4
"""How often a text can be read at nearly the worth of new text (Muennighoff et al. 2023)."""
MEMORY_SHARE = 0.8
"""Of the memory there is; the rest is for the program and its libraries."""
HEAP = 1.24
"""What the C library's heap holds on a CPU for every byte of tensors: 1.22 to 1.30 on four sizes of model and batch."""
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


def training_memory(config: SynapseConfig, *, batch_size: int, length: int, device: torch.device | str = "cpu") -> int:
    """Bytes that a training step takes at its peak, in float32 with AdamW.

    Weights and AdamW's averages are always there, 12 bytes a parameter. To them come either all that the backward pass
    needs, at its start, or, at its end, the gradients and what its last layer needs.
    """
    _, total = _learning(config)
    # Experts that get no token leave nothing behind, and how many there are does not matter to those that do.
    few = config.experts and replace(config.experts, n_experts=config.thalamus.top_k, labels=None)
    probe = replace(config, experts=few)
    one, two = (live_bytes(replace(probe, n_layers=layers), length=length) for layers in (1, 2))
    # Each of the two grows evenly by the layer; which is larger may depend on how many there are.
    alive = max(a + (config.n_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    needed = 12 * total + max(batch_size * alive, 4 * total + batch_size * max(one))
    return round(needed * (HEAP if torch.device(device).type == "cpu" else 1.0))


def live_bytes(config: SynapseConfig, *, length: int) -> tuple[int, int]:
    """Bytes of tensors alive at most in a step of one row, weights and gradients not counted; counted on the CPU.

    Returns:
        the most until the loss is there, with the states of all layers, and the most from then on.
    """
    with torch.random.fork_rng(devices=[]):  # its weights are nobody's
        model = SynapseModel(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    own = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad) if tensor is not None]
    ids = torch.zeros(1, length, dtype=torch.long)
    with torch.enable_grad(), Live(own) as live:
        loss = model(ids, targets=ids).loss
        assert loss is not None, "targets were given"
        forward = live.peak
        live.restart()
        loss.backward()
    return forward, live.peak


def predict(
    config: SynapseConfig,
    *,
    batch_size: int = 4,
    length: int = 256,
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
) -> Prediction:
    """What a training step takes here: measured on one and two layers, and drawn on to all of them.

    Args:
        config: the architecture.
        batch_size: windows a step.
        length: tokens of each.
        device: where the training will run.
        seconds: how long steps are timed; never fewer than three of each depth.
    """
    shape: Any = {"batch_size": batch_size, "length": length, "device": device}
    depths = [replace(config, n_layers=layers) for layers in (1, 2)]
    one, two = fastest([stepper(depth, **shape) for depth in depths], seconds)
    return Prediction(seconds=deepened(one, two, config.n_layers), memory=training_memory(config, **shape))


def deepened(one: float, two: float, layers: int) -> float:
    """Seconds of a step of so many layers, from those of one layer and of two."""
    return max(one + (layers - 1) * (two - one), one)


def fastest(steps: Sequence[Callable[[], float]], seconds: float) -> list[float]:
    """The fewest seconds each step took, run in turns for so long: what else the machine does slows all of them.

    Args:
        steps: each does its step and returns its seconds.
        seconds: how long; never fewer than three turns, and one before that warms up.
    """
    start, turns = time.perf_counter(), [[step() for step in steps]]
    while len(turns) < 4 or time.perf_counter() - start < seconds:
        turns.append([step() for step in steps])
    return [min(times) for times in zip(*turns[1:], strict=True)]


def stepper(
    config: SynapseConfig, *, batch_size: int, length: int, device: torch.device | str = "cpu"
) -> Callable[[], float]:
    """A fresh model's training step on random tokens, which returns the seconds it took."""
    model = SynapseModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> float:
        ids = torch.randint(config.vocab_size, (batch_size, length), device=device)
        start = _now(device)
        with torch.enable_grad():
            loss = model(ids, targets=ids).loss
            assert loss is not None, "targets were given"
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _now(device) - start

    return step


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
