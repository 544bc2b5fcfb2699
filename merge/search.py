"""Settings of a merge chosen on held-out text: python -m merge.search --recipe r.yaml --data held_out.

Every candidate is merged in memory and reads the text as `recipes.evaluation.held_out_bits` does; what counts is the
mean over the texts of bits per byte, so each kind of text counts alike. The base, each specialist and their average are
read beside them. Every trial is kept as a line of trials.jsonl when it ends: a search that was stopped goes on, and a
wider one tries only what is new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge.adapters import CONFIG as ADAPTER_CONFIG
from merge.candidates import DENSITIES, LAMBDAS, epsilon_of, grid, run_grid, run_optuna
from merge.io import short_name
from merge.methods import METHODS
from merge.recipe import SETTINGS, Recipe
from merge.run import calibration_text, open_inputs, stream
from recipes.data import SEPARATOR, Tokenizer, load_tokenizer, open_source
from recipes.evaluation import held_out_bits
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError, DataError, SynapseError, explain

NOTHING = 1e-8
"""Weights that sum to less cannot be averaged with."""
TRIALS, BEST, TABLE, TEXT = "trials.jsonl", "best.yaml", "search.json", "search.md"
TRIED = ("density", "lambda")
EXAMPLES = """examples:
  python -m merge.search --recipe merge.yaml --data held_out.txt --out search
  python -m merge.search --recipe merge.yaml --data code.txt prose.txt --test code2.txt prose2.txt --out search
  python -m merge.search --recipe merge.yaml --data text/ --methods ties task_arithmetic --lambdas 0.5 1 --out search
  python -m merge.search --recipe merge.yaml --data text/ --optuna 40 --out search

Then merge: python -m merge.ties --recipe search/best.yaml --out merged
"""


def read_text(path: Path, tokenizer: Tokenizer) -> Tensor:
    """A text file, every document of a file of many, or all of a folder, as one stream of ids (n,).

    Raises:
        DataError: nothing there, or no text.
    """
    documents = [document for document in open_source(path).documents() if document.data]
    if not documents:
        raise DataError(explain(str(path), "some text", "none"))
    opening = torch.tensor([SEPARATOR], dtype=tokenizer.dtype)
    return torch.cat([part for ids in tokenizer.read(documents) for part in (opening, ids)])


@dataclass
class Judge:
    """Reads texts with models of one configuration.

    Attributes:
        texts: streams by name.
        model: takes the weights of every candidate in turn.
        tokenizer: what made the streams.
    """

    texts: Mapping[str, Tensor]
    model: SynapseModel
    tokenizer: Tokenizer

    def bits(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, float]:
        """Bits per byte of each text, with these weights."""
        slots = self.model.state_dict()
        for name, tensor in tensors:
            slots[name].copy_(tensor)
        return {
            name: held_out_bits(self.model, text, sizes=self.tokenizer.sizes).per_byte
            for name, text in self.texts.items()
        }


@dataclass
class Search:
    """Candidates of one recipe and what they came to.

    Attributes:
        recipe: models and everything that is not tried.
        judge: reads the texts.
        out: folder of the records.
        trials: what was tried, by the candidate's key.
    """

    recipe: Recipe
    judge: Judge
    out: Path
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self) -> None:
        """Takes over the trials of an earlier search in the same folder.

        Raises:
            ConfigError: they are of another recipe or other texts, or the calibration text cannot be read.
        """
        path = self.out / TRIALS
        if not path.exists():
            return
        whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
        if rest or not whole:  # what was being written when a search was killed
            path.write_text(whole and whole + "\n", encoding="utf-8")
        if not whole:
            return
        try:
            head, *trials = map(json.loads, whole.splitlines())
        except ValueError as error:
            raise ConfigError(explain(str(path), "trials, a line each", error, "remove it")) from error
        if head != self._head():
            remedy = "name another --out, or remove it"
            raise ConfigError(explain(str(path), "trials of these models, recipe and texts", "others", remedy))
        self.trials = {key(trial["candidate"]): trial for trial in trials}

    def _head(self) -> dict[str, Any]:
        fixed = {name: value for name, value in self.recipe.to_dict().items() if name not in ("method", *TRIED)}
        sums = {name: hashlib.sha256(text.numpy().tobytes()).hexdigest() for name, text in self.judge.texts.items()}
        folders = [Path(path) for path in (self.recipe.base, *self.recipe.models) if path is not None]
        files = {str(folder): [_stamp(file) for file in _weights(folder)] for folder in folders}
        head: dict[str, Any] = {"recipe": fixed, "texts": sums, "models": files}
        if self.recipe.calibration is not None:
            head["calibration"] = hashlib.sha256(calibration_text(self.recipe.calibration)).hexdigest()
        return dict(json.loads(json.dumps(head)))

    def attempt(self, candidate: Mapping[str, Any]) -> float:
        """Mean bits per byte of a candidate, from the records if it was tried before."""
        known = self.trials.get(key(candidate))
        if known is None:
            known = {"candidate": dict(candidate), "bits": self.judge.bits(self.tensors(candidate))}
            known["mean"] = sum(known["bits"].values()) / len(known["bits"])
            self.trials[key(candidate)] = known
            self._append(known)
        return float(known["mean"])

    def _append(self, trial: Mapping[str, Any]) -> None:
        path = self.out / TRIALS
        self.out.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(self._head()) + "\n")
            file.write(json.dumps(trial) + "\n")

    def tensors(self, candidate: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The weights of a candidate: {"model": place}, {"base": True}, or settings of a merge."""
        if "method" in candidate:
            recipe = self.merging(candidate)
            return stream(recipe, open_inputs(recipe))
        inputs = open_inputs(replace(self.recipe, align=None, calibration=None))
        source = inputs.base if candidate.get("base") else inputs.models[candidate["model"]]
        return ((name, source.tensor(name)) for name in source.shapes)

    def merging(self, candidate: Mapping[str, Any]) -> Recipe:
        """The recipe of a candidate; what its method does not know is left out."""
        values = self.recipe.to_dict()
        uses = METHODS[candidate["method"]].uses
        unused = ["lambda" if name == "lam" else name for name in SETTINGS if name not in {*uses, "weights"}]
        for name in unused:
            values.pop(name, None)
        overrides = [{k: v for k, v in one.items() if k not in unused} for one in values.get("overrides", ())]
        if "weights" in uses:  # an override that would be left without a setting still hides those before it
            own = {"weights": values.get("weights", [1.0])}
            overrides = [one if len(one) > 1 else one | own for one in overrides]
        values["overrides"] = [one for one in overrides if len(one) > 1]
        return Recipe.from_dict(values | dict(candidate))

    def best(self, method: str | None = None) -> dict[str, Any]:
        """The best trial of a method, or of all."""
        merged = [trial for trial in self.trials.values() if method in (None, trial["candidate"].get("method"))]
        return min((one for one in merged if "method" in one["candidate"]), key=lambda trial: float(trial["mean"]))


