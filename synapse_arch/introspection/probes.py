"""How records are made: pure functions from what a region computed to what its record holds.

Modules call `routing_trace`, `gate_trace`, `memory_trace` and `expert_trace`, the model `synapse_trace`.
All run without gradients and without waiting for the device. Any T; T = 1 takes a few operations.
B rows, T tokens, n kept tokens, k experts a token, E experts, H heads, K key width, V value width,
D model width, F expert hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.introspection.matrix_memory import memory_probe, mlstm_probe, wide
from synapse_arch.introspection.records import (
    ExpertTrace,
    GateTrace,
    LayerTrace,
    MemoryTrace,
    RoutingTrace,
    SynapseTrace,
)
from synapse_arch.introspection.trace import Recorded, TraceSpec
from synapse_arch.ops._backends import no_autocast
from synapse_arch.ops.delta_rule import Rule
from synapse_arch.ops.experts import sort_by_expert
from synapse_arch.ops.mlstm import MLSTMState

SPARSE_BELOW = 0.01
"""A hidden activation smaller than this counts as silent."""


@torch.no_grad()
def routing_trace(
    logits: Tensor,
    indices: Tensor,
    weights: Tensor,
    coactivation: Tensor,
    spec: TraceSpec,
    *,
    mask: Tensor | None = None,
    ranked: Tensor | None = None,
) -> RoutingTrace:
    """Records one call of the thalamus.

    Args:
        logits: (B, T, E) router logits (Routing.logits).
        indices: (B, T, k) chosen experts, -1 for an unused slot and at padding (Routing.indices).
        weights: (B, T, k) mixing weights (Routing.weights).
        coactivation: (B, E, E) of the state after the call.
        spec: what is kept.
        mask: (B, T) bool, False at padding.
        ranked: (B, T, E) logits that top-k ranked, where they differ from `logits` (bias, pathways, noise).
    """
    experts, top_k = logits.shape[-1], indices.shape[-1]
    probabilities = wide(logits).softmax(-1)
    used = indices >= 0
    tokens = torch.zeros(logits.shape[0], experts, dtype=torch.long, device=logits.device)
    tokens.scatter_add_(1, indices.clamp(min=0).flatten(1), used.flatten(1).long())
    kept_mask = None if mask is None else spec.keep(mask)
    p = spec.keep(probabilities)
    top = p.topk(min(2, experts), dim=-1).values
    p1, p2 = top[..., 0], top[..., 1] if experts > 1 else torch.full_like(top[..., 0], torch.nan)
    if top_k < experts:
        order = (p if ranked is None else spec.keep(wide(ranked)).softmax(-1)).topk(top_k + 1, dim=-1).values
        margin = order[..., -2] - order[..., -1]
    else:
        margin = torch.full_like(p1, torch.nan)
    return RoutingTrace(
        positions=spec.positions(logits.shape[1], logits.device),
        experts=spec.keep(indices),
        weights=spec.keep(weights.masked_fill(~used, 0)),
        p1=_blank(p1, kept_mask),
        p2=_blank(p2, kept_mask),
        margin=_blank(margin, kept_mask),
        entropy=_blank(torch.special.entr(p).sum(-1), kept_mask),
        tokens=tokens,
        importance=_row_mean(probabilities, mask),
        reads=_unmasked(logits, mask),
        coactivation=coactivation.detach(),
        logits=_blank(spec.keep(logits), kept_mask) if spec.wants("full") else None,
    )


@torch.no_grad()
def gate_trace(
    k: Tensor,
    v: Tensor,
    log_i: Tensor,
    log_f: Tensor,
    o: Tensor,
    state: MLSTMState | None,
    final: MLSTMState,
    spec: TraceSpec,
    *,
    mass: Tensor | None = None,
    age: Tensor | None = None,
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Recorded[GateTrace], Tensor, Tensor]:
    """Records one call of the mLSTM cell; call it where spec.wants("gates").

    Args:
        k: (B, T, H, K) keys as given to ops.mlstm.
        v: (B, T, H, V) values.
        log_i: (B, T, H) input-gate pre-activations as given to ops.mlstm (the gate is their exp).
        log_f: (B, T, H) logsigmoid of the forget-gate pre-activations given to ops.mlstm, <= 0.
        o: (B, T, H, V) output gate in (0, 1).
        state: the cell's state before the call (None: fresh).
        final: the cell's state after the call.
        spec: what is kept.
        mass: (B, H) MLSTMLayerState.mass before the call, or None where the last call was not traced.
        age: (B, H) MLSTMLayerState.age before the call, or None.
        segment_ids: (B, T) ints, as given to ops.mlstm.
        mask: (B, T) bool, as given to ops.mlstm.

    Returns:
        The trace, and mass and age (B, H) for the next MLSTMLayerState.
    """
    probe = mlstm_probe(k, v, log_i, log_f, state, final, mass=mass, age=age, segment_ids=segment_ids, mask=mask)

    def make() -> GateTrace:
        kept_mask = None if mask is None else spec.keep(mask)[..., None]
        return GateTrace(
            positions=spec.positions(k.shape[1], k.device),
            log_i=_blank(spec.keep(log_i), kept_mask),
            log_f=_blank(spec.keep(log_f), kept_mask),
            o_mean=_blank(wide(spec.keep(o)).mean(-1), kept_mask),
            log_C_norm=_blank(spec.keep(probe.log_norm), kept_mask),
            age_tokens=_blank(spec.keep(probe.age), kept_mask),
        )

    return spec.record(make), probe.final_mass, probe.final_age


@torch.no_grad()
def memory_trace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    o: Tensor,
    state: Tensor | None,
    final: Tensor,
    spec: TraceSpec,
    *,
    write: Tensor | None = None,
    rule: Rule = "delta",
    segment_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> MemoryTrace:
    """Records one call of the fast-weight memory; call it where spec.wants("gates").

    Args:
        q: (B, T, H, K) queries as given to ops.delta_rule.
        k: (B, T, H, K) keys, or (B, T, M, H, K) for M writes a token; v, beta and write alike.
        v: (B, T, H, V) values.
        beta: (B, T, H) strengths.
        log_decay: (B, T, H), or None for no decay.
        o: (B, T, H, V) what ops.delta_rule returned, before any norm or gate.
        state: (B, H, K, V) the memory before the call (None: empty).
        final: (B, H, K, V) the memory that ops.delta_rule returned.
        spec: what is kept.
        write: (B, T, H, V), as given to ops.delta_rule.
        rule: as given to ops.delta_rule.
        segment_ids: (B, T) ints, as given to ops.delta_rule.
        mask: (B, T) bool, as given to ops.delta_rule.
    """
    if log_decay is None:
        log_decay = torch.zeros_like(q[..., 0])
    packing: Any = {"segment_ids": segment_ids, "mask": mask}
    probe = memory_probe(q, k, v, beta, log_decay, o, state, final, write=write, rule=rule, **packing)
    kept_mask = None if mask is None else spec.keep(mask)[..., None]
    strength = beta if write is None else write.mean(-1)
    steps = 1
    if k.dim() == 5:
        strength, steps = strength.mean(2), k.shape[2]
    count = _unmasked(k, mask)
    return MemoryTrace(
        positions=spec.positions(k.shape[1], k.device),
        write=_blank(spec.keep(strength), kept_mask),
        decay=_blank(spec.keep(log_decay).exp(), kept_mask),
        collision=_blank(spec.keep(probe.collision), kept_mask),
        read_conf=_blank(spec.keep(probe.read_conf), kept_mask),
        fro_norm=_blank(spec.keep(probe.norm), kept_mask),
        writes=count * steps,
        reads=count,
        weights=final.detach(),
    )


@torch.no_grad()
def expert_trace(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor) -> ExpertTrace:
    """Records what the experts compute; call it where spec.wants("full").

    Args:
        x: (B, T, D) tokens as the experts get them.
        w_in: (E, D, 2F), gate columns first.
        w_out: (E, F, D).
        indices: (B, T, k) chosen experts; -1 (unused slot, padding) is left out.
    """
    dtype = torch.promote_types(x.dtype, w_in.dtype)
    x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    # A step's few tokens are not worth sorting; and what a row shows must not depend on where the others went.
    pass_on = _grouped_pass if x.shape[1] > 1 and _can_group(x, w_in) else _dense_pass
    with no_autocast(x):
        counts, norms, silent = pass_on(x, w_in, w_out, indices)
    return ExpertTrace(tokens=counts, out_norm=norms / counts, sparsity=silent / counts)


@torch.no_grad()
def synapse_trace(
    ids: Tensor,
    start: Tensor,
    layers: tuple[LayerTrace, ...],
    spec: TraceSpec,
    *,
    labels: tuple[str, ...] | None = None,
    mask: Tensor | None = None,
) -> SynapseTrace:
    """Gathers the layers' traces of one call of the model.

    Args:
        ids: (B, T) token ids.
        start: (B,) tokens each row had read before the call (SynapseState.position).
        layers: the traced layers, in order.
        spec: what is kept.
        labels: the user's names of the expert slots.
        mask: (B, T) bool, False at padding.
    """
    length = ids.shape[1]
    kept_ids = spec.keep(ids)
    steps = torch.arange(length, device=ids.device)[None] if mask is None else mask.long().cumsum(1) - 1
    at = start[:, None] + spec.keep(steps)
    if mask is not None:
        kept_mask = spec.keep(mask)
        kept_ids, at = torch.where(kept_mask, kept_ids, -1), torch.where(kept_mask, at, -1)
    return SynapseTrace(
        level=spec.level,
        length=length,
        tokens=kept_ids,
        at=at,
        positions=spec.positions(length, ids.device),
        layers=layers,
        labels=labels,
    )


def _can_group(x: Tensor, w_in: Tensor) -> bool:
    """Whether F.grouped_mm takes these: its dtypes, 16-byte rows, a device with a kernel."""
    aligned = all(size * x.dtype.itemsize % 16 == 0 for size in (x.shape[-1], w_in.shape[-1] // 2))
    kinds = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
    return aligned and x.dtype in kinds.get(x.device.type, ())


def _grouped_pass(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments, summed output norms and summed silent shares (B, E), by sorted assignments."""
    (rows, _, slots), experts = indices.shape, w_in.shape[0]
    order, counts = sort_by_expert(indices, experts)
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x.flatten(0, 1)[order // slots], w_in, offs=ends).chunk(2, -1)
    hidden = F.silu(gate) * up
    norm, silent = _activity(hidden, F.grouped_mm(hidden, w_out, offs=ends))
    owner = indices.flatten()[order]
    used = owner >= 0  # rows behind the last expert's are never computed
    place = torch.where(used, order // indices[0].numel() * experts + owner, 0)

    def add(values: Tensor) -> Tensor:
        total = torch.zeros(rows * experts, dtype=values.dtype, device=values.device)
        return total.scatter_add(0, place, torch.where(used, values, 0)).view(rows, experts)

    return add(used.long()), add(norm), add(silent)


def _dense_pass(x: Tensor, w_in: Tensor, w_out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with every expert on every token, for what grouped products cannot take."""
    counts, norms, silents = [], [], []
    for e in range(w_in.shape[0]):
        times = (indices == e).sum(-1)
        gate, up = (x @ w_in[e]).chunk(2, -1)
        hidden = F.silu(gate) * up
        norm, silent = _activity(hidden, hidden @ w_out[e])
        counts.append(times.sum(1))
        norms.append(torch.where(times > 0, times * norm, 0).sum(1))
        silents.append(torch.where(times > 0, times * silent, 0).sum(1))
    return torch.stack(counts, -1), torch.stack(norms, -1), torch.stack(silents, -1)


def _activity(hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Per assignment: the L2 norm of the output row, and the share of hidden activations near 0."""
    return torch.linalg.vector_norm(wide(rows), dim=-1), wide((hidden.abs() < SPARSE_BELOW).to(hidden.dtype)).mean(-1)


def _row_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (B, T, E) over each row's unmasked tokens: (B, E)."""
    if mask is None:
        return x.mean(1)
    return torch.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdim=True)


def _unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of each row of x (B, T, ...) are real: (B,) int64."""
    if mask is None:
        return torch.full(x.shape[:1], x.shape[1], dtype=torch.long, device=x.device)
    return mask.sum(1)


def _blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """Writes NaN where mask is False."""
    if mask is None:
        return x
    return torch.where(mask if mask.dim() == x.dim() else mask[..., None], x, torch.nan)
