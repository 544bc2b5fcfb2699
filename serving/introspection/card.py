"""What the model is, what can be asked of it, and what its traces have shown so far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import torch

from serving.introspection.record import TraceRecord
from serving.requests import MOST_INTERVENTIONS, Kind
from serving.runtime import Runtime
from serving.settings import Settings
from synapse_arch import SynapseConfig
from synapse_arch.introspection import LEVELS
from synapse_arch.introspection.records import SCHEMA, plain
from synapse_arch.model import accounting


def model_card(runtime: Runtime) -> dict[str, Any]:
    """The model in numbers; each is counted on a model of this configuration, none is taken from a table."""
    return {"id": runtime.settings.model_id, "weights_sha256": runtime.weights, **_counts(runtime.config)}


@cache
def _counts(config: SynapseConfig) -> dict[str, Any]:
    by_module = accounting.parameters(config)
    return {
        "params": {
            "total": sum(by_module.values()),
            "active_per_token": accounting.active_parameters(config),
            "by_module": by_module,
        },
        "state_bytes_per_session": accounting.state_bytes(config),
    }


def capabilities(config: SynapseConfig, settings: Settings) -> dict[str, Any]:
    """What can be asked of this model."""
    missing: set[str] = set()
    if not config.n_experts:
        missing |= {"force_expert", "ban_expert", "bias_expert", "pathways"}
    if config.memory is None:
        missing |= {"scale_memory", "clear_memory", "freeze_writes"}
    return {
        "schema": SCHEMA,
        "levels": list(LEVELS),
        "interventions": [kind for kind in get_args(Kind) if kind not in missing],
        "most_interventions": MOST_INTERVENTIONS,
        "attribution": config.memory is not None,
        "diff": True,
        "pathways": config.n_experts > 0,
        "events": True,
        "safetensors": True,
        "limits": {
            "trace_tokens": settings.trace_tokens, "trace_bytes": settings.trace_bytes,
            "traces_bytes": settings.traces_bytes, "trace_ttl": settings.trace_ttl,
            "max_prompt_tokens": settings.max_prompt_tokens, "max_output_tokens": settings.max_output_tokens,
        },
    }  # fmt: skip


def observed(records: Sequence[TraceRecord]) -> dict[str, Any]:
    """How a caller's traces used the experts, all taken together.

    Returns:
        {"traces", "tokens", "layers": [{"i", "load" (E), "uniform", "balance", "utilisation"}]}: load is the share of
        the assignments, balance 1 - CV of the load (not below 0), utilisation the share of experts with a token.
    """
    counts: dict[int, torch.Tensor] = {}
    tokens = 0
    for record in records:
        view = record.view()
        tokens += len(view.ids)
        for layer in view.trace.layers if view.trace is not None else ():
            if layer.routing is not None:
                counts[layer.index] = counts.get(layer.index, 0) + layer.routing.tokens[0]
    layers = []
    for index, count in sorted(counts.items()):
        load = count.double() / count.sum()
        balance = (1 - load.std(correction=0) / load.mean()).clamp(min=0)
        layers.append({
            "i": index, "load": plain(load), "uniform": 1 / len(load), "balance": plain(balance),
            "utilisation": plain((count > 0).double().mean()),
        })  # fmt: skip
    return {"traces": len(records), "tokens": tokens, "layers": layers}
