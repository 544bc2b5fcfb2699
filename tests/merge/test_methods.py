"""Every other method against a small computation of its own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from merge import vectors
from merge.methods import METHODS, breadcrumbs, dare_linear, dare_ties, della, generator, linear, slerp, task_arithmetic
from merge.ties import ties
from merge.vectors import Delta
from synapse_arch.errors import ConfigError
from tests.helpers import assert_close


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected), f"{actual} is not {expected}"


def models(*shape: int, count: int = 3) -> tuple[Tensor, list[Tensor]]:
    source = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=source)
    return base, [base + torch.randn(shape, generator=source) for _ in range(count)]


def test_linear_is_the_weighted_average() -> None:
    base, given = models(6, 7)
    expected = (1 * given[0] + 2 * given[1] - 0.5 * given[2]) / 2.5
    assert_close(linear(base, given, weights=[1, 2, -0.5]), expected)
    assert_close(linear(given[0], given, weights=[1, 2, -0.5]), expected)  # whatever stands in for the base
    assert_close(linear(base, given, lam=0.3), base + 0.3 * (sum(given) / 3 - base))


def test_task_arithmetic_adds_and_takes_away() -> None:
    base, given = models(6, 7)
    merged = task_arithmetic(base, given, weights=[1, 0.5, -1], lam=0.4)
    assert_close(merged, base + 0.4 * ((given[0] - base) + 0.5 * (given[1] - base) - (given[2] - base)))


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.3], [1, 0], [0, 1]])
def test_slerp_goes_along_the_arc(weights: list[float]) -> None:
    base, given = models(9, 4, count=2)
    t = weights[1] / sum(weights)
    one, two = (tensor.double().flatten() for tensor in given)
    angle = torch.acos(one @ two / one.norm() / two.norm())
    expected = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)
    assert_close(slerp(base, given, weights=weights), expected.view(9, 4).float())


def test_slerp_keeps_the_norm_of_equally_long_tensors() -> None:
    one, two = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert_close(slerp(one, [one, two]).norm(), torch.tensor(3.0))


@pytest.mark.parametrize("second", [torch.zeros(2), torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])])
def test_slerp_is_linear_where_there_is_no_arc(second: Tensor) -> None:
    first = torch.tensor([1.0, 0.0])
    assert_close(slerp(first, [first, second], weights=[1, 3]), 0.25 * first + 0.75 * second)


def test_dare_keeps_at_random_and_rescales() -> None:
    base, given = models(50, 60)
    expected = base.clone()
    masks = []
    for index, tensor in enumerate(given):
        stays = torch.rand(3000, generator=generator(5, "x", index)).view(50, 60) < 0.25
        masks.append(stays)
        expected += 2 * stays * (tensor - base) / 0.25
    assert_close(dare_linear(base, given, density=0.25, weights=2, seed=5, name="x"), expected)
    thinned = [Delta(stays * (tensor - base) / 0.25) for stays, tensor in zip(masks, given, strict=True)]
    assert_close(dare_ties(base, given, density=0.25, seed=5, name="x"), ties(base, thinned, density=1.0))
    shares = [float(stays.float().mean()) for stays in masks]
    assert all(abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 3000) for share in shares)
    assert not torch.equal(masks[0], masks[1])


def test_breadcrumbs_leaves_out_outliers_and_the_small() -> None:
    base, (tensor,) = models(10, 10, count=1)
    order = (tensor - base).abs().flatten().argsort(descending=True)
    stays = torch.zeros(100, dtype=torch.bool)
    stays[order[5:35]] = True
    merged = breadcrumbs(base, [tensor], density=0.3, gamma=0.05, lam=2.0)
    assert_close(merged, base + 2 * stays.view(10, 10) * (tensor - base))
    most = breadcrumbs(base, [tensor], density=0.98, gamma=0.05)  # room for two outliers only
    stays = torch.ones(100, dtype=torch.bool)
    stays[order[:2]] = False
    assert_close(most, base + stays.view(10, 10) * (tensor - base))


def test_breadcrumbs_breaks_ties_by_index() -> None:
    merged = breadcrumbs(torch.zeros(10), [torch.ones(10)], density=0.4, gamma=0.2)
    assert_same_bits(merged, torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0, 0, 0]))


def test_della_spares_large_changes() -> None:
    base, given = models(20, 11)
    thinned = []
    for index, tensor in enumerate(given):
        delta = tensor - base
        ranks = torch.stack([(row.abs()[:, None] > row.abs()[None]).sum(1) for row in delta]).float()
        probability = 0.4 + 0.2 * (ranks / 10 - 0.5)
        stays = torch.rand(220, generator=generator(1, "y", index)).view(20, 11) < probability
        thinned.append(Delta(stays * delta / probability))
    merged = della(base, given, density=0.4, epsilon=0.2, seed=1, name="y")
    assert_close(merged, ties(base, thinned, density=1.0))


@pytest.mark.parametrize("name", METHODS)
def test_what_holds_for_every_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks do not matter, numbers alone are merged, bfloat16 stays, the seed decides."""
    method = METHODS[name]
    base, given = models(13, 17, count=2)
    settings: dict[str, Any] = {"name": "t"} if "seed" in method.uses else {}
    merged = method.merge(base, given, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "BLOCK", 64)
        assert_close(method.merge(base, given, **settings), merged)
    narrow = method.merge(base.bfloat16(), [one.bfloat16() for one in given], **settings)
    assert narrow.dtype == torch.bfloat16
    alone = method.merge(torch.tensor(1.0), [torch.tensor(3.0), torch.tensor(3.0)], **settings)
    expected = 5.0 if name in ("task_arithmetic", "dare_linear", "breadcrumbs") else 3.0
    assert_close(alone, torch.tensor(expected))
    if "seed" in method.uses:
        assert not torch.equal(method.merge(base, given, seed=1, **settings), merged)
        assert not torch.equal(method.merge(base, given, name="u"), merged)


