"""A trace as JSON, page by page, and as safetensors. n tokens of a page, k experts a token, H heads, E experts."""

from __future__ import annotations

import base64
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from serving.errors import bad_request
from serving.introspection.record import TraceRecord, View
from serving.runtime import Runtime
from serving.tokens import Codec
from synapse_arch.introspection import LayerTrace, MemoryTrace, RoutingTrace, SynapseTrace
from synapse_arch.introspection.joining import PER_TOKEN
from synapse_arch.introspection.records import SCHEMA, plain
from synapse_arch.model._files import pack_tensors

PAGE_BYTES = 2**20
FIELDS = ("tokens", "layers", "routing", "mlstm", "memory", "experts", "pathways")
"""What a page can be narrowed to; "layers" stands for "routing", "mlstm" and "memory"."""
PARTS = {"routing": "routing", "mlstm": "gates", "memory": "memory"}
"""Name in JSON -> attribute of LayerTrace."""
DERIVED = {"mlstm": ("C_norm", "half_life")}
HIDDEN = ("log_C_norm",)
PATHWAYS = 32
"""Strongest pathways listed of each kind."""


def head(record: TraceRecord, view: View, card: dict[str, Any]) -> dict[str, Any]:
    """What every page says of the whole trace; `card` describes the model."""
    return {
        "schema": SCHEMA,
        "trace_id": record.id,
        "request_id": record.request_id,
        "session_id": record.session_id,
        "model": card,
        "level": record.level,
        "every": record.spec.every,
        "request": {
            "first": view.first,
            "prompt_tokens": view.prompt_tokens,
            "output_tokens": len(view.ids) - view.prompt_tokens,
            "finish": view.finish,
            "error": view.error,
            "seed": record.seed,
            "interventions": [one.kind for one in record.request.interventions],
        },
        "truncated": {"tokens": view.overflow > 0, "dropped": view.overflow},
        "timing": {
            "queue_ms": _ms(view.seconds["queue"]), "ttft_ms": _ms(view.seconds["ttft"]),
            "itl_ms_p50": _ms(view.seconds["itl_p50"]), "trace_ms": _ms(view.seconds["trace"]),
        },
    }  # fmt: skip


class Page(NamedTuple):
    """A page, ready to be sent."""

    text: bytes
    """JSON."""
    next: int | None
    """Position of the first token that it leaves for the next page."""
    last: int | None
    """Position of its last token."""


