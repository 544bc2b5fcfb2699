"""Sizes chosen for a machine and a text, and the memory they are predicted to take."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import ConfigError
from synapse_arch.model import accounting, autosize
from synapse_arch.model._live import Live
from tests.model.small import small_config


def test_more_text_and_more_memory_give_larger_models_that_keep_the_rules() -> None:
    before = 0
    for tokens, memory in ((10**5, 2 * 10**8), (2 * 10**6, 10**9), (10**8, 10**9)):
        choice = autosize.choose(memory=memory, tokens=tokens)
        active, total = accounting.active_parameters(choice.config), sum(accounting.parameters(choice.config).values())
        assert active > before
        assert choice.memory <= autosize.MEMORY_SHARE * memory
        assert f"{total:,} parameters" in choice.why[-1]
        if before:  # the first is the smallest there is
            assert active <= tokens // 5
            assert total <= tokens
        before = active


def test_a_configuration_is_the_chosen_one() -> None:
    found = SynapseConfig.auto(tokens=10**7, memory=10**9, vocab_size=300, batch_size=2, length=64)
    chosen = autosize.choose(tokens=10**7, memory=10**9, vocab_size=300, batch_size=2, length=64)
    assert found == chosen.config
    assert found.vocab_size == 300
    assert SynapseConfig.auto(tokens=10**5).d_model >= 64


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory: expected .* MB or more, got 1"):
        autosize.choose(memory=10**6, tokens=10**9)
    with pytest.raises(ConfigError, match="tokens: expected 1 or more"):
        autosize.choose(memory=10**9, tokens=0)


@pytest.mark.parametrize("length", [32, 64])
def test_what_is_alive_grows_by_the_same_for_each_layer(length: int) -> None:
    """Before the gradients and with them, whichever of both is the peak."""
    config = small_config()
    sizes = [autosize.live_bytes(replace(config, n_layers=layers), length=length) for layers in (1, 2, 3, 4, 5, 6)]
    for part in zip(*sizes, strict=True):
        steps = {after - before for before, after in pairwise(part)}
        assert len(steps) == 1
        assert steps.pop() > length * 16 * 4  # at least the input of the layer


def test_a_prediction_of_memory_is_what_the_profiler_counts() -> None:
    """Against torch's own count of a whole step's allocations, whatever the regime: long text, or many weights."""
    for length, d_expert in ((96, 16), (8, 512)):
        base = small_config()
        assert base.experts is not None
        config = replace(base, n_layers=3, experts=replace(base.experts, d_expert=d_expert))
        model = SynapseModel(config).train()
        ids = torch.zeros(2, length, dtype=torch.long)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = model(ids, targets=ids).loss
            assert loss is not None
            loss.backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = max(itertools.accumulate(event.nbytes() for event in events))
        total = sum(parameter.numel() for parameter in model.parameters())
        predicted = autosize.training_memory(config, batch_size=2, length=length) / autosize.HEAP
        assert predicted == pytest.approx(12 * total + peak, rel=0.15), (length, d_expert)


def test_live_memory_counts_what_is_there_at_once() -> None:
    known = torch.zeros(1000)
    with Live([known]) as live:
        known.add_(1)
        made = [torch.zeros(256), torch.zeros(256)]
        assert live.peak == 2048
        made.clear()
        view = torch.zeros(128).view(2, 64)[1]
        assert live.peak == 2048
        more = torch.cat([torch.zeros(300), view])
        assert live.peak == 512 + 1200 + 364 * 4
    assert len(more) == 364


def test_steps_are_timed_in_turns() -> None:
    order: list[str] = []
    seconds = {"a": iter([9.0, 3.0, 2.0, 4.0]), "b": iter([9.0, 5.0, 7.0, 6.0])}

    def step(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    found = autosize.fastest([lambda: step("a"), lambda: step("b")], seconds=0)
    assert found == [2.0, 5.0]  # the first turn warms up
    assert order == ["a", "b"] * 4
    assert autosize.deepened(2.0, 5.0, 4) == 11.0


def test_a_step_is_timed() -> None:
    found = autosize.predict(small_config(), batch_size=2, length=16, seconds=0)
    assert 0 < found.seconds < 60
    assert found.memory == autosize.training_memory(small_config(), batch_size=2, length=16)
