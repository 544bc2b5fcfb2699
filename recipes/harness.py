"""Tasks of lm-evaluation-harness from files of one's own, on a SynapseModel, through `synapse_arch.hf`.

A task is a YAML file as the harness describes it; its data are local files named there. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.tokenizer import OPENING, TOKENIZER_FILE, BPETokenizer, Tokenizer
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError, DataError, explain


def run_tasks(
    model: SynapseModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    folder: Path,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """The figures of each task.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        tasks: names that the YAML files give.
        folder: where those files are, searched through.
        limit: examples of each task that are asked; None for all.
        batch_size: examples side by side.

    Returns:
        Task -> figure ("acc", "acc_stderr", ...) -> value.

    Raises:
        ConfigError: the harness is not installed, or a task is in none of the files.
        DataError: a task's data cannot be read.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from synapse_arch.hf import SynapseForCausalLM
    except ModuleNotFoundError as error:
        remedy = "pip install 'synapse-arch[eval]'"
        raise ConfigError(explain("--tasks", "lm-evaluation-harness", error, remedy)) from error
    manager: Any = TaskManager(include_path=str(folder), include_defaults=False)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        known = ", ".join(manager.all_tasks) or "none"
        raise ConfigError(explain(f"--tasks in {folder}", known, ", ".join(unknown), "check --task-files"))
    device = str(next(model.parameters()).device)
    subject = HFLM(
        pretrained=SynapseForCausalLM.from_core(model),
        tokenizer=_for_transformers(tokenizer),
        batch_size=batch_size,
        device=device,
    )
    try:
        found: Any = simple_evaluate(
            subject, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=False
        )
    except (OSError, ValueError) as error:
        remedy = "the files that a task names must be there, relative to where this runs"
        raise DataError(explain("the tasks' data", "readable files", error, remedy)) from error
    return {name: _figures(values) for name, values in found["results"].items()}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task: "acc,none" is called "acc"."""
    return {key.split(",")[0]: float(value) for key, value in values.items() if isinstance(value, int | float)}


def _for_transformers(tokenizer: Tokenizer) -> Any:
    """The same tokenizer as transformers knows them."""
    from synapse_arch.hf import byte_tokenizer

    if not isinstance(tokenizer, BPETokenizer):
        return byte_tokenizer()
    import tempfile

    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        special = {"bos_token": OPENING, "eos_token": OPENING, "pad_token": OPENING}
        return PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / TOKENIZER_FILE), **special)
