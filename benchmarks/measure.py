"""What every benchmark shares: a figure with its goal, interleaved timing, the table, and where it all was measured."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
Item = TypeVar("Item")
Tensors = dict[str, torch.Tensor]

UNITS: dict[str, tuple[float, str, str]] = {
    "relative": (1, ".1e", ""),
    "share": (1e2, ".1f", " %"),
    "ratio": (1, ".3f", " x"),
    "count": (1, ",.0f", ""),
    "bytes": (1e-9, ".2f", " GB"),
    "tokens/s": (1, ",.0f", " tokens/s"),
    "FLOP/s": (1e-9, ".1f", " GFLOP/s"),
    "bytes/s": (1e-9, ".1f", " GB/s"),
    "seconds": (1e3, ".2f", " ms"),
}
"""Of each unit: how values are scaled and formatted, and what stands behind them."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    Attributes:
        what: a line that says what was measured.
        values: one a repetition; the figure is their median.
        unit: a key of UNITS.
        goal: what the median must reach; None for a number that is only reported.
        better: whether the goal is a floor ("more") or a ceiling ("less").
        exact: it does not depend on the machine's speed.
        details: what else belongs in the file.
    """

    what: str
    values: tuple[float, ...]
    unit: str
    goal: float | None = None
    better: Literal["less", "more"] = "less"
    exact: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The middle of the values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles, or the least and the largest of fewer than four values."""
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, None without a goal; NaN reaches none."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.better == "more" else self.median <= self.goal

    def row(self) -> tuple[str, str, str, str]:
        """What, measured, goal, met."""
        scale, form, suffix = UNITS[self.unit]

        def show(value: float) -> str:
            return f"{scale * value:{form}}"

        low, high = map(show, self.spread)
        measured = f"{show(self.median)}{suffix}" + (f" ({low} to {high})" if low != high else "")
        sign = ">=" if self.better == "more" else "<="
        goal = "" if self.goal is None else f"{sign} {show(self.goal)}{suffix}"
        return self.what, measured, goal, {None: "", True: "yes", False: "NO"}[self.met]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        low, high = self.spread
        numbers = {"median": self.median, "low": low, "high": high, "values": list(self.values), "unit": self.unit}
        return {"what": self.what, **numbers, "goal": self.goal, "better": self.better, "met": self.met} | self.details


def table(figures: Iterable[Figure]) -> str:
    """All figures in columns."""
    rows = [("what", "measured", "goal", "met"), *(figure.row() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 6), *lines[1:]])


def progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on the terminal while they are used up."""
    quiet = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(items, desc=what, leave=False, mininterval=quiet, delay=quiet)  # type: ignore[no-any-return]


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int, what: str, *, limit: float = math.inf
) -> dict[str, list[float]]:
    """Times the runs in turn, so that whatever else the machine does meets them all; the order turns round every time.

    Args:
        runs: what is timed, by name.
        rounds: how often.
        what: said on the progress bar.
        limit: seconds; where all rounds would take longer there are fewer, but three.

    Returns:
        seconds of each run in each round, after one round that is not counted.
    """
    first = sum(seconds(run) for run in runs.values())
    if rounds * first > limit:
        rounds = min(rounds, max(3, int(limit / first)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in progress(range(rounds), what):
        for name in list(runs)[:: -1 if index % 2 else 1]:
            times[name].append(seconds(runs[name]))
    return times


def peak_bytes() -> int:
    """The most memory this process ever held, in bytes.

    Where Linux tells it, the high-water mark of the program itself: getrusage's also counts what the parent held
    before it started this program.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))):
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment() -> dict[str, Any]:
    """Commit, versions, processor and threads, and the GPU where there is one."""
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "modified": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    } | _gpu()


def report_file(text: str) -> Path:
    """What `--out` names: a file that can be written, tried before anything is measured.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        got = f"{text}: {error.strerror}"
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {got}") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    return path


def at_least_one(text: str) -> int:
    """What `--rounds` names.

    Raises:
        argparse.ArgumentTypeError: no whole number, or one below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text}")
    return int(text)


def write_report(path: Path, place: dict[str, Any], figures: Iterable[Figure], **more: Any) -> None:
    """Writes a benchmark's JSON, its folder too where that is missing, and says where it is.

    Args:
        path: the file.
        place: of `environment`.
        figures: what was measured.
        more: what else belongs in the file, such as sizes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": place, **more, "figures": [figure.to_dict() for figure in figures]}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)


@contextmanager
def growing_report(path: Path | None, place: dict[str, Any]) -> Iterator[Callable[[Iterable[Figure]], None]]:
    """A benchmark's JSON that is written beside its place after every part, and takes its place at the end.

    Where the benchmark is broken off, what was measured stays there, and an earlier file is as it was.

    Args:
        path: the file; None for none.
        place: of `environment`.

    Yields:
        what writes all figures so far.
    """
    written: list[Path] = []

    def write(figures: Iterable[Figure]) -> None:
        if path is not None:
            written[:] = [path.with_name(f"{path.name}.partial")]
            write_report(written[0], place, figures)

    try:
        yield write
    except BaseException:
        for part in written:
            print(f"broken off; what was measured is in {part}", file=sys.stderr)
        raise
    for part in written:
        os.replace(part, part.with_suffix(""))
        print(f"all of it is in {path}", file=sys.stderr)


def machine_slug(place: dict[str, Any]) -> str:
    """A file name's worth of an environment: processor and threads."""
    return re.sub(r"[^a-z0-9]+", "-", f"{place['cpu']} {place['threads']} threads".lower()).strip("-")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for package in ("triton", "flash-linear-attention", "mamba-ssm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))):
        return found[1].strip()
    return platform.processor() or platform.machine()
