"""Statistics of a finished trace, in plain numbers: what experts specialise in, and who works with whom.

Runs after the forward pass, on the host. B rows, n kept tokens, k experts a token, E experts, L traced layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, explain

if TYPE_CHECKING:
    from synapse_arch.introspection.records import LayerTrace, RoutingTrace

TOP_TOKENS = 5
"""Tokens listed for an expert."""
MIN_COUNT = 3
"""A token must have reached an expert so often to be listed."""
SHUFFLES = 8
"""Shuffles averaged for the baseline of the specialisation."""


@dataclass(frozen=True, kw_only=True)
class TopToken:
    """A token that prefers an expert."""

    id: int
    """The token's id."""
    lift: float
    """P(token | expert) / P(token) over the kept assignments; 1 means no preference."""
    n: int
    """Assignments of this token to this expert."""

    def to_dict(self) -> dict[str, Any]:
        """{"id", "lift", "n"}."""
        return {"id": self.id, "lift": self.lift, "n": self.n}


@dataclass(frozen=True, kw_only=True)
class Pathway:
    """Two experts that work on the same tokens: in neighbouring traced layers, or in one layer."""

    source: tuple[int, int]
    """(layer, expert slot)."""
    target: tuple[int, int]
    """(layer, expert slot)."""
    weight: float
    """Mean over the kept tokens of the product of the two mixing weights."""
    hebbian: float
    """Across layers: share of the kept tokens that both experts got. Within a layer: the state's running
    co-activation of the pair, mean over rows."""

    def to_dict(self) -> dict[str, Any]:
        """{"from", "to", "weight", "hebbian"}; the weight is None where a mixing weight is NaN."""
        weight = self.weight if math.isfinite(self.weight) else None
        return {"from": list(self.source), "to": list(self.target), "weight": weight, "hebbian": self.hebbian}


def pick_layer(layers: Sequence[LayerTrace], index: int) -> LayerTrace:
    """The trace of layer `index`, or ConfigError naming those that were traced."""
    for trace in layers:
        if trace.index == index:
            return trace
    traced = ", ".join(str(trace.index) for trace in layers) or "none"
    raise ConfigError(explain("layer", f"a traced layer ({traced})", index, "name it in TraceSpec.layers"))


def spread(routing: RoutingTrace) -> tuple[Tensor, Tensor]:
    """Mixing weight and choice (0 or 1) of every expert at every kept token; both (B, n, E) float64."""
    chosen = (routing.experts >= 0).double()
    slots = routing.experts.clamp(min=0)
    zero = chosen.new_zeros(*slots.shape[:2], routing.tokens.shape[-1])
    weights = zero.scatter_add(-1, slots, routing.weights.double() * chosen)
    return weights, zero.scatter_add(-1, slots, chosen)


def flows(routings: Sequence[RoutingTrace], valid: Tensor) -> Tensor:
    """Mean over the tokens where valid (B, n) of w_l[e] w_{l+1}[e'], for neighbours in `routings`: (L - 1, E, E)."""
    weights = [spread(routing)[0] for routing in routings]
    if len(weights) < 2:
        experts = weights[0].shape[-1] if weights else 0
        return torch.zeros(0, experts, experts, dtype=torch.float64, device=valid.device)
    return torch.stack([_pair_mean(a, b, valid) for a, b in pairwise(weights)])


def pathways(layers: Sequence[LayerTrace], valid: Tensor, top: int) -> tuple[Pathway, ...]:
    """The `top` pathways by weight between neighbouring traced layers, then the `top` by Hebbian strength inside."""
    parts = [(trace.index, *spread(trace.routing), trace.routing) for trace in layers if trace.routing is not None]
    across, inside = [], []
    for (i, weights_i, chosen_i, _), (j, weights_j, chosen_j, _) in pairwise(parts):
        weight, both = _pair_mean(weights_i, weights_j, valid), _pair_mean(chosen_i, chosen_j, valid)
        across += _collect(i, j, weight, both, weight > 0)
    for i, weights, _, routing in parts:
        weight, strength = _pair_mean(weights, weights, valid), routing.coactivation.double().mean(0)
        inside += _collect(i, i, weight, strength, (strength > 0).triu(1))
    across.sort(key=lambda path: -path.weight)
    inside.sort(key=lambda path: -path.hebbian)
    return tuple(across[:top] + inside[:top])


