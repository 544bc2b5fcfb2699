"""A decay of exactly 0, whose log is -inf, forgets all and spoils nothing."""

from __future__ import annotations

import pytest
import torch

from synapse_arch.ops import delta_rule, mlstm
from tests.helpers import assert_close


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_fast_weights(rule: str) -> None:
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 70, 2, 5), dim=-1)
    beta, decay = torch.rand(2, 2, 70, 2)
    decay[:, ::9] = 0.0
    found = [
        delta_rule(q, k, v, beta, decay.log(), rule=rule, backend=backend)  # type: ignore[arg-type]
        for backend in ("reference", "chunked")
    ]
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected)


def test_mlstm() -> None:
    q, k, v = torch.randn(3, 2, 70, 2, 5)
    i, f = torch.randn(2, 2, 70, 2)
    f[:, ::9] = -torch.inf
    (expected, state), (got, after) = (mlstm(q, k, v, i, f, backend=name) for name in ("reference", "chunked"))
    assert_close(got, expected)
    for one, other in zip(after, state, strict=True):
        assert_close(one, other)
