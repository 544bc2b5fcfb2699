"""Reading back what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file

from recipes import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "d_model=16", "n_layers=1", "thalamus.d_state=4", "thalamus.head_dim=8", "experts.n_experts=4",
    "experts.d_expert=16", "xlstm.n_heads=2", "memory.n_heads=2", "memory.d_key=4", "memory.d_value=4",
)  # fmt: skip


def strictly(text: str) -> Any:
    """What a reader of JSON reads that has no NaN."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def losses(out: Path) -> list[float]:
    return [strictly(line)["language"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint.latest(out)
    return load_file(folder / "model.safetensors") | load_file(folder / "trainer.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
