"""The training loop: steps, looks at held-out text, checkpoints, and stopping when asked to."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes import checkpoint, sharded
from recipes._accelerate import Accelerator, PartialState, broadcast_object_list
from recipes.checkpoint import Progress
from recipes.command import Command
from recipes.compiling import compile_layers, eagerly
from recipes.config import RunConfig
from recipes.data import Batch, Rows, Tokenizer, Windows, mix
from recipes.display import ProgressBar, clock
from recipes.evaluation import Bits, held_out_bits
from recipes.health import matrix_rate, router_health
from recipes.optim import adamw, set_lr
from recipes.signals import StopRequest
from recipes.sources import SEPARATOR
from recipes.tokenizer import TOKENIZER_FILE
from recipes.tokens import Tokens
from synapse_arch import SynapseModel, SynapseState
from synapse_arch.errors import CheckpointError, SynapseError, explain
from synapse_arch.model import accounting
from synapse_arch.model.state import map_tensors

PATIENCE = 10
"""Steps in a row without a finite loss after which a run stops."""
LOG_EVERY = 10
QUICK_WINDOWS = 4
"""Windows of each row that a look at held-out text reads during training."""
HELD_OUT_LIMIT = 512 * 1024
"""Tokens of held-out text that are judged at the end; of more, the first so many."""


class Part(NamedTuple):
    """What a part of a batch gave."""

    losses: dict[str, Tensor]
    load: Tensor | None
    """(L, E) assignments of its tokens."""
    state: SynapseState
    """Without its history."""


class Trainer:
    """One run: its model, data and optimizer, and the loop over them.

    Args:
        config: what to compute; `mixed_precision` resolved.
        command: where, and how it was asked for.
        tokens: the text.
        tokenizer: what made them.
        accelerator: the processes and devices.
    """

    def __init__(
        self, config: RunConfig, command: Command, tokens: Tokens, tokenizer: Tokenizer, accelerator: Accelerator
    ) -> None:
        self.config, self.out, self.accelerator = config, command.out, accelerator
        self.tokens, self.tokenizer = tokens, tokenizer
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main: bool = accelerator.is_main_process
        kind = Rows if config.carry else Windows
        self.windows = kind(tokens.train, length=config.length, batch_size=config.batch_size, seed=config.seed)
        self.held_out = tokens.held_out[: HELD_OUT_LIMIT + 1]
        torch.manual_seed(mix(config.seed, -1))
        folder = checkpoint.latest(self.out) if command.resume else None
        self.model = self.build(folder)
        self.sharded = config.shard and self.world > 1
        if self.sharded:
            sharded.shard(self.model, device=accelerator.device)
        self.optimizer = adamw(self.model, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2))
        self.progress = self.restore(folder) if folder else Progress()
        self.state = self.restore_state(folder) if folder and self.progress.carried else None
        self.saved: int | None = self.progress.step if folder else None
        self.wrapped: Any = self.model if self.sharded else accelerator.prepare(self.model)
        self.schedule = config.learning_rate()
        self.stop = StopRequest()
        self.failed_in_a_row = 0
        self.last: dict[str, float] = {}
        self.load: Tensor | None = None
        self.looked: float | None = None
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.matrix_rate = self.total([matrix_rate(accelerator.device, dtype)])[0]

    def build(self, folder: Path | None) -> SynapseModel:
        """A fresh model, or that of a checkpoint.

        Raises:
            CheckpointError: the checkpoint's vocabulary is not the tokenizer's.
        """
        size = self.tokenizer.vocab_size
        if folder is None:
            model = SynapseModel(self.config.model_config(size))
        elif self.config.shard:
            model = SynapseModel(sharded.read_sizes(folder / checkpoint.SHARDS_FOLDER))
        else:
            model = SynapseModel.from_pretrained(folder)
        if model.config.vocab_size != size:
            remedy = f"restore the {TOKENIZER_FILE} that the run was started with"
            got = f"{model.config.vocab_size} in {folder}"
            raise CheckpointError(explain("vocabulary", f"{size} entries, the tokenizer's", got, remedy))
        model.recompute = self.config.recompute
        if not (self.config.shard and self.world > 1):  # each shard finds its own way; the whole may not fit
            model.to(self.accelerator.device)
        if self.config.compile:
            compile_layers(model)
        return model.train()

    def restore(self, folder: Path) -> Progress:
        """Puts a checkpoint's optimizer back, and its weights where they lie in shards; says how far the run was.

        Raises:
            CheckpointError: it is missing, damaged or of another model.
        """
        if not self.config.shard:
            return checkpoint.restore(folder, self.model, self.optimizer)
        sharded.load(folder / checkpoint.SHARDS_FOLDER, self.model, self.optimizer)
        return checkpoint.read_progress(folder)

    def restore_state(self, folder: Path) -> SynapseState:
        """This process's rows of the state that a checkpoint carries on.

        Raises:
            CheckpointError: it is missing, damaged or of another model.
        """
        share = self.config.batch_size // self.world
        try:
            state = SynapseState.load(folder / checkpoint.STATE_FILE)
            state.check_against(self.model, self.config.batch_size)
            return state.select(range(self.rank * share, (self.rank + 1) * share)).to(self.accelerator.device)
        except SynapseError as error:
            raise CheckpointError(str(error)) from error

    @property
    def used(self) -> float:
        """Share of the budget used."""
        if self.config.steps:
            return self.progress.step / self.config.steps
        return self.progress.seconds / (60 * self.config.minutes)

    def run(self) -> bool:
        """Trains until the budget is used up (True) or a stop is asked for (False), and leaves a checkpoint."""
        config, progress = self.config, self.progress
        started = time.monotonic() - progress.seconds
        eval_at = progress.seconds + 60 * config.eval_minutes
        save_at = progress.seconds + 60 * config.save_minutes
        tokens = config.batch_size * config.length
        size = self.tokens.survey.bytes[0] / len(self.tokens.train)
        bar = ProgressBar(config, step=progress.step, seconds=progress.seconds, shown=self.main, token_bytes=size)
        stopping = False
        with self.stop.listening(), bar:
            while self.used < 1 and not stopping:
                stopping = self.step(started)
                bar.update(step=progress.step, seconds=progress.seconds, tokens=tokens, loss=self.last["language"])
                self.log(bar)
                best, former = False, (progress.best, progress.best_step)
                if progress.seconds >= eval_at:
                    best = self.look(bar)
                    eval_at = progress.seconds + 60 * config.eval_minutes
                if progress.seconds >= save_at or best:
                    try:
                        self.save()
                    except SynapseError as error:
                        bar.say(f"not saved, training goes on: {error}")
                        progress.best, progress.best_step = former  # whose checkpoint is there
                    save_at = progress.seconds + 60 * config.save_minutes
            self.save()
        return not stopping

    def step(self, started: float) -> bool:
        """One optimizer step; True when any process was asked to stop."""
        progress = self.progress
        batch = self.windows.batch(progress.step, self.rank, self.world).to(self.accelerator.device)
        torch.manual_seed(mix(self.config.seed, progress.step, self.rank))
        set_lr(self.optimizer, self.schedule.lr(self.used))
        outs = self.gradients(batch)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        share = 1 / (self.world * len(outs))
        losses = {name: torch.stack([out.losses[name] for out in outs]).sum() * share for name in outs[0].losses}
        clock_now = time.monotonic() - started if self.main else 0.0
        shared = self.total([clock_now, float(self.stop.made), *losses.values()])
        self.last = {
            "norm": float(norm.full_tensor() if self.sharded else norm),
            **dict(zip(losses, shared[2:], strict=True)),
        }
        loads = [out.load for out in outs if out.load is not None]
        self.load = torch.stack(loads).sum(0) if loads else None
        finite = all(math.isfinite(value) for value in self.last.values())
        if finite:
            self.optimizer.step()
            self.balance()
            self.failed_in_a_row = 0
        else:
            progress.skipped += 1
            self.failed_in_a_row += 1
        if self.config.carry:
            self.state = SynapseState.cat([out.state for out in outs]) if finite else None
            progress.carried = finite
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.seconds = shared[0]
        if self.failed_in_a_row == PATIENCE:
            self.give_up()
        return shared[1] > 0

    def gradients(self, batch: Batch) -> list[Part]:
        """Forward and backward over the parts of a batch; the gradients are those of the mean loss."""
        outs = []
        parts, states = batch.parts(self.config.accumulate), self.states(batch)
        reduce = self.reduced if self.world > 1 else None
        for number, (part, state) in enumerate(zip(parts, states, strict=True), start=1):
            last = number == len(parts)  # processes exchange gradients once a step
            documents = part.segment_ids
            if documents is None and self.config.compile:  # one graph for windows with borders and without
                documents = torch.zeros_like(part.ids)
            with self.exchange(last):
                with self.accelerator.autocast():
                    out = self.wrapped(part.ids, state, targets=part.targets, segment_ids=documents, reduce_load=reduce)
                self.accelerator.backward(out.loss / len(parts))
            losses = {name: out.losses[name].detach() for name in sorted(out.losses)}
            outs.append(Part(losses, out.expert_load, out.state.detach()))
            del out  # its graph lies between what the next part's could take
        return outs

    def exchange(self, now: bool) -> contextlib.AbstractContextManager[object]:
        """A region in which backward passes exchange gradients, or leave it for later."""
        if self.sharded:
            self.wrapped.set_requires_gradient_sync(now)
        elif not now:
            return self.accelerator.no_sync(self.wrapped)  # type: ignore[no-any-return]
        return contextlib.nullcontext()

    def states(self, batch: Batch) -> list[SynapseState | None]:
        """What each part of a batch goes on with: None for nothing, as in rows whose window opens a document."""
        count = self.config.accumulate
        if self.state is None or self.windows.begins(self.progress.step):
            return [None] * count
        rows = len(batch.ids)
        state = self.state.where(batch.ids[:, 0] != SEPARATOR, self.model.init_state(rows))
        size = rows // count
        return [state.select(range(start, start + size)) for start in range(0, rows, size)]

    def look(self, bar: ProgressBar) -> bool:
        """Reads a part of the held-out text; True when no look before was as good and the checkpoint is to be kept."""
        progress = self.progress
        self.looked = self.judge(QUICK_WINDOWS).per_byte
        bar.say(f"{clock(progress.seconds)}  held-out sample: {self.looked:.3f} bits/byte")
        if not self.config.keep_best or not self.looked < (math.inf if progress.best is None else progress.best):
            return False
        progress.best, progress.best_step = self.looked, progress.step
        return True

    def total(self, values: list[float | Tensor]) -> list[float]:
        """Each value summed over the processes."""
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in values])
        summed: Tensor = self.accelerator.reduce(stacked, reduction="sum")
        return summed.tolist()

    def reduced(self, tensor: Tensor) -> Tensor:
        """A tensor summed over the processes."""
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    def balance(self) -> None:
        """Moves the router's biases towards an even load, where the configuration asks for it."""
        if self.load is not None and self.model.config.thalamus.bias_rate > 0:
            self.model.balance_router(self.reduced(self.load.float()))

    def give_up(self) -> None:
        """Ends a run whose loss is no longer finite; the weights from before are in the last checkpoint."""
        try:
            kept = f"the last good weights are in {checkpoint.latest(self.out)}"
        except SynapseError:
            kept = "no checkpoint had been written yet"
        remedy = f"{kept}; lower --lr, or try --mixed-precision no"
        raise SynapseError(explain("loss", "finite numbers", f"{PATIENCE} steps without one", remedy))

    def judge(self, windows: int | None = None) -> Bits:
        """Held-out bits over all processes; `windows` of each row, or all of them."""
        self.model.eval()
        with self.accelerator.autocast(), eagerly(self.config.compile):
            share = held_out_bits(
                self.model,
                self.held_out,
                sizes=self.tokenizer.sizes,
                windows=windows,
                rank=self.rank,
                world=self.world,
            )
        self.model.train()
        bits, count = self.total([share.bits, float(share.count)])
        return Bits(bits, round(count))

    def save(self) -> None:
        """Writes a checkpoint from the main process, shards from all; every process hears how it went."""
        if self.saved == self.progress.step:
            return
        state, shards = self.state, None
        if state is not None and self.world > 1:  # every process's rows, in order
            layers = map_tensors(self.accelerator.gather, state.layers)
            state = SynapseState(layers, self.accelerator.gather(state.position))
        if self.config.shard:
            shards = self.out / f".{checkpoint.SHARDS_FOLDER}"
            on_main(self.accelerator, lambda: shutil.rmtree(shards, ignore_errors=True))
            sharded.save(shards, self.model, self.optimizer)
        on_main(
            self.accelerator,
            lambda: checkpoint.save(
                self.out,
                self.model,
                self.optimizer,
                self.progress,
                keep=self.config.keep,
                state=state,
                tokenizer=self.tokenizer,
                shards=shards,
            ),
        )
        self.saved = self.progress.step

    def whole(self) -> SynapseModel:
        """The model in one piece, for the main process alone; of shards, as the last checkpoint has it, on the CPU.

        Raises:
            CheckpointError: there is no checkpoint, or it could not be read.
        """
        if not self.config.shard:
            model: SynapseModel = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            return model
        folder = checkpoint.latest(self.out)
        return sharded.convert(folder / checkpoint.SHARDS_FOLDER, folder)

    def log(self, bar: ProgressBar) -> None:
        """Adds a line to the log, and to the trackers, every `LOG_EVERY` steps."""
        if self.progress.step % LOG_EVERY:
            return
        load = None if self.load is None else self.reduced(self.load)
        if not self.main:
            return
        line: dict[str, Any] = {name: getattr(self.progress, name) for name in ("step", "seconds", "skipped")}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], **self.last, "tokens_per_second": bar.rate}
        line["bits_per_byte"] = self.last["language"] / math.log(2) / bar.token_bytes
        line["matrix_share"] = 6 * accounting.active_parameters(self.model.config) * bar.rate / self.matrix_rate
        if self.looked is not None:
            line["held_out_bits_per_byte"], self.looked = self.looked, None
        line |= {} if load is None else router_health(load)
        self.accelerator.log({name: value for name, value in line.items() if name != "load"}, step=line["step"])
        try:
            with (self.out / checkpoint.LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(checkpoint.json_text(line) + "\n")
        except OSError as error:
            bar.say(f"step {self.progress.step} is missing in the log, training goes on: {error}")


def on_main(state: Accelerator | PartialState, action: Callable[[], object]) -> None:
    """Does `action` in the main process; its SynapseError is raised in every process, and none waits for another."""
    problem: list[str | None] = [None]
    if state.is_main_process:
        try:
            action()
        except SynapseError as error:
            problem = [str(error)]
    message = broadcast_object_list(problem)[0]
    if message is not None:
        raise SynapseError(message)