@pytest.mark.parametrize("ours", ["task_arithmetic", "linear", "slerp", "breadcrumbs"])
def test_equals_mergekit_where_nothing_is_random(ours: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is not installed")
    base, given = models(20, 30, count=2)
    inputs = {str(index): {"x": one} for index, one in enumerate(given)}
    if ours == "slerp":
        theirs = api.merge_state_dicts(inputs, "slerp", parameters={"t": 0.25}, base="0")["x"]
        assert_close(slerp(base, given, weights=[0.75, 0.25]), theirs)
    elif ours == "linear":
        theirs = api.merge_state_dicts(inputs, "linear", parameters={"weight": {"0": 1.0, "1": 2.0}})["x"]
        assert_close(linear(base, given, weights=[1, 2]), theirs)
    else:
        parameters: dict[str, Any] = {"weight": {"0": 1.0, "1": 2.0}, "lambda": 0.5}
        extra = {"density": 0.3, "gamma": 0.1} if ours == "breadcrumbs" else {}
        inputs = {"base": {"x": base}, **inputs}
        theirs = api.merge_state_dicts(inputs, ours, parameters=parameters | extra, base="base")["x"]
        assert_close(METHODS[ours].merge(base, given, weights=[1, 2], lam=0.5, **extra), theirs)


def test_wrong_settings() -> None:
    base, given = models(4)
    with pytest.raises(ConfigError, match="sum other than 0"):
        linear(base, given, weights=[1, -0.5, -0.5])
    with pytest.raises(ConfigError, match="2 models"):
        slerp(base, given)
    with pytest.raises(ConfigError, match="not both 0"):
        slerp(base, given[:2], weights=0)
    with pytest.raises(ConfigError, match="epsilon"):
        della(base, given, density=0.05, epsilon=0.2)
