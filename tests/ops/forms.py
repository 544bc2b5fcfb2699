"""What every other form of a recurrence is asked, beside being equal to the definition; loops in place of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

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


def loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What kernels compute; g (B, T, H, K) has a decay for every key channel, and without beta nothing is erased."""
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None] * state
        added = v[:, t]
        if beta is not None:
            added = beta[:, t, :, None] * (added - (k[:, t, ..., None] * state).sum(-2))
        state = state + k[:, t, ..., None] * added[..., None, :]
        outputs.append((q[:, t, ..., None] * state).sum(-2))
    return torch.stack(outputs, 1), state


def loop_backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor, state: Tensor, grad: Tensor, arriving: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `loop`, by hand: a compiled operator runs where nothing is recorded."""
    decayed, after = [], []
    for t in range(q.shape[1]):
        decayed.append(g[:, t].exp()[..., None] * state)
        _, state = loop(*(x[:, t : t + 1] for x in (q, k, v)), None if beta is None else beta[:, t : t + 1],
                        g[:, t : t + 1], state)  # fmt: skip
        after.append(state)
    found: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "beta", "g")}
    for t in reversed(range(q.shape[1])):
        key, before = k[:, t, ..., None], decayed[t]
        found["q"].append((after[t] * grad[:, t, :, None]).sum(-1))
        arriving = arriving + q[:, t, ..., None] * grad[:, t, :, None]
        added = (key * arriving).sum(-2)
        if beta is None:
            found["k"].append((arriving * v[:, t, :, None]).sum(-1))
            found["v"].append(added)
        else:
            strength, missing = beta[:, t, :, None], v[:, t] - (key * before).sum(-2)
            found["v"].append(strength * added)
            found["beta"].append((added * missing).sum(-1))
            held = -strength * added
            found["k"].append((arriving * (strength * missing)[..., None, :] + before * held[..., None, :]).sum(-1))
            arriving = arriving + key * held[..., None, :]
        found["g"].append((arriving * before).sum(-1))
        arriving = g[:, t].exp()[..., None] * arriving
    return *(torch.stack(parts[::-1], 1) for parts in found.values() if parts), arriving
