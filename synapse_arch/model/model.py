"""SynapseModel: embedding, layers, norm, head; state in and state out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from synapse_arch.errors import ConfigError, ShapeError, StateError, explain
from synapse_arch.introspection.joining import join_traces
from synapse_arch.introspection.probes import synapse_trace
from synapse_arch.introspection.records import LayerTrace, SynapseTrace
from synapse_arch.introspection.trace import Recorded, TraceSpec, made
from synapse_arch.model import generation
from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.controls import Controls, LayerControls
from synapse_arch.model.layer import SynapseLayer
from synapse_arch.model.loss import IGNORED, next_token_nats
from synapse_arch.model.state import SynapseState
from synapse_arch.modules import Routing
from synapse_arch.modules.common import RMSNorm, wide
from synapse_arch.modules.thalamus import expert_loads, load_balance_loss, router_z_loss
from synapse_arch.ops._checks import check_packing, check_shape

WINDOW = 2048
"""Tokens read at a time where no gradient is wanted."""


@dataclass(frozen=True, eq=False)
class SynapseOutput:
    """What a forward pass returns."""

    logits: Tensor
    """(B, T, vocab_size), or the last `logits_to_keep` positions of it."""
    state: SynapseState
    """The state after the last position."""
    loss: Tensor | None
    """(): the sum of `losses`; None without targets."""
    losses: dict[str, Tensor]
    """The terms of the loss, weighted as they are added: "language" (nats a token), "balance", "z"."""
    trace: SynapseTrace | None
    """What was asked for by `trace`; None where it is made `later`."""
    expert_load: Tensor | None
    """(L, E) int64: assignments each expert received; None without experts."""
    pending: Callable[[], SynapseTrace] | None = None
    """Makes what was asked for by a `trace` with `later`, on any thread, with the bits it would have had at once."""


class _Pass(NamedTuple):
    """What one window of the tokens gave."""

    x: Tensor
    state: SynapseState
    routings: list[Routing | None]
    trace: Recorded[SynapseTrace] | None


def _windows(length: int, segment_ids: Tensor | None) -> list[slice]:
    """How a call is read: whole where gradients are recorded, else so many tokens at a time.

    The state makes the cut exact, and memory and time a token stay what they are however long the text. Packed
    documents are read whole: a segment may begin where a window would.
    """
    if torch.is_grad_enabled() or segment_ids is not None:
        return [slice(0, length)]
    return [slice(start, min(start + WINDOW, length)) for start in range(0, length, WINDOW)]


def _join_traces(parts: list[Recorded[SynapseTrace] | None], spec: TraceSpec) -> SynapseTrace:
    """The traces of all windows as one."""
    traces = [made(part) for part in parts if part is not None]
    return traces[0] if len(traces) == 1 else join_traces(traces, max_tokens=spec.max_tokens)


def _join(parts: tuple[Routing | None, ...]) -> Routing | None:
    """One layer's routing in all windows."""
    found = [part for part in parts if part is not None]
    if len(found) <= 1:
        return found[0] if found else None
    return Routing(*(torch.cat(pieces, dim=1) for pieces in zip(*found, strict=True)))