def _weights(path: Path) -> list[Path]:
    """The files that decide on a model's weights; of an adapter its configuration scales them."""
    if not path.is_dir():
        return [path]
    return sorted([*path.glob("*.safetensors"), *path.glob(ADAPTER_CONFIG)])


def _stamp(file: Path) -> list[Any]:
    """What changes when a file is written anew."""
    found = file.stat()
    return [file.name, found.st_size, found.st_mtime_ns]


def key(candidate: Mapping[str, Any]) -> str:
    """A candidate as a string."""
    return json.dumps(candidate, sort_keys=True)


def references(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What every search reads besides its candidates: the base, each specialist, their average; by their names."""
    named: dict[str, dict[str, Any]] = {"base": {"base": True}} if recipe.base is not None else {}
    taken = ("base", "average")
    for place, path in enumerate(recipe.models):
        short = short_name(path, recipe.models)
        named[str(Path(path).resolve()) if short in taken else short] = {"model": place}
    if recipe.weights is not None and abs(sum(recipe.weights)) < NOTHING:  # there is no average
        return named
    return named | {"average": {"method": "linear", "lambda": 1.0}}


def table(search: Search, methods: Sequence[str], named: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row each for the base, the specialists, the average and the best of each method; best first."""
    rows = [{"name": name, **search.trials[key(candidate)]} for name, candidate in named.items()]
    tried = {trial["candidate"].get("method") for trial in search.trials.values()}
    rows += [{"name": f"{method}, best", **search.best(method)} for method in methods if method in tried]
    return sorted(rows, key=lambda row: (float(row["mean"]), row["name"]))


def to_markdown(rows: Sequence[Mapping[str, Any]], tested: Mapping[str, Mapping[str, float]] | None) -> str:
    """The table as text.

    Args:
        rows: of `table`.
        tested: bits per byte of the rows on texts that nothing was chosen by.
    """
    names = list(rows[0]["bits"])
    lines = [
        "# Merges compared",
        "",
        "Bits per byte of held-out text, each text alike in the mean; less is better.",
        "",
    ]
    lines += _markdown(rows, names, {row["name"]: row["bits"] for row in rows}, "by which the settings were chosen")
    if tested is not None:
        lines += _markdown(rows, list(next(iter(tested.values()))), tested, "not looked at in choosing")
    return "\n".join(lines)


def _markdown(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], bits: Mapping[str, Mapping[str, float]], what: str
) -> list[str]:
    head = f"| | settings | {' | '.join(names)} | mean |"
    lines = [f"## Texts {what}", "", head, "|---|---|" + "---:|" * (len(names) + 1)]
    for row in rows:
        own = bits[row["name"]]
        settings = ", ".join(f"{name} {value}" for name, value in row["candidate"].items() if name in TRIED)
        values = [*own.values(), sum(own.values()) / len(own)]
        lines.append(f"| {row['name']} | {settings} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return [*lines, ""]


def report(search: Search, methods: Sequence[str], test: Mapping[str, Tensor] | None) -> list[dict[str, Any]]:
    """Writes the table as JSON and Markdown and the best recipe as YAML.

    Args:
        search: with its trials done.
        methods: that were tried.
        test: texts that nothing was chosen by, to judge the rows of the table on.
    """
    rows = table(search, methods, references(search.recipe))
    tested = None
    if test is not None:
        judge = replace(search.judge, texts=test)
        tested = {row["name"]: judge.bits(search.tensors(row["candidate"])) for row in rows}
        rows = [{**row, "test": tested[row["name"]]} for row in rows]
    best = search.merging(search.best()["candidate"]).to_dict()
    trials = list(search.trials.values())
    found = {"rows": rows, "best": best, "trials": trials}
    (search.out / TABLE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (search.out / TEXT).write_text(to_markdown(rows, tested), encoding="utf-8")
    import yaml

    (search.out / BEST).write_text(yaml.safe_dump(best, sort_keys=False), encoding="utf-8")
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m merge.search", description="Choose the settings of a merge on held-out text.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="base, models and what is not tried")
    made.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="TEXT", help="files or folders to choose by"
    )
    made.add_argument("--test", type=Path, nargs="+", metavar="TEXT", help="others, to judge the table on in the end")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="trials, table and best.yaml; goes on")
    made.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help="to try (the recipe's)")
    numbers: dict[str, Any] = {"nargs": "+", "type": float, "metavar": "X"}
    made.add_argument("--lambdas", default=LAMBDAS, **numbers, help=f"to try {LAMBDAS}")
    made.add_argument("--densities", default=DENSITIES, **numbers, help=f"to try {DENSITIES}")
    made.add_argument(
        "--optuna", type=int, metavar="N", help="N trials chosen by Optuna between the least and largest values"
    )
    made.add_argument("--seed", type=int, default=0, help="of Optuna's choices (0)")
    return made.parse_args(arguments)


