"""Fewer candidates for Triton's autotuner: compiling all that flash-linear-attention offers takes minutes a shape."""

from __future__ import annotations

from typing import Any

WARPS, STAGES = 4, 3
"""The launch that every kernel keeps; block sizes stay open."""


def few_configs() -> None:
    """From now on, kernels that are defined try launches of one kind only. Call it before the first use of a kernel."""
    from triton.runtime.autotuner import Autotuner

    plain = Autotuner.__init__
    if getattr(plain, "few", False):
        return

    def fewer(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **options: Any) -> None:
        plain(self, fn, arg_names, fewest(configs), *rest, **options)

    fewer.few = True  # type: ignore[attr-defined]
    Autotuner.__init__ = fewer


def fewest(configs: Any) -> list[Any]:
    """Of each block size the launch nearest to WARPS and STAGES."""
    kept: dict[str, Any] = {}
    for config in configs or []:
        key = str(sorted(config.kwargs.items()))
        if key not in kept or _distance(config) < _distance(kept[key]):
            kept[key] = config
    return list(kept.values())


def _distance(config: Any) -> tuple[int, int]:
    return abs(config.num_warps - WARPS), abs(config.num_stages - STAGES)
