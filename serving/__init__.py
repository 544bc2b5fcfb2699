"""Serves a SynapseModel and shows what happens inside while it writes."""

from __future__ import annotations

from importlib.util import find_spec

from synapse_arch.errors import explain

_NEEDED = ("fastapi", "h11", "httpx", "jinja2", "prometheus_client", "pydantic", "uvicorn")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ModuleNotFoundError(
        explain("serving", "its packages", f"no {', '.join(_missing)}", "pip install 'synapse-arch[serve]'"),
        name=_missing[0],
    )
