"""The backend "mamba_ssm" around its kernels, which are replaced by loops: what they are handed makes both ops exact.

The kernels themselves are compared in tests/gpu, and those of ssd on a CPU too, in test_interpreted.py.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch.errors import BackendUnavailable
from synapse_arch.ops import _kernels, _mamba_ssm, _triton
from synapse_arch.ops._backends import LEAST_DECAY, _log_once
from tests.contracts.cases import OPS, Case, packing
from tests.helpers import assert_same, cast, measure
from tests.ops.forms import check_extremes, check_padding, loop, loop_backward

CASES = [case for case in OPS if "mamba_ssm" in case.backends]
BOTH = pytest.mark.parametrize("case", CASES, ids=str)


def _scan_as_linear(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values and decays: every channel is a head with one value."""
    heads = u.shape[1]
    keys, queries = (z.transpose(1, 2)[:, :, None].expand(-1, -1, heads, -1) for z in (B, C))
    steps = dt.transpose(1, 2)
    return queries, keys, (steps * u.transpose(1, 2))[..., None], steps[..., None] * A


def scan_forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    assert all(z.is_contiguous() and z.dtype == u.dtype for z in (u, dt, A, B, C))
    q, k, v, g = _scan_as_linear(u, dt, A, B, C)
    y, _ = loop(q, k, v, None, g, u.new_zeros(*u.shape[:2], A.shape[1], 1))
    return y[..., 0].transpose(1, 2).contiguous(), u.new_zeros(*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])


def scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    assert kept.shape == (*u.shape[:2], -(-u.shape[2] // 2048), 2 * A.shape[1])
    q, k, v, g = _scan_as_linear(u, dt, A, B, C)
    zeros = u.new_zeros(*u.shape[:2], A.shape[1], 1)
    found = loop_backward(q, k, v, None, g, zeros, grad.transpose(1, 2)[..., None], zeros)
    grad_q, grad_k, grad_v, grad_g, _ = found
    grad_v, steps = grad_v[..., 0], dt.transpose(1, 2)
    grad_dt = grad_v * u.transpose(1, 2) + (grad_g * A).sum(-1)
    return (
        (steps * grad_v).transpose(1, 2), grad_dt.transpose(1, 2), (grad_g * steps[..., None]).sum((0, 1)),
        grad_k.sum(2).transpose(1, 2), grad_q.sum(2).transpose(1, 2),
    )  # fmt: skip


def _ssd_as_linear(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Tensor | None) -> Any:
    repeats = x.shape[2] // B.shape[2]
    q, k = (z.repeat_interleave(repeats, 2) for z in (C, B))
    g = _triton.log_decay(dt * A, segments)[..., None].expand(k.shape)
    return q, k, dt[..., None] * x, g


def ssd_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert all(z.is_contiguous() for z in (x, dt, A, B, C, state))
    assert segments is None or (segments.dtype == torch.int32 and not segments[:, 0].any())
    assert ((dt * A) >= LEAST_DECAY * 1.01).all()
    q, k, v, g = _ssd_as_linear(x, dt, A, B, C, segments)
    y, final = loop(q, k, v, None, g, state.transpose(-1, -2))
    return y.to(x.dtype), final.transpose(-1, -2).contiguous()


def ssd_backward(*z: Any) -> tuple[Tensor, ...]:
    x, dt, A, B, C, state, segments, grad, grad_final = z
    q, k, v, g = _ssd_as_linear(x, dt, A, B, C, segments)
    found = loop_backward(q, k, v, None, g, state.transpose(-1, -2), grad, grad_final.transpose(-1, -2))
    grad_q, grad_k, grad_v, grad_g, grad_state = found
    grad_g = grad_g.sum(-1)
    grad_dt = (grad_v * x).sum(-1) + grad_g * A
    grad_B, grad_C = (z.unflatten(2, (B.shape[2], -1)).sum(3) for z in (grad_k, grad_q))
    return dt[..., None] * grad_v, grad_dt, (grad_g * dt).sum((0, 1)), grad_B, grad_C, grad_state.transpose(-1, -2)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    for double in (scan_forward, scan_backward, ssd_forward, ssd_backward):
        monkeypatch.setattr(_mamba_ssm, double.__name__, double)
    monkeypatch.setattr(_kernels, "_elsewhere", lambda _: "")
    monkeypatch.setattr(_mamba_ssm, "obstacle", lambda *_: "")
    monkeypatch.setattr(_mamba_ssm, "_missing", lambda _: "")


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("length", [2, 64, 71])
@BOTH
def test_it_equals_the_definition(case: Case, length: int, packed: bool, dtype: torch.dtype) -> None:
    tensors, options = cast(case.draw(2, length), dtype), packing(2, length) if packed else {}
    expected = measure(lambda z: case.call(z, backend="reference", **options), tensors)
    assert_same(measure(lambda z: case.call(z, backend="mamba_ssm", **options), tensors), expected)


@pytest.mark.usefixtures("loops")
@BOTH
def test_gates_at_their_ends(case: Case) -> None:
    check_extremes(case, "mamba_ssm")


@pytest.mark.usefixtures("loops")
@BOTH
def test_rows_that_are_all_padding_and_a_fresh_state(case: Case) -> None:
    check_padding(case, "mamba_ssm")


@pytest.mark.usefixtures("loops")
def test_a_new_segment_keeps_nothing_however_slow_the_decay() -> None:
    case = next(case for case in CASES if case.name == "selective_scan")
    tensors = case.draw(2, 20)
    tensors |= {"A": -torch.logspace(-25, 2, tensors["A"].numel(), dtype=torch.float64).view_as(tensors["A"])}
    options = {"segment_ids": torch.arange(20).expand(2, -1) // 7}
    expected = case.call(tensors, backend="reference", **options)
    assert_same(case.call(tensors, backend="mamba_ssm", **options), expected)


@pytest.mark.usefixtures("loops")
@pytest.mark.filterwarnings("default")
@BOTH
def test_it_compiles_without_a_break(case: Case) -> None:
    torch.compiler.reset()
    tensors, options = cast(case.draw(2, 20), torch.float32), packing(2, 20)
    call: Any = partial(case.call, backend="mamba_ssm", **options)
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(measure(compiled, tensors), measure(call, tensors))


@pytest.mark.usefixtures("loops")
@BOTH
def test_a_step_needs_no_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scan_forward", "ssd_forward"):
        monkeypatch.setattr(_mamba_ssm, name, None)
    tensors = case.draw(2, 1)
    with torch.no_grad():
        assert_same(case.call(tensors, backend="mamba_ssm"), case.call(tensors, backend="reference"))
    expected = measure(lambda z: case.call(z, backend="reference"), tensors)
    assert_same(measure(lambda z: case.call(z, backend="mamba_ssm"), tensors), expected)


@pytest.mark.usefixtures("loops")
def test_kernels_get_what_they_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.dtype]] = {}
    for name, double in (("scan_forward", scan_forward), ("ssd_forward", ssd_forward)):
        monkeypatch.setattr(
            _mamba_ssm, name, lambda *z, n=name, f=double: (seen.update({n: [x.dtype for x in z[:6]]}), f(*z))[1]
        )  # fmt: skip
    for case in CASES:
        tensors = cast(case.draw(2, 20), torch.float32)
        narrow = {name: x.bfloat16() if name in ("u", "x", "B", "C") else x for name, x in tensors.items()}
        found = measure(lambda z, c=case: c.call(z, backend="mamba_ssm"), narrow)
        for name, x in found.items():
            wide = name.startswith("state") or (name.startswith("grad") and narrow[name[5:]].dtype == torch.float32)
            assert x.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert seen["scan_forward"] == [torch.float32] * 5
    wide, narrow_ = torch.float32, torch.bfloat16
    assert seen["ssd_forward"] == [narrow_, wide, wide, narrow_, narrow_, wide]


@pytest.mark.parametrize(
    ("op", "dtype", "widest", "width", "reason"),
    [
        ("ssd", torch.float32, torch.float32, 64, "bfloat16, not in torch.float32: use autocast"),
        ("ssd", torch.bfloat16, torch.float64, 64, "no float64"),
        ("selective_scan", torch.float64, torch.float64, 16, "no float64"),
        ("selective_scan", torch.float32, torch.float32, 512, "up to 256 wide, not 512"),
    ],
)
def test_what_the_kernels_cannot_take(
    op: str, dtype: torch.dtype, widest: torch.dtype, width: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    there: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    with pytest.raises(BackendUnavailable, match=reason):
        _kernels.choose(op, "mamba_ssm", there, widest, width, 64)
    _log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert _kernels.choose(op, "auto", there, widest, width, 64) == "chunked"
    assert reason in caplog.text


def test_it_is_taken_where_it_is_the_first_that_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(_mamba_ssm, "_missing", lambda _: "")
    monkeypatch.setattr(_triton, "_missing", lambda: "not of this machine")
    _log_once.cache_clear()
    for op in ("ssd", "selective_scan"):
        assert _kernels.choose(op, "auto", there, torch.float32, 64, 64) == "mamba_ssm"
    assert caplog.messages == ["ssd: 'mamba_ssm' runs in place of 'triton': not of this machine"]
    monkeypatch.setattr(_triton, "_missing", lambda: "")
    assert _kernels.choose("ssd", "auto", there, torch.float32, 64, 64) == "triton"


def test_without_a_gpu_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    for case in CASES:
        tensors = case.draw(2, 6)
        with pytest.raises(BackendUnavailable, match=r"'mamba_ssm' cannot run here: .*on cpu; use 'chunked' or 'auto'"):
            case.call(tensors, backend="mamba_ssm")
        case.call(tensors)
    assert not caplog.messages


def test_a_missing_or_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = _mamba_ssm._missing.__wrapped__
    assert find("ssd") == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("selective_scan_cuda", "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, name, None)
    for op in ("ssd", "selective_scan"):
        assert "cannot be imported" in find(op)
        assert "pip install --no-build-isolation mamba-ssm" in find(op)
    for version, reason in (("2.1.0", "2.1.0 is too old"), ("2.2.6.post3", ""), ("3.0", "")):
        package = SimpleNamespace(__version__=version, __path__=[])
        for name in ("selective_scan_cuda", "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"):
            monkeypatch.setitem(sys.modules, name, package)
        for op in ("ssd", "selective_scan"):
            assert reason in find(op)
            assert bool(reason) == bool(find(op))


def test_looking_for_the_package_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(op: str) -> str:
        torch._dynamo.graph_break()
        return op

    monkeypatch.setattr(_mamba_ssm, "_missing", looked)
    call: Any = torch.compile(lambda x: x + len(_mamba_ssm.missing("ssd")), fullgraph=True, backend="eager")
    assert call(torch.zeros(1)).item() == 3
