"""Checkpoints read one tensor at a time: SynapseModel and Hugging Face folders, sharded or not, and safetensors files.

Tensors are read into memory of their own rather than mapped, so what was read and dropped no longer counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from merge.vectors import Given
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

    def given(self, name: str, base: Tensor) -> Given:
        """What it contributes to a tensor: its own, or its task vector where it knows that exactly (an adapter).

        Args:
            name: of the tensor.
            base: the base's tensor of that name, not to be changed; may be returned where nothing differs from it.
        """
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
        is_file = self.path.is_file()
        opened = [TensorFile(self.path, error=CheckpointError)] if is_file else open_weights(self.path)
        self.files: tuple[Path, ...] = tuple(file.path for file in opened)
        self.metadata: dict[str, str] = dict(opened[0].metadata)
        self._places: dict[str, _Place] = {}
        for file in self.files:
            self._places |= _places(file)
        self._shapes = {name: place.shape for name, place in self._places.items()}
        self._dtypes = {name: place.dtype for name, place in self._places.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every tensor, by name."""
        return self._dtypes

    def tensor(self, name: str) -> Tensor:
        """One tensor, read.

        Raises:
            CheckpointError: the file has become shorter or unreadable since it was opened.
        """
        (tensor,) = self.pieces(name, [slice(0, math.prod(self.shapes[name]))])
        return tensor.view(self.shapes[name])

    def pieces(self, name: str, pieces: Sequence[slice]) -> list[Tensor]:
        """Parts of a tensor, read: slices of its numbers in order, each with a start and a stop.

        Raises:
            CheckpointError: the file has become shorter or unreadable since it was opened.
        """
        place = self._places[name]
        read = []
        try:
            with place.file.open("rb", buffering=0) as file:
                for piece in pieces:
                    raw = torch.empty((piece.stop - piece.start) * place.dtype.itemsize, dtype=torch.uint8)
                    _fill(file, place.offset + piece.start * place.dtype.itemsize, raw.numpy().data)
                    read.append(raw.view(place.dtype) if len(raw) else torch.empty(0, dtype=place.dtype))
        except (OSError, EOFError) as cause:
            got = f"{type(cause).__name__}: {cause}"
            raise CheckpointError(explain(f"{place.file}: {name}", "a tensor", got, "copy the file again")) from cause
        return read

    def given(self, name: str, base: Tensor) -> Tensor:
        """The tensor; the base does not matter."""
        return self.tensor(name)


@dataclass(frozen=True)
class Reordered:
    """A model whose tensors are read through another: `tensors` has its names and shapes. It is a `Source`."""

    model: Source
    tensors: Tensors

    @property
    def label(self) -> str:
        """The model's."""
        return self.model.label

    @property
    def files(self) -> tuple[Path, ...]:
        """The model's."""
        return self.model.files

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The model's."""
        return self.model.shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The model's."""
        return self.model.dtypes

    def tensor(self, name: str) -> Tensor:
        """The tensor as `tensors` has it."""
        return self.tensors.tensor(name)

    def given(self, name: str, base: Tensor) -> Tensor:
        """The same; the base does not matter."""
        return self.tensors.tensor(name)


def _fill(file: io.FileIO, offset: int, memory: memoryview) -> None:
    """Reads as many bytes as the memory has, from an offset on."""
    file.seek(offset)
    filled = 0
    while filled < len(memory):
        count = file.readinto(memory[filled:])
        if not count:
            raise EOFError(f"{len(memory) - filled} bytes are missing")
        filled += count


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


def sha256(files: tuple[Path, ...], stop: threading.Event) -> str:
    """The SHA-256 of a file, or of the hashes of several in order of their names; of one file as sha256sum says it.

    Args:
        files: to read.
        stop: gives up when it is set; the answer is then nothing to rely on.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digests = []
    for path in sorted(files, key=lambda path: path.name):
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while not stop.is_set() and (block := file.read(_HASHED_AT_A_TIME)):
                    digest.update(block)
        except OSError as cause:
            raise CheckpointError(explain(str(path), "a readable file", f"{type(cause).__name__}: {cause}")) from cause
        digests.append(digest.hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def short_name(path: str | Path, others: Sequence[str | Path]) -> str:
    """A model's folder name, or its whole path where another one is called the same."""
    short = Path(path).resolve().name
    return short if sum(Path(other).resolve().name == short for other in others) == 1 else str(path)
