"""An expert pool out of dense specialists: Branch-Train-MiX (Sukhbaatar et al. 2024).

    python -m merge.upcycle --base DENSE --experts A B C --out OUT

A dense SynapseModel has a pool of one expert that every token visits (experts.n_experts=1, thalamus.top_k=1). Of
several trained from one such base, each one's feed-forward becomes an expert of the result, all other weights are
averaged, and the router starts anew. The result is to be trained on: until then its router knows nothing, or no more
than what the texts told it. E experts, D model width.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge.checks import check_finite, check_same_tensors, check_tokenizers
from merge.io import Checkpoint, sha256, short_name
from merge.writer import Entry, check_room, check_target, copy_companions, whole_folder, write_weights
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import CheckpointError, ConfigError, ShapeError, SynapseError, explain
from synapse_arch.model._files import write_text
from synapse_arch.model.checkpoint import CONFIG, SCHEMA

ROUTER_STD = 0.02
"""Of a random router's weights, as in a new model."""
READ_BYTES = 16 * 1024
"""Of each text, for a router that starts from texts."""
EXAMPLES = """examples:
  python -m merge.upcycle --base dense --experts code maths prose --out mixture
  python -m merge.upcycle --base dense --experts code prose --include-base --top-k 1 --out mixture
  python -m merge.upcycle --base dense --experts code prose --texts code.txt prose.txt --out mixture

Then train it: SynapseModel.from_pretrained("mixture"). A dense base is made by
  accelerate launch recipes/train.py --set experts.n_experts=1 --set thalamus.top_k=1
"""


@dataclass(frozen=True)
class Mixture:
    """What an upcycling makes.

    Attributes:
        base: the dense model that the specialists were trained from.
        sources: those whose feed-forwards become the experts, E of them.
        config: of the result.
        routers: of each layer's router the weight (E, D) float32.
    """

    base: Checkpoint
    sources: tuple[Checkpoint, ...]
    config: SynapseConfig
    routers: tuple[Tensor, ...]

    def entries(self) -> list[Entry]:
        """What is written, in order: wider dtypes first, then by name."""
        e = len(self.sources)
        entries = []
        for name, shape in self.base.shapes.items():
            kind, dtype = _kind(name), self.base.dtypes[name]
            new = {"experts": (e, *shape[1:]), "ids": (e,), "router": (e, *shape[1:]), "zeros": (e,) * len(shape)}
            fitted = new.get(kind, shape)
            entries.append(Entry(name, dtype, fitted, math.prod(fitted) * dtype.itemsize))
        return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))

    def tensor(self, entry: Entry) -> Tensor:
        """One tensor of the result; one tensor of each source is held for it.

        Raises:
            ShapeError: NaN or infinite numbers, or integers that differ.
        """
        kind, name = _kind(entry.name), entry.name
        if kind == "ids":
            return torch.arange(len(self.sources), dtype=entry.dtype)
        if kind == "zeros":
            return torch.zeros(entry.shape, dtype=entry.dtype)
        if kind == "router":
            return self.routers[int(name.split(".")[1])].to(entry.dtype)
        tensors = [source.tensor(name) for source in self.sources]
        for source, tensor in zip(self.sources, tensors, strict=True):
            check_finite(name, tensor, source.label)
        if kind == "experts":
            return torch.cat(tensors).to(entry.dtype)
        if entry.dtype.is_floating_point:
            total = sum((tensor.double() for tensor in tensors), torch.zeros(entry.shape, dtype=torch.float64))
            return (total / len(tensors)).to(entry.dtype)
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise ShapeError(explain(name, "the same integers in every specialist", "others"))
        return tensors[0]


def _kind(name: str) -> str:
    """What becomes of a tensor: "experts", "ids", "router", "zeros", or "mean"."""
    ends = {
        ".experts.w_in": "experts", ".experts.w_out": "experts", ".experts.expert_ids": "ids",
        ".thalamus.router.weight": "router", ".thalamus.router_bias": "zeros", ".thalamus.pathways": "zeros",
    }  # fmt: skip
    return next((kind for end, kind in ends.items() if name.endswith(end)), "mean")


