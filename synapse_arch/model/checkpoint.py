"""Checkpoints: safetensors and a config.json in a folder, never a pickle.

    model.safetensors                                      the weights, in one file, or
    model-<id>-00001-of-0000N.safetensors ...              in shards with names no other save uses,
    model.safetensors.index.json                           and which shard holds which tensor
    config.json                                            for people and tools; each weights file embeds the same

Which weights count: those of the index where there is one, else model.safetensors. A save writes everything aside
and then changes that by one atomic step (the index or model.safetensors is renamed into place, or the index of an
older save removed), so that an interruption at any point leaves the old or the new checkpoint loadable.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from synapse_arch.errors import CheckpointError, ConfigError, explain
from synapse_arch.model import _files
from synapse_arch.model._files import PathLike, TensorFile
from synapse_arch.model.config import SynapseConfig

if TYPE_CHECKING:
    from synapse_arch.model.model import SynapseModel

SCHEMA = "synapse.model/1"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SHARD = re.compile(r"model-[0-9a-f]{12}-\d{5}-of-\d{5}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_log = logging.getLogger(__name__)


def save_pretrained(model: SynapseModel, directory: PathLike, *, max_shard_bytes: int = 4 * 2**30) -> None:
    """Saves the weights and configuration of a model; an older checkpoint there is replaced whole or not at all.

    Args:
        model: on any device; tensors that are shared are stored once.
        directory: made where missing; other files in it are left alone.
        max_shard_bytes: weights above this many bytes are split, no shard above it but for a single larger tensor.

    Raises:
        CheckpointError: the folder cannot be made or written, or the disk is full, or the model is on the meta
            device. The folder then holds the older checkpoint or the new one, whole.
        ConfigError: `max_shard_bytes` is below 1.
    """
    if max_shard_bytes < 1:
        raise ConfigError(explain("max_shard_bytes", "1 or more", max_shard_bytes))
    tensors = _distinct_tensors(model)
    unreal = [name for name, tensor in tensors.items() if tensor.is_meta]
    if unreal:
        remedy = "load the model first"
        raise CheckpointError(explain("tensors", "values to save", f"meta tensors: {unreal[:10]}", remedy))
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, _plan(tensors, max_shard_bytes), tensors, _describe(model.config))
    except (OSError, SafetensorError) as cause:
        left = "a checkpoint that was there is whole, the older one or already the new one"
        raise _files.write_failed(folder, cause, left, CheckpointError) from cause
    finally:
        _sweep(folder)


def from_pretrained(
    directory: PathLike, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> SynapseModel:
    """Loads what `save_pretrained` saved, in evaluation mode.

    The configuration embedded in the weights is what counts; a config.json that says otherwise is reported by a
    logged warning.

    Args:
        directory: a folder with a checkpoint.
        device: where the weights go.
        dtype: floating parameters are cast to it, but those that are not to be narrowed (decay rates, routers);
            None keeps what was saved.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, foreign or of another schema, or its tensors
            are not those of its configuration.
        ConfigError: `dtype` is not a floating dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(explain("dtype", "a floating dtype", repr(dtype), "such as torch.bfloat16"))
    from synapse_arch.model.model import SynapseModel  # here, as its methods delegate to this module

    folder = Path(directory)
    try:
        files = open_weights(folder)
    except OSError as cause:
        raise CheckpointError(explain(str(folder), "a readable folder", f"{type(cause).__name__}: {cause}")) from cause
    config = _agreed_config(folder, files)
    found = {name: file for file in files for name in file.names}
    if config.n_layers > len(found):  # before so many are built
        wanted = f"those of n_layers={config.n_layers}"
        raise CheckpointError(explain(f"{files[0].path}: tensors", wanted, f"{len(found)} in all"))
    with torch.device("meta"):
        model = SynapseModel(config)
    expected = _distinct_tensors(model)
    _check_tensors(folder, expected, found)
    loaded = {id(old): _load(name, old, found[name], torch.device(device), dtype) for name, old in expected.items()}
    for name, old in model.state_dict(keep_vars=True).items():  # every name of a shared tensor
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        slots: dict[str, Any] = owner._parameters if isinstance(old, nn.Parameter) else owner._buffers
        slots[leaf] = loaded[id(old)]
    assert dict(model.named_buffers()).keys() <= model.state_dict().keys(), "every buffer of a model must be persistent"
    return model.eval()


