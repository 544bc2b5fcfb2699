"""The language loss against torch's cross entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from synapse_arch.model.loss import IGNORED, next_token_nats
from tests.helpers import assert_close


def example() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (2, 5))
    targets[0, 1] = targets[1, 4] = IGNORED
    return logits, targets


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_equals_cross_entropy(offset: float) -> None:
    logits, targets = example()
    ours = next_token_nats(logits + offset, targets)
    theirs = F.cross_entropy((logits + offset).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(3 * ours, logits)
    (expected,) = torch.autograd.grad(3 * theirs, logits)
    assert_close(gradient, expected)


def test_gradcheck() -> None:
    logits, targets = example()
    assert torch.autograd.gradcheck(lambda z: next_token_nats(z, targets), logits)


def test_a_second_backward_pass_gives_the_same() -> None:
    logits, targets = example()
    nats = next_token_nats(logits, targets)
    (first,) = torch.autograd.grad(2 * nats, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(nats, logits, retain_graph=True)
    assert_close(2 * second, kept)
    assert_close(first, kept)


def test_nothing_to_predict() -> None:
    logits, targets = example()
    nats = next_token_nats(logits, torch.full_like(targets, IGNORED))
    assert nats == 0
    (gradient,) = torch.autograd.grad(nats, logits)
    assert not gradient.any()
