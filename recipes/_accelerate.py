"""What the recipes use of Accelerate, or how to install it."""

from __future__ import annotations

import os

from synapse_arch.errors import ConfigError, explain

try:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env
    from tqdm import tqdm
except ModuleNotFoundError as error:
    remedy = "pip install 'synapse-arch[train]'"
    raise ModuleNotFoundError(explain("training", "accelerate and tqdm", error, remedy), name=error.name) from error

__all__ = [
    "Accelerator", "PartialState", "broadcast_object_list", "launched_precision", "parse_flag_from_env", "tqdm",
]  # fmt: skip


def launched_precision() -> str | None:
    """The "bf16" that `accelerate launch` was told, or None: its "no" is what it says unasked, too.

    Raises:
        ConfigError: another precision.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ConfigError(explain("accelerate launch --mixed_precision", "no or bf16", asked))
    return None if asked == "no" else asked
