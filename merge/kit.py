"""Methods of mergekit's, by hand-over: tensor by tensor, in float32 (extra [mergekit])."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merge.vectors import Delta, Given, per_model
from synapse_arch.errors import BackendUnavailable, ConfigError, explain

_BASE = "base"


def merge_with_mergekit(
    method: str,
    base: Tensor,
    tensors: Sequence[Given],
    *,
    name: str,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
    with_base: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Merges one tensor by `mergekit.merge_methods.api.merge_state_dicts`.

    Args:
        method: mergekit's name of it.
        base: the base's tensor.
        tensors: of each model.
        name: of the tensor.
        settings: density, weights and lam where they are set; they are mergekit's density, weight and lambda.
        parameters: others, by mergekit's own names.
        with_base: whether mergekit gets to know the base.
        dtype: of the result.

    Raises:
        BackendUnavailable: mergekit is not installed.
        ConfigError: mergekit has no such method, or refuses the inputs or parameters.
    """
    try:
        from mergekit import merge_methods
        from mergekit.merge_methods.api import merge_state_dicts
    except ImportError as cause:
        remedy = "pip install 'synapse-arch[mergekit]'"
        raise BackendUnavailable(explain(f"mergekit:{method}", "mergekit", f"{cause}", remedy)) from cause
    known = sorted(one.spec.name for one in merge_methods.registered_methods())
    if method not in known:
        raise ConfigError(explain("method", f"mergekit:NAME with one of {', '.join(known)}", f"mergekit:{method}"))
    whole = base.float()
    models = {str(index): {name: _whole(one, whole)} for index, one in enumerate(tensors)}
    given = dict(parameters)
    for ours, theirs in (("density", "density"), ("weights", "weight")):
        if ours in settings:
            values = per_model(ours, settings[ours], len(tensors))
            given[theirs] = dict(zip(models, values, strict=True))
    if "lam" in settings:
        given["lambda"] = settings["lam"]
    if with_base:
        models = {_BASE: {name: whole}, **models}
    try:
        merged = merge_state_dicts(models, method, parameters=given, base=_BASE if with_base else None)
    except (ValueError, TypeError, KeyError, RuntimeError) as cause:
        remedy = "--density, --weights, --lambda are its density, weight, lambda; --parameter NAME=VALUE the others"
        raise ConfigError(explain(f"mergekit:{method}", "inputs and parameters it takes", cause, remedy)) from cause
    result: Tensor = merged[name].detach().to(dtype)
    return result


def _whole(one: Given, base: Tensor) -> Tensor:
    return one.value + base if isinstance(one, Delta) else one.float()
