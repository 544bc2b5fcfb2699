"""What the recipes cost beside the model: packed documents, and making a batch.

    python -m benchmarks.training            packing keeps 95 % of the throughput, a batch takes under 2 % of a step
    python -m benchmarks.training --quick    a tiny model: shows that everything runs, judges nothing

Both are ratios within one run, timed in turn. The exit status is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import Figure, at_least_one, environment, interleaved, report_file, table, write_report
from recipes.data import Batch, ByteTokenizer, Windows, open_source, segments
from recipes.malloc import keep_freed_memory
from recipes.optim import adamw, set_lr
from recipes.tokens import load, prepare
from synapse_arch import SynapseConfig, SynapseModel

PACKING_GOAL, LOADING_GOAL = 0.95, 0.02
QUICK = {"d_model": 32, "n_layers": 1, "thalamus.head_dim": 16, "experts.d_expert": 32, "xlstm.n_heads": 2}
EPILOG = """examples:
  python -m benchmarks.training --rounds 15 --out training.json
  OMP_NUM_THREADS=1 python -m benchmarks.training --quick
"""


def packing(config: SynapseConfig, *, batch: int, length: int, documents: int, rounds: int) -> list[Figure]:
    """Throughput of training steps on packed windows as a share of that on windows without a boundary, same shape.

    Args:
        config: the model, in float32.
        batch: windows a step.
        length: tokens of each.
        documents: how many documents of equal length a packed window holds.
        rounds: how often both are timed.
    """
    torch.manual_seed(0)
    model = SynapseModel(config).train()
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    set_lr(optimizer, 1e-4)
    ids = torch.randint(1, config.vocab_size, (batch, length + 1))
    packed = ids.clone()
    packed[:, :: length // documents] = 0

    def step(tokens: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            part = Batch(tokens[:, :-1], tokens[:, 1:], segments(tokens[:, :-1]))
            loss = model(part.ids, targets=part.targets, segment_ids=part.segment_ids).loss
            assert loss is not None
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    times = interleaved({"plain": step(ids), "packed": step(packed)}, rounds, "packing")
    shares = tuple(plain / other for plain, other in zip(times["plain"], times["packed"], strict=True))
    what = f"training: throughput on {documents} packed documents a window over that on one, {batch} x {length}"
    plain = Figure(what="training: a step without boundaries", values=tuple(times["plain"]), unit="seconds")
    return [Figure(what=what, values=shares, unit="share", goal=PACKING_GOAL, better="more"), plain]


def loading(step: Figure, *, batch: int, length: int, rounds: int) -> list[Figure]:
    """Time to make a batch from the token cache of the built-in corpus, as a share of a step.

    Args:
        step: seconds of a training step of this shape.
        batch: windows a step.
        length: tokens of each.
        rounds: how many batches.
    """
    source = open_source()
    with tempfile.TemporaryDirectory() as cache:
        tokens = load(prepare(source, ByteTokenizer(), Path(cache)), source.name)
        windows = Windows(tokens.train, length=length, batch_size=batch, seed=0)
        steps = iter(range(rounds + 1))
        times = interleaved({"batch": lambda: windows.batch(next(steps))}, rounds, "batches")["batch"]
    shares = tuple(seconds / step.median for seconds in times)
    return [
        Figure(
            what="training: time to make a batch over that of a step", values=shares, unit="share", goal=LOADING_GOAL
        )
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the file.

    Returns:
        0, or 1 where a goal was missed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="What packing and making batches cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, nothing judged")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="repetitions (9)")
    parser.add_argument("--out", type=report_file, metavar="FILE", help="JSON file to write")
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as training does on a CPU
    place = environment()
    config = SynapseConfig.preset("tiny", **(QUICK if options.quick else {}))
    batch, length = 4, 256
    figures = packing(config, batch=batch, length=length, documents=4, rounds=options.rounds)
    figures += loading(figures[-1], batch=batch, length=length, rounds=10 * options.rounds)
    if options.quick:
        figures = [replace(figure, goal=None) for figure in figures]
    print(f"{place['cpu']}, {place['threads']} threads, torch {place['torch']}, {place['dtype']}")
    print(table(figures))
    if options.out is not None:
        write_report(options.out, place, figures)
    return int(any(figure.met is False for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
