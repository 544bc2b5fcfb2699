"""Teaches a trained SynapseModel from examples: `accelerate launch recipes/finetune.py --base model/ --data a.jsonl`.

Supervised on prompts with answers, or by preference (DPO, ORPO) on prompts with a better and a worse one; all weights,
or low-rank adapters in peft's format. A step is a function of the weights, the seed and its number.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes import checkpoint
from recipes._accelerate import Accelerator, PartialState, cpu_only, launched_precision, tqdm
from recipes.adapters import add_lora, load_lora
from recipes.checkpoint import Progress
from recipes.finetuning import Command, FinetuneConfig, parse, resumed
from recipes.malloc import keep_freed_memory
from recipes.optim import adamw, set_lr
from recipes.pairs import Encoded, Pairs, Sequences, batch_rows, collate, read_pairs
from recipes.preferences import IGNORED, Likelihood, dpo, likelihood, orpo
from recipes.signals import StopRequest
from recipes.tokenizer import Tokenizer, load_tokenizer
from recipes.trainer import PATIENCE, on_main
from recipes.windows import mix
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError, DataError, SynapseError, explain


class Finetuner:
    """One run: model, examples, optimizer, and the loop over them.

    Args:
        config: what to compute.
        out: the run's folder.
        pairs: the examples.
        held_out: those that are only judged.
        tokenizer: the model's.
        accelerator: the processes and devices.
        resume: go on from the last checkpoint in `out`.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        out: Path,
        pairs: Pairs,
        held_out: Pairs | None,
        tokenizer: Tokenizer,
        accelerator: Accelerator,
        *,
        resume: bool,
    ) -> None:
        self.config, self.out, self.pairs, self.held_out = config, out, pairs, held_out
        self.tokenizer, self.accelerator = tokenizer, accelerator
        torch.manual_seed(mix(config.seed, -1))
        folder = checkpoint.latest(out) if resume else None
        full = config.method == "full"
        core = SynapseModel.from_pretrained(folder if folder and full else config.base).to(accelerator.device)
        # Full training by DPO needs a second model to compare with; adapters are simply switched off.
        self.reference = None
        if full and config.task == "dpo":
            start = SynapseModel.from_pretrained(config.base) if folder else copy.deepcopy(core)
            self.reference = start.to(accelerator.device).eval().requires_grad_(False)
        self.model: Any = core
        if not full:
            targets: Any = {"modules": config.lora_modules, "parameters": config.lora_parameters}
            new = {"rank": config.rank, "alpha": config.alpha, **targets}
            self.model = load_lora(core, folder, trainable=True) if folder else add_lora(core, **new)
        self.model.train()
        self.optimizer = adamw(self.model, weight_decay=config.weight_decay, betas=(0.9, 0.95))
        self.progress = checkpoint.restore(folder, self.model, self.optimizer) if folder else Progress()
        self.wrapped: Any = accelerator.prepare(self.model)
        self.steps = config.steps(len(pairs.rows))
        self.stop = StopRequest()
        self.failed_in_a_row = 0
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def run(self) -> bool:
        """Trains to the end (True) or until a stop is asked for (False), and leaves a checkpoint."""
        progress, main = self.progress, self.accelerator.is_main_process
        started = time.monotonic() - progress.seconds
        with self.stop.listening(), tqdm(total=self.steps, initial=progress.step, disable=not main) as bar:
            stopping = False
            while progress.step < self.steps and not stopping:
                figures = self.step()
                progress.seconds = time.monotonic() - started
                stopping = self.total(float(self.stop.made)) > 0
                bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
                bar.update()
                if main:
                    self.log({"lr": self.optimizer.param_groups[0]["lr"], **figures})
                if progress.step % self.config.save_steps == 0:
                    self.save()
            self.save()
        return not stopping

    def step(self) -> dict[str, float]:
        """One optimizer step on the batch of this step; its figures, over all processes."""
        config, progress = self.config, self.progress
        numbers = batch_rows(len(self.pairs.rows), batch_size=config.batch_size, seed=config.seed, step=progress.step)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(mix(config.seed, progress.step, rank))
        set_lr(self.optimizer, config.learning_rate().lr((progress.step + 0.5) / self.steps))
        terms, figures = self.terms([self.pairs.rows[number] for number in numbers[rank::world]])
        self.accelerator.backward(torch.stack(list(terms.values())).sum())
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        found = {name: self.total(value) / world for name, value in {**terms, **figures}.items()}
        found["norm"] = float(norm)
        if all(math.isfinite(value) for value in found.values()):
            self.optimizer.step()
            self.failed_in_a_row = 0
        else:
            progress.skipped += 1
            self.failed_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        if self.failed_in_a_row == PATIENCE:
            raise SynapseError(explain("loss", "finite numbers", f"{PATIENCE} steps without one", "lower --lr"))
        return found

    def terms(self, rows: list[Encoded]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the loss by name, and what else there is to say of a batch."""
        batch = collate(rows).to(self.accelerator.device)
        first = batch.targets.clone()
        first[len(rows) :] = IGNORED  # the language term is of the better answers alone
        shared = self.accelerator.num_processes > 1 and self.model.training
        reduce = partial(self.accelerator.reduce, reduction="sum") if shared else None
        out = self.wrapped(batch.ids, targets=first, mask=batch.mask, reduce_load=reduce)
        terms = dict(out.losses)
        if shared:
            terms = self.weighted(terms, {"language": first != IGNORED}, batch.mask)
        if self.config.task == "sft":
            return terms, {}
        sides = _sides(out.logits, batch.targets)
        if self.config.task == "orpo":
            found = orpo(*sides, self.config.odds_weight)
        else:
            found = dpo(*sides, self.compared(batch), self.config.beta)
            del terms["language"]
        figures = {"margin": found.margin.mean(), "accuracy": (found.margin > 0).float().mean()}
        return {self.config.task: found.loss, **terms}, {name: value.detach() for name, value in figures.items()}

    def weighted(self, terms: dict[str, Tensor], counted: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """This process's means over tokens, so that their mean over processes is that over the tokens of all.

        Args:
            terms: of the loss, by name.
            counted: which tokens (B, T) a term is a mean over, by name.
            mask: the tokens that all others are a mean over.
        """
        counts = {name: counted.get(name, mask).sum() for name in sorted(terms)}
        return {
            name: terms[name] * (count * self.accelerator.num_processes / self.total(count))
            for name, count in counts.items()
        }

    def compared(self, batch: Sequences) -> tuple[Likelihood, Likelihood]:
        """What the model to compare with makes of both sides: the base, in evaluation mode.

        None of its weights takes a gradient. Where gradients are on they stay on: without them some regions round
        otherwise, and a model that has learned nothing would differ from its base.
        """
        if self.reference is not None:
            with self.accelerator.autocast():
                return _sides(self.reference(batch.ids, mask=batch.mask).logits, batch.targets)
        training = self.model.training
        with self.model.disable_adapter():
            sides = _sides(self.model.eval()(batch.ids, mask=batch.mask).logits, batch.targets)
        self.model.train(training)
        return sides

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """The figures of the held-out examples: of the language loss a mean over their tokens, of all else over them.

        Every process reads them all.
        """
        if self.held_out is None:
            return {}
        self.model.eval()
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        rows, size = self.held_out.rows, self.config.batch_size
        for start in range(0, len(rows), size):
            part = list(rows[start : start + size])
            terms, figures = self.terms(part)
            for name, value in {**terms, **figures}.items():
                count = sum(len(row.answers[0]) for row in part) if name == "language" else len(part)
                sums[name] = sums.get(name, 0.0) + float(value) * count
                counts[name] = counts.get(name, 0) + count
        self.model.train()
        return {name: value / counts[name] for name, value in sums.items()}

    def total(self, value: float | Tensor) -> float:
        """A number summed over the processes."""
        device = self.accelerator.device
        whole = torch.as_tensor(value, dtype=torch.float32, device=device).detach().reshape(1)
        return float(self.accelerator.reduce(whole, reduction="sum"))

    def save(self) -> None:
        """Writes a checkpoint from the main process: a model's, or an adapter's, beside what training needs."""
        arguments = (self.out, self.model, self.optimizer, self.progress)
        on_main(self.accelerator, lambda: checkpoint.save(*arguments, tokenizer=self.tokenizer))

    def log(self, figures: dict[str, float]) -> None:
        """Adds a line to the log."""
        line = {"step": self.progress.step, "seconds": self.progress.seconds, **figures}
        try:
            with (self.out / checkpoint.LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(checkpoint.json_text(line) + "\n")
        except OSError as error:
            tqdm.write(f"step {self.progress.step} is missing in the log, training goes on: {error}", file=sys.stderr)


def _sides(logits: Tensor, targets: Tensor) -> tuple[Likelihood, Likelihood]:
    """The likelihoods of the chosen and of the rejected answers."""
    total, tokens = likelihood(logits, targets)
    half = len(total) // 2
    return Likelihood(total[:half], tokens[:half]), Likelihood(total[half:], tokens[half:])


def configure(command: Command) -> tuple[FinetuneConfig, Tokenizer, Pairs, Pairs | None]:
    """The run to do and its examples, checked before the model is loaded.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong with the settings, the data or the folder.
    """
    fingerprint = None
    if command.resume:
        stored, fingerprint = checkpoint.read_run(command.out)
        config = resumed({"mixed_precision": launched_precision() or "no", **stored}, command.given)
    else:
        config = FinetuneConfig(**{"mixed_precision": launched_precision() or "no", **command.given})
        if not command.overwrite:
            checkpoint.refuse_used(command.out)
    base = checkpoint.model_folder(Path(config.base), "--base")
    config = dataclasses.replace(config, base=str(base))
    for option, path in (("--base", config.base), ("--data", config.data), ("--held-out", config.held_out)):
        if command.overwrite and path and checkpoint.is_cleared(Path(path), command.out):
            remedy = "it would be removed with the run that is replaced: choose another --out"
            expected = f"a {'model' if option == '--base' else 'file'} outside {command.out}"
            raise ConfigError(explain(f"{option} {path} with --overwrite", expected, "one in it", remedy))
    tokenizer = load_tokenizer(base)
    vocabulary = checkpoint.read_json(base / "config.json").get("vocab_size")
    if vocabulary != tokenizer.vocab_size:
        remedy = "put the model's tokenizer.json beside its weights"
        raise ConfigError(explain(f"tokenizer of {base}", f"{vocabulary} tokens", tokenizer.vocab_size, remedy))
    pairs, held_out = (
        read_pairs(Path(path), config.fields, tokenizer, length=config.length) if path else None
        for path in (config.data, config.held_out)
    )
    assert pairs is not None, "data is not optional"
    if fingerprint not in (None, pairs.fingerprint):
        remedy = "restore the file the run was started with"
        raise DataError(explain(config.data, f"fingerprint {fingerprint}", pairs.fingerprint, remedy))
    return config, tokenizer, pairs, held_out


def finetune(command: Command) -> bool:
    """Does what the command line asks for; False when the run was stopped before its end."""
    config, tokenizer, pairs, held_out = configure(command)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu_only())
    if config.batch_size % accelerator.num_processes:
        expected = f"a multiple of {accelerator.num_processes} processes"
        raise ConfigError(explain("batch_size", expected, config.batch_size, "change --batch-size"))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as held:
        on_main(accelerator, lambda: held.enter_context(checkpoint.claim(command.out)))
        tuner = Finetuner(config, command.out, pairs, held_out, tokenizer, accelerator, resume=command.resume)
        on_main(accelerator, lambda: start(tuner, command))
        finished = tuner.run()
        figures = tuner.judge() if finished else {}
        on_main(accelerator, lambda: report(tuner, figures, finished=finished))
        accelerator.wait_for_everyone()
    return finished


def start(tuner: Finetuner, command: Command) -> None:
    """Makes the folder ready, writes down what will run, and says it."""
    if not (command.resume or command.overwrite):  # a run may have begun and ended there while the base was loaded
        checkpoint.refuse_used(tuner.out)
    config, progress = tuner.config, tuner.progress
    checkpoint.prepare_folder(tuner.out, parameters=tuner.trainable, keep=1, clear=not command.resume)
    values = dataclasses.asdict(config)
    checkpoint.open_run(tuner.out, values, tuner.pairs.fingerprint, tuner.tokenizer, step=progress.step)
    whole = sum(parameter.numel() for parameter in tuner.model.parameters())
    print(
        f"data    {config.data}: {len(tuner.pairs.rows):,} examples, {tuner.steps:,} steps of {config.batch_size}, "
        f"mixed precision {config.mixed_precision}"
    )
    print(f"model   {config.base}: {tuner.trainable:,} of {whole:,} parameters learn ({config.method}, {config.task})")
    if progress.step:
        print(f"resumed at step {progress.step:,}")


def report(tuner: Finetuner, figures: dict[str, float], *, finished: bool) -> None:
    """Says where the outcome is, and writes it down when the run is finished."""
    folder = checkpoint.latest(tuner.out)
    if not finished:
        print(f"Stopped at step {tuner.progress.step}; go on with --out {tuner.out} --resume")
        return
    progress = dataclasses.asdict(tuner.progress)
    checkpoint.write_json(tuner.out / checkpoint.RESULT_FILE, {**progress, "held_out": figures})
    for name, value in figures.items():
        print(f"held out  {name} {value:.4f}")
    kind = "adapter" if tuner.config.method == "lora" else "model"
    print(f"The {kind} is in {folder}")


def main(argv: list[str] | None = None) -> int:
    """The program; returns 0 when the run ended or was stopped and saved, 2 after an error, 130 when cut short."""
    command = parse(argv)
    try:
        finetune(command)
    except SynapseError as error:
        if PartialState().is_main_process:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was saved before is in {command.out}", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
