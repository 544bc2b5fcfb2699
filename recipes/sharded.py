"""Models larger than a device: FSDP2 shards, and checkpoints of which every process writes its own part.

    model = shard(SynapseModel(config))          parameters, gradients and averages spread over the processes
    optimizer = adamw(model, ...)                made after sharding
    save(folder, model, optimizer)               torch.distributed.checkpoint, a file a process
    load(folder, model, optimizer)               over as many processes as there are now
    python -m recipes.sharded FOLDER OUT         the whole model as safetensors, for SynapseModel.from_pretrained

Needs a process group: gloo on CPUs, nccl on GPUs. The index that torch.distributed.checkpoint writes is a pickle: load
only folders you trust. What `convert` writes is none.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from recipes.checkpoint import SHARDS_FOLDER, read_json, write_json
from recipes.tokenizer import TOKENIZER_FILE
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import CheckpointError, SynapseError, explain

CONFIG_FILE = "config.json"
SINGLE = ".*assuming the intent is to (load|save) in a single process"
"""A warning of torch's, where the intent is just that."""
EPILOG = """examples:
  python -m recipes.sharded runs/large/step-00001000 runs/large-whole    a folder for SynapseModel.from_pretrained
"""


def shard(model: SynapseModel, *, device: torch.device | str, **options: Any) -> SynapseModel:
    """Spreads a model over the processes, layer by layer; a layer is whole only while it computes.

    Args:
        model: with equal weights in all processes; changed in place.
        device: where this process computes; its shards move there.
        options: of `torch.distributed.fsdp.fully_shard`, such as mp_policy.

    Returns:
        The model.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here and below: a second of imports that few need
    from torch.distributed.fsdp import fully_shard

    marks = {name: vars(parameter) for name, parameter in model.named_parameters()}  # what must not decay, and more
    options["mesh"] = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])
    return model


def save(folder: Path, model: SynapseModel, optimizer: torch.optim.Optimizer) -> None:
    """Writes weights and averages; every process calls it. The folder is there whole or not at all.

    Args:
        folder: must not exist yet.
        model: sharded or not.
        optimizer: over its parameters.

    Raises:
        CheckpointError: the folder exists, or could not be written.
    """
    if folder.exists():
        raise CheckpointError(explain(str(folder), "a new folder", "one that exists", "choose another name"))
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as write_shards

    aside = folder.with_name(f".{folder.name}")
    alone = not distributed.is_initialized()
    weights, averages = get_state_dict(model, optimizer)
    problem: list[str | None] = [None]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SINGLE)
            write_shards({"model": weights, "optimizer": averages}, checkpoint_id=aside, no_dist=alone)
        if alone or distributed.get_rank() == 0:
            write_json(aside / CONFIG_FILE, model.config.to_dict())
            aside.rename(folder)
    except (OSError, CheckpointException, SynapseError) as error:
        problem = [" ".join(str(error).split())]
    if not alone:
        distributed.broadcast_object_list(problem)  # every process hears whether the first could end it
    if problem[0] is not None:
        remedy = "free some space or check permissions"
        raise CheckpointError(explain(str(folder), "a checkpoint written", problem[0], remedy))


def load(folder: Path, model: SynapseModel, optimizer: torch.optim.Optimizer) -> None:
    """Reads what `save` wrote, each process its shards; the number of processes may be another.

    Raises:
        CheckpointError: the folder is missing, damaged or of another model.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, averages = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": averages}
    _read(folder, state, no_dist=not distributed.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def read_sizes(folder: Path) -> SynapseConfig:
    """The architecture of a sharded checkpoint.

    Raises:
        CheckpointError: the folder is missing or damaged. ConfigError: it is of another version.
    """
    return SynapseConfig.from_dict(read_json(folder / CONFIG_FILE))


def convert(folder: Path, out: Path) -> SynapseModel:
    """The whole model of a sharded checkpoint, in one process, and its safetensors in `out`.

    Args:
        folder: what `save` wrote, or a checkpoint of recipes/train.py that holds it, whose tokenizer is copied too.
        out: the model's folder.

    Raises:
        CheckpointError: the folder is missing or damaged, or `out` cannot be written.
    """
    shards = folder / SHARDS_FOLDER if (folder / SHARDS_FOLDER).is_dir() else folder
    if not list(shards.glob("*.distcp")):
        remedy = "give a step folder of a run with --shard"
        raise CheckpointError(explain(str(folder), "a sharded checkpoint", "a folder without shards", remedy))
    model = SynapseModel(read_sizes(shards))
    _read(shards, {"model": model.state_dict()}, no_dist=True)  # in place: the dict holds the model's own tensors
    model.save_pretrained(out)
    if (folder / TOKENIZER_FILE).is_file() and folder.resolve() != out.resolve():
        shutil.copyfile(folder / TOKENIZER_FILE, out / TOKENIZER_FILE)
    return model


def _read(folder: Path, state: dict[str, Any], *, no_dist: bool = False) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load as read_shards

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=SINGLE)
            read_shards(state, checkpoint_id=folder, no_dist=no_dist)
    except (OSError, CheckpointException, RuntimeError, ValueError) as error:
        remedy = "check the path; it must hold a sharded checkpoint of this model"
        message = " ".join(str(error).split())
        raise CheckpointError(explain(str(folder), "a sharded checkpoint", message, remedy)) from error


def main(argv: list[str] | None = None) -> int:
    """Converts a sharded checkpoint; returns 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.sharded",
        description="Make one model folder of a sharded checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a checkpoint in shards: a step folder of a run")
    parser.add_argument("out", type=Path, help="folder of the model to write")
    options = parser.parse_args(argv)
    try:
        convert(options.folder, options.out)
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"SynapseModel.from_pretrained({str(options.out)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
