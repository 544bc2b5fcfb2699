"""The layout "synapse.introspect/1" as a JSON schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

from synapse_arch.introspection.records import SCHEMA

NUMBER = {"type": ["number", "null"]}
"""None where it is undefined."""
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None, *, null: bool = False) -> dict[str, Any]:
    return {
        "type": ["object", "null"] if null else "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _by_head(*names: str) -> dict[str, Any]:
    return {name: _list(_list(NUMBER)) for name in names}


MODEL = _object({
    "id": TEXT,
    "weights_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "params": _object({
        "total": COUNT, "active_per_token": COUNT, "by_module": {"type": "object", "additionalProperties": COUNT},
    }),
    "state_bytes_per_session": COUNT,
})  # fmt: skip

TOKEN = _object({
    "pos": COUNT, "id": COUNT, "bytes_b64": {"type": "string", "contentEncoding": "base64"},
    "src": {"enum": ["prompt", "gen"]}, "logprob": NUMBER, "entropy": NUMBER,
})  # fmt: skip

ROUTING = _object(
    {
        "experts": _list(_list({"type": "integer", "minimum": -1})), "weights": _list(_list(NUMBER)),
        "entropy": _list(NUMBER), "margin": _list(NUMBER), "p1": _list(NUMBER), "p2": _list(NUMBER),
        "balance": NUMBER, "utilisation": NUMBER,
    },
    {"logits": _list(_list(NUMBER))},
    null=True,
)  # fmt: skip

MLSTM = _object(_by_head("log_i", "log_f", "o_mean", "C_norm", "age_tokens", "half_life"), null=True)

MEMORY = _object(
    _by_head("write", "decay", "collision", "read_conf", "fro_norm")
    | {"utilisation": _list(NUMBER), "capacity": COUNT, "writes": COUNT, "reads": COUNT},
    null=True,
)

EXPERT = _object({
    "layer": COUNT, "index": COUNT, "id": COUNT, "label": {"type": ["string", "null"]}, "tokens": COUNT,
    "load": NUMBER, "uniform": NUMBER, "out_norm": NUMBER, "sparsity": NUMBER, "specialisation": NUMBER,
    "specialisation_shuffled": NUMBER,
    "top_tokens": _list(_object({"id": COUNT, "lift": {"type": "number"}, "n": COUNT})),
})  # fmt: skip

END = {"type": "array", "items": COUNT, "minItems": 2, "maxItems": 2}
PATHWAY = _object({"from": END, "to": END, "weight": NUMBER, "hebbian": {"type": "number"}})

HEAD = {
    "schema": {"const": SCHEMA},
    "trace_id": {"type": "string", "pattern": "^trace-[0-9a-f]{32}$"},
    "request_id": TEXT,
    "session_id": {"type": ["string", "null"]},
    "model": MODEL,
    "level": {"enum": ["routes", "gates", "full"]},
    "every": {"type": "integer", "minimum": 1},
    "request": _object({
        "first": COUNT, "prompt_tokens": COUNT, "output_tokens": COUNT,
        "finish": {"enum": ["stop", "length", "cancelled", "failed", None]},
        "error": {"type": ["string", "null"]}, "seed": COUNT, "interventions": _list(TEXT),
    }),
    "truncated": _object({"tokens": {"type": "boolean"}, "dropped": COUNT}),
    "timing": _object({"queue_ms": NUMBER, "ttft_ms": NUMBER, "itl_ms_p50": NUMBER, "trace_ms": NUMBER}),
}  # fmt: skip

BODY = {
    "text": TEXT,
    "tokens": _list(TOKEN),
    "layers": _list(_object({"i": COUNT}, {"routing": ROUTING, "mlstm": MLSTM, "memory": MEMORY})),
    "experts": _list(EXPERT),
    "pathways": _list(PATHWAY),
}

TRACE: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": SCHEMA,
    "description": (
        "A trace, page by page. The lists of a layer hold one entry a token of `tokens`, in the same order, those of "
        "mlstm and memory one number a head. Numbers are null where they are undefined, parts where the model lacks "
        "them or the level leaves them out. Counts and means of the whole run (balance, utilisation, writes, reads, "
        "an expert's tokens, load, out_norm and sparsity) cover every token, kept or not; an expert's specialisation "
        "and top_tokens and the pathways' weights cover the kept ones. `next` is the `from` of the next page."
    ),
    **_object(HEAD | {"next": {"type": ["integer", "null"], "minimum": 0}}, BODY),
}
