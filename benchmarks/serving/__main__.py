"""The serving engine's numbers in one table: exactness first, then the engine alone, then a server on loopback.

    python -m benchmarks.serving                     all but the soak, and benchmarks/results/serving-<processor>.json
    python -m benchmarks.serving --quick             small sizes: shows that everything runs, judges exactness only
    python -m benchmarks.serving --only server       parts of it
    python -m benchmarks.serving --only soak --requests 10000
    OMP_NUM_THREADS=1 python -m benchmarks.serving   on one core

Speeds are ratios of what was measured in turn, on a model of fresh weights. The exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.measure import ROOT, Figure, environment, machine_slug, report_file, table, write_report
from benchmarks.serving import engine, load
from benchmarks.serving.client import served
from benchmarks.serving.soak import soak
from synapse_arch import SynapseConfig, SynapseModel


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are what the goals are about."""

    config: SynapseConfig = field(default_factory=lambda: SynapseConfig.preset("tiny"))
    small: SynapseConfig = field(default_factory=lambda: SynapseConfig.preset("tiny", n_layers=1, d_model=64))
    streams: int = 8
    tokens: int = 64
    rounds: int = 7
    trace_steps: int = 3
    trace_rounds: int = 30
    clients: int = 32
    each: int = 3
    requests: int = 1000
    soak_clients: int = 24


QUICK = Sizes(
    config=SynapseConfig.preset("tiny", n_layers=1, d_model=64), tokens=8, rounds=1, trace_steps=1, trace_rounds=2,
    clients=12, each=1, requests=60,
)  # fmt: skip

MEASUREMENTS: dict[str, Callable[[Sizes], list[Figure]]] = {
    "exactness": lambda s: [engine.exactness(_model(s.config), s.streams, min(s.tokens, 16))],
    "tracing": lambda s: engine.tracing(_model(s.config), s.streams, s.trace_steps, s.trace_rounds),
    "engine": lambda s: [
        engine.overhead(_model(s.config), s.streams, s.tokens, s.rounds),
        engine.throughput(_model(s.config), s.streams, s.tokens, s.rounds),
    ],
    "server": lambda s: _server(s),
    "soak": lambda s: _soak(s),
}
"""Everything that can be measured, in order; the soak only where it is asked for."""


def _model(config: SynapseConfig) -> SynapseModel:
    torch.manual_seed(0)
    model = SynapseModel(config).eval()
    with torch.no_grad():
        model.head.weight[0] = 0.0  # the byte that ends a text is then never the likeliest
    return model


def _server(s: Sizes) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        model = _model(s.config)
        model.save_pretrained(folder)
        threads, slots = str(torch.get_num_threads()), str(s.streams)
        with served(Path(folder), "--threads", threads, "--slots", slots, "--prefill-chunk", "64") as server:
            return [
                load.overhead(server, model, s.streams, s.tokens, s.rounds),
                load.processor_time(server, model, s.streams, s.tokens, s.rounds),
                load.throughput(server, s.streams, s.tokens, s.rounds),
                *load.evenness(server, s.clients, s.tokens, s.each),
            ]


def _soak(s: Sizes) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        _model(s.small).save_pretrained(folder)
        with served(Path(folder), "--threads", "1", "--slots", str(s.streams)) as server:
            return soak(server, s.requests, s.soak_clients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the file.

    Returns:
        0, or 1 where a goal was missed.
    """
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    if options.requests is not None:
        sizes = replace(sizes, requests=options.requests)
    place = environment() | {"load before": os.getloadavg()[0]}
    wanted = options.only or [name for name in MEASUREMENTS if name != "soak"]
    figures: list[Figure] = []
    for index, name in enumerate(wanted, start=1):
        print(f"[{index}/{len(wanted)}] {name} ...", file=sys.stderr)
        figures += MEASUREMENTS[name](sizes)
        if name == "exactness" and not figures[-1].met:
            print(f"Not measured, as the outputs are not right: {', '.join(wanted[index:])}", file=sys.stderr)
            break
    if options.quick:
        figures = [figure if figure.exact else replace(figure, goal=None) for figure in figures]
    print(
        f"{place['cpu']}, {place['threads']} threads, torch {place['torch']}, load {place['load before']:.1f}", end=""
    )
    print("; small sizes: speed is not judged" if options.quick else "")
    print(table(figures))
    path = options.out
    if path is None and not (options.quick or options.only):
        path = ROOT / "benchmarks" / "results" / f"serving-{machine_slug(place)}.json"
    if path is not None:
        write_report(path, place, figures, sizes=asdict(sizes))
    return int(any(figure.met is False for figure in figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; speed is shown but not judged")
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, default=[], metavar="PART",
        help=f"only some of {', '.join(MEASUREMENTS)}",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, help="of the soak (1000); the goal is about 10000")
    parser.add_argument(
        "--out",
        type=report_file,
        help="where the JSON goes; by default a whole run goes to benchmarks/results/, others nowhere",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
