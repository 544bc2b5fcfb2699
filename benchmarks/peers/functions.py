"""Every recurrence against the loop that defines it and other people's implementation of the same function.

The other implementations are the pure-PyTorch forms of transformers, and of mambapy and mlstm_kernels where these are
installed (`make peers` does so, in an environment of their own). None is timed before its outputs and gradients equal
ours.

B batch, T time, H heads, K and N key and state width, V and P value width.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Figure, Tensors, interleaved, peak_bytes
from benchmarks.parity import difference
from benchmarks.processes import alone
from recipes.malloc import keep_freed_memory
from synapse_arch.model.autosize import available_memory
from synapse_arch.ops import delta_rule, mlstm, selective_scan, ssd

AGREE = 1e-4
"""Largest relative difference of outputs and gradients in float32, ours from theirs."""
PEER_GOAL, LOOP_GOAL = 1.5, 20.0
PATIENCE = 2.0
"""Seconds a call of a peer may take to be called with longer texts as well; one of them is quadratic in T."""
ROOM_LEFT = 2 * 2**30
"""Bytes of memory that stay free when a peer is called."""
ALL_ROUNDS = 10.0
"""Seconds that all rounds of a comparison may take before there are fewer of them."""

Run = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Function:
    """A recurrence with its forms, all of them inputs -> y.

    Attributes:
        draw: (B, T) -> float32 inputs.
        ours: the fast form.
        loop: the reference.
        peers: other people's forms by name.
    """

    draw: Callable[[int, int], Tensors]
    ours: Run
    loop: Run
    peers: dict[str, Run]


def functions() -> dict[str, Function]:
    """The recurrences at the sizes of a layer of width 256."""
    return {
        "ssd": Function(_draw_ssd, partial(_ours, ssd), partial(_ours, ssd, backend="reference"), _ssd_peers()),
        "selective_scan": Function(
            _draw_scan, partial(_ours, selective_scan), partial(_ours, selective_scan, backend="reference"),
            _scan_peers(),
        ),
        "mlstm": Function(
            _draw_mlstm, partial(_ours, mlstm), partial(_ours, mlstm, backend="reference"), _mlstm_peers()
        ),
        "delta_rule": Function(
            _draw_delta, partial(_ours, delta_rule), partial(_ours, delta_rule, backend="reference"), _delta_peers()
        ),
    }  # fmt: skip


def measure(shapes: Sequence[tuple[int, int]], rounds: int, *, looped: int, peaks: bool) -> list[Figure]:
    """Times of the best peer over ours, of the loop over ours, and peak memory over the best peer's.

    Args:
        shapes: (B, T) to measure at.
        rounds: how often each is timed.
        looped: T at which the loops are timed; they are linear in T.
        peaks: whether memory is measured, each form in a process of its own.
    """
    keep_freed_memory()
    figures = []
    for name, function in functions().items():
        batch, length = min(shapes, key=lambda shape: shape[0] * shape[1])
        off = {peer: disagreement(function, run, batch, min(length, 200)) for peer, run in function.peers.items()}
        worst = max(off.values())
        what = f"{name}: outputs and gradients, ours from {', '.join(off)}"
        figures.append(
            Figure(what=what, values=(worst,), unit="relative", goal=AGREE, exact=True, details={"each": off})
        )
        if worst > AGREE:
            continue
        needed: dict[str, float] = {}  # bytes a position
        for batch, length in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
            function = _without_large(name, function, needed, batch * length)
            if not function.peers:
                break
            timed = [_against_peers(name, function, batch, length, backward, rounds) for backward in (False, True)]
            figures += timed
            function = _without_slow(function, timed)
            if peaks and function.peers:
                figures.append(_peaks(name, list(function.peers), batch, length))
                needed = {form: size / (batch * length) for form, size in figures[-1].details["bytes"].items()}
        figures += [_against_loop(name, function, looped, backward, rounds) for backward in (False, True)]
    return figures


def quiet() -> None:
    """Keeps transformers from saying that its kernels are missing: its PyTorch forms are what is measured."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def disagreement(function: Function, peer: Run, batch: int, length: int) -> float:
    """The largest relative difference of outputs and of all gradients."""
    torch.manual_seed(0)
    inputs = function.draw(batch, length)
    return difference(_with_gradients(function.ours, inputs), _with_gradients(peer, inputs))


