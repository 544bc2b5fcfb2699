"""A model folder that appears whole or not at all: written beside its place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge.io import DTYPES
from synapse_arch.errors import CheckpointError, ConfigError, explain
from synapse_arch.model import _files
from synapse_arch.model.checkpoint import CONFIG

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SPARE = 1 << 20
"""Bytes for headers, configuration and model card."""
_ASIDE, _OLDER = ".synapse-merge-", ".older"
_COPIED = (
    "config.json", "generation_config.json", "*tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.model", "*.tiktoken", "*processor_config.json", "*.py",
)  # fmt: skip
"""What is taken over from the base's folder besides weights."""


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


def check_target(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuses an output that would touch an input or something else that is there.

    What a killed process had moved away from there comes back first.

    Args:
        out: the folder.
        inputs: folders and files; of a folder its files count as well, wherever they are links to.
        overwrite: whether `out` may be there.

    Raises:
        ConfigError: `out` is or holds an input, or lies in one, or is there and not to be overwritten, or is where this
            process works or a disk is mounted, which cannot be renamed.
    """
    place = out.resolve()
    files = (file for path in inputs if path.is_dir() for file in path.iterdir() if file.is_file())
    for path in (*inputs, *files):
        source = path.resolve()
        if place == source or place in source.parents or source in place.parents:
            raise ConfigError(explain("out", "a folder apart from the inputs", f"{out}, and {path} is an input"))
    with suppress(OSError):  # said when it is written
        _sweep(place)
    if not (os.path.lexists(out) or place.exists()):
        return
    if not overwrite:
        raise ConfigError(explain("out", "a folder that is not there yet", f"{out}", "name another, or --overwrite"))
    if not place.is_dir() or out.is_symlink() or (any(place.iterdir()) and not any(place.glob("*.safetensors"))):
        raise ConfigError(explain("out", "a model folder to overwrite", f"{out}, which is something else"))
    if os.path.ismount(place) or Path.cwd().is_relative_to(place):
        got = f"{out}, the current one, one above it or the root of a disk"
        raise ConfigError(explain("out", "a folder that can be renamed", got, "name one below it"))


def check_room(out: Path, size: int) -> None:
    """Refuses to begin what will not fit.

    Raises:
        CheckpointError: the disk of `out` has less than `size` bytes and a little free.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < size + _SPARE:
        need, have = f"{_readable(size + _SPARE)} free", _readable(free)
        raise CheckpointError(explain(str(out), need, have, "make room, or name another disk"))


def _readable(size: int) -> str:
    """A size in the largest unit of which it is one or more."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write into, which takes its place at the end; after an error nothing is left.

    An older folder is replaced by two renames and then removed. What a killed process left behind is removed by the
    next one that writes to the same place, or put back where it was killed between the two.

    Raises:
        CheckpointError: it could not be written.
    """
    place = out.resolve()  # "." and ".." have no names
    aside = place.with_name(f"{_ASIDE}{place.name}-{uuid.uuid4().hex}")
    lock = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        aside.mkdir()
        lock = _lock(aside)
        yield aside
        _files.sync_directory(aside)
        _replace(aside, place)
    except OSError as cause:
        raise _files.write_failed(out, cause, "what was there is as it was", CheckpointError) from cause
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _replace(aside: Path, out: Path) -> None:
    if not os.path.lexists(out):
        os.rename(aside, out)
        _files.sync_directory(out.parent)
        return
    older = aside.with_name(f"{aside.name}{_OLDER}")
    os.rename(out, older)
    try:
        os.rename(aside, out)
    except OSError:
        os.rename(older, out)
        raise
    _files.sync_directory(out.parent)
    shutil.rmtree(older, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Marks a folder as in use for as long as this process lives; None where that cannot be, or another one uses it."""
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(out: Path) -> None:
    """Removes what killed processes left of a folder of this name; one that they had only moved away comes back."""
    prefix = f"{_ASIDE}{out.name}-"
    for left in sorted(out.parent.glob(f"{prefix}*")):  # each new folder before the older one that made room for it
        name = left.name.removeprefix(prefix)
        if len(name.removesuffix(_OLDER)) != 32:
            continue
        if not name.endswith(_OLDER):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        elif not left.with_name(left.name.removesuffix(_OLDER)).exists():  # else its process is at work
            if os.path.lexists(out):
                shutil.rmtree(left, ignore_errors=True)
            else:
                os.rename(left, out)


def write_weights(
    folder: Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    max_shard_bytes: int,
) -> None:
    """Writes tensors as they come, in the order of their entries, as one safetensors file or as shards and an index.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    shards = _shards(entries, max_shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    stream = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, stream, metadata)
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}}
        index["weight_map"] = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        _files.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if entry.bytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.bytes
    return shards


def _write_shard(
    path: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            name, tensor = next(tensors)
            assert (name, tensor.dtype, tuple(tensor.shape)) == (entry.name, entry.dtype, entry.shape)
            _write(file, tensor)
            del tensor  # before the next one is made
        os.fsync(file.fileno())


def _write(file: Any, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    memory = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    while memory:
        memory = memory[file.write(memory) :]


def copy_companions(source: Path, folder: Path, *, dtype: str | None = None) -> list[str]:
    """Copies configuration, tokenizer and the like from a model folder; weights, cards and everything else stay.

    Args:
        source: what is copied from.
        folder: what is copied into.
        dtype: of the weights, for a config.json that names one; None leaves it as it is.

    Returns:
        The names of the files copied.
    """
    if not source.is_dir():
        return []
    found = {path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}
    weights = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx"}
    copied = sorted(path for path in found if path.suffix not in weights and not path.name.endswith(".index.json"))
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    if dtype is not None and (folder / CONFIG).is_file():
        _name_dtype(folder / CONFIG, dtype)
    return [path.name for path in copied]


def _name_dtype(path: Path, dtype: str) -> None:
    """Writes the weights' dtype into a Hugging Face configuration that names one, under either of its keys."""
    config = json.loads(path.read_text(encoding="utf-8"))
    named = {"dtype", "torch_dtype"} & config.keys() if isinstance(config, dict) else set()
    if named:
        path.write_text(json.dumps(config | dict.fromkeys(named, dtype), indent=2) + "\n", encoding="utf-8")
