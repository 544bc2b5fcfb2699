"""The elementwise Functions against their plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from synapse_arch.ops.gating import gate, rms_norm
from tests.helpers import assert_close, assert_same, measure


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_gate(activation: str) -> None:
    drawn = {"x": torch.randn(2, 3, 4, dtype=torch.float64), "logits": 5 * torch.randn(2, 3, 4, dtype=torch.float64)}
    plain = torch.sigmoid if activation == "sigmoid" else F.silu
    ours = measure(lambda z: {"y": gate(z["x"], z["logits"], activation)}, drawn)  # type: ignore[arg-type]
    assert_same(ours, measure(lambda z: {"y": z["x"] * plain(z["logits"])}, drawn))


@pytest.mark.parametrize("shape", [(4, 5), (5,), None], ids=["heads", "channels", "no weight"])
def test_rms_norm(shape: tuple[int, ...] | None) -> None:
    drawn = {"x": torch.randn(2, 3, 4, 5, dtype=torch.float64)}
    if shape:
        drawn["weight"] = torch.randn(shape, dtype=torch.float64)

    def by_hand(z: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scale = (z["x"].square().mean(-1, keepdim=True) + 0.1).rsqrt()
        return {"y": z["x"] * scale * z.get("weight", 1.0)}

    assert_same(measure(lambda z: {"y": rms_norm(z["x"], z.get("weight"), 0.1)}, drawn), measure(by_hand, drawn))


def test_narrow_and_wide_meet() -> None:
    """As under autocast: bf16 activations with float32 weights, each gradient in its input's dtype."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 5, requires_grad=True)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    y = gate(rms_norm(x, weight, 1e-6), logits, "silu")
    assert y.dtype == torch.float32
    y.sum().backward()
    assert [z.grad.dtype for z in (x, weight, logits)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert_close(y.detach(), rms_norm(x, weight, 1e-6).detach() * F.silu(logits).detach())


@pytest.mark.filterwarnings("default")  # the compiler warns itself
@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (5,), None], ids=["heads", "one head", "channels", "no weight"])
def test_compiled_under_autocast(shape: tuple[int, ...] | None) -> None:
    """The gradients too, in float32: torch.compile runs a backward pass under the forward pass's autocast.

    torch 2.11 loses them without an error where a Function returns what it cast to its own dtype or changed in place.
    """
    drawn = {"x": torch.randn(2, 3, shape[0] if shape and len(shape) == 2 else 4, 5)}
    if shape:
        drawn["weight"] = torch.randn(shape)

    def norm(z: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": rms_norm(z["x"], z.get("weight"), 0.1)}

    expected = measure(norm, drawn)
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(torch.compile(norm, fullgraph=True, backend="aot_eager"), drawn)
    assert_same(found, expected)
