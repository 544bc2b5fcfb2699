"""What a model costs: parameters, active parameters, state bytes, floating-point operations a token.

Nothing is estimated from tables: a configuration is built on the meta device, without memory, and counted.
A multiply-add is two operations; E experts, M writes of a token to the fast-weight memory, T time.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.model import SynapseModel
from synapse_arch.modules import XLSTM, ExpertPool, FastWeightMemory, Mamba, MemoryConfig, Thalamus
from synapse_arch.ops import delta_rule, mlstm, ssd


def parameters(model: SynapseModel | SynapseConfig) -> dict[str, int]:
    """Parameters by kind of part, over all layers; their sum is the model's numel, a tied head counted once.

    Returns:
        embedding, xlstm, thalamus, experts, memory, norms, head, as far as the model has them.
    """
    counts: Counter[str] = Counter()
    for name, parameter in _built(model).named_parameters():
        counts[_part(name)] += parameter.numel()
    return dict(counts)


def active_parameters(model: SynapseModel | SynapseConfig) -> int:
    """Parameters that a token is multiplied with: top_k of the E experts, and all else but the embedding table.

    The table is looked up, not multiplied, so it counts only where it is tied and serves as the head. Six times
    this number is the usual estimate of the operations of a training step a token.
    """
    built = _built(model)
    total = sum(parameter.numel() for parameter in built.parameters())
    if not built.config.tie_embeddings:
        total -= built.embedding.weight.numel()
    for pool in built.modules():
        if isinstance(pool, ExpertPool):
            idle = pool.config.n_experts - built.config.thalamus.top_k
            total -= _stacked(pool) // pool.config.n_experts * idle
    return total


def state_bytes(model: SynapseModel | SynapseConfig, batch_size: int = 1) -> int:
    """Bytes of the recurrent state of `batch_size` sequences, however long they are."""
    return _built(model).init_state(batch_size, device="meta").nbytes


def flops_per_token(model: SynapseModel | SynapseConfig, *, chunked: bool = False) -> int:
    """Floating-point operations of a forward pass a token; see `flops_by_part`."""
    return sum(flops_by_part(model, chunked=chunked).values())


def flops_by_part(model: SynapseModel | SynapseConfig, *, chunked: bool = False) -> dict[str, int]:
    """Floating-point operations of a forward pass a token by kind of part, a multiply-add counted as two.

    Counted are the projections, the top_k experts, the head, and each recurrence: in its recurrent form, two
    operations to write and two to read each number of the state (the delta rule reads twice), or with `chunked`
    the matrix products of the chunk forms at their default chunk sizes, when T fills whole chunks. Not counted are
    elementwise work (gates, norms, short convolutions, softmax) and the embedding lookup.
    """
    built = _built(model)
    counts: Counter[str] = Counter()
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear):
            counts[_part(name)] += 2 * module.weight.numel()
        elif isinstance(module, ExpertPool):
            counts[_part(name)] += 2 * built.config.thalamus.top_k * _stacked(module) // module.config.n_experts
        elif isinstance(module, Thalamus):
            counts[_part(name)] += 2 * module.n_experts**2  # co-activation
        elif isinstance(module, (Mamba, XLSTM, FastWeightMemory)):
            counts[_part(name)] += _recurrence(module, chunked)
    return dict(counts)


def _recurrence(module: Mamba | XLSTM | FastWeightMemory, chunked: bool) -> int:
    """Operations of a mixer's recurrence a token: of all heads."""
    c: Any = module.config
    if isinstance(module, Mamba) and c.variant == "s6":
        return int(module.d_inner * c.d_state * (2 if chunked else 4))  # the writes of the scan are elementwise
    if isinstance(module, Mamba):
        size = _chunk(ssd) if chunked else 0
        scores = 2 * size * c.d_state * (c.n_groups - module.n_heads)  # heads of a group share theirs
        return int(scores + module.n_heads * _head(c.d_state, c.head_dim, size))
    if isinstance(module, XLSTM):
        head = _head(module.d_key, module.d_value, _chunk(mlstm) if chunked else 0)
        return int(c.n_heads * (head + 4 * module.d_key))  # the normaliser is a row more of the state
    return int(c.n_heads * _memory_head(c, _chunk(delta_rule) if chunked else 0))


def _memory_head(c: MemoryConfig, size: int) -> int:
    """A head of the fast-weight memory: M writes and a read; `size` writes a chunk, 0 for the recurrent form."""
    steps, key, value = c.n_householder, c.d_key, c.d_value
    tokens = max(size // steps, 1) if size else 0
    size = tokens * steps
    head = _head(key, value, size) + 2 * (steps - 1) * key * value
    head += 2 * (tokens**2 - size**2)  # log decays are summed over tokens, not over writes
    if c.rule == "delta":
        head += 2 * steps * key * value  # what the keys held
        head += 2 * steps * size * (2 * key + value)  # K Kᵀ, and A⁻¹ on keys and values
        width = 1 << (size - 1).bit_length() if size else 0
        head += 2 * width * (width**2 - 1) // (3 * tokens) if size else 0  # A⁻¹ itself, by doubling its diagonal blocks
    return head


def _head(key: int, value: int, size: int) -> int:
    """A head's state written and read; in chunks also the scores, scores · values, and the sums of log decays."""
    return 4 * key * value + 2 * size * (key + value) + 2 * size**2


def _chunk(op: Callable[..., Any]) -> int:
    return int(inspect.signature(op).parameters["chunk_size"].default)


def _built(model: SynapseModel | SynapseConfig) -> SynapseModel:
    if isinstance(model, SynapseConfig):
        with torch.device("meta"):
            return SynapseModel(model)
    return model


def _stacked(pool: ExpertPool) -> int:
    return pool.w_in.numel() + pool.w_out.numel()


def _part(name: str) -> str:
    """The kind of part that a parameter or module belongs to, from its dotted name."""
    parts = name.split(".")
    part = parts[2] if parts[0] == "layers" else parts[0]
    return "norms" if part == "norm" or part.endswith("_norm") else part
