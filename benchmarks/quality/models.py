"""Every model of the comparison by name: this library's, its peers at equal size, this library's with a part changed.

build("synapse", task=TASKS["parity"], protocol=TASKS["parity"].protocols["cpu"])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.peers import PEERS, Decoder, angles, matched, state_numbers
from benchmarks.quality.tasks.base import IGNORED, Protocol, Task
from synapse_arch.errors import ConfigError, explain
from synapse_arch.model.accounting import active_parameters
from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.model import SynapseModel
from synapse_arch.modules import ExpertsConfig, MemoryConfig, ThalamusConfig, XLSTMConfig
from synapse_arch.modules.common import RMSNorm, linear

LIBRARY_WIDTH = 256
"""From this width on the sizes are those that the library has unasked."""
HALVES_WIDTH = 128
"""From this width on half a layer has two heads."""


class Autoencoder(nn.Module):
    """Rebuilds every token from the last position's feature and a position, by MAD's MLP (Poli et al. 2024).

    Args:
        d_model: D.
        n_classes: tokens to choose from.
    """

    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            RMSNorm(d_model), linear(d_model, d_model), nn.GELU(),
            RMSNorm(d_model), linear(d_model, d_model), nn.GELU(),
            RMSNorm(d_model), linear(d_model, n_classes),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, n_classes), of which only the last position is read."""
        turn = angles(features.shape[1], features.shape[2]).to(features)
        y: Tensor = self.layers(features[:, -1:] + torch.cat([turn.sin(), turn.cos()], dim=-1))
        return y


class Learner(nn.Module):
    """A model with the head a task needs.

    Args:
        body: a SynapseModel, whose own head is taken off, or a Decoder.
        task: what is learned.
        test_lengths: of the protocol; `description` counts the state of attention at the longest text.
    """

    def __init__(self, body: SynapseModel | Decoder, task: Task, test_lengths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.body, self.task, self.test_lengths = body, task, test_lengths
        d_model = body.embedding.embedding_dim
        if isinstance(body, SynapseModel):
            body.head = nn.Identity()  # type: ignore[assignment]
        self.head = Autoencoder(d_model, task.n_classes) if task.autoencodes else linear(d_model, task.n_classes)
        if task.tied:
            assert isinstance(self.head, nn.Linear)
            self.head.weight = body.embedding.weight
        self.scale = d_model**-0.5  # of tied logits: the embedding has unit variance, and they shall start there too
        self._load: Tensor | None = None

    def features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) ids -> (B, T, D) features and the router's losses, which count in training only."""
        if isinstance(self.body, Decoder):
            x: Tensor = self.body(ids)
            return x, x.new_zeros(())
        out = self.body(ids, targets=torch.full_like(ids, IGNORED) if self.training else None)
        if self.training:
            self._load = out.expert_load
        routing = (loss for name, loss in out.losses.items() if name != "language")
        return out.logits, sum(routing, start=out.logits.new_zeros(()))

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and the auxiliary loss.

        Args:
            ids: (B, T).
            positions: (B, T) bool, where logits are wanted; None means everywhere.

        Returns:
            (B, T, n_classes), or (n, n_classes) at the True positions in order; and ().
        """
        x, auxiliary = self.features(ids)
        if self.task.tied:
            x = x * self.scale
        if isinstance(self.head, Autoencoder):
            logits = self.head(x)
            return logits if positions is None else logits[positions], auxiliary
        return self.head(x if positions is None else x[positions]), auxiliary

    def after_step(self) -> None:
        """What follows an optimizer step: the routers' balancing biases move where the configuration has them."""
        body = self.body
        if isinstance(body, SynapseModel) and self._load is not None and body.config.thalamus.bias_rate > 0:
            body.balance_router(self._load)


def description(learner: Learner) -> dict[str, Any]:
    """What a record says of a model: parameters, active parameters, numbers of state a sequence, configuration."""
    body, task = learner.body, learner.task
    total = sum(p.numel() for p in learner.parameters())
    if isinstance(body, SynapseModel):
        idle = sum(p.numel() for p in body.parameters()) - active_parameters(body)
        state = state_numbers(body.init_state(1, device="meta").layers)
        config = body.config.to_dict()
    else:
        idle = body.embedding.weight.numel()
        tested = None if learner.test_lengths else task.test_make
        makers = [make for make in (task.make, tested) if make is not None]
        drawn = (make(1, torch.Generator()).ids.shape[1] for make in makers)
        state = body.state_numbers(max([*learner.test_lengths, *drawn]))
        config = body.config
    if task.tied:  # what is looked up is multiplied with as well
        idle -= body.embedding.weight.numel()
    return {"parameters": total, "active_parameters": total - idle, "state_numbers": state, "config": config}


