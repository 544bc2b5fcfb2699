"""mlstm against forms that share nothing with it: the paper's parallel form, and the unstabilised equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synapse_arch.ops import MLSTMState, mlstm
from tests.contracts.cases import draw_mlstm
from tests.helpers import Tensors, assert_same, measure


def parallel(z: Tensors) -> Tensors:
    """Beck et al. 2024, appendix A.3: D̃ = log gates, stabilised by its row maxima; C̃ = QKᵀ/√d ∘ D; H = C V / n.

    q, k (B, T, H, K) -> (B, H, T, K). The fresh state's stabiliser 0 is a lower bound of m: n >= 1 in true numbers.
    """
    q, k, v = (z[name].transpose(1, 2) for name in ("q", "k", "v"))
    i, f = (z[name].transpose(1, 2) for name in ("i", "f"))
    length = q.shape[2]
    log_f = torch.log(torch.sigmoid(f))
    gaps = torch.full((*f.shape, length), -torch.inf, dtype=f.dtype)
    for t in range(length):
        for s in range(t + 1):
            gaps[..., t, s] = log_f[..., s + 1 : t + 1].sum(-1)
    log_d = gaps + i[..., None, :]
    m = log_d.amax(-1, keepdim=True).detach()
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5 * (log_d - m).exp()
    h = scores @ v / torch.maximum(scores.sum(-1, keepdim=True).abs(), (-m).exp())
    return {"y": h.transpose(1, 2)}


def unstabilised(z: Tensors) -> Tensors:
    """Equations 19-27 in true numbers: C = f C + i k vᵀ, n = f n + i k, h = Cᵀq / max(|nᵀq|, 1)."""
    scale = z["state.m"].exp()
    C, n = z["state.C"] * scale[..., None, None], z["state.n"] * scale[..., None]
    outputs = []
    for t in range(z["q"].shape[1]):
        q, k, v = z["q"][:, t] * z["q"].shape[-1] ** -0.5, z["k"][:, t], z["v"][:, t]
        i, f = z["i"][:, t].exp()[..., None], z["f"][:, t].sigmoid()[..., None]
        C = f[..., None] * C + (i * k)[..., None] * v[..., None, :]
        n = f * n + i * k
        read, weight = torch.einsum("bhkv,bhk->bhv", C, q), torch.einsum("bhk,bhk->bh", n, q)
        outputs.append(read / weight.abs().clamp(min=1.0)[..., None])
    return {"y": torch.stack(outputs, 1), "C": C, "n": n}


def true_numbers(h: Tensor, state: MLSTMState) -> Tensors:
    scale = state.m.exp()
    return {"y": h, "C": state.C * scale[..., None, None], "n": state.n * scale[..., None]}


def test_equals_the_parallel_form() -> None:
    tensors = {name: x for name, x in draw_mlstm(2, 40).items() if not name.startswith("state")}
    assert_same(measure(lambda z: {"y": mlstm(**z)[0]}, tensors), measure(parallel, tensors))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_the_equations_without_a_stabiliser(backend: str) -> None:
    def ours(z: Tensors) -> Tensors:
        state = MLSTMState(z["state.C"], z["state.n"], z["state.m"])
        return true_numbers(*mlstm(z["q"], z["k"], z["v"], z["i"], z["f"], state, backend=backend, chunk_size=16))

    tensors = draw_mlstm(2, 40)
    assert_same(measure(ours, tensors), measure(unstabilised, tensors))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_only_the_true_memory_counts(backend: str) -> None:
    """(C, n, m) and (C e^-a, n e^-a, m + a) are the same memory."""
    z = draw_mlstm(2, 30)
    inputs = {name: x for name, x in z.items() if not name.startswith("state")}
    state = MLSTMState(z["state.C"], z["state.n"], z["state.m"])
    shifted = MLSTMState(state.C * torch.e**-3, state.n * torch.e**-3, state.m + 3)
    expected = true_numbers(*mlstm(**inputs, state=state, backend=backend))
    assert_same(true_numbers(*mlstm(**inputs, state=shifted, backend=backend)), expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_read_of_nothing_is_zero(backend: str) -> None:
    """q = 0 at a stabiliser so large that e^-m is 0: no 0 / 0."""
    q = torch.zeros(1, 3, 1, 4, requires_grad=True)
    k, v = torch.randn(2, 1, 3, 1, 4)
    h, _ = mlstm(q, k, v, torch.full((1, 3, 1), 200.0), torch.zeros(1, 3, 1), backend=backend)
    assert not h.any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_stabiliser_that_falls_where_a_segment_begins(backend: str) -> None:
    """By e^200, which no float32 holds: nothing decays from one segment into the next."""
    z = {name: x.float() for name, x in draw_mlstm(1, 40).items()}
    segment_ids = torch.arange(40)[None] // 14

    def ours(z: Tensors) -> Tensors:
        state = MLSTMState(z["state.C"], z["state.n"], z["state.m"])
        y, state = mlstm(
            z["q"], z["k"], z["v"], z["i"], z["f"], state, segment_ids=segment_ids, backend=backend, chunk_size=16
        )
        return {"y": y, "C": state.C, "n": state.n, "m": state.m}

    shifted = z | {"state.m": z["state.m"] + 200}
    found, expected = measure(ours, shifted), measure(ours, z)
    assert all(x.isfinite().all() for x in found.values())
    assert_same({"y": found["y"][:, 14:]}, {"y": expected["y"][:, 14:]})
