"""What the tests share: comparisons, nested states as flat dictionaries, outputs together with all gradients.

`Tensors` maps dotted names to tensors ("x", "state.cell.C", "param.A_log"), for inputs and outputs alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import NEGLIGIBLE, RELATIVE

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]


def assert_close(actual: Tensor, expected: Tensor, name: str = "", *, least: float = 0.0) -> None:
    """Fails unless the largest difference is within the tolerance of the narrower dtype.

    It is relative to the expected tensor's largest magnitude, or to `least` where that is larger.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected), f"{name}: integers differ"
        return
    if expected.numel() == 0:
        return
    tolerance = max(RELATIVE[actual.dtype], RELATIVE[expected.dtype])
    a, b = actual.detach().double(), expected.detach().double()
    assert a.isfinite().all(), f"{name}: not finite"
    error, size = (a - b).abs().max().item(), max(b.abs().max().item(), least)
    assert error <= tolerance * size, f"{name}: off by {error:.2e} at magnitude {size:.2e}, allowed {tolerance:.0e}"


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Fails unless both hold the same names and close tensors."""
    assert actual.keys() == expected.keys()
    largest = max((x.abs().max().item() for name, x in expected.items() if name.startswith("grad")), default=0.0)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, name, least=NEGLIGIBLE * largest if name.startswith("grad") else 0.0)


def assert_equal(actual: Tensors, expected: Tensors) -> None:
    """Fails unless both hold the same names and the same bits (NaN equals NaN)."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{name}: bits differ")


def flatten(value: Any, name: str) -> Tensors:
    """Nested named tuples of tensors -> a flat dictionary; None leaves are absent."""
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    fields: Iterable[str] = value._fields
    parts = [flatten(getattr(value, field), f"{name}.{field}" if name else field) for field in fields]
    return {key: tensor for part in parts for key, tensor in part.items()}


def rebuild(template: Any, tensors: Tensors, name: str) -> Any:
    """The inverse of `flatten`, after the structure of `template`; leaves that are absent stay None."""
    if template is None or isinstance(template, Tensor):
        return tensors.get(name)
    return type(template)(*(rebuild(getattr(template, f), tensors, f"{name}.{f}") for f in template._fields))


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Every floating tensor in `dtype`."""
    return {name: x.to(dtype) if x.dtype.is_floating_point else x for name, x in tensors.items()}


def measure(function: Function, tensors: Tensors) -> Tensors:
    """The outputs of `function`, and as "grad ..." the gradients of all its floating inputs.

    The cotangents are random, but depend on an output's name and shape alone: two functions that compute the same
    get the same gradients.
    """
    leaves = {name: x.detach().clone().requires_grad_(x.dtype.is_floating_point) for name, x in tensors.items()}
    outputs = function(leaves)
    terms = [
        (x * cotangent(name, x)).sum() for name, x in outputs.items() if x.dtype.is_floating_point and x.requires_grad
    ]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    total = sum(terms, torch.zeros((), requires_grad=True))
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    found = {
        f"grad {name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(wanted.items(), grads, strict=True)
    }
    return {name: x.detach() for name, x in outputs.items()} | found


def cotangent(name: str, x: Tensor) -> Tensor:
    """Standard normal numbers of x's shape that depend on `name` only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
