"""What the tests of merges do with folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge.cli import main
from merge.io import Checkpoint
from merge.ties import ties


def weights(path: str | Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.shapes}


def expected_ties(models: str = "abc", **settings: Any) -> dict[str, Tensor]:
    base, others = weights("base"), [weights(name) for name in models]
    return {
        name: ties(tensor, [one[name] for one in others], **settings) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def merging(*words: str, base: str | None = "base", models: str = "abc", out: str = "out") -> int:
    start = [*(["--base", base] if base else []), "--models", *models, "--out", out, "--quiet"]
    return main([*start, *words])


def left_over() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.name.startswith((".synapse", "out")))
