"""The training loop: steps, looks at held-out text, checkpoints, and stopping when asked to."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from recipes import checkpoint
from recipes._accelerate import Accelerator, PartialState, broadcast_object_list
from recipes.checkpoint import Progress
from recipes.config import Command, RunConfig
from recipes.data import Corpus, Windows, mix, to_stream
from recipes.display import ProgressBar, clock
from recipes.evaluation import Bits, held_out_bits
from recipes.optim import adamw, set_lr
from synapse_arch import SynapseModel
from synapse_arch.errors import SynapseError, explain

PATIENCE = 10
"""Steps in a row without a finite loss after which a run stops."""
LOG_EVERY = 10
QUICK_WINDOWS = 4
"""Windows of each row that a look at held-out text reads during training."""
HELD_OUT_LIMIT = 512 * 1024
"""Bytes of held-out text that are judged at the end; of more, the first so many."""


class StopRequest:
    """Set by Ctrl-C or SIGTERM; one more after `GRACE` seconds interrupts at once.

    Sooner ones are the same wish told twice, as launchers pass on what the terminal has already sent to every process.
    """

    GRACE = 2.0

    def __init__(self) -> None:
        self.made = False
        self.at = math.inf

    def _note(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.at + self.GRACE:
            raise KeyboardInterrupt
        if not self.made:
            self.made, self.at = True, time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Trainer:
    """One run: its model, data and optimizer, and the loop over them.

    Args:
        config: what to compute; `mixed_precision` resolved.
        command: where, and how it was asked for.
        corpus: the text.
        accelerator: the processes and devices.
    """

    def __init__(self, config: RunConfig, command: Command, corpus: Corpus, accelerator: Accelerator) -> None:
        self.config, self.out, self.accelerator = config, command.out, accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main: bool = accelerator.is_main_process
        self.windows = Windows(
            to_stream(corpus.train), length=config.length, batch_size=config.batch_size, seed=config.seed
        )
        self.held_out = to_stream(corpus.held_out)[: HELD_OUT_LIMIT + 1]
        torch.manual_seed(mix(config.seed, -1))
        folder = checkpoint.latest(self.out) if command.resume else None
        self.model = SynapseModel.from_pretrained(folder) if folder else SynapseModel(config.model_config())
        self.model.to(accelerator.device).train()
        self.optimizer = adamw(self.model, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2))
        self.progress = checkpoint.restore(folder, self.model, self.optimizer) if folder else Progress()
        self.wrapped: Any = accelerator.prepare(self.model)
        self.schedule = config.learning_rate()
        self.stop = StopRequest()
        self.failed_in_a_row = 0
        self.last: dict[str, float] = {}

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
        bar = ProgressBar(config, step=progress.step, seconds=progress.seconds, shown=self.main)
        stopping = False
        with self.stop.listening(), bar:
            while self.used < 1 and not stopping:
                stopping = self.step(started)
                bar.update(step=progress.step, seconds=progress.seconds, tokens=tokens, loss=self.last["language"])
                self.log(bar)
                if progress.seconds >= eval_at:
                    bits = self.judge(QUICK_WINDOWS)
                    bar.say(f"{clock(progress.seconds)}  held-out sample: {bits.per_byte:.3f} bits/byte")
                    eval_at = progress.seconds + 60 * config.eval_minutes
                if progress.seconds >= save_at:
                    try:
                        self.save()
                    except SynapseError as error:
                        bar.say(f"not saved, training goes on: {error}")
                    save_at = progress.seconds + 60 * config.save_minutes
            self.save()
        return not stopping

    def step(self, started: float) -> bool:
        """One optimizer step; True when any process was asked to stop."""
        progress = self.progress
        batch = self.windows.batch(progress.step, self.rank, self.world).to(self.accelerator.device)
        torch.manual_seed(mix(self.config.seed, progress.step, self.rank))
        set_lr(self.optimizer, self.schedule.lr(self.used))
        out = self.wrapped(batch.ids, targets=batch.targets, segment_ids=batch.segment_ids)
        self.accelerator.backward(out.loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        names = sorted(out.losses)
        clock_now = time.monotonic() - started if self.main else 0.0
        shared = self.total([clock_now, float(self.stop.made), *(out.losses[name] / self.world for name in names)])
        self.last = {"norm": float(norm), **dict(zip(names, shared[2:], strict=True))}
        if all(math.isfinite(value) for value in self.last.values()):
            self.optimizer.step()
            self.balance(out.expert_load)
            self.failed_in_a_row = 0
        else:
            progress.skipped += 1
            self.failed_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.seconds = shared[0]
        if self.failed_in_a_row == PATIENCE:
            self.give_up()
        return shared[1] > 0

    def total(self, values: list[float | Tensor]) -> list[float]:
        """Each value summed over the processes."""
        device = self.accelerator.device
        stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in values])
        summed: Tensor = self.accelerator.reduce(stacked, reduction="sum")
        return summed.tolist()

    def balance(self, load: Tensor | None) -> None:
        """Moves the router's biases towards an even load, where the configuration asks for it."""
        if load is not None and self.model.config.thalamus.bias_rate > 0:
            self.model.balance_router(self.accelerator.reduce(load.float(), reduction="sum"))

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
        with self.accelerator.autocast():
            share = held_out_bits(self.model, self.held_out, windows=windows, rank=self.rank, world=self.world)
        self.model.train()
        bits, count = self.total([share.bits, float(share.count)])
        return Bits(bits, round(count))

    def save(self) -> None:
        """Writes a checkpoint from the main process; every process hears how it went."""
        on_main(self.accelerator, lambda: checkpoint.save(self.out, self.model, self.optimizer, self.progress))

    def log(self, bar: ProgressBar) -> None:
        """Adds a line to the log every `LOG_EVERY` steps."""
        if not self.main or self.progress.step % LOG_EVERY:
            return
        line = {"step": self.progress.step, "seconds": self.progress.seconds, "skipped": self.progress.skipped}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], **self.last, "tokens_per_second": bar.rate}
        try:
            with (self.out / checkpoint.LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
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
