"""What answers are worth: log-probabilities of sequences, and the losses of DPO and ORPO.

B pairs, T positions, V vocabulary. The log-probability of an answer is that of its tokens after the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class Likelihood(NamedTuple):
    """How likely a model holds the answers of a batch."""

    total: Tensor
    """(B,) log-probability of each answer, in nats."""
    tokens: Tensor
    """(B,) how many it has."""

    @property
    def mean(self) -> Tensor:
        """(B,) log-probability a token."""
        return self.total / self.tokens


class Preference(NamedTuple):
    """What a batch of pairs gave."""

    loss: Tensor
    """()."""
    margin: Tensor
    """(B,) by how much the chosen answer is ahead, in the units of the loss."""


def likelihood(logits: Tensor, targets: Tensor) -> Likelihood:
    """The log-probability of the targets that are not ignored.

    Args:
        logits: (B, T, V).
        targets: (B, T) next tokens; -100 is ignored.

    >>> likelihood(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 0]])).mean.exp()
    tensor([0.2500])
    """
    counted = targets != IGNORED
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return Likelihood(-nats.view(targets.shape).sum(1), counted.sum(1))


def dpo(chosen: Likelihood, rejected: Likelihood, held: tuple[Likelihood, Likelihood], beta: float) -> Preference:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7).

    The margin is β ((log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log π_ref(rejected))), the difference of
    the implicit rewards; the loss is the mean of -log σ(margin).

    Args:
        chosen: of the model in training.
        rejected: of the same.
        held: the two by the reference model, which does not learn.
        beta: how far the model may move away from the reference: the smaller, the farther.
    """
    margin = beta * ((chosen.total - held[0].total) - (rejected.total - held[1].total))
    return Preference(-F.logsigmoid(margin).mean(), margin)


def orpo(chosen: Likelihood, rejected: Likelihood, weight: float) -> Preference:
    """The odds-ratio term of ORPO (Hong et al. 2024, eq. 6 and 7); the loss of the chosen answers is added elsewhere.

    With P the geometric mean of an answer's token probabilities and odds = P / (1 - P), the margin is
    log odds(chosen) - log odds(rejected), and the term is the mean of -log σ(margin), times `weight` (their λ).
    """
    margin = _log_odds(chosen.mean) - _log_odds(rejected.mean)
    return Preference(-weight * F.logsigmoid(margin).mean(), margin)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(log_p); finite where p rounds to 1."""
    tiny = torch.finfo(log_p.dtype).tiny
    return log_p - torch.log((-torch.expm1(log_p)).clamp(min=tiny))
