"""What the recipes use of Accelerate, or how to install it."""

from __future__ import annotations

from synapse_arch.errors import explain

try:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import broadcast_object_list, parse_flag_from_env
    from tqdm import tqdm
except ModuleNotFoundError as error:
    remedy = "pip install 'synapse-arch[train]'"
    raise ModuleNotFoundError(explain("training", "accelerate and tqdm", error, remedy), name=error.name) from error

__all__ = ["Accelerator", "PartialState", "broadcast_object_list", "parse_flag_from_env", "tqdm"]
