"""Judges a model: `python -m recipes.evaluate --model runs/demo/step-00000480`.

Bits per byte and perplexity of whole documents, speed, what context is worth by its length, and tasks of
lm-evaluation-harness from files; printed, and written as JSON and as a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes import checkpoint, curves
from recipes._accelerate import cpu_only, tqdm
from recipes.adapters import load_lora
from recipes.data import SEPARATOR, Document, Tokenizer, load_corpus, load_tokenizer, open_source
from recipes.evaluation import compressors, held_out_bits
from recipes.harness import run_tasks
from recipes.measures import Stretch, loss_by_position, throughput
from synapse_arch import SynapseModel
from synapse_arch.errors import CheckpointError, ConfigError, DataError, SynapseError, explain

EPILOG = """examples:
  python -m recipes.evaluate --model runs/demo/step-00000480              text held out of the built-in corpus
  python -m recipes.evaluate --model model/ --data notes/ --all           your own text, all of it
  python -m recipes.evaluate --model model/ --adapter runs/finetune/step-00000100
  python -m recipes.evaluate --model model/ --context 65536 --limit 1048576
  python -m recipes.evaluate --model model/ --tasks my_task --task-files tasks/
"""
JSON_FILE, TABLE_FILE, PICTURE_FILE = "evaluation.json", "evaluation.md", "context.png"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to judge and how; see the help text."""

    model: Path
    adapter: Path | None
    data: Path | None
    field: str
    all: bool
    limit: int
    context: int
    rows: int
    tasks: list[str]
    task_files: Path
    task_limit: int | None
    out: Path


