"""The OpenAPI schema and the server agree: what it forbids is refused, what it allows is taken, nothing is a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.servers import client_of, listening, make_app

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
]  # fmt: skip
LIMITS = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
OPERATIONS = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
    ("POST", "/api/sessions"), ("GET", "/api/sessions"), ("GET", "/api/sessions/{session_id}"),
    ("DELETE", "/api/sessions/{session_id}"), ("POST", "/api/sessions/{session_id}/fork"),
    ("GET", "/api/sessions/{session_id}/export"), ("POST", "/api/sessions/import"), ("GET", "/api/status"),
]  # fmt: skip

NEVER_WRONG = [
    ("GET", "/v1/models"), ("GET", "/v1/models/{model}"), ("GET", "/api/sessions"), ("POST", "/api/sessions/import"),
    ("GET", "/api/status"),
]  # fmt: skip
"""What has no fields, or one that can be any text or bytes: a schema cannot tell what is wrong with it."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(make_app(max_output_tokens=4, queue=100)) as found:
        yield found


@pytest.fixture(scope="module")
def schema(address: str) -> Any:
    found = schemathesis.openapi.from_url(f"{address}/openapi.json", config=SchemathesisConfig())
    found.config.update(base_url=address)
    return found


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation not in NEVER_WRONG],
)
def test_operation(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = schema[path][method]
    refused: list[int] = []

    @LIMITS
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call()
        checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS
        case.validate_response(response, checks=checks)
        if response.status_code >= 400:
            refused.append(response.status_code)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    run()
    assert refused or mode is GenerationMode.POSITIVE


def test_one_call_after_another(schema: Any) -> None:
    """Sessions that were made are looked up, branched, exported and forgotten in any order."""
    machine = schema.include(path_regex="^/api/sessions").as_state_machine()
    machine.run(settings=settings(LIMITS, max_examples=4, stateful_step_count=6))


def test_what_the_schema_says_of_limits() -> None:
    with client_of(make_app(max_output_tokens=77)) as client:
        schema = client.get("/openapi.json").json()
    parts = schema["components"]["schemas"]
    assert parts["CompletionBody"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 77
    assert parts["CompletionBody"]["additionalProperties"] is False
    assert "422" not in str(schema["paths"])