def page(
    record: TraceRecord,
    view: View,
    runtime: Runtime,
    card: dict[str, Any],
    *,
    start: int = 0,
    limit: int = 256,
    layers: Sequence[int] | None = None,
    fields: Sequence[str] = FIELDS,
    extra: dict[str, Any] | None = None,
) -> Page:
    """A page of at most 1 MiB: as many tokens from position `start` on as fit, `limit` at most.

    Args:
        record: the trace.
        view: as it stands.
        runtime: the server's parts.
        card: the model's description.
        start: position of the first token shown.
        limit: most tokens.
        layers: which; None for all traced.
        fields: which of FIELDS.
        extra: further members, first on the page.

    Raises:
        ApiError: 400 where not even one token fits.
    """
    shown = _expanded(fields)
    fixed = (extra or {}) | head(record, view, card) | _whole(view, layers, shown)
    positions = [] if view.trace is None else view.trace.at[0].tolist()
    first = bisect_left(positions, start)
    count = min(limit, len(positions) - first)  # a limit of 0 shows what is said of the whole alone
    while True:
        body = fixed | window(view, runtime.codec, slice(first, first + count), layers, shown)
        end = first + count
        following = positions[end] if end < len(positions) else None
        text = json.dumps(body | {"next": following}, allow_nan=False, separators=(",", ":")).encode()
        if len(text) <= PAGE_BYTES:
            return Page(text, following, positions[end - 1] if count else None)
        if count <= 1:
            raise bad_request("a page of one token is larger than 1 MiB: name fewer layers or fields", "fields")
        count = max(1, min(count - 1, count * PAGE_BYTES // len(text)))


def window(
    view: View, codec: Codec, kept: slice, layers: Sequence[int] | None, shown: frozenset[str]
) -> dict[str, Any]:
    """The tokens `kept`, and what each layer reports of them."""
    if view.trace is None:
        return {"tokens": [], "layers": []}
    tokens = [_token(view, codec, position) for position in view.trace.at[0, kept].tolist()]
    chosen = [layer for layer in view.trace.layers if layers is None or layer.index in layers]
    parts = [name for name in PARTS if name in shown]
    body: dict[str, Any] = {"tokens": tokens} if "tokens" in shown else {}
    if parts:
        body["layers"] = [_layer(layer, kept, parts) for layer in chosen]
    return body


def aggregates(trace: SynapseTrace, layers: Sequence[int] | None, shown: frozenset[str]) -> dict[str, Any]:
    """Statistics of the run, the same on every page: the experts one by one, and the strongest pathways."""
    body: dict[str, Any] = {}
    chosen = [layer.index for layer in trace.layers if layers is None or layer.index in layers]
    if "experts" in shown:
        body["experts"] = [stat.to_dict() for index in chosen for stat in trace.expert_stats(index)]
    if "pathways" in shown:
        body["pathways"] = [
            path.to_dict() for path in trace.pathways(PATHWAYS) if path.source[0] in chosen and path.target[0] in chosen
        ]
    return body


def tensors_of(record: TraceRecord, view: View) -> bytes:
    """The kept tokens as a safetensors file: "tokens.pos", "layers.0.routing.experts" (n, k) and so on."""
    named: dict[str, Tensor] = {}
    if view.trace is not None:
        at = view.trace.at[0]
        index = (at - view.first).tolist()
        named = {
            "tokens.pos": at,
            "tokens.id": view.trace.tokens[0],
            "tokens.logprob": torch.tensor([view.logprobs[i] for i in index], dtype=torch.float64),
            "tokens.entropy": torch.tensor([view.entropies[i] for i in index], dtype=torch.float64),
        }
        for layer in view.trace.layers:
            for name, attribute in PARTS.items():
                part = getattr(layer, attribute)
                for column in () if part is None else PER_TOKEN[type(part)]:
                    if (value := getattr(part, column)) is not None:
                        named[f"layers.{layer.index}.{name}.{column}"] = value[0]
            named |= _last(layer)
    about = {"format": "pt", "schema": SCHEMA, "trace_id": record.id, "level": record.level}
    return pack_tensors(named, about | {"dropped": str(view.overflow), "prompt_tokens": str(view.prompt_tokens)})


def _last(layer: LayerTrace) -> dict[str, Tensor]:
    """What a layer reports of the whole run."""
    named = {}
    if layer.routing is not None:
        named["routing.load"] = layer.routing.tokens[0]
        named["routing.coactivation"] = layer.routing.coactivation[0]
    if layer.memory is not None:
        named["memory.weights"] = layer.memory.weights[0]
    if layer.experts is not None:
        named |= {"experts.out_norm": layer.experts.out_norm[0], "experts.sparsity": layer.experts.sparsity[0]}
    return {f"layers.{layer.index}.{name}": value for name, value in named.items()}


def _whole(view: View, layers: Sequence[int] | None, shown: frozenset[str]) -> dict[str, Any]:
    if view.trace is None:
        return {name: [] for name in ("experts", "pathways") if name in shown}
    return aggregates(view.trace, layers, shown)


def _token(view: View, codec: Codec, position: int) -> dict[str, Any]:
    index = position - view.first
    token = view.ids[index]
    return {
        "pos": position,
        "id": token,
        "bytes_b64": base64.b64encode(codec.token_bytes(token)).decode(),
        "src": "prompt" if index < view.prompt_tokens else "gen",
        "logprob": _finite(view.logprobs[index]),
        "entropy": _finite(view.entropies[index]),
    }


def _layer(layer: LayerTrace, kept: slice, parts: Sequence[str]) -> dict[str, Any]:
    """A layer's columns, None for a part that it lacks or the level leaves out."""
    body: dict[str, Any] = {"i": layer.index}
    for name in parts:
        part = getattr(layer, PARTS[name])
        if part is None:
            body[name] = None
            continue
        columns = itertools.chain(PER_TOKEN[type(part)], DERIVED.get(name, ()))
        values = {column: getattr(part, column) for column in columns if column not in HIDDEN}
        body[name] = {column: plain(value[0, kept]) for column, value in values.items() if value is not None}
        body[name] |= _summary(part)
    return body


def _summary(part: Any) -> dict[str, Any]:
    """What a part says of the whole run."""
    if isinstance(part, RoutingTrace):
        return {"balance": plain(part.balance[0]), "utilisation": plain(part.utilisation[0])}
    if isinstance(part, MemoryTrace):
        return {
            "utilisation": plain(part.utilisation[0]), "capacity": part.capacity,
            "writes": int(part.writes[0]), "reads": int(part.reads[0]),
        }  # fmt: skip
    return {}


def _expanded(fields: Sequence[str]) -> frozenset[str]:
    return frozenset(fields) | (frozenset(PARTS) if "layers" in fields else frozenset())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
