"""Speed beside the peers, and beside the machine's limits, in one table.

    python -m benchmarks.peers                      all of it, and benchmarks/results/peers-<processor>.json
    python -m benchmarks.peers --quick              small sizes: shows that everything runs
    python -m benchmarks.peers --only ops decoding  parts of it

Every figure is a ratio of times taken in turn in one run, each part in a process of its own. No function is timed
before its outputs and gradients equal the peer's. The exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.measure import ROOT, Figure, environment, growing_report, machine_slug, report_file, table
from benchmarks.peers.suite import MEASUREMENTS, QUICK, Sizes, measure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the file; 1 where a goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute; nothing is judged but equality")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=[], metavar="PART", help="only some parts")
    parser.add_argument("--out", type=report_file, help="where the JSON goes; a whole run goes to benchmarks/results/")
    options = parser.parse_args(arguments)
    place, sizes = environment(), QUICK if options.quick else Sizes()
    wanted = [name for name in MEASUREMENTS if not options.only or name in options.only]
    path = options.out
    if path is None and not (options.quick or options.only):
        path = ROOT / "benchmarks" / "results" / f"peers-{machine_slug(place)}.json"
    if path is None:
        print("The figures are shown and not kept; --out FILE keeps them.", file=sys.stderr)
    figures: list[Figure] = []
    with growing_report(path, place) as write:
        for index, name in enumerate(wanted):
            print(f"[{index + 1}/{len(wanted)}] {name} ...", file=sys.stderr)
            found = measure(name, sizes)
            figures += [f if f.exact or not options.quick else replace(f, goal=None) for f in found]
            write(figures)  # after every part: an hour's work is not lost with its last minute
    print(f"{place['cpu']}, {place['threads']} threads, torch {place['torch']}, {place['dtype']}")
    print(table(figures))
    return int(any(figure.met is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
