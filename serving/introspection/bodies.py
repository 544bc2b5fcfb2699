"""What clients may send to /api/introspect, and what a refusal looks like."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from serving.introspection.interventions import Number
from serving.schemas import MOST_INTERVENTIONS, Body, SessionId, Text, TokenId

Changes = Annotated[list[dict[str, JsonValue]], Field(max_length=MOST_INTERVENTIONS)]


class SamplingBody(Body):
    """How tokens are drawn; without a seed one is drawn and reported."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class RunBody(Body):
    """POST /api/introspect.

    Attributes:
        prompt: text, read as a completion's prompt is.
        tokens: token ids instead, read as they are.
        max_tokens: of output; 0 only reads. Where it is absent, 32 or the server's limit, if that is less.
        level: "routes" (which experts), "gates" (and gates and memory), "full" (and router logits, expert activity).
        layers: which; all where it is absent.
        every: stride in tokens.
        sampling: how tokens are drawn.
        session_id: the run starts from a copy of this session, which stays as it is.
        interventions: what is changed on the way.
        stream: live events instead of the first page.
    """

    prompt: Text | None = None
    tokens: list[TokenId] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    level: Literal["routes", "gates", "full"] = "gates"
    layers: Annotated[list[TokenId], Field(min_length=1, max_length=1024)] | None = None
    every: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    sampling: SamplingBody = SamplingBody()
    session_id: SessionId | None = None
    interventions: Changes = Field(default_factory=list)
    stream: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> RunBody:
        if (self.prompt is None) == (self.tokens is None):
            raise ValueError("prompt or tokens: give one of them")
        return self


Matrix = list[list[Number]]


class PathwaysLayer(Body):
    """One layer of an export; its co-activation is not looked at."""

    i: TokenId
    pathways: Matrix
    coactivation: Matrix | None = None


class PathwaysBody(Body):
    """PUT /api/introspect/pathways: what the GET gave, of this server or of another with the same model.

    Attributes:
        schema_: the layout's name.
        weights_sha256: of the model they come from, which must be the one served; None to take them all the same.
        n_experts: E.
        layers: (E, E) each; layers that are absent get none.
        gain: not looked at, the model has its own.
        tokens: not looked at.
        scale: multiplies them.
    """

    schema_: Annotated[Literal["synapse.pathways/1"], Field(alias="schema")]
    weights_sha256: str | None = None
    n_experts: Annotated[int, Field(ge=1)]
    layers: Annotated[list[PathwaysLayer], Field(min_length=1)]
    gain: float | None = None
    tokens: TokenId | None = None
    scale: Annotated[float, Field(ge=-1000, le=1000)] = 1.0


class AttributionBody(Body):
    """POST /api/introspect/traces/{id}/attribution.

    Attributes:
        layer, head: which memory.
        pos: position of the token whose read is split.
        top: sources listed.
    """

    layer: TokenId
    head: TokenId
    pos: Annotated[int, Field(ge=0)]
    top: Annotated[int, Field(ge=1, le=1024)] = 16


class DiffBody(Body):
    """POST /api/introspect/traces/{id}/diff.

    Attributes:
        interventions: what the second run has besides those of the traced one.
        max_tokens: of output that is compared; all where it is absent.
        seeds: random draws of each control.
    """

    interventions: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=MOST_INTERVENTIONS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seeds: Annotated[int, Field(ge=1, le=8)] = 3


class Fault(Body):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(Body):
    """Every 4xx."""

    error: Fault