def synapse_config(vocab_size: int, d_model: int, n_layers: int) -> SynapseConfig:
    """The library's defaults, with smaller parts where the model is narrower than theirs.

    A layer alone is about as large as two of the peers' blocks. Several are half as large each, where a half still has
    two heads; where it has not they stay whole, and peers of equal size have larger blocks.
    """
    if d_model >= LIBRARY_WIDTH:
        return SynapseConfig(vocab_size=vocab_size, d_model=d_model, n_layers=n_layers)
    share = 2 if n_layers > 1 and d_model >= HALVES_WIDTH else 1
    heads = max(1, d_model // 32 // share)
    return SynapseConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        xlstm=XLSTMConfig(d_hidden=d_model // share, n_heads=heads),
        thalamus=ThalamusConfig(d_state=16, expand=2 // share, head_dim=32),
        experts=ExpertsConfig(n_experts=8 // share, d_expert=d_model // 2),
        memory=MemoryConfig(n_heads=heads, d_key=32, d_value=32),
    )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model of the comparison.

    Attributes:
        description: one line.
        builder: makes it for a task and a protocol.
    """

    description: str
    builder: Callable[[Task, Protocol], Learner]


def build(name: str, *, task: Task, protocol: Protocol) -> Learner:
    """A model by its name, with fresh weights from torch's generator.

    Raises:
        ConfigError: there is no such model, or it cannot be built in this size.
    """
    if name not in MODELS:
        raise ConfigError(explain("model", f"one of {', '.join(MODELS)}", repr(name)))
    return MODELS[name].builder(task, protocol)


def _config(task: Task, protocol: Protocol) -> SynapseConfig:
    """As many layers as the peers have blocks."""
    return synapse_config(task.vocab_size, protocol.d_model, protocol.n_layers)


def _synapse(change: Callable[[SynapseConfig], SynapseConfig], task: Task, protocol: Protocol) -> Learner:
    return Learner(SynapseModel(change(_config(task, protocol))), task, protocol.test_lengths)


def _peer(name: str, task: Task, protocol: Protocol) -> Learner:
    """At equal parameters; language models, which are limited by time rather than by memory, at equal active ones."""
    with torch.device("meta"):
        reference = SynapseModel(_config(task, protocol))
    by = "active" if task.metric == "bits" else "total"
    return Learner(matched(name, reference, protocol.n_layers, by=by), task, protocol.test_lengths)


def _with(part: str, **values: Any) -> Callable[[SynapseConfig], SynapseConfig]:
    """The configuration with fields of one part replaced."""
    return lambda config: replace(config, **{part: replace(getattr(config, part), **values)})


def _without(part: str) -> Callable[[SynapseConfig], SynapseConfig]:
    nothing: dict[str, Any] = {part: None}
    return lambda config: replace(config, **nothing)


def _dense(config: SynapseConfig) -> SynapseConfig:
    """One expert as wide as the top_k that a token visited."""
    assert config.experts is not None
    width = config.thalamus.top_k * config.experts.d_expert
    one = replace(config.experts, n_experts=1, d_expert=width)
    return replace(config, experts=one, thalamus=replace(config.thalamus, top_k=1))


def _same(config: SynapseConfig) -> SynapseConfig:
    return config


ABLATIONS: dict[str, tuple[str, Callable[[SynapseConfig], SynapseConfig]]] = {
    "no-xlstm": ("without the language module", _without("xlstm")),
    "no-memory": ("without the fast-weight memory", _without("memory")),
    "no-experts": ("without experts; the thalamus only relays", _without("experts")),
    "no-thalamus": ("no Mamba; the router reads what it would have read", _with("thalamus", mamba=None)),
    "token-router": ("the Mamba relays, but the router reads what the Mamba reads", _with("thalamus", context=False)),
    "dense-experts": ("one feed-forward as wide as the experts a token visits", _dense),
    "hebbian": ("memory that adds without erasing", _with("memory", rule="hebbian")),
    "beta-1": ("writing strengths up to 1", _with("memory", beta_max=1.0)),
    "decay-free-heads": (
        "memory whose heads start without forgetting",
        _with("memory", decay_min=1e-6, decay_max=1e-6),
    ),
    "householder-1": ("one write a token", _with("memory", n_householder=1)),
    "write-gate": ("erasing and writing strengths apart", _with("memory", write_gate=True)),
    "input-gate-minus-2": ("input-gate bias -2", _with("xlstm", input_gate_bias=-2.0)),
    "input-gate-minus-5": ("input-gate bias -5", _with("xlstm", input_gate_bias=-5.0)),
    "input-gate-minus-10": ("input-gate bias -10, as in xLSTM-7B", _with("xlstm", input_gate_bias=-10.0)),
    "no-balance": ("without the load-balance loss", _with("thalamus", load_balance=0.0)),
    "bias-balance": ("balanced by biases, without a loss", _with("thalamus", load_balance=0.0, bias_rate=1e-3)),
}
"""This library's model with one thing changed; what a removed part leaves free is not given to others."""

MODELS: dict[str, ModelSpec] = {
    "synapse": ModelSpec(description="this library's model", builder=partial(_synapse, _same)),
    **{n: ModelSpec(description=peer.description, builder=partial(_peer, n)) for n, peer in PEERS.items()},
    **{f"synapse:{n}": ModelSpec(description=d, builder=partial(_synapse, c)) for n, (d, c) in ABLATIONS.items()},
}
"""Every model by name."""
