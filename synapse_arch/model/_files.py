"""Files that are there whole or not at all, and safetensors that are read with clear errors.

Shared by states and checkpoints: each gives the error class that its callers catch.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from synapse_arch.errors import CheckpointError, StateError, explain

FileError = type[CheckpointError] | type[StateError]
PathLike = str | os.PathLike[str]

ASIDE_PREFIX = ".synapse-"
ASIDE_SUFFIX = ".aside"
_PICKLE_HEADS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def aside(directory: Path) -> Path:
    """A name in `directory` that no other save uses, to write under before the file gets its real name."""
    return directory / f"{ASIDE_PREFIX}{uuid.uuid4().hex}{ASIDE_SUFFIX}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file and waits until it is on the disk; tensors may be views and on any device.

    Raises:
        OSError, SafetensorError: as the system and safetensors word them; the caller says what was saved.
    """
    path.touch(exist_ok=False)
    mode = path.stat().st_mode  # what the umask grants; save_file renames a private file of mode 600 over it
    save_file(_separate(tensors), path, metadata=dict(metadata))
    path.chmod(mode)
    _sync(path)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage, as safetensors wants them."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file."""
    data: bytes = save(_separate(tensors), metadata=dict(metadata))
    return data


def unpack_tensors(data: bytes, source: str, *, error: FileError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of what `pack_tensors` made.

    Raises:
        error: the bytes are truncated, a pickle, or otherwise no safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, KeyError, ValueError) as cause:
        remedy = "the file is truncated, damaged or of another format"
        raise error(explain(source, "a safetensors file", f"{type(cause).__name__}: {cause}", remedy)) from cause
    size = int.from_bytes(data[:8], "little")  # its header, which load has checked
    return tensors, json.loads(data[8 : 8 + size]).get("__metadata__", {})


def write_text(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def commit(source: Path, target: Path) -> None:
    """Gives a file written aside its real name, at once replacing what bore it."""
    os.replace(source, target)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that."""
    if os.name == "posix":
        _sync(directory)


def sync_tree(folder: Path) -> None:
    """Waits until all that a folder holds is on the disk, where the system can do that."""
    if os.name == "posix":
        for path in (*folder.rglob("*"), folder):
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_whole(path: Path, write: Callable[[Path], None], *, error: FileError) -> None:
    """Writes a file aside with `write`, then names it `path`: the file is replaced whole or left as it was.

    Raises:
        error: the folder is missing, the disk is full or not writable. Nothing half-written is left.
    """
    temporary = aside(path.parent)
    try:
        write(temporary)
        commit(temporary, path)
    except (OSError, SafetensorError) as cause:
        raise write_failed(path, cause, "an older file of that name is as it was", error) from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_failed(path: Path, cause: Exception, left: str, error: FileError) -> CheckpointError | StateError:
    """The error for files that could not be written; `left` says what is there now."""
    remedy = f"check that the folder exists and is writable and that the disk has room; {left}"
    return error(explain(str(path), "to write there", f"{type(cause).__name__}: {cause}", remedy))


def _what_else(path: Path, cause: Exception) -> tuple[str, str]:
    """What a file that safetensors refused is, and the remedy; a good one may begin like a pickle, by its length."""
    try:
        with path.open("rb") as stream:
            pickled = stream.read(4).startswith(_PICKLE_HEADS)
    except OSError:
        pickled = False
    if pickled:
        remedy = "convert it to safetensors where you trust its source; pickles run code and are never loaded"
        return "a pickle or zip archive", remedy
    remedy = "the file is truncated, damaged or of another format: copy or save it again"
    return f"{type(cause).__name__}: {cause}", remedy


class TensorFile:
    """An open safetensors file whose header has been checked; tensors are read one at a time.

    Raises:
        error: (on opening) the file is missing, truncated, a pickle, or otherwise no safetensors file.
    """

    def __init__(self, path: Path, *, error: FileError) -> None:
        self.path, self._error = path, error
        try:
            if not path.is_file():
                got = "a folder" if path.is_dir() else "no file of that name"
                raise error(explain(str(path), "a safetensors file", got, "check the path"))
            file: Any = safe_open(path, framework="pt", device="cpu")  # Any: its stubs are untyped
        except (OSError, SafetensorError) as cause:
            got, remedy = _what_else(path, cause)
            raise error(explain(str(path), "a safetensors file", got, remedy)) from cause
        self._file = file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names: tuple[str, ...] = tuple(file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU, backed by the file until it is copied."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError) as cause:
            raise self._error(
                explain(f"{self.path}: {name}", "a tensor", f"{type(cause).__name__}: {cause}")
            ) from cause
        return tensor
