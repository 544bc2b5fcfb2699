"""How far autosize's predictions are from what is then measured: `python -m benchmarks.autosize`.

Each size is trained a few steps in a process of its own: the fastest step, and the peak of memory above what the
process held before the model was made. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from recipes.malloc import keep_freed_memory
from synapse_arch import SynapseConfig
from synapse_arch.model import autosize

SIZES: dict[str, dict[str, Any]] = {
    "narrow": {"d_model": 128, "n_layers": 6},
    "tiny": {"d_model": 256, "n_layers": 3},
    "deep": {"d_model": 256, "n_layers": 8},
    "wide": {"d_model": 512, "n_layers": 4},
}


def resident(figure: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most so far (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(figure))


def measure(name: str, batch_size: int, length: int) -> dict[str, float]:
    """What the training of one size takes in this process."""
    keep_freed_memory()
    config = SynapseConfig(**SIZES[name])
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    small = SynapseConfig(d_model=64, n_layers=1)
    autosize.step_seconds(small, batch_size=1, length=16, device=device, repeats=1)  # loads what torch loads late
    before = 0 if on_gpu else resident("VmRSS")
    seconds = autosize.step_seconds(config, batch_size=batch_size, length=length, device=device, repeats=5)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    return {"seconds": seconds, "memory": peak - before}


def main() -> None:
    """Prints predicted, measured and their ratio for every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parser.add_argument("--one", choices=SIZES, help="measure one size in this process, as JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.batch_size, options.length)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| size | step predicted, s | measured | ratio | memory predicted, MB | measured | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, fields in SIZES.items():
        shape = {"batch_size": options.batch_size, "length": options.length}
        found = autosize.predict(SynapseConfig(**fields), device=device, **shape)
        arguments = [
            f"--{key.replace('_', '-')}={value}" for key, value in {**shape, "threads": options.threads}.items()
        ]
        command = [sys.executable, "-m", "benchmarks.autosize", "--one", name, *arguments]
        real = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        time, memory = found.seconds / real["seconds"], found.memory / real["memory"]
        times = f"{found.seconds:.3f} | {real['seconds']:.3f} | {time:.2f}"
        print(f"| {name} | {times} | {found.memory / 1e6:.0f} | {real['memory'] / 1e6:.0f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
