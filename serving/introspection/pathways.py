"""Hebbian pathways out of a state: what its co-activation would be consolidated into. E experts."""

from __future__ import annotations

from typing import Any

from synapse_arch import SynapseConfig, SynapseState
from synapse_arch.introspection.records import plain
from synapse_arch.modules.thalamus import pathways_of

SCHEMA = "synapse.pathways/1"


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
        layers.append({"i": index, "coactivation": plain(together), "pathways": plain(pathways_of(together))})
    return {
        "schema": SCHEMA, "weights_sha256": weights, "n_experts": config.n_experts,
        "gain": config.thalamus.hebbian_gain, "tokens": int(state.position[0]), "layers": layers,
    }  # fmt: skip
