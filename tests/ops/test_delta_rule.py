"""delta_rule by what a memory must do, against closed forms, and its triangular inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from synapse_arch.ops import delta_rule
from synapse_arch.ops._wy import unit_lower_inverse
from synapse_arch.ops.delta_rule import Rule
from tests.contracts.cases import draw_delta, draw_gated_product, keys, normal
from tests.helpers import Tensors, assert_close, assert_same, cast, measure

FORMS = pytest.mark.parametrize("backend", ["reference", "chunked"])


def stored(k: Tensor, v: Tensor, beta: float, rule: Rule, backend: str) -> Tensor:
    """The memory (K, V) after the pairs k (T, K), v (T, V) were written with strength beta."""
    k, v = k[None, :, None], v[None, :, None]
    _, state = delta_rule(k, k, v, torch.full(k.shape[:3], beta, dtype=k.dtype), rule=rule, backend=backend)
    return state[0, 0]


@FORMS
def test_orthogonal_facts_are_recalled_exactly(backend: str) -> None:
    k = torch.linalg.qr(normal(16, 16)).Q
    v = normal(16, 5)
    for rule in ("delta", "hebbian"):
        assert_close(k @ stored(k, v, 1.0, rule, backend), v)


@FORMS
def test_the_delta_rule_replaces_and_the_hebbian_adds(backend: str) -> None:
    k, v = keys(1, 8).expand(2, 8), normal(2, 5)
    assert_close(k[0] @ stored(k, v, 1.0, "delta", backend), v[1])
    assert_close(k[0] @ stored(k, v, 1.0, "hebbian", backend), v[0] + v[1])


@FORMS
def test_a_strength_of_two_reflects(backend: str) -> None:
    """I - 2 k kᵀ is its own inverse: writing nothing twice over the same key gives the memory back."""
    k = keys(1, 1, 1, 8).expand(1, 2, 1, 8)
    before = normal(1, 1, 8, 5)
    arguments = (k, k, torch.zeros(1, 2, 1, 5, dtype=k.dtype), torch.full((1, 2, 1), 2.0, dtype=k.dtype))
    _, once = delta_rule(*(z[:, :1] for z in arguments), state=before, backend=backend)
    _, twice = delta_rule(*arguments, state=before, backend=backend)
    assert_close(twice, before)
    assert_close(k[0, 0] @ once[0], -k[0, 0] @ before[0])


@FORMS
def test_nothing_is_normalised_inside(backend: str) -> None:
    q, k, v = normal(1, 1, 1, 4), 3 * normal(1, 1, 1, 4), normal(1, 1, 1, 2)
    o, _ = delta_rule(q, k, v, torch.ones(1, 1, 1, dtype=q.dtype), backend=backend)
    assert_close(o, (q * k).sum(-1, keepdim=True) * v)


def attention(z: Tensors) -> Tensors:
    """The Hebbian rule as decayed linear attention, all positions at once."""
    q, k, v = (z[name].transpose(1, 2) for name in ("q", "k", "v"))
    total = z["log_decay"].transpose(1, 2).cumsum(-1)
    gaps = (total[..., :, None] - total[..., None, :]).exp().tril()
    scores = (q @ k.transpose(-1, -2)) * gaps * z["beta"].transpose(1, 2)[..., None, :]
    return {"y": (scores @ v + total.exp()[..., None] * (q @ z["state"])).transpose(1, 2)}


def products(z: Tensors) -> Tensors:
    """The delta rule as products of the matrices α (I - β k kᵀ)."""
    state, eye = z["state"], torch.eye(z["k"].shape[-1], dtype=torch.float64)
    for t in range(z["q"].shape[1]):
        k, beta = z["k"][:, t, ..., None], z["beta"][:, t, :, None, None]
        step = z["log_decay"][:, t, :, None, None].exp() * (eye - beta * k @ k.transpose(-1, -2))
        state = step @ state + beta * k @ z["v"][:, t, :, None, :]
    return {"state": state, "y": (z["q"][:, -1:, :, None] @ state[:, None])[..., 0, :]}


@FORMS
def test_hebbian_is_linear_attention(backend: str) -> None:
    tensors = draw_delta(2, 50)
    ours = measure(lambda z: {"y": delta_rule(**z, rule="hebbian", backend=backend)[0]}, tensors)
    assert_same(ours, measure(attention, tensors))


@FORMS
def test_delta_is_a_product_of_householder_steps(backend: str) -> None:
    def ours(z: Tensors) -> Tensors:
        o, state = delta_rule(**z, backend=backend)
        return {"state": state, "y": o[:, -1:]}

    tensors = draw_delta(2, 50)
    assert_same(measure(ours, tensors), measure(products, tensors))


@FORMS
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_several_writes_are_tokens_that_do_not_decay(rule: Rule, backend: str) -> None:
    """DeltaProduct: three writes a position equal three positions, of which the first decays and the last is read."""
    T, M = 40, 3
    tensors = draw_gated_product(2, T)
    segments, mask = torch.arange(T).expand(2, -1) // 17, torch.rand(2, T) > 0.2

    def ours(z: Tensors) -> Tensors:
        o, state = delta_rule(**z, rule=rule, segment_ids=segments, mask=mask, backend=backend)
        return {"state": state, "y": o[mask]}

    def virtual(z: Tensors) -> Tensors:
        long = {name: z[name].flatten(1, 2) for name in ("k", "v", "beta", "write")}
        first = (torch.arange(M * T) % M == 0)[:, None]
        packing = {"segment_ids": segments.repeat_interleave(M, 1), "mask": mask.repeat_interleave(M, 1)}
        for name in ("q", "log_decay"):
            long[name] = z[name].repeat_interleave(M, 1)
        long["log_decay"] = long["log_decay"] * first
        o, state = delta_rule(**long, state=z["state"], rule=rule, backend="reference", **packing)
        return {"state": state, "y": o[:, M - 1 :: M][mask]}

    assert_same(measure(ours, tensors), measure(virtual, tensors))


@FORMS
def test_erasing_and_writing_apart(backend: str) -> None:
    """The products α (I - β k kᵀ), and what is added scaled channel by channel."""
    tensors = draw_delta(2, 50) | {"write": torch.rand(2, 50, 4, 5, dtype=torch.float64)}

    def expected(z: Tensors) -> Tensors:
        return products(z | {"v": z["v"] * z["write"] / z["beta"][..., None]})

    def ours(z: Tensors) -> Tensors:
        o, state = delta_rule(**z, backend=backend)
        return {"state": state, "y": o[:, -1:]}

    assert_same(measure(ours, tensors), measure(expected, tensors))


@FORMS
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_writing_as_strong_as_erasing_is_the_classic_rule(rule: Rule, backend: str) -> None:
    tensors = draw_delta(2, 50)
    strength = tensors["beta"][..., None].expand_as(tensors["v"])
    pairs = [
        dict(zip(("y", "s"), delta_rule(**tensors, write=write, rule=rule, backend=backend), strict=True))
        for write in (strength, None)
    ]
    assert_same(*pairs)


@FORMS
def test_two_reflections_rotate(backend: str) -> None:
    """Two writes of strength 2 turn by twice the angle between their keys: no single write is a rotation."""
    half = torch.tensor(0.3, dtype=torch.float64)
    along = torch.tensor([1.0, 0.0], dtype=torch.float64)
    k = torch.stack([along, torch.stack([half.cos(), half.sin()])]).expand(1, 3, 2, 2)[:, :, :, None]
    q, v, beta = normal(1, 3, 1, 2), torch.zeros(1, 3, 2, 1, 1).double(), torch.full((1, 3, 2, 1), 2.0).double()
    _, state = delta_rule(q, k, v, beta, state=along[None, None, :, None], backend=backend)
    assert_close(state[0, 0, :, 0], torch.stack([(6 * half).cos(), (6 * half).sin()]))


@FORMS
def test_no_decay_is_a_decay_of_one(backend: str) -> None:
    tensors = draw_delta(2, 50) | {"log_decay": torch.zeros(2, 50, 4, dtype=torch.float64)}
    without = {name: x for name, x in tensors.items() if name != "log_decay"}
    pairs = [dict(zip(("y", "s"), delta_rule(**z, backend=backend), strict=True)) for z in (without, tensors)]
    assert_same(*pairs)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 31, 32, 33, 64])
def test_unit_lower_inverse(size: int) -> None:
    strict = normal(3, 2, size, size).tril(-1) * 0.5
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + strict)
    assert_close(unit_lower_inverse(strict), expected)
    if size < 6:
        assert gradcheck(unit_lower_inverse, [strict.requires_grad_()])  # nothing above the diagonal is read


def test_it_stays_accurate_over_long_reflections() -> None:
    """Strength 2 and no decay keep every error alive; still float32 is as good after 500 steps as after one."""
    z = cast(draw_delta(1, 500), torch.float32)
    z |= {"beta": torch.full((1, 500, 4), 2.0), "v": torch.zeros_like(z["v"]), "log_decay": torch.zeros(1, 500, 4)}
    _, exact = delta_rule(**cast(z, torch.float64), backend="reference")
    _, fast = delta_rule(**z)
    assert_close(fast, exact)


@pytest.mark.parametrize("kept", ["y", "state"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_a_loss_of_one_output_alone(rule: Rule, kept: str) -> None:
    """The other then has no gradient; with several writes its shape is not theirs."""

    def measured(backend: str) -> Tensors:
        def outputs(z: Tensors) -> Tensors:
            found = dict(zip(("y", "state"), delta_rule(**z, rule=rule, backend=backend), strict=True))
            return {kept: found[kept]}

        return measure(outputs, tensors)

    tensors = draw_gated_product(2, 50)
    assert_same(measured("chunked"), measured("reference"))