class _Plan(NamedTuple):
    """Which file gets which tensors: shards by name, or one file where `shards` is empty."""

    shards: dict[str, list[str]]
    total_bytes: int


def _plan(tensors: Mapping[str, Tensor], limit: int) -> _Plan:
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total = sum(sizes.values())
    if total <= limit:
        return _Plan({}, total)
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    save_id = uuid.uuid4().hex[:12]
    names = [f"model-{save_id}-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    return _Plan(dict(zip(names, groups, strict=True)), total)


def _write(folder: Path, plan: _Plan, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Writes everything aside, then makes the new weights count by one atomic step."""
    embedded = dict(description)
    header = {
        "format": "pt",
        "schema": embedded.pop("schema"),
        "library_version": embedded.pop("library_version"),
        "config": json.dumps(embedded),
    }
    config = _files.aside(folder)
    _files.write_text(config, json.dumps(description, indent=2) + "\n")
    first = not (folder / CONFIG).exists()  # a first save ends with the weights, a later one with config.json
    if plan.shards:
        for shard, names in plan.shards.items():
            _files.write_tensors(folder / shard, {name: tensors[name] for name in names}, header)
        weight_map = {name: shard for shard, names in plan.shards.items() for name in names}
        index = _files.aside(folder)
        body = {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map}
        _files.write_text(index, json.dumps(body, indent=2) + "\n")
        if first:
            _files.commit(config, folder / CONFIG)
        _files.commit(index, folder / INDEX)  # from here on the new weights count
    else:
        weights = _files.aside(folder)
        _files.write_tensors(weights, tensors, header)
        if first:
            _files.commit(config, folder / CONFIG)
        _files.commit(weights, folder / WEIGHTS)  # from here on the new weights count, unless an index is there
        (folder / INDEX).unlink(missing_ok=True)  # then from here on
    if not first:
        _files.commit(config, folder / CONFIG)


def _sweep(folder: Path) -> None:
    """Removes what does not count: files written aside, shards that no index names, weights beside our own index.

    It looks at the folder and not at how far a save came, so it is right after success and after any failure.
    """
    if not folder.is_dir():
        return
    try:
        kept = set(_weight_map(folder).values()) if (folder / INDEX).exists() else {WEIGHTS}
        foreign = not all(name == WEIGHTS or _SHARD.fullmatch(name) for name in kept)
        for path in folder.iterdir():
            ours = _SHARD.fullmatch(path.name) or (path.name == WEIGHTS and not foreign)
            unfinished = path.name.startswith(_files.ASIDE_PREFIX) and path.name.endswith(_files.ASIDE_SUFFIX)
            if unfinished or (ours and path.name not in kept):
                path.unlink(missing_ok=True)
    except (OSError, CheckpointError) as cause:  # or an index that cannot be read: what is superfluous is not known
        _log.warning("%s: files of an older or interrupted save could not be removed: %s", folder, cause)


def _describe(config: SynapseConfig) -> dict[str, Any]:
    """What config.json holds."""
    try:
        version = metadata.version("synapse-arch")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {"schema": SCHEMA, "library_version": version, **config.to_dict()}


def _distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that has several names appears under the first."""
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        distinct.setdefault(id(tensor), (name, tensor))
    return dict(distinct.values())


def open_weights(folder: Path) -> list[TensorFile]:
    """The weights files that count, opened."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        remedy = "give the folder that save_pretrained wrote"
        raise CheckpointError(explain(str(folder), "a checkpoint folder", got, remedy))
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder)
        files = [TensorFile(folder / shard, error=CheckpointError) for shard in sorted(set(weight_map.values()))]
        for file in files:
            named = {name for name, shard in weight_map.items() if shard == file.path.name}
            if named != set(file.names):
                _refuse_names(file.path, named, set(file.names))
        return files
    if (folder / WEIGHTS).exists():
        return [TensorFile(folder / WEIGHTS, error=CheckpointError)]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        remedy = "pickles run code and are never loaded: convert them to safetensors where you trust their source"
        raise CheckpointError(explain(str(folder), f"{WEIGHTS} or {INDEX}", f"only pickles: {pickles[:10]}", remedy))
    remedy = "give the folder that save_pretrained wrote"
    raise CheckpointError(explain(str(folder), f"{WEIGHTS} or {INDEX}", "neither", remedy))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise CheckpointError(explain(str(path), "a file", "none of that name", "save the checkpoint again")) from cause
    except (OSError, ValueError, RecursionError) as cause:
        got = f"{type(cause).__name__}: {cause}"
        raise CheckpointError(explain(str(path), "a readable JSON object", got, "save the checkpoint again")) from cause
    if not isinstance(content, dict):
        raise CheckpointError(explain(str(path), "a JSON object", type(content).__name__, "save the checkpoint again"))
    return content


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard, of an index whose shards all lie in the folder itself."""
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(explain(str(folder / INDEX), "a weight_map", type(weight_map).__name__))
    foreign = [shard for shard in weight_map.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if foreign:
        raise CheckpointError(explain(str(folder / INDEX), "shards named without a folder", foreign[:10]))
    return weight_map


def _agreed_config(folder: Path, files: list[TensorFile]) -> SynapseConfig:
    """The configuration that the weights embed, all files alike; says so where config.json differs."""
    for file in files:
        schema = file.metadata.get("schema")
        if schema != SCHEMA or "config" not in file.metadata:
            family, _, version = str(schema).partition("/")
            ours = family == SCHEMA.partition("/")[0] and version.isdecimal()
            newer = ours and int(version) > int(SCHEMA.partition("/")[2])
            remedy = "these weights are not of synapse_arch: convert them first"
            if ours:
                remedy = "update the library" if newer else "a former version wrote it: load and save it with that one"
            raise CheckpointError(explain(f"{file.path}: schema", SCHEMA, schema, remedy))
        if file.metadata["config"] != files[0].metadata["config"]:
            raise CheckpointError(explain(str(file.path), f"the configuration of {files[0].path.name}", "another"))
    beside = _read_json(folder / CONFIG)
    where = f"{files[0].path}: embedded config"
    try:
        embedded = json.loads(files[0].metadata["config"])
        config = SynapseConfig.from_dict(embedded)
    except (ValueError, TypeError, RecursionError) as cause:  # JSON that does not parse, or a ConfigError
        remedy = "the file is damaged, or a newer version of the library wrote it"
        raise CheckpointError(explain(where, "a valid configuration", f"{cause}", remedy)) from cause
    differing = sorted(key for key, value in embedded.items() if beside.get(key) != value)
    if differing:
        fields = ", ".join(differing)
        _log.warning("%s differs from the weights in %s; the weights' own is used", folder / CONFIG, fields)
    return config


def _check_tensors(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, TensorFile]) -> None:
    if expected.keys() != found.keys():
        _refuse_names(folder, set(expected), set(found))
    for name, tensor in expected.items():
        shape = found[name].shape(name)
        if shape != tuple(tensor.shape):
            remedy = "the configuration does not belong to these weights"
            raise CheckpointError(explain(f"{found[name].path}: {name}", tuple(tensor.shape), shape, remedy))


def _refuse_names(path: Path, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    got = f"{len(missing)} missing {missing[:10]}, {len(unexpected)} unexpected {unexpected[:10]}"
    raise CheckpointError(explain(f"{path}: tensors", f"{len(expected)} of the configuration", got))


def never_narrowed(model: nn.Module) -> frozenset[str]:
    """The names of what keeps its precision where a model is loaded or merged in another dtype."""
    marked = (name for name, parameter in model.named_parameters() if getattr(parameter, "_keep_float32", False))
    return frozenset(marked) | frozenset(name for name, _ in model.named_buffers())


def _load(name: str, old: Tensor, file: TensorFile, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """The saved tensor, ready to stand in a meta tensor's place, with the marks of a parameter (_keep_float32)."""
    value = file.tensor(name)
    if value.dtype != old.dtype and not (value.is_floating_point() and old.is_floating_point()):
        raise CheckpointError(explain(f"{file.path}: {name}", old.dtype, value.dtype, "the file is damaged"))
    if not isinstance(old, nn.Parameter):
        return value.to(device, copy=True)
    target = dtype or value.dtype
    if getattr(old, "_keep_float32", False):
        target = torch.promote_types(value.dtype, target)
    parameter = nn.Parameter(value.to(device, target, copy=True), requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter
