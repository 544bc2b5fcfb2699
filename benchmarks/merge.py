"""What a TIES merge of whole checkpoints costs: memory, and time beside mergekit's own run and a plain copy.

    python -m benchmarks.merge                 3 models of 2 GB and their base, once each, and a file in results/
    python -m benchmarks.merge --gb 0.2        smaller; the goals are judged on 2 GB only
    python -m benchmarks.merge --rounds 3      each program three times in turn

Every program runs in a process of its own and is timed from the first byte read to the last one written, without its
imports. "Copy" reads all inputs and writes as much as the result, waiting for the disk as the merge does. mergekit
does not wait for the disk. The exit status is 1 when a goal is missed or the two merges differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    ROOT,
    Figure,
    at_least_one,
    environment,
    machine_slug,
    peak_bytes,
    progress,
    report_file,
    seconds,
    table,
    write_report,
)
from merge.io import Checkpoint
from merge.recipe import Recipe
from merge.run import merge
from merge.select import kept
from merge.vectors import TaskVectors
from merge.writer import Entry, write_weights

WIDTH, FEED_FORWARD, VOCABULARY, HEADS = 1024, 2816, 32000, 16
DENSITY = 0.2
GOAL_GB = 2.0
SPARE_BYTES = 300e6
DIFFERENCE = 1e-6


def llama(gigabytes: float) -> tuple[dict[str, Any], list[Entry]]:
    """The configuration and tensors of a Llama of a size, in float32, as mergekit knows it."""
    layer = {
        "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        "mlp.gate_proj": (FEED_FORWARD, WIDTH), "mlp.up_proj": (FEED_FORWARD, WIDTH),
        "mlp.down_proj": (WIDTH, FEED_FORWARD),
        **{f"self_attn.{one}_proj": (WIDTH, WIDTH) for one in "qkvo"},
    }  # fmt: skip
    shapes = {"lm_head.weight": (VOCABULARY, WIDTH), "model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    around = 4 * 2 * VOCABULARY * WIDTH
    layers = max(1, round((gigabytes * 1e9 - around) / (4 * WIDTH * (4 * WIDTH + 3 * FEED_FORWARD))))
    shapes |= {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()}
    shapes["model.norm.weight"] = (WIDTH,)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": layers,
        "intermediate_size": FEED_FORWARD, "vocab_size": VOCABULARY, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    return config, [Entry(name, torch.float32, shape, sizes[name]) for name, shape in sorted(shapes.items())]


def make(folder: Path, models: int, gigabytes: float) -> None:
    """Writes base, 0, 1, ... as Hugging Face folders: the base random, the models a hundredth of it away."""
    config, entries = llama(gigabytes)

    def tensors(model: int) -> Iterator[tuple[str, Tensor]]:
        for entry in progress(entries, f"model {model}" if model else "base"):
            generator = torch.Generator().manual_seed(len(entry.name))
            tensor = torch.randn(entry.shape, generator=generator)
            if model:
                generator.manual_seed(1000 * model + len(entry.name))
                tensor += 0.01 * torch.randn(entry.shape, generator=generator)
            yield entry.name, tensor

    for model in range(models + 1):
        place = folder / (str(model - 1) if model else "base")
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_weights(place, entries, tensors(model), {}, max_shard_bytes=2**40)


def run_ours(folder: Path, models: int, *, hashes: bool) -> None:
    """Our merge."""
    recipe = Recipe(
        base=str(folder / "base"), models=tuple(str(folder / str(n)) for n in range(models)), density=(DENSITY,)
    )
    merge(recipe, folder / "out", hashes=hashes, progress=False)


def run_mergekit(folder: Path, models: int) -> None:
    """The same merge by mergekit's own program, from folders to a folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    one = [{"model": str(folder / str(n)), "parameters": {"weight": 1.0, "density": DENSITY}} for n in range(models)]
    settings = {"merge_method": "ties", "base_model": str(folder / "base"), "dtype": "float32", "models": one}
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(settings), str(folder / "out"), options)


def run_copy(folder: Path, models: int) -> None:
    """Reads what the merge reads, writes what it writes, and computes nothing."""
    buffer = memoryview(bytearray(1 << 24))
    (folder / "out").mkdir()
    with (folder / "out" / "model.safetensors").open("xb", buffering=0) as target:
        for name in ["base", *map(str, range(models))]:
            with (folder / name / "model.safetensors").open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if name == "base":
                        target.write(buffer[:count])
        os.fsync(target.fileno())


PROGRAMS: dict[str, Callable[[Path, int], None]] = {
    "merge": lambda folder, models: run_ours(folder, models, hashes=False),
    "merge with hashes": lambda folder, models: run_ours(folder, models, hashes=True),
    "mergekit": run_mergekit,
    "copy": run_copy,
}


