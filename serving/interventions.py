"""Interventions of a request as the model's controls. B rows, L layers, E experts, D model width."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serving.requests import Intervention
from synapse_arch import Controls, SynapseConfig, SynapseState
from synapse_arch.errors import ConfigError, explain


def check(interventions: Sequence[Intervention], config: SynapseConfig) -> None:
    """Checks that a model of `config` has what the interventions act on, at every position.

    Raises:
        ConfigError: there is no such layer, expert or memory, the vector is of another width, or a layer is left with
            too little choice.
    """
    for one in interventions:
        if one.layer is not None and one.layer >= config.n_layers:
            raise ConfigError(explain(f"{one.kind}.layer", f"0 to {config.n_layers - 1}", one.layer))
        if one.expert is not None and one.expert >= config.n_experts:
            expected = f"0 to {config.n_experts - 1}" if config.n_experts else "a model with experts"
            raise ConfigError(explain(f"{one.kind}.expert", expected, one.expert))
        if one.kind == "pathways" and config.n_experts == 0:
            raise ConfigError(explain("pathways", "a model with experts", "one without"))
        if one.vector is not None and len(one.vector) != (width := _width(one, config)):
            raise ConfigError(explain(f"{one.kind}.vector", f"{width} numbers", len(one.vector)))
        if one.kind in ("scale_memory", "clear_memory", "freeze_writes") and config.memory is None:
            raise ConfigError(explain(one.kind, "a model with a fast-weight memory", "one without"))
    for position in boundaries(interventions):
        controls = controls_at(interventions, position, config)
        if controls is None:
            continue
        if controls.router_bias.isnan().any():
            raise ConfigError(explain("interventions", "an expert forced or banned", "the same expert for both"))
        controls.check(config, 1)


def boundaries(interventions: Sequence[Intervention]) -> list[int]:
    """The positions in front of which something begins or ends, ascending."""
    ends = [one.end for one in interventions if one.end is not None]
    return sorted({one.start for one in interventions} | set(ends))


def controls_at(
    interventions: Sequence[Intervention],
    position: int,
    config: SynapseConfig,
    *,
    device: torch.device | str | None = None,
) -> Controls | None:
    """The controls of one row while it reads the token at `position`; None where nothing is in force.

    Where several act on one place: biases and steering add up, memory scales multiply, the last patch counts.
    """
    active = [one for one in interventions if one.kind != "clear_memory" and one.active(position)]
    if not active:
        return None
    controls = Controls.neutral(config, 1)
    for one in active:
        layers = slice(None) if one.layer is None else one.layer
        value, vector = one.value or 0.0, torch.tensor(one.vector or ())
        if one.kind in ("force_expert", "ban_expert", "bias_expert"):
            amount = {"force_expert": torch.inf, "ban_expert": -torch.inf}.get(one.kind, value)
            controls.router_bias[0, layers, one.expert] += amount
        elif one.kind == "pathways":
            controls.pathways[0, layers] += vector.view(-1, config.n_experts, config.n_experts).squeeze(0)
        elif one.kind == "scale_memory":
            controls.memory_read[0, layers] *= value
        elif one.kind == "freeze_writes":
            controls.memory_write[0, layers] = 0.0
        elif one.kind == "steer":
            controls.steer[0, layers] += value * vector
        else:
            controls.patch[0, layers], controls.patch_on[0, layers] = vector, True
    return Controls(*(x.to(device) for x in controls))


def cleared_at(interventions: Sequence[Intervention], position: int, first: int) -> list[int | None]:
    """The layers (None for all) whose memory is emptied in front of `position`, in a run that begins at `first`."""
    return [one.layer for one in interventions if one.kind == "clear_memory" and max(one.start, first) == position]


def clear_memory(state: SynapseState, row: int, layers: Sequence[int | None]) -> SynapseState:
    """The state with the fast weights of one row's `layers` at zero; the given one is not changed."""
    changed = list(state.layers)
    for index, layer in enumerate(changed):
        if layer.memory is not None and (None in layers or index in layers):
            weights = layer.memory.weights.clone()
            weights[row] = 0.0
            changed[index] = layer._replace(memory=layer.memory._replace(weights=weights))
    return SynapseState(tuple(changed), state.position)


def _width(one: Intervention, config: SynapseConfig) -> int:
    """How many numbers the vector of an intervention has."""
    if one.kind != "pathways":
        return config.d_model
    return config.n_experts**2 * (config.n_layers if one.layer is None else 1)