def open_search(recipe: Recipe, data: Sequence[Path], out: Path) -> Search:
    """A search over SynapseModels by the texts at some paths, with the trials that are in its folder.

    Raises:
        DataError: a text cannot be read.
        CheckpointError, ShapeError: the models cannot be opened, are none of ours or do not fit each other.
        ConfigError: the folder holds trials of something else, the method is one of mergekit's, or the calibration text
            cannot be read.
    """
    if recipe.mergekit is not None:
        raise ConfigError(explain("method", f"one of {', '.join(METHODS)}", recipe.method, "search merges in memory"))
    base = open_inputs(replace(recipe, align=None, calibration=None)).base
    model, tokenizer = SynapseModel.from_pretrained(base.path), load_tokenizer(base.path)
    if model.config.vocab_size != tokenizer.vocab_size:
        remedy = "put the model's tokenizer.json beside its weights"
        expected = f"{model.config.vocab_size} tokens"
        raise ConfigError(explain(f"tokenizer of {base.path}", expected, tokenizer.vocab_size, remedy))
    search = Search(recipe, Judge(texts(data, tokenizer), model, tokenizer), out)
    search.load()
    return search


def run(command: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    recipe = Recipe.load(command.recipe)
    if command.optuna is not None and command.optuna < 1:
        raise ConfigError(explain("--optuna", "1 or more trials", command.optuna))
    methods = command.methods or [recipe.method]
    search = open_search(recipe, command.data, command.out)
    test = texts(command.test, search.judge.tokenizer) if command.test else None
    run_grid(search.attempt, list(references(recipe).values()))
    bounds, epsilon = (command.lambdas, command.densities), epsilon_of(recipe)
    if command.optuna is not None:
        run_optuna(search.attempt, methods, command.optuna, *bounds, epsilon=epsilon, seed=command.seed)
    else:
        run_grid(search.attempt, grid(methods, *bounds, epsilon=epsilon))
    report(search, methods, test)
    print((command.out / TEXT).read_text(encoding="utf-8"))
    print(f"merge it: python -m merge.ties --recipe {command.out / BEST} --out merged")


def texts(paths: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Streams by the names of their files or folders.

    Raises:
        ConfigError: two have one name. DataError: nothing there, or no text.
    """
    named = {path.stem if path.is_file() else path.name: read_text(path, tokenizer) for path in paths}
    if len(named) < len(paths):
        raise ConfigError(explain("texts", "different names", [str(path) for path in paths]))
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """The program.

    Returns:
        0, or 2 after an error, which is one line; 130 when interrupted: finished trials are kept.
    """
    command = parse(arguments)
    try:
        run(command)
    except SynapseError as error:
        print(f"python -m merge.search: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m merge.search: interrupted; the same command goes on from {command.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