def measured(program: str, folder: Path, models: int) -> tuple[float, int]:
    """Seconds and peak bytes of a program in a process of its own; its result is in folder/out."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.merge",
        "--worker",
        program,
        "--models",
        str(models),
        "--folder",
        str(folder.resolve()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["seconds"], answer["peak"]


def difference(folder: Path, models: int) -> tuple[float, int]:
    """The largest difference between the two merges but at ties, and how many numbers differ at ties.

    Where several magnitudes of a task vector equal the one at the cut, some stay and some go: ours by index, mergekit's
    in no fixed order. Among millions of float32 there are always some.
    """
    base, ours, theirs = (Checkpoint(folder / name) for name in ("base", "by-merge", "by-mergekit"))
    others = [Checkpoint(folder / str(n)) for n in range(models)]
    assert ours.shapes == theirs.shapes, "the two merges hold other tensors"
    largest, tied = 0.0, 0
    for name in progress(list(ours.shapes), "comparing"):
        gap = (ours.tensor(name) - theirs.tensor(name)).abs_().view(-1)
        apart = (gap > DIFFERENCE).nonzero().view(-1)
        vectors = TaskVectors(base.tensor(name), [other.tensor(name) for other in others])
        at_cut = torch.zeros(len(apart), dtype=torch.bool)
        for index in range(models if len(apart) else 0):
            cut = vectors.cut(index, kept(vectors.n, DENSITY))
            magnitude = torch.cat([block.clone() for block in vectors.magnitudes(index)])
            at_cut |= (magnitude[apart] == cut.value) & (cut.equals > 0)
        gap[apart[at_cut]] = 0
        largest, tied = max(largest, float(gap.max())), tied + int(at_cut.sum())
    return largest, tied


def measure(folder: Path, models: int, gigabytes: float, rounds: int) -> list[Figure]:
    """All figures; goals are set where the checkpoint is of the size they are about."""
    make(folder, models, gigabytes)
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    peaks: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for index in range(rounds):
        for name in list(PROGRAMS)[:: -1 if index % 2 else 1]:
            print(f"[{index + 1}/{rounds}] {name} ...", file=sys.stderr)
            taken, peak = measured(name, folder, models)
            times[name].append(taken)
            peaks[name].append(peak)
            if name in ("merge", "mergekit"):
                shutil.rmtree(folder / f"by-{name}", ignore_errors=True)
                (folder / "out").rename(folder / f"by-{name}")
    base = Checkpoint(folder / "base")
    largest = max(4 * torch.Size(shape).numel() for shape in base.shapes.values())
    size = (folder / "base" / "model.safetensors").stat().st_size
    judged = gigabytes >= GOAL_GB
    what = f"TIES of {models} models of {size / 1e9:.2f} GB"
    largest_gap, tied = difference(folder, models)
    ratio = tuple(b / a for a, b in zip(times["merge"], times["mergekit"], strict=True))
    share = tuple(b / a for a, b in zip(times["merge"], times["copy"], strict=True))
    hashed = tuple(b / a for a, b in zip(times["merge with hashes"], times["mergekit"], strict=True))
    bound = (models + 2) * largest + SPARE_BYTES
    floor = 3.0 if judged else None
    traffic = tuple((models + 2) * size / 1e9 / value for value in times["merge"])
    return [
        Figure(
            what="largest difference from mergekit, ties at the cut aside", values=(largest_gap,), unit="relative",
            goal=DIFFERENCE, exact=True, details={"numbers_that_differ_at_ties": tied},
        ),
        Figure(
            what="peak memory, goal (models + 2) x largest tensor + 300 MB", values=tuple(peaks["merge"]), unit="bytes",
            goal=bound if judged else None, details={"largest_tensor_bytes": largest},
        ),
        Figure(what="peak memory of mergekit", values=tuple(peaks["mergekit"]), unit="bytes"),
        *(Figure(what=f"{what}: {name}", values=tuple(times[name]), unit="seconds") for name in PROGRAMS),
        Figure(what="times faster than mergekit", values=ratio, unit="ratio", goal=floor, better="more"),
        Figure(what="the same with SHA-256 of the inputs", values=hashed, unit="ratio"),
        Figure(what="share of the rate of a plain copy", values=share, unit="share", details={"GB/s": traffic}),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the file.

    Returns:
        0, or 1 where a goal was missed.
    """
    options = _parser().parse_args(arguments)
    if options.worker:
        run = PROGRAMS[options.worker]
        if options.worker == "mergekit":
            import mergekit.merge  # noqa: F401  its imports are not timed
        taken = seconds(lambda: run(options.folder, options.models))
        print(json.dumps({"seconds": taken, "peak": peak_bytes()}))
        return 0
    place = environment()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="merge-benchmark-") as folder:
        figures = measure(Path(folder), options.models, options.gb, options.rounds)
    print(f"{place['cpu']}, {place['threads']} threads, torch {place['torch']}")
    print(table(figures))
    path = options.out or (
        ROOT / "benchmarks" / "results" / f"merge-{machine_slug(place)}.json" if options.gb >= GOAL_GB else None
    )
    if path is not None:
        write_report(path, place, figures)
    return int(any(figure.met is False for figure in figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=GOAL_GB, help="size of each checkpoint (2)")
    parser.add_argument("--models", type=int, default=3, help="how many are merged (3)")
    parser.add_argument("--rounds", type=at_least_one, default=1, help="repetitions of everything (1)")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made for the time being")
    parser.add_argument("--out", type=report_file, help="where the JSON goes; by default only runs of 2 GB are kept")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