class SynapseModel(nn.Module):
    """A language model of linear time and constant-size state whose inside can be read.

    Args:
        config: the architecture.

    >>> model = SynapseModel(SynapseConfig.preset("tiny", n_layers=1, d_model=64))
    >>> ids = torch.randint(256, (2, 16))
    >>> out = model(ids, targets=ids.roll(-1, 1))
    >>> tuple(out.logits.shape), sorted(out.losses)
    ((2, 16, 256), ['balance', 'language', 'z'])
    """

    recompute = False
    """Layers are computed again in the backward pass instead of being remembered: less memory, the same bits."""

    def __init__(self, config: SynapseConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # Unit variance: each region's output is added to the tokens, and must not drown them from the first step.
        nn.init.normal_(self.embedding.weight)
        self.embedding.weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.layers = nn.ModuleList(SynapseLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.logit_scale = 1.0
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
            self.logit_scale = config.d_model**-0.5

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> SynapseState:
        """The state before the first token.

        Args:
            batch_size: rows B.
            device: where it lies; None means where the model lies.

        Raises:
            StateError: batch_size is no integer of at least 1.
        """
        if not isinstance(batch_size, int | torch.SymInt) or isinstance(batch_size, bool) or batch_size < 1:
            raise StateError(explain("batch_size", "an integer, at least 1", repr(batch_size)))
        device = self.embedding.weight.device if device is None else device
        layers = tuple(layer.init_state(batch_size, device=device) for layer in self._layers())
        return SynapseState(layers, torch.zeros(batch_size, dtype=torch.long, device=device))

    def forward(
        self,
        ids: Tensor,
        state: SynapseState | None = None,
        *,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        trace: TraceSpec | None = None,
        logits_to_keep: int = 0,
        reduce_load: Callable[[Tensor], Tensor] | None = None,
        controls: Controls | None = None,
        expert_backend: str = "auto",
    ) -> SynapseOutput:
        """Reads tokens, predicts the next ones.

        Args:
            ids: (B, T) integer token ids. Their range is checked on the CPU; elsewhere that would stop the device.
            state: what an earlier call returned, or None for a fresh one; never modified.
            targets: (B, T) the tokens to predict, already shifted; -100 is ignored.
            segment_ids: (B, T) ints; nothing crosses from one document to the next.
            mask: (B, T) bool; False marks padding, which neither changes the state nor counts in a loss.
            trace: what to record on the way. The outputs are the same bits with and without.
            logits_to_keep: predict only at so many last positions; 0 means at all.
            reduce_load: sums the experts' loads (L, E) over processes; the balance loss then counts all their tokens.
            controls: what is done to the regions on the way, at all positions of the call.
            expert_backend: how the experts are computed, see `expert_swiglu`.

        Returns:
            SynapseOutput.

        Raises:
            ShapeError: a wrong shape, dtype or id. StateError: a state of another model or batch.
            ConfigError: controls that leave no choice, an unknown backend, a trace of layers that are not there.
        """
        options = {"segment_ids": segment_ids, "mask": mask, "trace": trace, "expert_backend": expert_backend}
        self._check(ids, state, targets, logits_to_keep, options)
        if controls is not None:
            controls.check(self.config, ids.shape[0])
        before = state if state is not None else self.init_state(ids.shape[0], device=ids.device)
        passes = self._read_windows(ids, before, controls, options)
        x = passes[0].x if len(passes) == 1 else torch.cat([one.x for one in passes], dim=1)
        routings = [_join(parts) for parts in zip(*(one.routings for one in passes), strict=True)]
        logits = self.head(self.norm(x[:, -logits_to_keep:]) * self.logit_scale)
        load = self._load(routings)
        record = None if trace is None else trace.record(partial(_join_traces, [one.trace for one in passes], trace))
        losses = {}
        if targets is not None:
            shared = reduce_load(load) if reduce_load is not None and load is not None else load
            losses = self._losses(logits, targets, routings, mask, shared)
        return SynapseOutput(
            logits=logits,
            state=passes[-1].state,
            loss=sum(losses.values(), start=logits.new_zeros(())) if losses else None,
            losses=losses,
            trace=None if callable(record) else record,
            expert_load=load,
            pending=record if callable(record) else None,
        )

    def stream(self, ids: Tensor, state: SynapseState | None = None, **options: Any) -> generation.TokenStream:
        """Yields tokens one by one; see `generation.stream`."""
        return generation.stream(self, ids, state, **options)

    def generate(self, ids: Tensor, state: SynapseState | None = None, **options: Any) -> generation.GenerateOutput:
        """Completes prompts; see `generation.generate`."""
        return generation.generate(self, ids, state, **options)

    def consolidate(self, state: SynapseState) -> None:
        """Turns the co-activation that `state` has gathered into pathways that bias routing from now on.

        Left to the user: no gain of them made three byte models better on held-out text (paper, what routing means).
        """
        self._check_state(state)
        for layer, remembered in zip(self._layers(), state.layers, strict=True):
            if layer.experts is not None:
                layer.thalamus.consolidate(remembered.thalamus)

    def balance_router(self, load: Tensor) -> None:
        """Moves each router's balancing bias by `thalamus.bias_rate` against its load.

        Args:
            load: (L, E) assignments, as in SynapseOutput.expert_load, summed over processes.

        Raises:
            ShapeError: the load is of other sizes.
        """
        sizes = {"L": self.config.n_layers, "E": self.config.n_experts}
        check_shape("load", load, "L E", sizes, remedy="pass SynapseOutput.expert_load")
        for layer, counts in zip(self._layers(), load, strict=True):
            layer.thalamus.balance(counts)

    def save_pretrained(self, directory: str | PathLike[str], **options: Any) -> None:
        """Writes weights and configuration; see `checkpoint.save_pretrained`."""
        from synapse_arch.model import checkpoint  # it builds models, so it imports this module

        checkpoint.save_pretrained(self, directory, **options)

    @classmethod
    def from_pretrained(cls, directory: str | PathLike[str], **options: Any) -> SynapseModel:
        """Reads what `save_pretrained` wrote; see `checkpoint.from_pretrained`."""
        from synapse_arch.model import checkpoint

        return checkpoint.from_pretrained(directory, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> SynapseModel:
        """A copy whose parameters keep their marks (no weight decay, float32), which torch would drop."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for own, theirs in zip(self.parameters(), copied.parameters(), strict=True):
            theirs.__dict__.update(own.__dict__)
        return copied

    def _layers(self) -> list[SynapseLayer]:
        return cast(list[SynapseLayer], list(self.layers))

    def _read_windows(
        self, ids: Tensor, before: SynapseState, controls: Controls | None, options: dict[str, Any]
    ) -> list[_Pass]:
        """One pass after the other, each with its part of the mask and of the trace."""
        layered = [None if controls is None else controls.layer(i) for i in range(self.config.n_layers)]
        mask, trace = options["mask"], options["trace"]
        passes: list[_Pass] = []
        for window in _windows(ids.shape[1], options["segment_ids"]):
            last = passes[-1].state if passes else before
            part = None if mask is None else mask[:, window]
            spec = None if trace is None else replace(trace, start=trace.start + window.start)
            passes.append(self._read(ids[:, window], last, layered, options | {"mask": part, "trace": spec}))
        return passes

    def _read(
        self, ids: Tensor, before: SynapseState, controls: list[LayerControls | None], options: dict[str, Any]
    ) -> _Pass:
        """One pass through the layers, which take all `options` alike."""
        spec, mask = options["trace"], options["mask"]
        x = self.embedding(ids)
        states, routings = [], []
        records: list[Recorded[LayerTrace] | None] = []
        for layer, remembered, hands in zip(self._layers(), before.layers, controls, strict=True):
            if self.recompute and torch.is_grad_enabled():
                out = recomputed(layer, x, remembered, use_reentrant=False, controls=hands, **options)
            else:
                out = layer(x, remembered, controls=hands, **options)
            x = out.x
            states.append(out.state)
            routings.append(out.routing)
            records.append(out.trace)
        trace = None
        if spec is not None:
            trace = self._record(spec, ids, before.position, records, mask)
        read = ids.shape[1] if mask is None else mask.sum(1)
        return _Pass(x, SynapseState(tuple(states), before.position + read), routings, trace)

    def _record(
        self,
        spec: TraceSpec,
        ids: Tensor,
        position: Tensor,
        records: list[Recorded[LayerTrace] | None],
        mask: Tensor | None,
    ) -> Recorded[SynapseTrace]:
        """The layers' records as one; nothing else of the pass is held by it."""
        labels = self.config.experts.labels if self.config.experts else None

        def make() -> SynapseTrace:
            layers = tuple(made(record) for record in records if record is not None)
            return synapse_trace(ids, position, layers, spec, labels=labels, mask=mask)

        return spec.record(make)

    def _losses(
        self,
        logits: Tensor,
        targets: Tensor,
        routings: list[Routing | None],
        mask: Tensor | None,
        load: Tensor | None,
    ) -> dict[str, Tensor]:
        targets = targets[:, -logits.shape[1] :]
        if mask is not None:
            targets = targets.masked_fill(~mask[:, -logits.shape[1] :], IGNORED)
        nats = next_token_nats(wide(logits), targets)
        losses = {"language": nats / (targets != IGNORED).sum().clamp(min=1)}
        routed = [routing for routing in routings if routing is not None]
        if routed and load is not None:
            c = self.config.thalamus
            pairs = zip(routed, load, strict=True)
            balance = torch.stack([load_balance_loss(routing, mask, load=counts) for routing, counts in pairs]).mean()
            z = torch.stack([router_z_loss(routing, mask) for routing in routed]).mean()
            losses |= {"balance": c.load_balance * balance, "z": c.z_loss * z}
        return losses

    def _load(self, routings: list[Routing | None]) -> Tensor | None:
        found = [routing.indices for routing in routings if routing is not None]
        return expert_loads(torch.stack(found), self.config.n_experts) if found else None

    def _check(
        self,
        ids: Tensor,
        state: SynapseState | None,
        targets: Tensor | None,
        logits_to_keep: int,
        options: dict[str, Any],
    ) -> None:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or 0 in ids.shape:
            got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ShapeError(explain("ids", "(B, T) with B, T > 0", got, "add a batch dimension with ids[None]"))
        self._check_ids("ids", ids)
        if targets is not None:
            sizes = {"B": ids.shape[0], "T": ids.shape[1]}
            check_shape("targets", targets, "B T", sizes, remedy="shift ids by one token")
            self._check_ids("targets", targets.masked_fill(targets == IGNORED, 0))
        if isinstance(logits_to_keep, Tensor) or not 0 <= logits_to_keep <= ids.shape[1]:
            raise ShapeError(explain("logits_to_keep", f"0 to T={ids.shape[1]}", logits_to_keep))
        check_packing(options["segment_ids"], options["mask"], {"B": ids.shape[0], "T": ids.shape[1]})
        trace: TraceSpec | None = options["trace"]
        if trace is not None and not isinstance(trace, TraceSpec):
            raise ConfigError(explain("trace", "a TraceSpec", type(trace).__name__, 'as in TraceSpec(level="gates")'))
        outside = [layer for layer in (trace and trace.layers) or () if layer >= self.config.n_layers]
        if outside:
            raise ConfigError(explain("TraceSpec.layers", f"0 to {self.config.n_layers - 1}", outside[0]))
        if state is not None:
            self._check_state(state)
            if state.batch_size != ids.shape[0]:
                remedy = "use state.select(rows) or model.init_state(batch_size)"
                raise StateError(explain("state", f"{ids.shape[0]} rows, as many as ids", state.batch_size, remedy))

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(explain(name, "int64 or int32", ids.dtype, f"convert with {name}.long()"))
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                remedy = "the tokenizer and the model's vocab_size must agree"
                expected = f"ids from 0 to {self.config.vocab_size - 1}"
                raise ShapeError(explain(name, expected, f"{low} to {high}", remedy))

    def _check_state(self, state: SynapseState) -> None:
        """The cheap part; the ops check each tensor's shape."""
        if not isinstance(state, SynapseState):
            raise StateError(
                explain("state", "a SynapseState", type(state).__name__, "use model.init_state(batch_size)")
            )
        if len(state.layers) != self.config.n_layers:
            got = f"{len(state.layers)} layers"
            raise StateError(explain("state", f"{self.config.n_layers} layers", got, "use a state of this model"))
        parts = (self.config.xlstm is not None, self.config.memory is not None)
        for layer in state.layers:
            if (layer.xlstm is not None, layer.memory is not None) != parts:
                remedy = "use a state of this model"
                raise StateError(explain("state", "the regions of this configuration", "others", remedy))
