"""Timing on a device that runs behind its host, and the device's limits."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.measure import Figure

Jobs = dict[str, Callable[[], object]]


def interleaved(jobs: Jobs, rounds: int, device: str, *, repeat: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each job in each round, in turn, so that whatever the device does meets them all.

    A GPU's own clock is read, before and behind `repeat` calls; two rounds before are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for index in range(rounds + 2):
        for name in list(jobs)[:: -1 if index % 2 else 1]:
            taken = _seconds(jobs[name], repeat, device)
            if index > 1:
                times[name].append(taken)
    return times


def _seconds(job: Callable[[], object], repeat: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            job()
        return (time.perf_counter() - start) / repeat
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeat):
        job()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeat


def limits(device: str, *, size: int, bytes_moved: int, rounds: int) -> list[Figure]:
    """The bfloat16 matrix rate, and the bandwidth of a copy (bytes read and written)."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    source = torch.ones(bytes_moved // 4, device=device)
    target = torch.empty_like(source)
    jobs: Jobs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = interleaved(jobs, rounds, device, repeat=5)
    return [
        Figure(
            what=f"limit: bfloat16 product {size}^3", values=tuple(2 * size**3 / t for t in times["product"]),
            unit="FLOP/s",
        ),
        Figure(
            what=f"limit: copy of {bytes_moved / 1e9:.2f} GB, read and written",
            values=tuple(2 * bytes_moved / t for t in times["copy"]), unit="bytes/s",
        ),
    ]  # fmt: skip


def attempt(what: str, measurement: Callable[[], list[Figure]], device: str) -> list[Figure]:
    """Its figures; where it fails, one that misses its goal: a GPU is borrowed for minutes, the rest must still run."""
    try:
        return measurement()
    except Exception as error:  # whatever it was, it is in the file
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"[:2000]
        details = {"error": message}
        return [Figure(what=f"{what}: failures", values=(1.0,), unit="count", goal=0.0, exact=True, details=details)]
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
