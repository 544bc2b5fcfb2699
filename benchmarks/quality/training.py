"""Trains one model on one task and says how well it does: the same loop, optimiser and tests for every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.models import Learner
from benchmarks.quality.tasks.base import IGNORED, Batch, Protocol, Task, accuracy, test_batches, training_batch
from recipes.optim import Schedule, adamw, optimizer_tensors, restore_optimizer, set_lr

BETAS = (0.9, 0.95)
CLIP = 1.0
MOST_FAILURES = 20
TEST_SEED = 0  # one test set for all


@dataclass
class Progress:
    """How far a training run is: enough to go on from, and to draw its curve.

    Attributes:
        step: optimizer steps done.
        seconds: wall time of these steps, tests left out.
        failures: steps skipped because their loss was not finite.
        curve: (step, mean training loss since the entry before, test score).
    """

    step: int = 0
    seconds: float = 0.0
    failures: int = 0
    curve: list[list[float]] = field(default_factory=list)


class Trainer:
    """A model, a task and how to train; all that is random depends on the seed and the step only.

    Args:
        learner: the model, on the device it is to be trained on.
        task: what is learned.
        protocol: how long and how fast.
        seed: of the training batches; the model's initial weights are the caller's.
        lr: peak learning rate.
        weight_decay: of the matrices.
        steps: instead of the protocol's.
        bf16: matrix products under autocast.
    """

    def __init__(
        self,
        learner: Learner,
        task: Task,
        protocol: Protocol,
        *,
        seed: int,
        lr: float,
        weight_decay: float,
        steps: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.learner, self.task, self.protocol, self.seed = learner, task, protocol, seed
        self.steps = steps or protocol.steps
        self.device = next(learner.parameters()).device
        self.schedule = Schedule(peak=lr, final=min(1.0, protocol.min_lr / lr), warmup=protocol.warmup)
        self.optimizer = adamw(learner, weight_decay=weight_decay, betas=BETAS)
        self.bf16 = bf16
        self.progress = Progress()
        self._losses: list[float] = []

    def run(self, shown: Callable[[Progress], None] = lambda _: None, save: Callable[[], None] = lambda: None) -> None:
        """Trains to the end of the protocol, or until a test reaches its `stop_at`.

        Args:
            shown: called after every step, for a progress bar.
            save: called after every test.
        """
        while not self._done():
            self.step()
            shown(self.progress)
            if self.progress.step % self.protocol.eval_every == 0 or self.progress.step == self.steps:
                self.progress.curve.append([self.progress.step, _mean(self._losses), self.score()])
                self._losses = []
                save()

    def _done(self) -> bool:
        """Whether all steps are taken, or the last test was good enough."""
        goal, curve = self.protocol.stop_at, self.progress.curve
        tested = bool(curve) and curve[-1][0] == self.progress.step
        return self.progress.step >= self.steps or (goal is not None and tested and curve[-1][2] >= goal)

    def step(self) -> None:
        """One optimizer step."""
        began = time.perf_counter()
        batch = self._to_device(training_batch(self.task, self.protocol, self.seed, self.progress.step))
        self.learner.train()
        set_lr(self.optimizer, self.schedule.lr((self.progress.step + 1) / self.steps))
        with self._autocast():
            logits, targets, auxiliary = self._predict(batch)
            loss = F.cross_entropy(logits.float(), targets) + auxiliary
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.learner.parameters(), CLIP)
        if math.isfinite(float(norm)):
            self.optimizer.step()
            self.learner.after_step()
        else:
            self.progress.failures += 1
            if self.progress.failures > MOST_FAILURES:
                raise FloatingPointError(f"{self.task.name}: {self.progress.failures} steps without a finite gradient")
        self.optimizer.zero_grad()
        self._losses.append(float(loss.detach()))
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - began

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and targets of the trained positions, and the auxiliary loss."""
        trained = batch.targets != IGNORED
        if self.task.autoencodes or bool(trained.all()):
            logits, auxiliary = self.learner(batch.ids)
            return logits.flatten(0, 1), batch.targets.flatten(), auxiliary
        logits, auxiliary = self.learner(batch.ids, trained)
        return logits, batch.targets[trained], auxiliary

    @torch.no_grad()
    def score(self) -> float:
        """On the task's test set: accuracy, or bits per token where the task is measured in bits."""
        self.learner.eval()
        batches = test_batches(self.task, self.protocol, TEST_SEED)
        if self.task.metric == "bits":
            return self._bits(batches)
        predictions = []
        for batch in batches:
            ids, scored = batch.ids.to(self.device), batch.scored.to(self.device)
            with self._autocast():
                logits, _ = self.learner(ids, None if self.task.autoencodes else scored)
            predictions.append(logits.argmax(-1).cpu())
        return accuracy(self.task, predictions, batches)

    def _bits(self, batches: list[Batch]) -> float:
        nats, count = 0.0, 0
        for batch in map(self._to_device, batches):
            with self._autocast():
                logits, _ = self.learner(batch.ids)
            nats += float(F.cross_entropy(logits[batch.scored].float(), batch.targets[batch.scored], reduction="sum"))
            count += int(batch.scored.sum())
        return nats / count / math.log(2)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.device) for part in batch))

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on: tensors and plain numbers."""
        return {
            "model": self.learner.state_dict(),
            "optimizer": optimizer_tensors(self.learner, self.optimizer),
            "progress": vars(self.progress),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up where `state` was taken."""
        self.learner.load_state_dict(state["model"])
        restore_optimizer(self.learner, self.optimizer, state["optimizer"])
        self.progress = Progress(**state["progress"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
