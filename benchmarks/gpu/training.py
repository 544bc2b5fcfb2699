"""A training step in bfloat16: tokens/s, share of the matrix rate, memory; beside it models of fla of equal size."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.timing import attempt, interleaved
from benchmarks.measure import Figure
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.model.accounting import active_parameters
from synapse_arch.ops import _triton

GOAL = 0.4
THEIRS = ("KDA", "GatedDeltaNet")
"""Models of fla that are tried as peers."""
HEAD = 64
"""Width of their heads."""


def narrow(model: SynapseModel) -> SynapseModel:
    """Casts the weights to bfloat16, but for those that stay float32; as `from_pretrained(dtype=...)` does."""
    for parameter in model.parameters():
        if not getattr(parameter, "_keep_float32", False):
            parameter.data = parameter.data.bfloat16()
    return model


def ours(
    config: SynapseConfig, batch: int, length: int, device: str, rate: float, *, rounds: int, compiled: bool
) -> list[Figure]:
    """Steps of ours, eager and compiled; `rate` is the measured bfloat16 matrix rate."""
    total = sum(p.numel() for p in _meta(config).parameters())
    size = active_parameters(config)
    sizes = {"active parameters, embedding table not counted": size, "parameters": total}

    def steps(form: str) -> list[Figure]:
        model = SynapseModel(config).to(device).train()
        if form == "compiled":
            torch.compiler.reset()
            for layer in model.layers:
                layer.compile(fullgraph=True)
        what = f"training, {form}"
        return _steps(what, _our_loss(model), model, size, batch, length, device, rate, rounds, sizes)

    figures = []
    for form in ("compiled", "eager") if compiled else ("eager",):
        figures += attempt(f"training, {form}", partial(steps, form), device)
    return figures


def theirs(
    config: SynapseConfig, batch: int, length: int, device: str, rate: float, *, rounds: int, late: Callable[[], bool]
) -> list[Figure]:
    """Steps of each peer, while it is not late."""
    figures = []
    if not _triton.missing():
        for name in THEIRS:
            if not late():
                figures += _peer(name, config, batch, length, device, rate, rounds)
    return figures


def _our_loss(model: SynapseModel) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        found = model(ids[:, :-1], targets=ids[:, 1:]).loss
        assert found is not None
        return found

    return loss


def _steps(
    what: str, loss: Callable[[Tensor], Tensor], model: nn.Module, size: int, batch: int, length: int, device: str,
    rate: float, rounds: int, details: dict[str, Any],
) -> list[Figure]:  # fmt: skip
    """Times of a step whose batch is halved until it fits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocabulary = next(m for m in model.modules() if isinstance(m, nn.Embedding)).num_embeddings

    def step(ids: Tensor) -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            found = loss(ids)
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    while True:
        ids = torch.randint(vocabulary, (batch, length + 1), device=device)
        try:
            step(ids)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = interleaved({"step": lambda: step(ids)}, rounds, device)["step"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    what = f"{what}, B {batch}, T {length:,}"
    return [
        Figure(
            what=f"{what}: 6 x active parameters x tokens/s over the bfloat16 matrix rate", unit="share",
            values=tuple(6 * size * batch * length / t / rate for t in times), better="more", details=details,
            goal=GOAL if what.startswith("training, compiled") else None,
        ),
        Figure(what=what, values=tuple(batch * length / t for t in times), unit="tokens/s"),
        Figure(what=f"{what}: peak memory", values=(float(peak),), unit="bytes"),
    ]  # fmt: skip


def _peer(
    name: str, config: SynapseConfig, batch: int, length: int, device: str, rate: float, rounds: int
) -> list[Figure]:
    """A model of fla as deep as it takes to have our active parameters; without a figure where it cannot train here."""
    what = f"training, fla {name}"
    try:
        model = _their_model(name, config).to(device).train()
        size = _their_size(model)

        def loss(ids: Tensor) -> Tensor:
            logits = model(ids[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

        return _steps(what, loss, model, size, batch, length, device, rate, rounds, {"active parameters": size})
    except Exception as error:  # a peer that cannot run says so, and the rest is measured
        message = f"{type(error).__name__}: {error}"[:300]
        return [Figure(what=f"{what}: cannot train here", values=(0.0,), unit="count", details={"reason": message})]


def _their_model(name: str, config: SynapseConfig) -> nn.Module:
    import fla.models as models

    make, settings = getattr(models, f"{name}ForCausalLM"), getattr(models, f"{name}Config")
    heads = {"num_heads": config.d_model // HEAD, "head_dim": HEAD}
    shape = {"hidden_size": config.d_model, "vocab_size": config.vocab_size, **heads}

    def built(layers: int, device: str) -> nn.Module:
        with torch.device(device):
            model: nn.Module = make(settings(**shape, num_hidden_layers=layers))
        return model

    one, two = (_their_size(built(layers, "meta")) for layers in (1, 2))
    return built(max(1, 1 + round((active_parameters(config) - one) / (two - one))), "cpu")


def _their_size(model: nn.Module) -> int:
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


def _meta(config: SynapseConfig) -> SynapseModel:
    with torch.device("meta"):
        return SynapseModel(config)
