"""Interventions and layers as clients write them, checked; every refusal names the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from serving import interventions
from serving.errors import ApiError, bad_request
from serving.requests import MOST_INTERVENTIONS, Intervention, Kind
from serving.schemas import Body
from synapse_arch import SynapseConfig
from synapse_arch.errors import SynapseError

LARGEST = 1e6
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class InterventionBody(Body):
    """One intervention; see serving.requests.Intervention for what each field means and which kind has which."""

    kind: Kind
    layer: Count | None = None
    expert: Count | None = None
    value: Number | None = None
    vector: Annotated[list[Number], Field(min_length=1)] | None = None
    start: Count = 0
    end: Count | None = None


def parse(
    items: Sequence[Mapping[str, Any]], config: SynapseConfig, *, field: str = "interventions"
) -> tuple[Intervention, ...]:
    """The interventions of a request's body, each checked for itself and then all together.

    Args:
        items: as JSON gave them.
        config: of the model that they act on.
        field: what the body calls them.

    Raises:
        ApiError: 400; `param` names the field, such as "interventions.2.layer".
    """
    if len(items) > MOST_INTERVENTIONS:
        raise bad_request(f"{field}: expected at most {MOST_INTERVENTIONS}, got {len(items)}", field)
    found = tuple(_one(item, config, f"{field}.{index}") for index, item in enumerate(items))
    try:
        interventions.check(found, config)
    except SynapseError as error:
        raise bad_request(f"{field}: {error}", field) from error
    return found


def check_layers(layers: Sequence[int] | None, config: SynapseConfig, *, field: str = "layers") -> None:
    """Checks a choice of layers.

    Raises:
        ApiError: 400; a layer that the model does not have, or one that is named twice.
    """
    for index, layer in enumerate(layers or ()):
        if layer >= config.n_layers:
            message = f"{field}.{index}: expected 0 to {config.n_layers - 1}, got {layer}"
            raise bad_request(message, f"{field}.{index}")
        if layers is not None and layer in layers[:index]:
            raise bad_request(f"{field}.{index}: layer {layer} is there already", f"{field}.{index}")


def _one(item: Mapping[str, Any], config: SynapseConfig, place: str) -> Intervention:
    try:
        body = InterventionBody.model_validate(item)
        values = body.model_dump()
        values["vector"] = None if body.vector is None else tuple(body.vector)
        one = Intervention(**values)
        interventions.check([one], config)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join([place, *(str(part) for part in first["loc"])])
        reason = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise bad_request(f"{param}: {reason}", param) from error
    except SynapseError as error:
        raise _named(error, place) from error
    return one


def _named(error: SynapseError, place: str) -> ApiError:
    """A refusal of the model's side; its message begins with "kind.field" where one field is at fault."""
    field = str(error).split(":")[0].partition(".")[2]
    known = {one.name for one in dataclasses.fields(Intervention)}
    param = f"{place}.{field}" if field in known else place
    return bad_request(f"{param}: {error}", param)
