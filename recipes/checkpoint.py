"""A run's folder: `run.json`, `log.jsonl`, and checkpoints that are there whole or not at all.

A checkpoint is a folder `step-00000480` with the model (config.json and safetensors, opened by
`SynapseModel.from_pretrained`), its tokenizer where it is not bytes, and what training needs to go on
(trainer.safetensors, trainer.json, state.safetensors where a state is carried). It is written aside under a name that
starts with a dot and renamed when it is complete; then those go that are no longer to be kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from recipes.optim import optimizer_tensors, restore_optimizer
from recipes.tokenizer import BYTES, TOKENIZER_FILE, Tokenizer, load_tokenizer
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.errors import CheckpointError, ConfigError, StateError, explain
from synapse_arch.model import _files

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
RESULT_FILE = "result.json"
TRAINER_TENSORS = "trainer.safetensors"
TRAINER_FILE = "trainer.json"
STATE_FILE = "state.safetensors"
SHARDS_FOLDER = "shards"
CURVES_FILE = "curves.png"
TRACKERS_FOLDER = "trackers"
LOCK_FILE = ".lock"
SCHEMA = 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps behind, skipped ones included.
        seconds: wall time spent.
        skipped: steps whose loss or gradient was not finite.
        best: the fewest bits per byte at a look at held-out text, where the best checkpoint is kept.
        best_step: the step of that look.
        carried: whether the state behind the last window goes on with the next.
    """

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float | None = None
    best_step: int | None = None
    carried: bool = False


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Holds the folder of a run, made where missing, so that no other process writes to it; an empty one is removed.

    The system lifts the claim of a process that dies.

    Raises:
        CheckpointError: another process holds it, or it cannot be made or written to.
    """
    lock = FileLock(out / LOCK_FILE)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        remedy = "wait for it to end, or choose another --out"
        raise CheckpointError(explain(f"--out {out}", "a folder of no other run", "one in use", remedy)) from error
    except OSError as error:
        raise CheckpointError(explain(f"--out {out}", "a folder to write to", error.strerror or error)) from error
    try:
        yield
    finally:
        (out / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            out.rmdir()


def refuse_used(out: Path) -> None:
    """Raises CheckpointError where `out` holds a run."""
    if _own_items(out):
        remedy = "go on with --resume, choose another --out, or replace it with --overwrite"
        raise CheckpointError(explain(f"--out {out}", "a folder without a run", "one that holds a run", remedy))


def is_cleared(path: Path, out: Path) -> bool:
    """Whether `path` lies in what a new run in `out` would replace."""
    return any(path.resolve().is_relative_to(item.resolve()) for item in _own_items(out))


def prepare_folder(out: Path, *, parameters: int, keep: int, clear: bool) -> None:
    """Makes sure that a run of a model with so many float32 parameters can be kept in `out`.

    Args:
        out: made where missing; files that are none of a run's are left alone.
        parameters: a checkpoint holds each three times, with AdamW's two averages.
        keep: how many checkpoints will be there; a new one must fit beside them.
        clear: for a new run: remove the one that `out` holds, once all else is right.

    Raises:
        CheckpointError: the folder cannot be made or written to, or the disk is too full.
    """
    try:
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
        there = 0 if clear else sum(_step(item) is not None for item in out.iterdir())
        needed, free = max(keep + 1 - there, 1) * 3 * 4 * parameters / 1e6, shutil.disk_usage(out).free / 1e6
        if free < needed:
            remedy = "free some space or choose another --out"
            raise CheckpointError(explain(f"--out {out}", f"{needed:.1f} MB free", f"{free:.1f} MB", remedy))
        for item in _own_items(out) if clear else ():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    except OSError as error:
        raise CheckpointError(explain(f"--out {out}", "a folder to write to", error.strerror or error)) from error


def open_run(out: Path, config: dict[str, Any], corpus: str, tokenizer: Tokenizer, *, step: int) -> None:
    """Writes `run.json` and the tokenizer, and takes out what a resumed run is about to write again.

    That is what the log holds of later steps, and the result.

    Raises:
        CheckpointError: the folder cannot be written to, or holds another tokenizer. DataError: that one is damaged.
    """
    log, there = out / LOG_FILE, out / TOKENIZER_FILE
    writes = tokenizer.fingerprint != BYTES
    if writes and there.exists() and load_tokenizer(there).fingerprint != tokenizer.fingerprint:
        raise CheckpointError(explain(str(there), "the tokenizer of the run", "another", "choose another --out"))
    try:
        (out / RESULT_FILE).unlink(missing_ok=True)
        tokenizer.save(out)
        write_json(out / RUN_FILE, {"schema": SCHEMA, "config": config, "corpus": corpus})
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(line for line in lines if _logged_step(line) <= step), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(explain(f"--out {out}", "a folder to write to", error.strerror or error)) from error


def read_run(out: Path) -> tuple[dict[str, Any], str]:
    """The configuration and the corpus's fingerprint that `open_run` wrote.

    Raises:
        CheckpointError: there is no run, or its file is damaged or of another schema.
    """
    values = read_json(out / RUN_FILE)
    config, corpus = values.get("config"), values.get("corpus")
    if values.get("schema") != SCHEMA or not isinstance(config, dict) or not isinstance(corpus, str):
        got = f"schema {values.get('schema')} with {', '.join(values) or 'nothing'}"
        raise CheckpointError(explain(str(out / RUN_FILE), f"schema {SCHEMA} with config and corpus", got))
    return config, corpus


def latest(out: Path) -> Path:
    """The newest checkpoint in `out`.

    Raises:
        CheckpointError: there is none.
    """
    found = _checkpoints(out)
    if not found:
        remedy = "check --out, or leave --resume away to start a run"
        raise CheckpointError(explain(f"--out {out}", "a run with a checkpoint in it", "none", remedy))
    return found[max(found)]


def model_folder(folder: Path, option: str) -> Path:
    """The folder of a model: the one given, or the newest checkpoint where it is that of a run.

    Raises:
        CheckpointError: there is neither, or it is an adapter or in shards.
    """
    if (folder / "config.json").is_file():
        return folder
    chosen, remedy = newest(folder), ""
    if (chosen / "adapter_config.json").is_file():
        got, remedy = "an adapter", "merge it into its base first: see recipes/adapters.py"
    elif (chosen / SHARDS_FOLDER).is_dir() and not (chosen / "config.json").is_file():
        got, remedy = "a model in shards", f"make it whole: python -m recipes.sharded {chosen} FOLDER"
    elif chosen != folder:
        return chosen
    else:
        got = "a folder without them" if folder.is_dir() else "no such folder"
    raise CheckpointError(explain(f"{option} {folder}", "a model, or a run with a checkpoint in it", got, remedy))


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run, any other folder as it is."""
    found = _checkpoints(folder)
    return found[max(found)] if found else folder


def save(
    out: Path,
    model: SynapseModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    keep: int = 1,
    state: SynapseState | None = None,
    tokenizer: Tokenizer | None = None,
    shards: Path | None = None,
) -> Path:
    """Writes the checkpoint of this step, then removes old ones; what was there stays until the new one is complete.

    Args:
        out: the run's folder.
        model: the weights.
        optimizer: its averages.
        progress: how far the run is; its `best_step` is kept besides the newest.
        keep: how many of the newest are kept.
        state: what is carried to the next window, all rows of the batch.
        tokenizer: the model's.
        shards: what `sharded.save` wrote in `out`, taken into the checkpoint in place of whole weights and averages.

    Raises:
        CheckpointError: it could not be written; the ones before it are untouched.
    """
    final = out / f"step-{progress.step:08d}"
    if final.is_dir():
        return final
    aside = out / f".{final.name}"
    try:
        for leftover in out.glob(".step-*"):
            shutil.rmtree(leftover)
        if shards is not None:
            aside.mkdir()
            shards.rename(aside / SHARDS_FOLDER)
        else:
            _save_whole(aside, model, optimizer, progress.step)
        if state is not None:
            state.save(aside / STATE_FILE)
        if tokenizer is not None:
            tokenizer.save(aside)
        write_json(aside / TRAINER_FILE, {"schema": SCHEMA, **asdict(progress)})
        _files.sync_tree(aside)
        aside.rename(final)
        _files.sync_directory(out)
        found = _checkpoints(out)
        for step in sorted(found)[:-keep]:
            if step != progress.best_step:
                shutil.rmtree(found[step])
    except CheckpointError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except (OSError, SafetensorError, StateError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        remedy = "free some space or check permissions; earlier checkpoints are untouched"
        raise CheckpointError(explain(str(final), "a checkpoint written", error, remedy)) from error
    return final


def _save_whole(folder: Path, model: SynapseModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and averages as safetensors."""
    model.save_pretrained(folder)
    trainer = folder / TRAINER_TENSORS
    _files.write_tensors(trainer, optimizer_tensors(model, optimizer), {"schema": str(SCHEMA), "step": str(step)})
    for path in folder.glob("*.safetensors"):  # peft's are private, as safetensors makes them
        path.chmod(trainer.stat().st_mode)


def read_progress(folder: Path) -> Progress:
    """How far the run of a checkpoint had come.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    values = read_json(folder / TRAINER_FILE)
    try:
        progress = Progress(**{name: values[name] for name in ("step", "seconds", "skipped")})
    except KeyError as error:
        raise CheckpointError(explain(str(folder / TRAINER_FILE), "progress", error, "start a new run")) from error
    return replace(progress, **{name: values[name] for name in ("best", "best_step", "carried") if name in values})


def restore(folder: Path, model: SynapseModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts the optimizer's state of a checkpoint back and says how far it was; the weights are the caller's to load.

    Raises:
        CheckpointError: a file is missing, damaged or of another step.
    """
    progress, path = read_progress(folder), folder / TRAINER_TENSORS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        restore_optimizer(model, optimizer, tensors)
    except (OSError, SafetensorError, ConfigError) as error:
        raise CheckpointError(explain(str(path), "the trainer's state", error, "start a new run")) from error
    if metadata.get("schema") != str(SCHEMA) or metadata.get("step") != str(progress.step):
        got = f"schema {metadata.get('schema')}, step {metadata.get('step')}"
        raise CheckpointError(explain(str(path), f"schema {SCHEMA}, step {progress.step}", got, "start a new run"))
    return progress


def json_text(values: dict[str, Any], *, indent: int | None = None) -> str:
    """`values` as JSON; it has no NaN and no infinities, such a number is null there.

    >>> json_text({"loss": float("nan"), "steps": 3})
    '{"loss": null, "steps": 3}'
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes `values` aside and renames, so that the file is there whole or not at all, whatever goes down.

    Raises:
        CheckpointError: it could not be written.
    """
    aside = path.with_name(f".{path.name}")
    try:
        aside.unlink(missing_ok=True)
        _files.write_text(aside, json_text(values, indent=2) + "\n")
        _files.commit(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(explain(str(path), "a file written", error.strerror or error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: missing, unreadable or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(explain(str(path), "a JSON file", error, "check --out")) from error
    if not isinstance(values, dict):
        raise CheckpointError(explain(str(path), "a JSON object", type(values).__name__, "check --out"))
    return values


def _own_items(out: Path) -> list[Path]:
    """What of `out` belongs to a run; a tokenizer alone is none."""
    names = (RUN_FILE, LOG_FILE, RESULT_FILE, CURVES_FILE, TOKENIZER_FILE, TRACKERS_FOLDER)
    found = [item for item in out.iterdir() if item.name in names or _step(item) is not None] if out.is_dir() else []
    return found if [item.name for item in found] != [TOKENIZER_FILE] else []


def _checkpoints(out: Path) -> dict[int, Path]:
    """The checkpoints in `out` by their steps."""
    return {step: item for item in (out.iterdir() if out.is_dir() else ()) if (step := _step(item)) is not None}


def _step(item: Path) -> int | None:
    match = STEP_FOLDER.fullmatch(item.name)
    return int(match[1]) if match and item.is_dir() else None


def _logged_step(line: str) -> float:
    """The step of a line of the log; a line that was cut off counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
