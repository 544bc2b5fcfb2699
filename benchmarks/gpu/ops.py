"""Each recurrence with kernels, forward alone and with its gradients: kernels, chunked, fusible compiled, fla's own.

fla's functions of the same recurrence are called as they are, on inputs made ready for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parity import Case, Widths, cases, narrowed
from benchmarks.gpu.timing import Jobs, interleaved
from benchmarks.measure import Figure, Tensors
from synapse_arch.ops import _triton
from synapse_arch.ops._backends import KERNELS

Made = tuple[Callable[..., Any], list[Tensor]]


def measure(
    widths: Widths, batch: int, length: int, device: str, sound: set[str], *, rounds: int, compiled: bool,
    late: Callable[[], bool],
) -> list[Figure]:  # fmt: skip
    """Seconds of every form and, where there are kernels, how they stand to the rest; `sound` are those with parity."""
    figures = []
    for name, case in cases(widths).items():
        if late():
            break
        torch.manual_seed(0)
        inputs = narrowed({key: x.to(device) for key, x in case.draw(batch, length).items()}, torch.bfloat16)
        for backward in (False, True):
            jobs = _ours(name, case, inputs, sound, backward, compiled)
            jobs, reasons = _working(jobs | _theirs(name, inputs, backward))
            if not jobs:
                continue
            times = interleaved(jobs, rounds, device, repeat=3)
            what = f"{name}: {'forward and backward' if backward else 'forward'}, B {batch}, T {length:,}"
            details = {"cannot run": reasons}
            figures += [
                Figure(what=f"{what}: {form}", values=tuple(values), unit="seconds", details=details)
                for form, values in times.items()
            ]
            kernels = next((name for name in KERNELS if name in times), None)
            if kernels is None:
                continue
            figures += [
                Figure(
                    what=f"{what}: time of {form} over that of our kernels", unit="ratio",
                    values=tuple(a / b for a, b in zip(values, times[kernels], strict=True)),
                    details={"kernels": kernels},
                )
                for form, values in times.items() if form != kernels
            ]  # fmt: skip
    return figures


def _ours(name: str, case: Case, inputs: Tensors, sound: set[str], backward: bool, compiled: bool) -> Jobs:
    forms: Jobs = {}
    for backend in (backend for backend, dtype in case.forms if dtype == torch.bfloat16):
        if f"{name} {backend}" not in sound:
            continue
        call = partial(case.call, backend=backend, packing={})
        if backend != "fusible":
            forms[backend] = _job(lambda z, c=call: c(z)["y"], inputs, backward)
        elif compiled and backward:
            torch.compiler.reset()
            forms["fusible, compiled"] = _job(torch.compile(lambda z, c=call: c(z)["y"]), inputs, backward)
    return forms


def _job(run: Callable[[Tensors], Tensor], inputs: Tensors, backward: bool) -> Callable[[], object]:
    leaves = {key: x.detach().clone().requires_grad_(backward) for key, x in inputs.items()}

    def call() -> object:
        if not backward:
            with torch.no_grad():
                return run(leaves)
        y = run(leaves)
        return torch.autograd.grad(y, [x for x in leaves.values() if x.requires_grad], torch.ones_like(y))

    return call


def _working(jobs: Jobs) -> tuple[Jobs, dict[str, str]]:
    """The jobs that run, and why the others do not: fla refuses some kernels on some GPUs."""
    working, reasons = {}, {}
    for name, job in jobs.items():
        try:
            job()
        except Exception as error:  # whatever stops one form must not stop the others
            reasons[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            working[name] = job
    return working, reasons


def _theirs(name: str, inputs: Tensors, backward: bool) -> Jobs:
    """What fla has for the same recurrence."""
    if _triton.missing():
        return {}
    made = {"ssd": _their_ssd, "delta_rule": _their_delta}.get(name)
    if made is None:
        return {}
    jobs: Jobs = {}
    for form, (function, arguments) in made(inputs).items():
        leaves = [x.detach().contiguous().requires_grad_(backward) for x in arguments]

        def call(f: Callable[..., Any] = function, z: list[Tensor] = leaves) -> object:
            if not backward:
                with torch.no_grad():
                    return f(*z)
            o = f(*z)[0]
            return torch.autograd.grad(o, z, torch.ones_like(o))

        jobs[form] = call
    return jobs


def _their_ssd(inputs: Tensors) -> dict[str, Made]:
    from fla.ops.simple_gla import chunk_simple_gla

    heads = inputs["x"].shape[2]
    k, q = (inputs[key].expand(-1, -1, heads, -1) for key in ("B", "C"))
    v = (inputs["x"] * inputs["dt"][..., None]).bfloat16()
    return {"fla chunk_simple_gla": (partial(chunk_simple_gla, scale=1.0), [q, k, v, inputs["dt"] * inputs["A"]])}


def _their_delta(inputs: Tensors) -> dict[str, Made]:
    """Two writes a position by DeltaProduct; one write by the gated delta rule, for scale."""
    from fla.ops.gated_delta_product import chunk_gated_delta_product
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    k, v, beta = (inputs[key].flatten(1, 2) for key in ("k", "v", "beta"))
    steps = inputs["k"].shape[2]

    def product(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return chunk_gated_delta_product(q, k, v, g, beta, num_householder=steps, scale=1.0)

    q, g = inputs["q"], inputs["log_decay"]
    single = [q, inputs["k"][:, :, 0], inputs["v"][:, :, 0], g, inputs["beta"][:, :, 0]]
    return {
        "fla chunk_gated_delta_product": (product, [q, k, v, g, beta]),
        "fla chunk_gated_delta_rule, one write": (partial(chunk_gated_delta_rule, scale=1.0), single),
    }
