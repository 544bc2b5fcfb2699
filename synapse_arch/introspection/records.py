"""What a forward pass reports: frozen records of detached tensors, read after the pass.

Letters: B rows, n kept token offsets, k experts a token, E experts, H heads, K key and V value width.
Making a record never waits for the device; properties, `to_dict`, `to_json` and `report` do.
Per-token numbers are NaN where they are undefined and at padding (mask False); JSON shows null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from synapse_arch.introspection import analysis
from synapse_arch.introspection.analysis import Pathway, TopToken
from synapse_arch.introspection.report import render

SCHEMA = "synapse.introspect/1"


def plain(value: Any) -> Any:
    """Turns tensors, tuples and floats into JSON's own types; NaN and infinities become None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, TopToken):
        return value.to_dict()
    return value


class _Record:
    """Conversion shared by the records."""

    _derived: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python: fields and derived values by name; what was not traced is None or left out."""
        names = [f.name for f in fields(self) if f.metadata.get("json", True)]  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in (*names, *self._derived)}
        return {name: plain(value) for name, value in values.items()}

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace(_Record):
    """Where the thalamus sent each token. p = softmax(router logits) over the E experts."""

    _derived = ("confidence", "load", "uniform", "balance", "utilisation")

    positions: Tensor
    """(n,) int64: offsets of the kept tokens in this call."""
    experts: Tensor
    """(B, n, k) int64: chosen experts; -1 for an unused slot or padding."""
    weights: Tensor
    """(B, n, k): mixing weight of each choice; 0 at an unused slot or padding."""
    p1: Tensor
    """(B, n): largest probability."""
    p2: Tensor
    """(B, n): second largest probability; NaN where E = 1."""
    margin: Tensor
    """(B, n): p_(k) - p_(k+1), k-th less next largest probability of the logits that were ranked for the
    choice (bias, pathways and noise included): how near the choice was to another. NaN where k = E."""
    entropy: Tensor
    """(B, n) nats: -sum p ln p, from 0 to ln E."""
    tokens: Tensor
    """(B, E) int64: assignments to each expert, over all unmasked tokens of the call."""
    importance: Tensor
    """(B, E): mean of p over all unmasked tokens of the call; NaN for a row without any."""
    reads: Tensor
    """(B,) int64: unmasked tokens of the call."""
    coactivation: Tensor
    """(B, E, E): decayed running average of a a^T after the call, a in {0, 1}^E the chosen experts."""
    logits: Tensor | None = None
    """(B, n, E): router logits; only at level "full"."""

    @property
    def confidence(self) -> Tensor:
        """(B, n): p1 / p2, 1 for a tie."""
        return self.p1 / self.p2

    @property
    def load(self) -> Tensor:
        """(B, E): share of the row's assignments, tokens_e / sum tokens; NaN for a row without any."""
        return self.tokens / self.tokens.sum(-1, keepdim=True)

    @property
    def uniform(self) -> float:
        """1 / E: the load of every expert under perfect balance."""
        return 1 / self.tokens.shape[-1]

    @property
    def balance(self) -> Tensor:
        """(B,): max(0, 1 - CV), CV = population standard deviation of the load over its mean."""
        load = self.load
        return (1 - load.std(-1, correction=0) / load.mean(-1)).clamp(min=0)

    @property
    def utilisation(self) -> Tensor:
        """(B,): share of the experts that got at least one token."""
        return (self.tokens > 0).float().mean(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class GateTrace(_Record):
    """The xLSTM cell: gates and the matrix memory C (true values, unstabilised)."""

    _derived = ("C_norm", "half_life")

    positions: Tensor
    """(n,) int64: offsets of the kept tokens in this call."""
    log_i: Tensor
    """(B, n, H): log of the input gate, as the cell used it (after the soft cap)."""
    log_f: Tensor
    """(B, n, H) <= 0: log of the forget gate, log sigmoid of its capped pre-activation."""
    o_mean: Tensor
    """(B, n, H): mean over the head's channels of the output gate, in (0, 1)."""
    log_C_norm: Tensor  # noqa: N815 - C is the paper's letter
    """(B, n, H): ln ||C_t||_F after the token; -inf where C is 0."""
    age_tokens: Tensor
    """(B, n, H) tokens: mean age of what C holds, A_t / M_t with M_t = f M_{t-1} + i ||k|| ||v|| and
    A_t = f (A_{t-1} + M_{t-1}). NaN where M = 0. Where tracing began on a used state the older
    content counts as ||C||_F of age 0, so the age is an estimate from below of the content's age."""

    @property
    def C_norm(self) -> Tensor:  # noqa: N802
        """(B, n, H): ||C_t||_F; inf where it exceeds the dtype (see `log_C_norm`)."""
        return self.log_C_norm.exp()

    @property
    def half_life(self) -> Tensor:
        """(B, n, H) tokens: ln 2 / -log_f, after which this forget gate would halve C; inf at log_f = 0."""
        return math.log(2) / -self.log_f


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryTrace(_Record):
    """The fast-weight memory. W_{t-1} is the memory before token t decays and writes it, W_t after.

    A token may write several times; `write` and `collision` are then means over its writes.
    """

    _derived = ("utilisation", "capacity")

    positions: Tensor
    """(n,) int64: offsets of the kept tokens in this call."""
    write: Tensor
    """(B, n, H): what scales the value written, beta_t; with a write gate of its own the mean of w_t over channels."""
    decay: Tensor
    """(B, n, H) in (0, 1]: alpha_t = exp(log_decay_t), what is kept of W_{t-1}."""
    collision: Tensor
    """(B, n, H) in [0, 1]: ||W_{t-1}^T k_t|| / (||W_{t-1}||_F ||k_t||), how much the memory already
    answers to the key being written. NaN where W_{t-1} or k_t is 0. Each of several writes meets the memory that the
    one before left; the mean leaves NaN out."""
    read_conf: Tensor
    """(B, n, H) in [0, 1]: ||W_t^T q_t|| / (||W_t||_F ||q_t||), how much of the memory the query meets.
    NaN where W_t or q_t is 0."""
    fro_norm: Tensor
    """(B, n, H): ||W_t||_F after the write."""
    writes: Tensor
    """(B,) int64: writes of the call, one (or as many as a token makes) for each unmasked token."""
    reads: Tensor
    """(B,) int64: reads of the call, one for each unmasked token."""
    weights: Tensor = field(metadata={"json": False})
    """(B, H, K, V): the memory after the call."""

    @property
    def utilisation(self) -> Tensor:
        """(B, H) in [0, 1]: effective rank of W over the largest possible; 0 for an empty memory.

        exp(-sum s ln s) / min(K, V), s the singular values over their sum (Roy & Vetterli 2007). NaN where W is not
        finite.
        """
        finite = self.weights.isfinite().all(-1).all(-1)
        values = torch.linalg.svdvals(torch.where(finite[..., None, None], self.weights, 0))
        share = values / values.sum(-1, keepdim=True)
        rank = torch.special.entr(share).sum(-1).exp() / values.shape[-1]
        return torch.where(finite, torch.where(values[..., 0] > 0, rank, 0), torch.nan)

    @property
    def capacity(self) -> int:
        """K: keys one head can hold without any overlap."""
        return self.weights.shape[-2]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertTrace(_Record):
    """What the experts did with each row's tokens; level "full"."""

    tokens: Tensor
    """(B, E) int64: assignments computed by each expert."""
    out_norm: Tensor
    """(B, E): mean over its assignments of the L2 norm of the expert's output, before the mixing weight;
    NaN for an expert without tokens of the row."""
    sparsity: Tensor
    """(B, E): share of its hidden activations h = silu(x Wg) * x Wu with |h| < 0.01; NaN without tokens."""


@dataclass(frozen=True, kw_only=True)
class ExpertStats(_Record):
    """One expert in plain numbers, over the batch. The token statistics cover the kept offsets."""

    layer: int
    """Index of the layer."""
    index: int
    """Slot in the pool, what RoutingTrace.experts counts in."""
    id: int
    """Stable id of the expert."""
    label: str | None
    """The user's label, if one was given."""
    tokens: int
    """Assignments in the call."""
    load: float
    """Share of all assignments in the call."""
    uniform: float
    """1 / E."""
    out_norm: float | None
    """See ExpertTrace, over all rows; None below level "full" or without tokens."""
    sparsity: float | None
    """See ExpertTrace, over all rows; None below level "full" or without tokens."""
    specialisation: float | None
    """In [0, 1]: KL(P(token | e) || P(token)) / -ln P(e); 1 where e's tokens go to no other expert.
    P counts kept assignments. Few samples inflate it: compare with `specialisation_shuffled`."""
    specialisation_shuffled: float | None
    """The same after shuffling which assignment went to which expert (mean of 8, fixed seed): its value
    for an expert that ignores the token, at this sample size."""
    top_tokens: tuple[TopToken, ...]
    """Tokens by lift = P(token | e) / P(token), of those e got at least 3 times."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTrace:
    """Everything traced in one layer; None for what the layer lacks or the level leaves out."""

    index: int
    """Index of the layer in the model."""
    routing: RoutingTrace | None = None
    """Routes of the thalamus."""
    experts: ExpertTrace | None = None
    """What the experts computed; level "full"."""
    gates: GateTrace | None = None
    """The xLSTM cell; level "gates"."""
    memory: MemoryTrace | None = None
    """The fast-weight memory; level "gates"."""
    expert_ids: Tensor | None = None
    """(E,) int64: stable id of each expert slot; None for 0 ... E - 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python: {"i", "routing", "mlstm", "memory", "activations"}, the last four where traced."""
        parts = {"routing": self.routing, "mlstm": self.gates, "memory": self.memory, "activations": self.experts}
        return {"i": self.index} | {name: part.to_dict() for name, part in parts.items() if part is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class SynapseTrace:
    """One traced forward pass of a model."""

    level: str
    """The level asked for."""
    length: int
    """T, tokens of the call (padding included)."""
    tokens: Tensor
    """(B, n) int64: ids of the kept tokens; -1 at padding."""
    positions: Tensor
    """(n,) int64: offsets of the kept tokens in this call."""
    at: Tensor
    """(B, n) int64: how many tokens the row had read before this one, from the start of its state; -1 at padding."""
    layers: tuple[LayerTrace, ...]
    """The traced layers, in order."""
    labels: tuple[str, ...] | None = None
    """The user's names for the expert slots, if any."""
    schema: str = SCHEMA
    """Name and version of the JSON layout."""

    @property
    def dropped(self) -> int:
        """Offsets of the call that stride and max_tokens left out."""
        return self.length - self.positions.shape[0]

    def layer(self, index: int) -> LayerTrace:
        """The trace of layer `index` of the model.

        Raises:
            ConfigError: where that layer was not traced.
        """
        return analysis.pick_layer(self.layers, index)

    def expert_stats(self, layer: int) -> tuple[ExpertStats, ...]:
        """One record for each expert of a layer; () for a layer without routing."""
        trace = self.layer(layer)
        if trace.routing is None:
            return ()
        rows = analysis.expert_statistics(self.tokens, trace, self.labels)
        return tuple(ExpertStats(**row) for row in rows)

    def flows(self) -> Tensor:
        """(L - 1, E, E): mean over kept tokens of w_l[e] w_{l+1}[e'], between neighbouring traced layers."""
        return analysis.flows([t.routing for t in self.layers if t.routing is not None], self.at >= 0)

    def pathways(self, top: int = 10) -> tuple[Pathway, ...]:
        """The `top` strongest between neighbouring traced layers, then the `top` within a layer (by `hebbian`)."""
        return analysis.pathways(self.layers, self.at >= 0, top)

    def report(self, *, width: int = 100, decode: Callable[[int], str] | None = None) -> str:
        """The trace as text with bars, averaged over rows and tokens.

        Args:
            width: columns; longer lines are cut.
            decode: turns a token id into text; with it each expert shows the tokens that prefer it.
        """
        return render(self, width, decode)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python in the layout of `schema`; every per-token list has a leading axis of rows."""
        stats = [stat for trace in self.layers for stat in self.expert_stats(trace.index)]
        return {
            "schema": self.schema,
            "level": self.level,
            "truncated": {"tokens": self.dropped > 0, "dropped": self.dropped},
            "tokens": {"pos": plain(self.at), "id": plain(self.tokens)},
            "layers": [trace.to_dict() for trace in self.layers],
            "experts": [stat.to_dict() for stat in stats],
            "pathways": [path.to_dict() for path in self.pathways()],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as strict JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False, indent=indent)
