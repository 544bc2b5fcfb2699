"""Checkpoints read one tensor at a time: SynapseModel and Hugging Face folders, sharded or not, and safetensors files.

Tensors are read into memory of their own rather than mapped, so what was read and dropped no longer counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from synapse_arch.errors import CheckpointError, explain
from synapse_arch.model._files import TensorFile
from synapse_arch.model.checkpoint import open_weights

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that are read and written, by their names in safetensors headers."""
_HASHED_AT_A_TIME = 1 << 20


class Tensors(Protocol):
    """Named tensors that are read when asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name; nothing is read for it."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory that the caller may change."""
        ...


class Source(Tensors, Protocol):
    """A model to merge: its tensors, and how it is called in messages and the model card."""

    @property
    def label(self) -> str:
        """The path it was given as."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every tensor, by name."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights files it is read from."""
        ...

    def delta(self, name: str) -> Tensor | None:
        """The tensor's task vector in float32 where the model knows it exactly (an adapter), else None."""
        ...


class _Place(NamedTuple):
    """Where a tensor lies."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a SynapseModel folder, a Hugging Face folder or one .safetensors file. It is a `Source`.

    Attributes:
        label: the path it was given as.
        path: the same, as a Path.
        files: the weights files that count.
        metadata: of the first weights file's header; a SynapseModel's configuration is in it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the files and checks their headers.

        Raises:
            CheckpointError: nothing there, a pickle, a truncated or damaged file, an index that does not fit its
                shards, or a dtype that is not known.
        """
        self.label, self.path = str(path), Path(path)
        opened = [TensorFile(self.path, error=CheckpointError)] if self.path.is_file() else open_weights(self.path)
        self.files: tuple[Path, ...] = tuple(file.path for file in opened)
        self.metadata: dict[str, str] = dict(opened[0].metadata)
        self._places: dict[str, _Place] = {}
        for path_ in self.files:
            self._places |= _places(path_)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {name: place.shape for name, place in self._places.items()}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every tensor, by name."""
        return {name: place.dtype for name, place in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, read.

        Raises:
            CheckpointError: the file has become shorter or unreadable since it was opened.
        """
        place = self._places[name]
        raw = torch.empty(math.prod(place.shape) * place.dtype.itemsize, dtype=torch.uint8)
        try:
            with place.file.open("rb", buffering=0) as file:
                file.seek(place.offset)
                view, filled = memoryview(raw.numpy()), 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise EOFError(f"{len(view) - filled} bytes are missing")
                    filled += count
        except (OSError, EOFError) as cause:
            got = f"{type(cause).__name__}: {cause}"
            raise CheckpointError(explain(f"{place.file}: {name}", "a tensor", got, "copy the file again")) from cause
        return raw.view(place.dtype).view(place.shape) if raw.numel() else torch.empty(place.shape, dtype=place.dtype)

    def delta(self, name: str) -> None:
        """None: whole models know no task vectors."""


def _places(path: Path) -> dict[str, _Place]:
    """What the header of a safetensors file says, which has been checked by opening it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
    if unknown:
        raise CheckpointError(explain(f"{path}: dtypes", ", ".join(DTYPES), unknown, "convert the file first"))
    return {
        name: _Place(path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def sha256(files: tuple[Path, ...]) -> str:
    """The SHA-256 of a file, or of the hashes of several in order of their names; of one file as sha256sum says it."""
    digests = []
    for path in sorted(files, key=lambda path: path.name):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(_HASHED_AT_A_TIME):
                digest.update(block)
        digests.append(digest.hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
