"""Parity, then speed, on a GPU, in one run of at most eight minutes.

    python -m benchmarks.gpu                        all of it, and benchmarks/results/gpu-<name>.json
    python -m benchmarks.gpu --quick                small sizes: shows that everything runs, on a CPU too
    python -m benchmarks.gpu --only limits parity   parts of it

The file is written beside its place after every part and takes it at the end. A part that fails is a figure that misses
its goal: the others still run.
No backend is timed on an op before it equals the loop in float64. The exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.gpu import decoding, ops, parity, training
from benchmarks.gpu.timing import attempt, limits
from benchmarks.gpu.tuning import few_configs
from benchmarks.measure import ROOT, Figure, environment, growing_report, report_file, table
from synapse_arch import ExpertsConfig, MemoryConfig, SynapseConfig, ThalamusConfig, XLSTMConfig
from synapse_arch.ops import _triton, backends


def _model() -> SynapseConfig:
    """About 350 million parameters that a token is multiplied with."""
    return SynapseConfig(
        vocab_size=16384, d_model=1536, n_layers=8, thalamus=ThalamusConfig(d_state=64),
        xlstm=XLSTMConfig(n_heads=6), experts=ExpertsConfig(n_experts=8, d_expert=1024),
        memory=MemoryConfig(n_heads=12, d_key=64, d_value=64),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are what the goals are about."""

    model: SynapseConfig = field(default_factory=_model)
    widths: parity.Widths = field(default_factory=lambda: parity.Widths(heads=(48, 6, 12), key=128, value=256))
    lengths: tuple[int, ...] = (64, 200)
    product: int = 8192
    moved: int = 2**31
    batch: int = 8
    length: int = 2048
    rounds: int = 10
    batches: tuple[int, ...] = (1, 8)
    compiled: bool = True
    seconds: float = 450.0


QUICK = Sizes(
    model=SynapseConfig(vocab_size=256, d_model=256, n_layers=1, experts=ExpertsConfig(d_expert=64)),
    widths=parity.Widths(), lengths=(70,), product=256, moved=2**20, batch=2, length=70, rounds=2,
    batches=(1,), compiled=False,
)  # fmt: skip


@dataclass
class Run:
    """What later parts need of earlier ones."""

    sizes: Sizes
    device: str
    rate: float = float("nan")
    bandwidth: float = float("nan")
    started: float = field(default_factory=time.perf_counter)
    sound: set[str] = field(default_factory=set)

    def late(self) -> bool:
        """Whether nothing long may begin any more."""
        return time.perf_counter() - self.started > self.sizes.seconds

    def limits(self) -> list[Figure]:
        """How fast the device multiplies and copies."""
        s = self.sizes
        found = limits(self.device, size=s.product, bytes_moved=s.moved, rounds=s.rounds)
        self.rate, self.bandwidth = (figure.median for figure in found)
        return found

    def parity(self) -> list[Figure]:
        """Backends against the loop."""
        found, self.sound = parity.figures(self.sizes.widths, self.sizes.lengths, self.device)
        return found

    def ops(self) -> list[Figure]:
        """Recurrences alone."""
        s = self.sizes
        options = {"rounds": s.rounds, "compiled": s.compiled, "late": self.late}
        return ops.measure(s.widths, s.batch, s.length, self.device, self.sound, **options)  # type: ignore[arg-type]

    def training(self) -> list[Figure]:
        """Training steps."""
        s = self.sizes
        options = {"rounds": s.rounds, "compiled": s.compiled}
        return training.ours(s.model, s.batch, s.length, self.device, self.rate, **options)  # type: ignore[arg-type]

    def peers(self) -> list[Figure]:
        """Training steps of models of fla."""
        s = self.sizes
        options = {"rounds": s.rounds, "late": self.late}
        return training.theirs(s.model, s.batch, s.length, self.device, self.rate, **options)  # type: ignore[arg-type]

    def decoding(self) -> list[Figure]:
        """Decoding steps."""
        s = self.sizes
        options = {"rounds": s.rounds, "compiled": s.compiled}
        return decoding.measure(s.model, s.batches, self.device, self.bandwidth, **options)  # type: ignore[arg-type]


PARTS: dict[str, Callable[[Run], list[Figure]]] = {
    "limits": Run.limits, "parity": Run.parity, "training": Run.training, "decoding": Run.decoding, "ops": Run.ops,
    "peers": Run.peers,
}  # fmt: skip
"""Everything that can be measured, in order; what others need comes first, and what matters least last."""
NEEDS = {"training": ("limits",), "decoding": ("limits",), "ops": ("parity",), "peers": ("limits",)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the file; 1 where a goal was missed or a part failed."""
    options = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        print("There is no CUDA device: --quick runs small sizes on the CPU.", file=sys.stderr)
        return 2
    if device == "cuda" and not options.tune:
        few_configs()
    place = environment() | {"kernels": _triton.missing() or "available", "backends": backends()}
    place["all launches tuned"] = options.tune
    run, figures = Run(QUICK if options.quick else Sizes(), device), []
    path = options.out
    if path is None and not (options.quick or options.only):
        path = ROOT / "benchmarks" / "results" / f"gpu-{slug(place['gpu'])}.json"
    chosen = options.only or list(PARTS)
    wanted = [name for name in PARTS if name in chosen or any(name in NEEDS.get(other, ()) for other in chosen)]
    with growing_report(path, place) as write:
        for index, name in enumerate(wanted):
            seconds = time.perf_counter() - run.started
            print(f"[{index + 1}/{len(wanted)}] {seconds:5.0f} s  {name} ...", file=sys.stderr)
            found = _guarded(name, run)
            figures += [f if f.exact or not options.quick else replace(f, goal=None) for f in found]
            write(figures)
            print(table(found), flush=True)
    print(f"{place.get('gpu', place['cpu'])}, torch {place['torch']}, kernels: {place['kernels']}")
    print(table(figures))
    return int(any(figure.met is False for figure in figures))


def slug(name: str) -> str:
    """A file name's worth of a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _guarded(name: str, run: Run) -> list[Figure]:
    if run.late():
        return [
            Figure(what=f"{name}: not measured, the time was up", values=(1.0,), unit="count", goal=0.0, exact=True)
        ]
    return attempt(name, lambda: PARTS[name](run), run.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is judged but parity")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], metavar="PART", help="only some parts")
    parser.add_argument("--tune", action="store_true", help="let the kernels try all their launches: many minutes more")
    parser.add_argument("--out", type=report_file, help="where the JSON goes; a whole run goes to benchmarks/results/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
