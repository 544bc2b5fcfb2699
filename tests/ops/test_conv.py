"""causal_conv1d against torch's own convolution."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.errors import ConfigError, ShapeError, StateError
from synapse_arch.ops import causal_conv1d, conv
from tests.helpers import Tensors, assert_same, measure


def torch_conv(z: Tensors) -> Tensors:
    """torch.nn.functional.conv1d over the state and the inputs, one group a channel."""
    padded = torch.cat([z["state"], z["x"]], dim=1)
    y = F.conv1d(padded.transpose(1, 2), z["weight"][:, None], z.get("bias"), groups=z["weight"].shape[0])
    return {"y": y.transpose(1, 2), "state": padded[:, padded.shape[1] - z["state"].shape[1] :]}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("width", [2, 3, 4, 7])
def test_equals_torch(width: int, length: int, bias: bool, activation: Literal["silu"] | None) -> None:
    tensors = {"x": (2, length, 5), "weight": (5, width), "bias": (5,), "state": (2, width - 1, 5)}
    drawn = {name: torch.randn(shape, dtype=torch.float64) for name, shape in tensors.items()}
    if not bias:
        del drawn["bias"]

    def theirs(z: Tensors) -> Tensors:
        out = torch_conv(z)
        return out | {"y": F.silu(out["y"])} if activation else out

    ours = measure(lambda z: dict(zip(("y", "state"), causal_conv1d(**z, activation=activation), strict=True)), drawn)
    assert_same(ours, measure(theirs, drawn))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", [2, 3, 50])
def test_what_a_compiler_fuses_is_the_same(
    length: int, activation: Literal["silu"] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"x": (2, length, 5), "weight": (5, 4), "bias": (5,), "state": (2, 3, 5)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in drawn.items()}
    for ids in (None, torch.arange(length).expand(2, -1) // 7):

        def run(z: Tensors, ids: Tensor | None = ids) -> Tensors:
            return dict(zip(("y", "after"), causal_conv1d(**z, activation=activation, segment_ids=ids), strict=True))

        expected = measure(run, tensors)
        with monkeypatch.context() as patch:
            patch.setattr(conv, "_shifted", conv._fusible)
            assert_same(measure(run, tensors), expected)


def test_unknown_activation() -> None:
    with pytest.raises(ConfigError, match="activation: expected None or 'silu', got 'gelu'"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), activation="gelu")  # type: ignore[arg-type]


def test_the_last_column_meets_the_current_position() -> None:
    x = torch.tensor([1.0, 10.0, 100.0]).reshape(1, 3, 1)
    y, state = causal_conv1d(x, torch.tensor([[2.0, 3.0]]), torch.tensor([0.5]), torch.tensor([[[7.0]]]))
    assert y.flatten().tolist() == [2 * 7 + 3 * 1 + 0.5, 2 * 1 + 3 * 10 + 0.5, 2 * 10 + 3 * 100 + 0.5]
    assert state.flatten().tolist() == [100.0]


def test_the_state_holds_the_last_segment_alone() -> None:
    x = torch.arange(1.0, 6.0).reshape(1, 5, 1)
    weight = torch.ones(1, 4)
    ids = torch.tensor([[0, 0, 0, 1, 1]])
    _, state = causal_conv1d(x, weight, segment_ids=ids)
    assert state.flatten().tolist() == [0.0, 4.0, 5.0]
    mask = torch.tensor([[True, True, True, True, False]])
    _, state = causal_conv1d(x, weight, segment_ids=ids, mask=mask)
    assert state.flatten().tolist() == [0.0, 0.0, 4.0]
    _, state = causal_conv1d(x, weight, mask=torch.tensor([[True, False, True, False, True]]))
    assert state.flatten().tolist() == [1.0, 3.0, 5.0]


def narrow(x: Tensor) -> Tensor:
    return x.bfloat16()


def test_bfloat16_is_rounded_once() -> None:
    x, weight = narrow(torch.randn(2, 30, 8)), narrow(torch.randn(8, 4))
    y, state = causal_conv1d(x, weight)
    exact, _ = causal_conv1d(x.float(), weight.float())
    assert torch.equal(y, narrow(exact))
    assert state.dtype == torch.float32


def test_what_does_not_fit() -> None:
    x = torch.randn(2, 5, 3)
    with pytest.raises(ShapeError, match="W at least 2"):
        causal_conv1d(x, torch.ones(3, 1))
    with pytest.raises(StateError, match=r"state: expected \(B, 3, D\)"):
        causal_conv1d(x, torch.ones(3, 4), state=torch.zeros(2, 2, 3))


def test_a_frozen_kernel_gets_no_gradient_and_changes_no_other() -> None:
    x, weight = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    (frozen,) = torch.autograd.grad(causal_conv1d(x, weight, activation="silu")[0].sum(), x)
    (trained,) = torch.autograd.grad(causal_conv1d(x, weight.requires_grad_(), activation="silu")[0].sum(), x)
    assert torch.equal(frozen, trained)


def segments(kind: str, length: int) -> Tensor | None:
    """(3, T): one segment; texts of many lengths that end anywhere; texts shorter than a kernel."""
    if kind == "one":
        return None
    position = torch.arange(length)
    if kind == "short":
        return torch.stack([position, position // 2, position // 3])
    return torch.stack([position // 11, (position >= length - 1).long(), (position >= 1).long() + (position >= 14)])


@pytest.mark.parametrize("kind", ["one", "many", "short"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("length", "width"), [(15, 4), (16, 4), (17, 4), (70, 4), (17, 2), (17, 20)])
def test_onednn_equals_the_shifted_sum(
    length: int, width: int, bias: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In outputs, states and every gradient, also those that are asked for alone."""
    drawn = {"x": torch.randn(3, length, 24), "weight": torch.randn(24, width), "state": torch.randn(3, width - 1, 24)}
    if bias:
        drawn["bias"] = torch.randn(24)
    ids = segments(kind, length)

    def run(z: Tensors) -> Tensors:
        return dict(zip(("y", "state"), causal_conv1d(**z, activation="silu", segment_ids=ids), strict=True))

    fast = measure(run, drawn)
    alone = torch.autograd.grad(run({**drawn, "weight": drawn["weight"].requires_grad_()})["y"].sum(), drawn["weight"])
    drawn["weight"].requires_grad_(False)
    assert conv._by_onednn(drawn["x"]) == (length >= conv.LEAST_FOR_ONEDNN and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(conv, "LEAST_FOR_ONEDNN", length + 1)
    assert_same(fast, measure(run, drawn))
    slow = torch.autograd.grad(run({**drawn, "weight": drawn["weight"].requires_grad_()})["y"].sum(), drawn["weight"])
    torch.testing.assert_close(alone, slow)


@pytest.mark.parametrize("length", [15, 40])
def test_not_even_a_nan_crosses_to_another_segment(length: int) -> None:
    ids = (torch.arange(length) // 5).expand(2, -1)
    x, weight = torch.randn(2, length, 24), torch.randn(24, 4)
    x[:, 5:10] = torch.nan
    x.requires_grad_()
    y, _ = causal_conv1d(x, weight, segment_ids=ids)
    others = torch.ones(length, dtype=torch.bool)
    others[5:10] = False
    assert y[:, others].isfinite().all()
    grad = torch.zeros_like(y)
    grad[:, 5:10] = torch.nan
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad[:, others], torch.zeros_like(x.grad[:, others]))


def test_a_compiled_graph_is_not_broken_by_segments() -> None:
    """How many rows are put right depends on the data, which the compiler must not ask for."""
    ids = segments("many", 40)
    drawn = {"x": torch.randn(3, 40, 24), "weight": torch.randn(24, 4), "bias": torch.randn(24)}

    def run(z: Tensors) -> Tensors:
        return {"y": causal_conv1d(**z, activation="silu", segment_ids=ids)[0]}

    assert_same(measure(torch.compile(run, backend="aot_eager", fullgraph=True), drawn), measure(run, drawn))
