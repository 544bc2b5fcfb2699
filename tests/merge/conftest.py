"""Model folders that the tests of merges share, and a folder of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from synapse_arch import SynapseModel
from tests.model.small import small_model


def perturbed(model: SynapseModel, seed: int, frozen: str = "embedding") -> SynapseModel:
    """The model after some training that left its embedding alone."""
    other = SynapseModel(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not name.startswith(frozen):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and three models, written by the library."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    base = small_model()
    base.save_pretrained(folder / "base")
    for index, name in enumerate("abc"):
        perturbed(base, index).save_pretrained(folder / name)
    return folder


@pytest.fixture
def inside(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, the models beside it under short names."""
    for path in zoo.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
