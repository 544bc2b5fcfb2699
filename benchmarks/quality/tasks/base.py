"""What every task shares: batches and protocols, the training batch of a step, the test set, the accuracy.

All that is drawn comes from the seed of a run and from the number of the step: runs can stop and go on, and all models
of one seed see the same examples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recipes.data import mix
from synapse_arch.errors import ConfigError, ShapeError, explain

IGNORED = -100
_SET, _ORDER, _STREAM, _TEST = range(4)  # first numbers of the seeds, so that no two uses share one


class Batch(NamedTuple):
    """Examples of one length.

    Attributes:
        ids: (B, T) int64.
        targets: (B, T) int64, IGNORED where nothing is trained; of an autoencoder the tokens to rebuild.
        scored: (B, T) bool, the positions that count for the accuracy.
    """

    ids: Tensor
    targets: Tensor
    scored: Tensor


Make = Callable[[int, torch.Generator], Batch]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one scale of a task is trained and tested.

    Attributes:
        train_examples: size of the fixed training set; None for fresh examples at every step.
        test_examples: in all, over all lengths.
        batch_size: examples a step.
        steps: optimizer steps.
        lrs: peak learning rates to choose from.
        weight_decays: to choose from.
        d_model: width.
        n_layers: (mixer, SwiGLU) blocks of the peers.
        min_lr: where the cosine ends.
        warmup: share of the steps.
        stop_at: the test accuracy, in [0, 1], that ends the training early.
        eval_every: steps between tests.
        train_length: tokens of a training example; None for the task's own length.
        test_lengths: tokens of the test examples, the same number of examples of each; empty for the task's own length.
    """

    train_examples: int | None
    test_examples: int
    batch_size: int
    steps: int
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    d_model: int
    n_layers: int
    min_lr: float = 1e-6
    warmup: float = 0.0
    stop_at: float | None
    eval_every: int
    train_length: int | None = None
    test_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Something to learn.

    Attributes:
        name: as on the command line.
        vocab_size: of the inputs.
        n_classes: of the targets.
        make: n examples drawn from a generator.
        protocols: by scale, "cpu" and "published".
        test_make: draws the test examples; None for those of `make`.
        make_length: draws n examples of a given length, where a protocol names lengths.
        metric: "micro" is the share of right answers; "macro" the mean over the classes of the share of their answers
            that were right; "bits" leaves the accuracy for bits a token.
        autoencodes: every token is to be rebuilt from the feature at the last position.
        tied: the head uses the embedding's weights, as the task's authors have it.
        published: scores of others, in percent.
        description: one line.
        bar: the score to reach, in percent.
    """

    name: str
    vocab_size: int
    n_classes: int
    make: Make
    protocols: dict[str, Protocol]
    test_make: Make | None = None
    make_length: Callable[[int, torch.Generator, int], Batch] | None = None
    metric: Literal["micro", "macro", "bits"] = "micro"
    autoencodes: bool = False
    tied: bool = False
    published: dict[str, float] = field(default_factory=dict)
    description: str
    bar: float | None = None


def training_batch(task: Task, protocol: Protocol, seed: int, step: int) -> Batch:
    """The examples of a step, which depend on the seed and the step alone.

    A fixed training set is drawn once a seed. Each epoch goes through it in another order; examples that fill no
    whole batch sit that epoch out.

    Raises:
        ConfigError: the training set is smaller than a batch, or the task cannot make the protocol's train_length.
    """
    if protocol.train_examples is None:
        make = task.make if protocol.train_length is None else _of_length(task, protocol.train_length)
        return make(protocol.batch_size, _generator(_STREAM, seed, step))
    per_epoch = protocol.train_examples // protocol.batch_size
    if per_epoch == 0:
        got = f"{protocol.train_examples} train_examples"
        raise ConfigError(explain(task.name, f"at least one batch of {protocol.batch_size}", got, "lower batch_size"))
    epoch, place = divmod(step, per_epoch)
    order = _order(protocol.train_examples, seed, epoch)
    rows = order[place * protocol.batch_size : (place + 1) * protocol.batch_size]
    return Batch(*(part[rows] for part in _training_set(task, protocol.train_examples, seed)))


@lru_cache(maxsize=4)
def test_batches(task: Task, protocol: Protocol, seed: int) -> list[Batch]:
    """The test set in batches, from seeds that no training batch uses; all models tested with one seed get the same.

    Raises:
        ConfigError: the protocol names test lengths and the task cannot make them, or there are too few examples.
    """
    makes = _test_makes(task, protocol)
    each = protocol.test_examples // len(makes)
    if each == 0:
        got = f"{protocol.test_examples} test_examples"
        raise ConfigError(explain(task.name, "an example of each test length", got, "raise test_examples"))
    batches = []
    for index, make in enumerate(makes):
        for start in range(0, each, protocol.batch_size):
            n = min(protocol.batch_size, each - start)
            batches.append(make(n, _generator(_TEST, seed, index, start)))
    return batches


test_batches.__test__ = False  # type: ignore[attr-defined]  # a function of this name is no test


def accuracy(task: Task, predictions: list[Tensor], batches: list[Batch]) -> float:
    """The score of predicted classes, in [0, 1]; of batches of several lengths only the longest count.

    The classes of the macro average are those that occur among the answers.

    Args:
        task: whose metric is meant.
        predictions: one for each batch: (B, T) int64, or (n,) at the scored positions in their order.
        batches: what was predicted.

    Raises:
        ShapeError: predictions that fit no batch.
    """
    by_length = accuracy_by_length(task, predictions, batches)
    return by_length[max(by_length)]


def accuracy_by_length(task: Task, predictions: list[Tensor], batches: list[Batch]) -> dict[int, float]:
    """The accuracy of each length of the test set."""
    if len(predictions) != len(batches) or not batches:
        raise ShapeError(explain("predictions", f"one for each of {len(batches)} (> 0) batches", len(predictions)))
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for prediction, batch in zip(predictions, batches, strict=True):
        answers = batch.targets[batch.scored]
        chosen = prediction[batch.scored] if prediction.shape == batch.scored.shape else prediction
        if chosen.shape != answers.shape:
            expected = f"{tuple(batch.scored.shape)} or {tuple(answers.shape)}"
            raise ShapeError(explain("predictions", expected, tuple(prediction.shape)))
        found.setdefault(batch.ids.shape[1], []).append((chosen, answers))
    return {
        length: _accuracy(task, *(torch.cat(parts) for parts in zip(*pairs, strict=True)))
        for length, pairs in found.items()
    }


def scaled(score: float, n_classes: int) -> float:
    """An accuracy with chance moved to 0: (score − 1/n) / (1 − 1/n).

    >>> scaled(0.75, 2)
    0.5
    """
    chance = 1 / n_classes
    return (score - chance) / (1 - chance)


def _accuracy(task: Task, chosen: Tensor, answers: Tensor) -> float:
    right = (chosen == answers).double()
    if task.metric == "macro":
        asked = answers.bincount(minlength=task.n_classes)
        hit = answers.bincount(right, minlength=task.n_classes)
        return float((hit[asked > 0] / asked[asked > 0]).mean())
    return float(right.mean())


def _test_makes(task: Task, protocol: Protocol) -> list[Make]:
    if not protocol.test_lengths:
        return [task.test_make or task.make]
    return [_of_length(task, length) for length in protocol.test_lengths]


def _of_length(task: Task, length: int) -> Make:
    make = task.make_length
    if make is None:
        raise ConfigError(explain(task.name, "the task's one length", f"{length} tokens", "give the task make_length"))
    return lambda n, generator: make(n, generator, length)


@lru_cache(maxsize=2)
def _training_set(task: Task, examples: int, seed: int) -> Batch:
    return task.make(examples, _generator(_SET, seed))


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(examples, generator=_generator(_ORDER, seed, epoch))


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))