def weighted_mean(means: Tensor, counts: Tensor) -> Tensor:
    """The mean over dim 0 weighted by counts; NaN where nothing was counted."""
    return torch.where(counts > 0, means * counts, 0).sum(0) / counts.sum(0)


def expert_statistics(tokens: Tensor, trace: LayerTrace, labels: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The fields of one ExpertStats an expert.

    Args:
        tokens: (B, n) ids of the kept tokens.
        trace: a layer with routing.
        labels: the user's names of the expert slots.
    """
    routing = trace.routing
    assert routing is not None
    counts = routing.tokens.sum(0)
    experts = counts.shape[0]
    ids = range(experts) if trace.expert_ids is None else trace.expert_ids.tolist()
    activity = trace.experts
    blank = [None] * experts
    norms = blank if activity is None else _optional(weighted_mean(activity.out_norm, activity.tokens))
    sparsity = blank if activity is None else _optional(weighted_mean(activity.sparsity, activity.tokens))
    special, shuffled, tops = _token_statistics(tokens, routing.experts, experts)
    return [
        {
            "layer": trace.index,
            "index": e,
            "id": ids[e],
            "label": labels[e] if labels else None,
            "tokens": count,
            "load": count / max(1, int(counts.sum())),
            "uniform": 1 / experts,
            "out_norm": norms[e],
            "sparsity": sparsity[e],
            "specialisation": special[e],
            "specialisation_shuffled": shuffled[e],
            "top_tokens": tops[e],
        }
        for e, count in enumerate(counts.tolist())
    ]


def specialisation(joint: Tensor) -> Tensor:
    """KL(P(token | e) || P(token)) / -ln P(e) of counts joint (E, tokens): (E,), NaN where undefined.

    P(token) >= P(e) P(token | e), so the ratio lies in [0, 1].
    """
    share = joint.sum(1) / joint.sum()
    given = joint / joint.sum(1, keepdim=True)
    overall = joint.sum(0) / joint.sum()
    divergence = torch.xlogy(given, given / overall).sum(1)
    return torch.where((share > 0) & (share < 1), divergence / -share.log(), torch.nan)


def _token_statistics(
    tokens: Tensor, chosen: Tensor, experts: int
) -> tuple[list[float | None], list[float | None], list[tuple[TopToken, ...]]]:
    """Specialisation, its shuffled baseline and the top tokens of each expert, from ids (B, n), choices (B, n, k)."""
    used = chosen >= 0
    owner = chosen[used].cpu()
    if owner.numel() == 0:
        return [None] * experts, [None] * experts, [()] * experts
    ids, kind = torch.unique(tokens[..., None].expand_as(chosen)[used].cpu(), return_inverse=True)

    def count(owner: Tensor) -> Tensor:
        return torch.bincount(owner * len(ids) + kind, minlength=experts * len(ids)).view(experts, -1).double()

    joint = count(owner)
    generator = torch.Generator().manual_seed(0)
    shuffles = [owner[torch.randperm(len(owner), generator=generator)] for _ in range(SHUFFLES)]
    baseline = torch.stack([specialisation(count(shuffled)) for shuffled in shuffles]).mean(0)
    lift = joint / joint.sum(1, keepdim=True) / (joint.sum(0) / joint.sum())
    tops = []
    for e in range(experts):
        often = torch.nonzero(joint[e] >= MIN_COUNT).flatten().tolist()
        found = [TopToken(id=int(ids[t]), lift=float(lift[e, t]), n=int(joint[e, t])) for t in often]
        tops.append(tuple(sorted(found, key=lambda token: (-token.lift, -token.n, token.id))[:TOP_TOKENS]))
    return _optional(specialisation(joint)), _optional(baseline), tops


def _pair_mean(a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens of the outer product of a and b (B, n, E): (E, E); 0 without tokens."""
    a = torch.where(valid[..., None], a, 0)
    return torch.einsum("bne,bnf->ef", a, b) / valid.sum().clamp(min=1)


def _collect(i: int, j: int, weight: Tensor, hebbian: Tensor, where: Tensor) -> list[Pathway]:
    """Pathways from layer i to layer j at the entries of the (E, E) mask `where`."""
    return [
        Pathway(source=(i, e), target=(j, f), weight=float(weight[e, f]), hebbian=float(hebbian[e, f]))
        for e, f in torch.nonzero(where).tolist()
    ]


def _optional(values: Tensor) -> list[float | None]:
    """Plain floats, None for NaN."""
    return [None if value != value else value for value in values.tolist()]
