"""What the recipes use of Accelerate, or how to install it."""

from __future__ import annotations

import os

import torch

from synapse_arch.errors import ConfigError, explain

try:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env
    from tqdm import tqdm
except ModuleNotFoundError as error:
    remedy = "pip install 'synapse-arch[train]'"
    raise ModuleNotFoundError(explain("training", "accelerate and tqdm", error, remedy), name=error.name) from error

__all__ = ["Accelerator", "PartialState", "broadcast_object_list", "cpu_only", "launched_precision", "tqdm"]


def cpu_only() -> bool:
    """Whether training stays on the CPU: there is no CUDA device, or ACCELERATE_USE_CPU asks for it.

    Said outright to Accelerate: several processes on a machine without an accelerator are otherwise as many runs of
    one, and it would take devices on which nothing here was ever tried, such as the GPU of a Mac.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def launched_precision() -> str | None:
    """The "bf16" that `accelerate launch` was told, or None: its "no" is what it says unasked, too.

    Raises:
        ConfigError: another precision.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ConfigError(explain("accelerate launch --mixed_precision", "no or bf16", asked))
    return None if asked == "no" else asked