def parse(argv: list[str] | None = None) -> Options:
    """Reads the command line (`sys.argv` when None); argparse prints its own complaints and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate",
        description="Judge a SynapseModel on text, by its speed, by length of context, and on tasks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the model")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="folder of a LoRA adapter to put on it")
    parser.add_argument("--data", type=Path, metavar="FILE", help="text, as for training; else the built-in corpus")
    parser.add_argument("--field", default="text", help="the field or column that is the text (text)")
    parser.add_argument("--all", action="store_true", help="read all of the text, not what training holds out")
    parser.add_argument("--limit", type=int, default=512 * 1024, metavar="INT", help="most tokens of text (524288)")
    parser.add_argument(
        "--context", type=int, default=0, metavar="INT", help="length of the context curve, as in 65536; 0 for none"
    )
    parser.add_argument("--rows", type=int, default=8, metavar="INT", help="texts that the curve is over, at most (8)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-evaluation-harness")
    parser.add_argument("--task-files", type=Path, default=Path(), metavar="DIR", help="where their YAML files are (.)")
    parser.add_argument("--task-limit", type=int, metavar="INT", help="examples of each task, at most")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="where it is written")
    options = Options(**vars(parser.parse_args(argv)))
    for name, least in (("limit", 2), ("context", 0), ("rows", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected {least} or more, got {getattr(options, name)}")
    return options


def load_model(folder: Path, adapter: Path | None) -> tuple[SynapseModel, Tokenizer]:
    """The model, its adapter merged in, on the machine's accelerator where there is one, and its tokenizer.

    Raises:
        CheckpointError: a folder holds no model, or no adapter of it. ConfigError: the tokenizer is of another size.
    """
    folder = checkpoint.model_folder(folder, "--model")
    model, tokenizer = SynapseModel.from_pretrained(folder), load_tokenizer(folder)
    if model.config.vocab_size != tokenizer.vocab_size:
        remedy = "put the model's tokenizer.json beside its weights"
        got = tokenizer.vocab_size
        raise ConfigError(explain(f"tokenizer of {folder}", f"{model.config.vocab_size} tokens", got, remedy))
    if adapter is not None:
        model = load_lora(model, checkpoint.newest(adapter)).merge_and_unload()
    if not cpu_only():
        model = model.to("cuda")
    return model.eval(), tokenizer


def read_text(options: Options, tokenizer: Tokenizer) -> tuple[str, Tensor]:
    """What the text is called, and its first tokens (n,), each document opened by a separator.

    Raises:
        DataError: the text cannot be read, or holds nothing.
    """
    documents: Iterable[Document]
    if options.all:
        source = open_source(options.data, field=options.field)
        name, documents = source.name, source.documents()
    else:
        corpus = load_corpus(options.data, field=options.field)
        name, documents = f"{corpus.source}, held out", corpus.held_out
    parts: list[Tensor] = []
    count = 0
    found = (document for document in documents if document.data)
    while count <= options.limit and (group := list(islice(found, 64))):
        for ids in tokenizer.read(group):
            parts += [torch.tensor([SEPARATOR]), ids.long()]
            count += len(ids) + 1
    if count < 2:  # a separator and what is predicted after it
        raise DataError(explain(str(options.data), "some text", "none", "give text with --data"))
    return name, torch.cat(parts)[: options.limit + 1]


def judge(options: Options) -> dict[str, Any]:
    """Every figure that was asked for, as JSON knows them."""
    model, tokenizer = load_model(options.model, options.adapter)
    name, stream = read_text(options, tokenizer)
    steps = 2 + bool(options.context) + bool(options.tasks)
    result: dict[str, Any] = {
        "model": str(options.model),
        "adapter": None if options.adapter is None else str(options.adapter),
    }
    with tqdm(total=steps) as bar:  # what can be refused comes first
        if options.context:
            bar.set_description("context")
            curve: dict[str, Any] = {"length": options.context, "rows": options.rows, "sizes": tokenizer.sizes}
            with tqdm(total=options.context, desc="context", unit="pos", leave=False, delay=1.0) as read:
                parts = loss_by_position(model, stream, **curve, update=read.update)
            result["context"] = [_plain(part) for part in parts]
            bar.update()
        if options.tasks:
            bar.set_description("tasks")
            files, most = options.task_files, options.task_limit
            result["tasks"] = run_tasks(model, tokenizer, options.tasks, files, limit=most)
            bar.update()
        bar.set_description("documents")
        bits = held_out_bits(model, stream, sizes=tokenizer.sizes)
        text = tokenizer.decode_bytes(token for token in stream.tolist() if token != SEPARATOR)
        result["text"] = {"name": name, "tokens": len(stream), "bytes": bits.count}
        result["bits_per_byte"] = {"model": bits.per_byte, **compressors(text)}
        result["perplexity"] = 2 ** (bits.bits / (len(stream) - 1))
        bar.update()
        bar.set_description("speed")
        result["tokens_per_second"] = dataclasses.asdict(throughput(model, batch_size=8, length=512, tokens=64))
        bar.update()
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    text = result["text"]
    title = result["model"] + (f" with {result['adapter']}" if result["adapter"] else "")
    lines = [f"# {title}", "", f"{text['name']}: {text['tokens']:,} tokens, {text['bytes']:,} bytes", ""]
    lines += ["| figure | value |", "|---|---:|"]
    lines += [f"| bits per byte, {name} | {value:.4f} |" for name, value in result["bits_per_byte"].items()]
    lines += [f"| perplexity, a token | {result['perplexity']:.3f} |"]
    lines += [f"| {name}, tokens/s | {value:,.0f} |" for name, value in result["tokens_per_second"].items()]
    if "context" in result:
        lines += ["", "| tokens of context | bits per byte |", "|---:|---:|"]
        lines += [f"| {part['first']:,} to {part['last'] - 1:,} | {_shown(part)} |" for part in result["context"]]
    if "tasks" in result:
        lines += ["", "| task | figure | value |", "|---|---|---:|"]
        lines += [
            f"| {task} | {name} | {value:.4f} |"
            for task, values in result["tasks"].items()
            for name, value in values.items()
        ]
    return "\n".join(lines) + "\n"


def write_table(path: Path, result: dict[str, Any]) -> None:
    """Writes the figures as Markdown.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        path.write_text(table(result), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(explain(str(path), "a file written", error.strerror or error)) from error


def main(argv: list[str] | None = None) -> int:
    """The program; returns 0, or 2 after an error."""
    options = parse(argv)
    try:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(explain(f"--out {options.out}", "a folder to write to", error.strerror)) from error
        result = judge(options)
        checkpoint.write_json(options.out / JSON_FILE, result)
        write_table(options.out / TABLE_FILE, result)
        picture = curves.draw_context(result["context"], options.out / PICTURE_FILE) if options.context else None
    except SynapseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(f"Written to {options.out / JSON_FILE} and {options.out / TABLE_FILE}")
    if options.context:
        print(f"The curve is in {picture}" if picture else f"No picture of the curve: {curves.MISSING}")
    return 0


def _plain(part: Stretch) -> dict[str, Any]:
    return {**dataclasses.asdict(part), "per_byte": part.per_byte if part.bytes else None}


def _shown(part: dict[str, Any]) -> str:
    return "" if part["per_byte"] is None else f"{part['per_byte']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
