"""How far autosize's predictions are from what is then measured: `python -m benchmarks.autosize`.

Each size is trained a few steps in processes of its own. One takes steps of one layer, of two and of all in turns, so
that what else the machine does slows prediction and measurement alike; one finds the peak of memory above what the
process held before the model was made.

    python -m benchmarks.autosize                                  every size; its batches and widths are in SIZES
    python -m benchmarks.autosize --sizes tiny wide --out a.json   two of them, kept
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import Figure, environment, report_file, write_report
from recipes.malloc import keep_freed_memory
from synapse_arch import SynapseConfig
from synapse_arch.model import autosize

SIZES: dict[str, dict[str, int]] = {
    "narrow": {"d_model": 128, "n_layers": 6, "batch_size": 4, "length": 256},
    "many rows": {"d_model": 128, "n_layers": 4, "batch_size": 16, "length": 128},
    "long": {"d_model": 128, "n_layers": 4, "batch_size": 1, "length": 2048},
    "tiny": {"d_model": 256, "n_layers": 3, "batch_size": 4, "length": 256},
    "deep": {"d_model": 256, "n_layers": 8, "batch_size": 4, "length": 256},
    "wide": {"d_model": 512, "n_layers": 4, "batch_size": 4, "length": 256},
}


def resident(figure: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most so far (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(figure))


def measure(name: str, what: str) -> list[float]:
    """Predicted and measured seconds, or bytes, of one size in this process."""
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = dict(SIZES[name])
    shape: dict[str, Any] = {"batch_size": size.pop("batch_size"), "length": size.pop("length"), "device": device}
    config = SynapseConfig(**size)
    if what == "seconds":
        depths = [replace(config, n_layers=layers) for layers in (1, 2, config.n_layers)]
        one, two, whole = autosize.fastest([autosize.stepper(depth, **shape) for depth in depths], seconds=10)
        return [autosize.deepened(one, two, config.n_layers), whole]
    first = autosize.stepper(SynapseConfig(d_model=64, n_layers=1), batch_size=1, length=16, device=device)
    first()  # loads what torch loads late
    before = 0 if device == "cuda" else resident("VmRSS")
    autosize.fastest([autosize.stepper(config, **shape)], seconds=0)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return [autosize.training_memory(config, **shape), peak - before]


def main() -> None:
    """Prints predicted, measured and their ratio for every size; writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES), metavar="NAME")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "WHAT"), help="one figure in this process, as JSON")
    parser.add_argument("--out", type=report_file, metavar="FILE", help="JSON file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    place, figures = environment(), []
    print("| size | step predicted, s | measured | ratio | memory predicted, MB | measured | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.sizes:
        cells = []
        for what, unit, digits in (("seconds", 1.0, 3), ("memory", 1e6, 0)):
            command = [sys.executable, "-m", "benchmarks.autosize", "--threads", str(options.threads)]
            command += ["--one", name, what]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            details = {"predicted": found[0], "measured": found[1], "size": SIZES[name]}
            title = f"autosize: {what} of {name}, predicted over measured"
            figures.append(Figure(what=title, values=(found[0] / found[1],), unit="ratio", details=details))
            cells += [*(f"{value / unit:.{digits}f}" for value in found), f"{found[0] / found[1]:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.out is not None:
        write_report(options.out, place, figures)


if __name__ == "__main__":
    main()
