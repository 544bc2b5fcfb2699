"""The command line of a merge: `python -m merge.ties`, `python -m merge`, `synapse-merge`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from merge.methods import METHODS
from merge.recipe import MERGEKIT, Recipe, read_mapping
from merge.report import check_reportable, write_report
from merge.run import merge, open_inputs, plan
from synapse_arch.errors import ConfigError, SynapseError, explain

COMMANDS = {
    "ties": "merge models: this program",
    "upcycle": "make an expert pool out of dense specialists",
    "search": "try settings on held-out data",
}
EPILOG = """methods (--method):
{methods}
  {mergekit} one of mergekit's, tensor by tensor

programs:
{commands}

a model is a SynapseModel folder, a Hugging Face folder, a .safetensors file, or a peft LoRA adapter on the base

examples:
  python -m merge.ties --base base --models french code --density 0.2 --lambda 1.0 --out merged
  python -m merge.ties --base base --models a b c --weights 1 1 2 --trim global --out merged
  python -m merge.ties --base base --models a b --override '*.norm.weight' skip --override 'head.*' copy=0 --out merged
  python -m merge.ties --models a b --method slerp --weights 0.7 0.3 --out between
  python -m merge.ties --base base --models a b --report --out merged
  python -m merge.ties --recipe merge.yaml --out merged --dry-run
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of a merge; what is not given is left out."""
    width = max(map(len, METHODS)) + 5
    epilog = EPILOG.format(
        methods="\n".join(f"  {name:<{width}} {entry.about}" for name, entry in METHODS.items()),
        commands="\n".join(f"  python -m merge.{name:<{width - 8}} {about}" for name, about in COMMANDS.items()),
        mergekit=f"{MERGEKIT}NAME".ljust(width),
    )
    made = argparse.ArgumentParser(
        prog=prog, description="Merge models that were trained from one base.", epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    what = made.add_argument_group("what")
    what.add_argument(
        "--recipe", type=Path, metavar="FILE", help="YAML or JSON with these settings; options given here count more"
    )
    what.add_argument("--base", metavar="PATH", help="what the models were trained from")
    what.add_argument("--models", nargs="+", metavar="PATH", help="what to merge")
    what.add_argument("--out", type=Path, metavar="FOLDER", help="where the merged model goes")
    _add_how(made.add_argument_group("how"))
    _add_run(made.add_argument_group("run"))
    return made


def _add_how(how: Any) -> None:
    """What a recipe holds besides the models."""
    how.add_argument("--method", metavar="NAME", help="see below (ties)")
    how.add_argument(
        "--density",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="of each task vector that is kept (0.2); one, or one a model",
    )
    how.add_argument("--weights", nargs="+", type=float, metavar="W", help="of the models (1); one, or one a model")
    how.add_argument("--lambda", type=float, metavar="SCALE", help="of the merged task vector (1)")
    how.add_argument("--election", choices=("mass", "count"), help="of signs: by sum, or by number of models (mass)")
    how.add_argument(
        "--normalize", choices=("count", "weights"), help="divide by how many agree, or by their weights (count)"
    )
    how.add_argument(
        "--trim", choices=("tensor", "global"), help="each tensor to its density, or each model as a whole (tensor)"
    )
    how.add_argument("--epsilon", type=float, help="spread of della's probabilities (0.1)")
    how.add_argument("--gamma", type=float, metavar="SHARE", help="of outliers that breadcrumbs leaves out (0.01)")
    how.add_argument("--seed", type=int, help="of random drops (0)")
    how.add_argument(
        "--override",
        dest="overrides",
        action="append",
        nargs="+",
        metavar=("PATTERN", "KEY=VALUE"),
        help="for tensors by name: density=0.5 weights=1,2, or skip (keep the base's), or copy=0 (the first model's)",
    )
    how.add_argument(
        "--parameter",
        dest="parameters",
        action="append",
        metavar="KEY=VALUE",
        help="of a method of mergekit's; may be repeated",
    )
    how.add_argument(
        "--align-experts",
        dest="align",
        nargs="?",
        const="weights",
        choices=("weights", "activations"),
        help="first match experts that may have been renumbered: by weights, or by their answers to --calibration",
    )
    how.add_argument("--calibration", metavar="TEXT", help="file to match experts by activations on")
    how.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), help="of the result (the base's)"
    )


def _add_run(run: Any) -> None:
    """What is not part of a recipe."""
    run.add_argument(
        "--dry-run", action="store_true", default=False, help="list every tensor and what would happen; write nothing"
    )
    run.add_argument(
        "--report",
        action="store_true",
        default=False,
        help="add report.md and report.png: how far, where, how they agree",
    )
    run.add_argument("--overwrite", action="store_true", default=False, help="replace the model folder at --out")
    run.add_argument(
        "--trust-base",
        action="store_true",
        default=False,
        help="go on where models share tensors that the base has otherwise",
    )
    run.add_argument(
        "--no-hashes", action="store_true", default=False, help="leave the inputs' SHA-256 out of the model card"
    )
    run.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    run.add_argument("--max-shard", type=float, default=4.0, metavar="GIB", help="largest weights file (4)")


def recipe_of(options: dict[str, Any]) -> Recipe:
    """The recipe that a file and the options on top of it describe.

    Raises:
        ConfigError: something is missing or does not fit.
    """
    path = options.get("recipe")
    values = read_mapping(path) if path is not None else {}
    for key in ("base", "models", "method", "density", "weights", "lambda", "election", "normalize", "trim", "epsilon",
                "gamma", "seed", "align", "calibration", "dtype"):  # fmt: skip
        if key in options:
            values[key] = options[key]
    overrides, parameters = values.get("overrides") or [], values.get("parameters") or {}
    if "overrides" in options and isinstance(overrides, list):  # others are refused with the rest
        values["overrides"] = [*overrides, *map(_override, options["overrides"])]
    if "parameters" in options and isinstance(parameters, dict):
        values["parameters"] = {**parameters, **dict(map(_pair, options["parameters"]))}
    if "models" not in values:
        raise ConfigError(explain("--models", "one or more paths", "none", "see --help"))
    return Recipe.from_dict(values)


def _override(words: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"pattern": words[0]}
    for word in words[1:]:
        key, equals, text = word.partition("=")
        if key == "skip" and not equals:
            values["skip"] = True
        elif key in ("density", "weights", "copy") and text:
            try:
                values[key] = int(text) if key == "copy" else [float(part) for part in text.split(",")]
            except ValueError as cause:
                raise ConfigError(explain(f"--override {words[0]}", f"numbers for {key}", repr(text))) from cause
        else:
            expected = "skip, copy=MODEL, density=SHARE or weights=W,W"
            raise ConfigError(explain(f"--override {words[0]}", expected, repr(word)))
    return values


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(explain("--parameter", "KEY=VALUE", repr(text)))
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m merge.ties") -> int:
    """Merges, or lists what would be done.

    Returns:
        0, or 2 after an error, which is one line.
    """
    made = parser(prog)
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = vars(made.parse_args(words or ["--help"]))
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        return _run(options)
    except SynapseError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # so that what was half written is removed on the way out


def _run(options: dict[str, Any]) -> int:
    recipe = recipe_of(options)
    if options["dry_run"]:
        steps = plan(recipe, open_inputs(recipe))
        print("\n".join(map(str, steps)))
        counts = ", ".join(
            f"{sum(step.action == kind for step in steps)} {kind}" for kind in ("merge", "base", "copy", "equal")
        )
        print(f"{len(steps)} tensors: {counts}; nothing was written")
        return 0
    if "out" not in options:
        raise ConfigError(
            explain("--out", "a folder for the result", "none", "or list what would happen with --dry-run")
        )
    if not 0 < options["max_shard"] * 2**30 < float("inf"):
        raise ConfigError(explain("--max-shard", "a size above 0 in GiB", options["max_shard"]))
    if options["report"]:
        check_reportable(recipe)
    notes = merge(
        recipe,
        options["out"],
        overwrite=options["overwrite"],
        trust_base=options["trust_base"],
        hashes=not options["no_hashes"],
        progress=not options["quiet"],
        max_shard_bytes=int(options["max_shard"] * 2**30),
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if options["report"]:
        try:
            write_report(recipe, options["out"].resolve(), progress=not options["quiet"])
        except KeyboardInterrupt:
            print(f"interrupted; the model is in {options['out']}, the report was not written", file=sys.stderr)
            return 130
    print(f"merged {len(recipe.models)} models by {recipe.method} into {options['out']}")
    return 0