def mixture(
    base: Path,
    experts: Sequence[Path],
    *,
    include_base: bool = False,
    top_k: int = 2,
    labels: Sequence[str] | None = None,
    texts: Sequence[Path] | None = None,
    seed: int = 0,
) -> Mixture:
    """Opens the models and decides everything but the weights.

    Args:
        base: folder of a dense SynapseModel.
        experts: folders of specialists trained from it.
        include_base: the base's own feed-forward becomes the last expert and counts in the averages.
        top_k: experts a token visits.
        labels: names of the experts; their folders' names when None.
        texts: one file an expert, whose kind of text it is for: the router then starts with a row for each that points
            to where the base's mean signal on it lies, apart from the mean of all. None starts at random.
        seed: of a random router.

    Raises:
        ConfigError: a model that is not dense, too few models, or counts that do not fit.
        CheckpointError, ShapeError: a model that cannot be read, is none of ours, or of other sizes or tokens.
    """
    paths = [*experts, *([base] if include_base else [])]
    reference = Checkpoint(base)
    dense = _config(reference)
    _check_counts(len(paths), top_k, labels, texts)
    sources = tuple(Checkpoint(path) for path in paths)
    for source in sources:
        check_same_tensors(reference, source)
    check_tokenizers(reference, sources)
    values = dense.to_dict()
    names = list(labels) if labels is not None else [short_name(path, paths) for path in paths]
    values["experts"] |= {"n_experts": len(paths), "labels": names}
    values["thalamus"] |= {"top_k": top_k}
    config = SynapseConfig.from_dict(values)
    if texts is not None:
        return Mixture(reference, sources, config, _from_texts(base, texts))
    generator = torch.Generator().manual_seed(seed)
    shape = (len(paths), config.d_model)
    routers = (ROUTER_STD * torch.randn(shape, generator=generator) for _ in range(config.n_layers))
    return Mixture(reference, sources, config, tuple(routers))


def _config(base: Checkpoint) -> SynapseConfig:
    if base.metadata.get("schema") != SCHEMA:
        got = base.metadata.get("schema")
        raise CheckpointError(explain(f"{base.label}: schema", SCHEMA, got, "only SynapseModels can be upcycled"))
    config = SynapseConfig.from_dict(json.loads(base.metadata["config"]))
    if config.n_experts != 1:
        expected = "a dense model: experts.n_experts=1, thalamus.top_k=1"
        remedy = "pools of several experts are merged by python -m merge.ties --align-experts"
        raise ConfigError(explain(base.label, expected, f"n_experts={config.n_experts}", remedy))
    return config


def _check_counts(experts: int, top_k: int, labels: Sequence[str] | None, texts: Sequence[Path] | None) -> None:
    if experts < 2:
        raise ConfigError(explain("--experts", "two or more, the base included where it is", experts))
    if not 1 <= top_k <= experts:
        raise ConfigError(explain("--top-k", f"1 to {experts}, the number of experts", top_k))
    for name, given in (("--labels", labels), ("--texts", texts)):
        if given is not None and len(given) != experts:
            raise ConfigError(
                explain(name, f"{experts}, one an expert, the base last where it is included", len(given))
            )


