"""The core's numbers in one table: exactness first, then speed, memory and what length costs.

    python -m benchmarks.core                     all of it, and benchmarks/results/core-<processor>.json
    python -m benchmarks.core --quick             small sizes: shows that everything runs, judges exactness only
    python -m benchmarks.core --only training     parts of it
    OMP_NUM_THREADS=1 python -m benchmarks.core   on one core

No speed is reported when a fast form differs from its reference. The exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from benchmarks.measure import ROOT, Figure, environment, machine_slug, report_file, table, write_report
from benchmarks.parity import parity
from benchmarks.speed import decoding, length_cost, training_memory, training_rate
from benchmarks.streaming import streaming
from synapse_arch import SynapseConfig


def _trained() -> SynapseConfig:
    """The model whose speed is measured: 8 experts of 512, two a token, and the memory's and cell's defaults."""
    return SynapseConfig(vocab_size=4096, d_model=256, n_layers=4)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are what the goals are about."""

    parity_lengths: tuple[int, ...] = (1, 63, 64, 65, 200)
    streamed: SynapseConfig = field(default_factory=lambda: SynapseConfig.preset("tiny"))
    stream_length: int = 2048
    stream_calls: tuple[int, ...] = (1, 7, 64, 100, 500)
    trained: SynapseConfig = field(default_factory=_trained)
    batch: int = 4
    length: int = 512
    product: int = 2048
    train_rounds: int = 15
    short: int = 2048
    long: int = 32768
    length_rounds: int = 5
    near: int = 100
    far: int = 100_000
    decode_steps: int = 300


QUICK = Sizes(
    parity_lengths=(1, 65), stream_length=256, product=512, batch=2, length=128, train_rounds=3,
    short=256, long=1024, length_rounds=3, far=2000, decode_steps=20,
)  # fmt: skip

MEASUREMENTS: dict[str, Callable[[Sizes], list[Figure]]] = {
    "parity": lambda s: parity(s.parity_lengths),
    "streaming": lambda s: streaming(s.streamed, s.stream_length, s.stream_calls),
    "training": lambda s: training_rate(
        s.trained, batch=s.batch, length=s.length, product=s.product, rounds=s.train_rounds
    ),
    "memory": lambda s: training_memory(s.trained, batch=s.batch, length=s.length),
    "length": lambda s: length_cost(s.trained, short=s.short, long=s.long, rounds=s.length_rounds),
    "decoding": lambda s: decoding(s.trained, near=s.near, far=s.far, steps=s.decode_steps),
}
"""Everything that can be measured, in order."""
SPEED = ("training", "memory", "length", "decoding")


def measure(sizes: Sizes, only: Sequence[str] = ()) -> tuple[list[Figure], list[str]]:
    """Takes the measurements, parity before any speed.

    Args:
        sizes: how much; the goals of speed hold for the default sizes only and are left out for others.
        only: which measurements; none means all.

    Returns:
        The figures, and the names of the measurements left out because parity failed.
    """
    wanted = [name for name in MEASUREMENTS if not only or name in only]
    if "parity" not in wanted and set(wanted) & set(SPEED):
        wanted.insert(0, "parity")
    figures: list[Figure] = []
    for index, name in enumerate(wanted):
        if name in SPEED and any(figure.met is False for figure in figures if figure.exact):
            return figures, wanted[index:]
        print(f"[{index + 1}/{len(wanted)}] {name} ...", file=sys.stderr)
        figures += MEASUREMENTS[name](sizes)
    if sizes != Sizes():
        figures = [figure if figure.exact else replace(figure, goal=None) for figure in figures]
    return figures, []


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the file.

    Returns:
        0, or 1 where a goal was missed.
    """
    options = _parser().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    place = environment()
    figures, left_out = measure(sizes, options.only)
    print(f"{place['cpu']}, {place['threads']} threads, torch {place['torch']}, {place['dtype']}", end="")
    print("; small sizes: speed is not judged" if options.quick else "")
    print(table(figures))
    print("Differences: the largest, relative to the largest magnitude. In brackets the quartiles of the repetitions.")
    if left_out:
        print(f"Not measured, as the numbers are not right: {', '.join(left_out)}")
    path = options.out
    if path is None and not (options.quick or options.only):
        path = ROOT / "benchmarks" / "results" / f"core-{machine_slug(place)}.json"
    if path is not None:
        write_report(path, place, figures, sizes=asdict(sizes))
    return int(any(figure.met is False for figure in figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.core", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute; speed is shown but not judged")
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, default=[], metavar="PART",
        help=f"only some of {', '.join(MEASUREMENTS)}; parity comes before any speed",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=report_file,
        help="where the JSON goes; by default a whole run goes to benchmarks/results/, others nowhere",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
