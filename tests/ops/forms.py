"""What every other form of a recurrence is asked, beside being equal to the definition."""

from __future__ import annotations

import torch

from tests.contracts.cases import Case
from tests.helpers import Tensors, assert_same, measure


def check_extremes(case: Case, backend: str) -> None:
    """Gates and decays at their ends: everything finite, and outputs those of the definition."""
    for changed in case.extremes:
        tensors = case.draw(2, 20)
        tensors |= {name: torch.full_like(tensors[name], value) for name, value in changed.items()}
        found = measure(lambda z: case.call(z, backend=backend), tensors)
        assert all(x.isfinite().all() for x in found.values()), changed
        expected = case.call(tensors, backend="reference")
        assert_same({name: found[name] for name in expected}, expected)


def check_padding(case: Case, backend: str) -> None:
    """A row that is all padding, one that begins with it, and a fresh state."""
    tensors = {name: x for name, x in case.draw(2, 20).items() if not name.startswith("state")}
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0], mask[1, :3] = False, False

    def run(z: Tensors, form: str) -> Tensors:
        outputs = case.call(z, backend=form, mask=mask)
        return {name: x if name.startswith("state") else x[mask] for name, x in outputs.items()}

    assert_same(measure(lambda z: run(z, backend), tensors), measure(lambda z: run(z, "reference"), tensors))
