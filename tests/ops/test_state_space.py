"""ssd and selective_scan against closed forms, and against each other."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from synapse_arch.ops import selective_scan, ssd
from tests.contracts.cases import N, P, draw_scan, draw_ssd, normal, packing
from tests.helpers import Tensors, assert_same, measure


def semiseparable(z: Tensors) -> Tensors:
    """Dao & Gu 2024, eq. 6: y = (L ∘ C Bᵀ) (dt x), L_ts = exp(Σ_{s < r <= t} dt_r A), plus the incoming state."""
    heads, length = z["x"].shape[2], z["x"].shape[1]
    B, C = (z[name].repeat_interleave(heads // z[name].shape[2], dim=2) for name in ("B", "C"))
    log_decay = z["dt"] * z["A"]  # (B, T, H)
    rows = []
    for t in range(length):
        after = torch.stack([log_decay[:, s + 1 : t + 1].sum(1) for s in range(t + 1)], dim=1)
        weight = after.exp() * z["dt"][:, : t + 1] * torch.einsum("bhn,bshn->bsh", C[:, t], B[:, : t + 1])
        carried = log_decay[:, : t + 1].sum(1).exp()[..., None] * torch.einsum("bhpn,bhn->bhp", z["state"], C[:, t])
        rows.append(torch.einsum("bsh,bshp->bhp", weight, z["x"][:, : t + 1]) + carried)
    return {"y": torch.stack(rows, 1) + z["D"][:, None] * z["x"]}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_ssd_is_a_semiseparable_matrix(backend: str) -> None:
    tensors = draw_ssd(2, 40)
    ours = measure(lambda z: {"y": ssd(**z, chunk_size=16, backend=backend)[0]}, tensors)
    assert_same(ours, measure(semiseparable, tensors))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_ssd_is_a_selective_scan_with_shared_decays(groups: int) -> None:
    """Each head is a Mamba-1 whose channels and states share one decay."""
    heads, length = 6, 40
    tensors = draw_ssd(2, length) | {
        "x": normal(2, length, heads, P), "dt": normal(2, length, heads).exp(), "A": -normal(heads).exp(),
        "B": normal(2, length, groups, N), "C": normal(2, length, groups, N), "D": normal(heads),
        "state": normal(2, heads, P, N),
    }  # fmt: skip

    def by_heads(z: Tensors) -> Tensors:
        parts = []
        for h in range(heads):
            g = h * groups // heads
            dt = z["dt"][:, :, h, None].expand(-1, -1, P)
            A, D = z["A"][h].expand(P, N), z["D"][h].expand(P)
            B, C = z["B"][:, :, g], z["C"][:, :, g]
            parts.append(selective_scan(z["x"][:, :, h], dt, A, B, C, D, z["state"][:, h]))
        y, states = zip(*parts, strict=True)
        return {"y": torch.stack(y, -2), "s": torch.stack(states, 1)}

    expected = measure(by_heads, tensors)
    assert_same(measure(lambda z: dict(zip(("y", "s"), ssd(**z), strict=True)), tensors), expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_constant_input_reaches_the_fixed_point(backend: str) -> None:
    """h_∞ = dt u B / (1 - exp(dt A)), channel by channel and state by state."""
    z = draw_scan(1, 1)
    u, dt, B, C = (z[name].expand(1, 3000, -1) for name in ("u", "dt", "B", "C"))
    _, state = selective_scan(u, dt.clamp(min=0.3), z["A"], B, C, backend=backend)
    dt, A = dt[0, 0].clamp(min=0.3)[:, None], z["A"]
    expected = dt * z["u"][0, 0][:, None] * z["B"][0, 0] / -torch.expm1(dt * A)
    assert_same({"state": state[0]}, {"state": expected})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("some", [1, 2, 4, 9, 100])
def test_how_many_chunks_step_side_by_side_changes_nothing(
    some: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = draw_scan(2, 70), packing(2, 70) if packed else {}

    def run(z: Tensors, **how: Any) -> Tensors:
        return dict(zip(("y", "state"), selective_scan(**z, **options, **how), strict=True))

    expected = measure(lambda z: run(z, backend="reference"), tensors)
    module = import_module("synapse_arch.ops.selective_scan")  # whose function has its name
    monkeypatch.setattr(module, "AT_ONCE", some * tensors["state"].numel())
    monkeypatch.setattr(module, "FEWEST", 2)
    assert_same(measure(lambda z: run(z, chunk_size=8), tensors), expected)


def test_without_skip_weights_there_is_no_skip() -> None:
    z = draw_ssd(2, 5)
    without, _ = ssd(**{name: x for name, x in z.items() if name != "D"})
    with_skip, _ = ssd(**z)
    assert_same({"y": with_skip - without}, {"y": z["D"][:, None] * z["x"]})