@torch.no_grad()
def _from_texts(base: Path, texts: Sequence[Path]) -> tuple[Tensor, ...]:
    """Of each layer (E, D): unit vectors from the mean signal over all texts to the mean over each one."""
    model = SynapseModel.from_pretrained(base)
    if (base / "tokenizer.json").is_file() or model.config.vocab_size > 256:
        raise ConfigError(explain("--texts", "a base that reads bytes", "a tokenizer of its own", "leave --texts away"))
    heard: list[list[Tensor]] = [[] for _ in range(model.config.n_layers)]
    routers = [module for name, module in model.named_modules() if name.endswith("thalamus.router")]

    def listen(signals: list[Tensor]) -> Any:
        def hear(router: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            signals.append(inputs[0].double().mean((0, 1)))

        return hear

    for router, signals in zip(routers, heard, strict=True):
        router.register_forward_pre_hook(listen(signals))
    for path in texts:
        try:
            text = path.read_bytes()[:READ_BYTES]
        except OSError as cause:
            raise ConfigError(
                explain(f"--texts {path}", "a readable text", f"{type(cause).__name__}: {cause}")
            ) from cause
        if not text:
            raise ConfigError(explain(f"--texts {path}", "some text", "an empty file"))
        heard_before = [len(signals) for signals in heard]
        model(torch.tensor([list(text)]))
        for signals, count in zip(heard, heard_before, strict=True):
            signals[count:] = [torch.stack(signals[count:]).mean(0)]
    means = (torch.stack(signals) for signals in heard)
    return tuple(nn.functional.normalize(mean - mean.mean(0), dim=-1).float() for mean in means)


def upcycle(made: Mixture, out: Path, *, overwrite: bool = False, progress: bool = True) -> None:
    """Writes a mixture as a SynapseModel folder, which appears whole or not at all.

    Args:
        made: what `mixture` returned.
        out: the folder.
        overwrite: replaces a model folder that is there.
        progress: shows a bar with the time left.

    Raises:
        SynapseError: of the kind that says what is wrong; nothing is left at `out` that was not there.
    """
    check_target(out, [made.base.path, *(source.path for source in made.sources)], overwrite=overwrite)
    entries = made.entries()
    check_room(out, sum(entry.bytes for entry in entries))
    config = made.config.to_dict()
    header = {**made.base.metadata, "config": json.dumps(config)}
    described = {"schema": SCHEMA, "library_version": made.base.metadata["library_version"], **config}
    with whole_folder(out) as folder:
        copy_companions(made.base.path, folder)
        (folder / CONFIG).unlink(missing_ok=True)
        write_text(folder / CONFIG, json.dumps(described, indent=2) + "\n")
        write_weights(folder, entries, _stream(made, entries, progress), header, max_shard_bytes=4 * 2**30)
        write_text(folder / "README.md", _card(made))


def _stream(made: Mixture, entries: Sequence[Entry], progress: bool) -> Iterator[tuple[str, Tensor]]:
    shown: Any = entries
    if progress:
        from tqdm import tqdm

        shown = tqdm(entries, desc="upcycling", unit="tensor", leave=False)
    for entry in shown:
        yield entry.name, made.tensor(entry)


def _card(made: Mixture) -> str:
    labels = made.config.experts.labels if made.config.experts else None
    rows = [
        f"| {label} | `{source.label}` | `{sha256(source.files, threading.Event())}` |"
        for label, source in zip(labels or (), made.sources, strict=True)
    ]
    top_k = made.config.thalamus.top_k
    return "\n".join([
        "---", "tags:", "- merge", "- upcycle", "---", "", "# Mixture of dense specialists", "",
        f"{len(rows)} feed-forwards as experts of one pool, {top_k} a token, everything else averaged, the router new",
        f"(Branch-Train-MiX, Sukhbaatar et al. 2024), from the base `{made.base.label}`. To be trained on.", "",
        "| expert | path | SHA-256 of the weights |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


def parse(arguments: Sequence[str] | None) -> Mapping[str, Any]:
    """The command line's options."""
    made = argparse.ArgumentParser(
        prog="python -m merge.upcycle", description="Make an expert pool out of dense specialists of one base.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("--base", type=Path, required=True, metavar="PATH", help="the dense model they were trained from")
    made.add_argument("--experts", type=Path, nargs="+", required=True, metavar="PATH", help="the specialists")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the result goes")
    made.add_argument("--include-base", action="store_true", help="the base's feed-forward becomes one more expert")
    made.add_argument("--top-k", type=int, default=2, help="experts a token visits (2)")
    made.add_argument("--labels", nargs="+", metavar="NAME", help="of the experts (the folders' names)")
    router = made.add_mutually_exclusive_group()
    router.add_argument("--seed", type=int, default=0, help="of the router, which starts at random (0)")
    router.add_argument(
        "--texts", type=Path, nargs="+", metavar="FILE", help="a text for each expert: the router starts from them"
    )
    made.add_argument("--overwrite", action="store_true", help="replace the model folder at --out")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return vars(made.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program.

    Returns:
        0, or 2 after an error, which is one line.
    """
    options = dict(parse(arguments))
    out, overwrite, quiet = (options.pop(name) for name in ("out", "overwrite", "quiet"))
    try:
        upcycle(mixture(**options), out, overwrite=overwrite, progress=not quiet)
    except SynapseError as error:
        print(f"python -m merge.upcycle: {error}", file=sys.stderr)
        return 2
    print(f"{out}: load it with SynapseModel.from_pretrained({str(out)!r}) and train it on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
