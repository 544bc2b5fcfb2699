"""Hebbian pathways: out of a session's state as what its co-activation would be consolidated into, and into requests.

The weights of a model that is served never change: what is imported acts as an intervention, on the requests that have
it. E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.errors import bad_request
from serving.introspection.bodies import PathwaysBody
from serving.introspection.interventions import LARGEST
from synapse_arch import SynapseConfig, SynapseState
from synapse_arch.introspection.records import plain
from synapse_arch.modules.thalamus import pathways_of

SCHEMA = "synapse.pathways/1"
NUMBER_BYTES = 32
"""Of a number in JSON, with what separates it from the next."""


def most_bytes(config: SynapseConfig) -> int:
    """Bytes that a model's export takes as JSON, at most."""
    return 2 * config.n_layers * config.n_experts**2 * NUMBER_BYTES


def export(state: SynapseState, config: SynapseConfig, weights: str) -> dict[str, Any]:
    """What fired together in one row's past, layer by layer.

    Args:
        state: one row.
        config: the model's.
        weights: SHA-256 of the model's weights.

    Returns:
        {"schema", "weights_sha256", "n_experts", "gain", "tokens", "layers": [{"i", "coactivation", "pathways"}]}:
        pathways (E, E) is P(j visited | i visited) - P(j visited), as `SynapseModel.consolidate` would write it; where
        i ranks first for a token, gain times it is added to j's rank.
    """
    layers = []
    for index, layer in enumerate(state.layers):
        together = layer.thalamus.coactivation.mean(0)
        lifts = pathways_of(together, config.thalamus.top_k)
        layers.append({"i": index, "coactivation": plain(together), "pathways": plain(lifts)})
    return {
        "schema": SCHEMA, "weights_sha256": weights, "n_experts": config.n_experts,
        "gain": config.thalamus.hebbian_gain, "tokens": int(state.position[0]), "layers": layers,
    }  # fmt: skip


def load(body: PathwaysBody, config: SynapseConfig, weights: str) -> dict[str, Any]:
    """An export as the intervention that acts like it.

    Returns:
        {"interventions": [{"kind": "pathways", "vector": L · E · E numbers}]}, as any request takes it.

    Raises:
        ApiError: 400; the pathways of another model, or of other sizes.
    """
    experts = config.n_experts
    if body.weights_sha256 not in (None, weights):
        raise bad_request("weights_sha256: these are another model's experts", "weights_sha256")
    if body.n_experts != experts:
        raise bad_request(f"n_experts: expected {experts}, got {body.n_experts}", "n_experts")
    rows = {layer.i: layer.pathways for layer in body.layers}
    for index, layer in enumerate(body.layers):
        place = f"layers.{index}"
        if layer.i >= config.n_layers or layer.i in [other.i for other in body.layers[:index]]:
            raise bad_request(f"{place}.i: expected 0 to {config.n_layers - 1}, each once", f"{place}.i")
        if _sizes(layer.pathways) != [experts] * experts:
            raise bad_request(f"{place}.pathways: expected {experts} rows of {experts}", f"{place}.pathways")
    nothing = [[0.0] * experts] * experts
    vector = [body.scale * x for i in range(config.n_layers) for row in rows.get(i, nothing) for x in row]
    if max(map(abs, vector)) > LARGEST:
        raise bad_request(f"scale: expected products with the pathways of at most {LARGEST:.0f}", "scale")
    return {"interventions": [{"kind": "pathways", "vector": vector}]}


def _sizes(matrix: Sequence[Sequence[float]]) -> list[int]:
    return [len(row) for row in matrix]
