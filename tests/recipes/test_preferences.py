"""Losses by preference against the formulas of their papers, computed here number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.preferences import IGNORED, Likelihood, dpo, likelihood, orpo


def held(total: list[float], count: list[int]) -> Likelihood:
    return Likelihood(torch.tensor(total, dtype=torch.float64), torch.tensor(count))


def test_the_likelihood_of_an_answer_is_that_of_its_tokens() -> None:
    logits, targets = torch.randn(2, 4, 5), torch.tensor([[-100, 3, 1, -100], [0, 2, 4, 4]])
    found = likelihood(logits, targets)
    for row in range(2):
        terms = [
            math.log(float(logits[row, t].double().softmax(-1)[targets[row, t]]))
            for t in range(4)
            if targets[row, t] != IGNORED
        ]
        assert float(found.total[row]) == pytest.approx(sum(terms), rel=1e-5)
        assert int(found.tokens[row]) == len(terms)


def test_dpo_is_the_papers_formula() -> None:
    """Rafailov et al. 2023, eq. 7, with probabilities instead of logarithms."""
    pi_w, pi_l, ref_w, ref_l, beta = [0.3, 0.02], [0.1, 0.5], [0.2, 0.04], [0.2, 0.25], 0.7

    def logs(values: list[float]) -> Likelihood:
        return held([math.log(value) for value in values], [1, 1])

    found = dpo(logs(pi_w), logs(pi_l), (logs(ref_w), logs(ref_l)), beta)
    expected = 0.0
    for w, l_, rw, rl in zip(pi_w, pi_l, ref_w, ref_l, strict=True):
        odds = ((w / rw) / (l_ / rl)) ** beta
        expected -= math.log(odds / (1 + odds)) / 2
    assert float(found.loss) == pytest.approx(expected, rel=1e-12)
    assert (found.margin > 0).tolist() == [True, False]


def test_dpo_of_a_model_that_has_not_moved_is_log_2() -> None:
    one, other = held([-3.0], [2]), held([-5.0], [4])
    assert float(dpo(one, other, (one, other), 0.1).loss) == pytest.approx(math.log(2))


def test_the_gradient_of_dpo_is_the_papers() -> None:
    """Rafailov et al. 2023, §4: -β σ(r̂_l - r̂_w) [∇ log π(y_w) - ∇ log π(y_l)]."""
    w, l_ = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-4.0, -3.0))
    count, beta = torch.tensor([2]), 0.4
    reference = (held([-3.5], [2]), held([-3.6], [2]))
    dpo(Likelihood(w, count), Likelihood(l_, count), reference, beta).loss.backward()
    reward_w, reward_l = beta * (-4.0 + 3.5), beta * (-3.0 + 3.6)
    expected = -beta / (1 + math.exp(reward_w - reward_l))
    assert w.grad is not None
    assert l_.grad is not None
    assert (float(w.grad), float(l_.grad)) == pytest.approx((expected, -expected), rel=1e-12)


def test_orpo_is_the_papers_formula() -> None:
    """Hong et al. 2024, eq. 3, 4 and 6: odds of the geometric mean of the tokens' probabilities."""
    tokens_w, tokens_l = [0.5, 0.4, 0.9], [0.3, 0.6]

    def answer(tokens: list[float]) -> Likelihood:
        return held([sum(map(math.log, tokens))], [len(tokens)])

    p_w, p_l = math.prod(tokens_w) ** (1 / 3), math.prod(tokens_l) ** (1 / 2)
    ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    found = orpo(answer(tokens_w), answer(tokens_l), 0.25)
    assert float(found.loss) == pytest.approx(-0.25 * math.log(1 / (1 + 1 / ratio)), rel=1e-12)
    assert float(found.margin) == pytest.approx(math.log(ratio), rel=1e-12)


def test_orpo_is_finite_where_an_answer_is_certain() -> None:
    total: Tensor = torch.tensor([0.0], requires_grad=True)
    found = orpo(Likelihood(total, torch.tensor([1])), Likelihood(torch.tensor([-2.0]), torch.tensor([1])), 1.0)
    found.loss.backward()
    assert found.loss.isfinite()
    assert total.grad is not None
    assert total.grad.isfinite().all()