def _with_gradients(run: Run, inputs: Tensors) -> Tensors:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = run(leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def _job(run: Run, inputs: Tensors, backward: bool) -> Callable[[], object]:
    """One call, with its gradients or without."""
    if not backward:

        def forward() -> object:
            with torch.inference_mode():
                return run(inputs)

        return forward
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def both() -> object:
        return torch.autograd.grad(run(leaves).sum(), list(leaves.values()))

    return both


def _against_peers(name: str, function: Function, batch: int, length: int, backward: bool, rounds: int) -> Figure:
    torch.manual_seed(0)
    inputs = function.draw(batch, length)
    jobs = {peer: _job(run, inputs, backward) for peer, run in {"ours": function.ours, **function.peers}.items()}
    times = interleaved(jobs, rounds, f"{name} {batch} x {length}", limit=ALL_ROUNDS)
    best = [min(times[peer][index] for peer in function.peers) for index in range(len(times["ours"]))]
    kind = "forward and backward" if backward else "forward"
    return Figure(
        what=f"{name}: {kind}, B {batch}, T {length:,}: best peer's time over ours",
        values=tuple(theirs / ours for theirs, ours in zip(best, times["ours"], strict=True)),
        unit="ratio", goal=PEER_GOAL, better="more", details={"seconds": times},
    )  # fmt: skip


def _without_slow(function: Function, timed: Sequence[Figure]) -> Function:
    """The peers that took no longer than PATIENCE."""
    slowest = {
        peer: max(statistics.median(figure.details["seconds"][peer]) for figure in timed) for peer in function.peers
    }
    return replace(function, peers={peer: run for peer, run in function.peers.items() if slowest[peer] <= PATIENCE})


def _without_large(name: str, function: Function, needed: Mapping[str, float], positions: int) -> Function:
    """The peers that need no more memory than there is; who is left out is said on the error stream.

    Args:
        name: the function's.
        function: with its peers.
        needed: bytes a position of those peers that were measured; the others are taken to fit.
        positions: B · T.
    """
    room = available_memory("cpu") - ROOM_LEFT
    large = {peer for peer in function.peers if needed.get(peer, 0.0) * positions > room}
    for peer in sorted(large):
        size = needed[peer] * positions / 1e9
        print(f"{name}: {peer} is not called with {positions:,} positions: it needs {size:.0f} GB", file=sys.stderr)
    return replace(function, peers={peer: run for peer, run in function.peers.items() if peer not in large})


def _against_loop(name: str, function: Function, length: int, backward: bool, rounds: int) -> Figure:
    torch.manual_seed(0)
    inputs = function.draw(1, length)
    jobs = {kind: _job(run, inputs, backward) for kind, run in (("ours", function.ours), ("loop", function.loop))}
    times = interleaved(jobs, rounds, f"{name} loop", limit=ALL_ROUNDS)
    kind = "forward and backward" if backward else "forward"
    ratios = tuple(loop / ours for loop, ours in zip(times["loop"], times["ours"], strict=True))
    what = f"{name}: {kind}, B 1, T {length}: the loop's time over ours"
    return Figure(what=what, values=ratios, unit="ratio", goal=LOOP_GOAL, better="more", details={"seconds": times})


def _peaks(name: str, peers: Sequence[str], batch: int, length: int) -> Figure:
    """Memory that a forward and backward pass adds to a fresh process, ours over the least peer's."""
    found = {form: alone(_added, name, form, batch, length) for form in ("ours", *peers)}
    least = min(size for form, size in found.items() if form != "ours")
    return Figure(
        what=f"{name}: B {batch}, T {length:,}: memory of forward and backward over the best peer's",
        values=(found["ours"] / max(least, 1),), unit="ratio", goal=1.0, details={"bytes": found},
    )  # fmt: skip


def _added(name: str, form: str, batch: int, length: int) -> int:
    torch.manual_seed(0)
    quiet()
    function = functions()[name]
    run = function.ours if form == "ours" else function.peers[form]
    _job(run, function.draw(1, 64), backward=True)()  # what is set up once
    inputs = function.draw(batch, length)
    before = peak_bytes()
    _job(run, inputs, backward=True)()
    return peak_bytes() - before


def _ours(op: Callable[..., Any], inputs: Tensors, **options: Any) -> Tensor:
    y: Tensor = op(**inputs, **options)[0]
    return y


def _draw_ssd(batch: int, length: int) -> Tensors:
    return {
        "x": torch.randn(batch, length, 8, 64), "dt": _uniform(-7, -1, batch, length, 8).exp(),
        "A": -_uniform(0.1, 16, 8), "B": torch.randn(batch, length, 1, 64), "C": torch.randn(batch, length, 1, 64),
        "D": torch.randn(8),
    }  # fmt: skip


def _ssd_peers() -> dict[str, Run]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def run(z: Tensors, chunk: int) -> Tensor:
        y: Tensor = mamba2_chunk_scan(z["x"], z["dt"], z["A"], z["B"], z["C"], chunk_size=chunk, D=z["D"])
        return y

    return {f"transformers, chunk {chunk}": partial(run, chunk=chunk) for chunk in (64, 256)}


def _draw_scan(batch: int, length: int) -> Tensors:
    return {
        "u": torch.randn(batch, length, 512), "dt": _uniform(-7, -1, batch, length, 512).exp(),
        "A": -_uniform(0.1, 16, 512, 16), "B": torch.randn(batch, length, 16), "C": torch.randn(batch, length, 16),
        "D": torch.randn(512),
    }  # fmt: skip


def _scan_peers() -> dict[str, Run]:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(z: Tensors, **options: bool) -> Tensor:
        u, dt, B, C = (z[name].transpose(1, 2) for name in ("u", "dt", "B", "C"))
        y: Tensor = mamba_selective_scan(u, dt, z["A"], B, C, z["D"], **options)
        return y.transpose(1, 2)

    peers: dict[str, Run] = {"transformers": run}
    if importlib.util.find_spec("mambapy"):
        peers["mambapy"] = partial(run, use_mambapy=True)
    return peers


def _draw_mlstm(batch: int, length: int) -> Tensors:
    return {
        "q": torch.randn(batch, length, 4, 32), "k": torch.randn(batch, length, 4, 32),
        "v": torch.randn(batch, length, 4, 64), "i": torch.randn(batch, length, 4),
        "f": 3 + 2 * torch.randn(batch, length, 4),
    }  # fmt: skip


def _mlstm_peers() -> dict[str, Run]:
    from transformers.models.xlstm import modeling_xlstm as xlstm

    steps = partial(xlstm.mlstm_recurrent_sequence_native, dtype_state=torch.float32)

    def run(z: Tensors, chunk: int) -> Tensor:
        q, k, v, i, f = (z[name].transpose(1, 2) for name in ("q", "k", "v", "i", "f"))
        y: Tensor = xlstm.wrap_chunkwise_arbitrary_sequence_length(
            xlstm.mlstm_chunkwise_native_autograd, steps, None, q, k, v, f, i,
            chunk_size=chunk, eps=0.0, return_last_states=False,
        )  # fmt: skip
        return y.transpose(1, 2)

    peers: dict[str, Run] = {f"transformers, chunk {chunk}": partial(run, chunk=chunk) for chunk in (64, 128)}
    return peers | _mlstm_kernels()


def _mlstm_kernels() -> dict[str, Run]:
    """The native chunkwise form of the mLSTM's authors; it takes whole chunks only."""
    if not importlib.util.find_spec("mlstm_kernels"):
        return {}
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd as chunkwise

    def run(z: Tensors, chunk: int) -> Tensor:
        q, k, v, i, f = (z[name].transpose(1, 2) for name in ("q", "k", "v", "i", "f"))
        missing = -q.shape[2] % chunk
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
        i, f = (F.pad(x, (0, missing)) for x in (i, f))
        y: Tensor = chunkwise(q, k, v, i, f, eps=0.0, chunk_size=chunk)
        return y[:, :, : z["q"].shape[1]].transpose(1, 2)

    return {f"mlstm_kernels, chunk {chunk}": partial(run, chunk=chunk) for chunk in (64, 128)}


def _draw_delta(batch: int, length: int) -> Tensors:
    return {
        "q": F.normalize(torch.randn(batch, length, 2, 64), dim=-1),
        "k": F.normalize(torch.randn(batch, length, 2, 64), dim=-1), "v": torch.randn(batch, length, 2, 64),
        "beta": _uniform(0, 2, batch, length, 2), "log_decay": -_uniform(-7, 0, batch, length, 2).exp(),
    }  # fmt: skip


def _delta_peers() -> dict[str, Run]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def run(z: Tensors) -> Tensor:
        scale = z["q"].shape[-1] ** 0.5  # theirs divides the queries by it
        y: Tensor = torch_chunk_gated_delta_rule(z["q"] * scale, z["k"], z["v"], z["log_decay"], z["beta"])[0]
        return y

    return {"transformers": run}


def _uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape)


SHAPES = tuple(itertools.product((1, 8), (512, 8192)))
"""(B, T) of the table."""
