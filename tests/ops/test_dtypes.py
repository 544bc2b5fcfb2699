"""One argument in float64 is enough for a recurrence to be computed in it."""

from __future__ import annotations

import pytest
import torch

from synapse_arch.ops import causal_conv1d, selective_scan, ssd


@pytest.mark.parametrize("wide", ["x", "dt", "A", "B", "C", "D"])
def test_ssd(wide: str) -> None:
    shapes = {"x": (1, 5, 2, 3), "dt": (1, 5, 2), "A": (2,), "B": (1, 5, 1, 4), "C": (1, 5, 1, 4), "D": (2,)}
    given = {name: torch.rand(shape) for name, shape in shapes.items()}
    given["A"] = -given["A"]
    given[wide] = given[wide].double()
    assert ssd(**given)[1].dtype == torch.float64


@pytest.mark.parametrize("wide", ["u", "dt", "A", "B", "C", "D"])
def test_selective_scan(wide: str) -> None:
    shapes = {"u": (1, 5, 3), "dt": (1, 5, 3), "A": (3, 4), "B": (1, 5, 4), "C": (1, 5, 4), "D": (3,)}
    given = {name: torch.rand(shape) for name, shape in shapes.items()}
    given["A"] = -given["A"]
    given[wide] = given[wide].double()
    assert selective_scan(**given)[1].dtype == torch.float64


@pytest.mark.parametrize("wide", ["x", "weight", "bias"])
def test_causal_conv1d(wide: str) -> None:
    given = {name: torch.rand(shape) for name, shape in {"x": (1, 5, 3), "weight": (3, 4), "bias": (3,)}.items()}
    given[wide] = given[wide].double()
    assert causal_conv1d(**given)[1].dtype == torch.float64
