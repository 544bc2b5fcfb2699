"""Sizes chosen for a machine and a text, and the memory they are predicted to take."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import ConfigError
from synapse_arch.model import accounting, autosize
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


def test_what_layers_leave_behind_grows_by_the_same_for_each() -> None:
    config = small_config()
    sizes = [autosize.saved_bytes(replace(config, n_layers=layers), length=32) for layers in (1, 2, 3, 4)]
    steps = {after - before for before, after in pairwise(sizes)}
    assert len(steps) == 1
    assert steps.pop() > 32 * 16 * 4  # at least the input of the layer


def test_a_prediction_of_memory_counts_every_tensor_that_is_kept() -> None:
    """Against the storages that are alive between forward and backward pass, found another way."""
    import gc

    config, ids = replace(small_config(), n_layers=3), torch.zeros(2, 32, dtype=torch.long)
    model = SynapseModel(config).train()
    loss = model(ids, targets=ids).loss
    assert loss is not None
    seen: dict[int, int] = {}
    stack, visited = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        stack += [parent for parent, _ in node.next_functions]
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        values += list(getattr(node, "saved_tensors", ()) or ())
        for value in values:
            if isinstance(value, Tensor):
                seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    gc.collect()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = sum(size for place, size in seen.items() if place not in own)
    total = sum(parameter.numel() for parameter in model.parameters())
    predicted = autosize.training_memory(config, batch_size=2, length=32) - 12 * total
    assert predicted == pytest.approx(alive, rel=0.25)


def test_a_step_is_timed() -> None:
    found = autosize.predict(small_config(), batch_size=2, length=16, repeats=1)
    assert 0 < found.seconds < 60
    assert found.memory == autosize.training_memory(small_config(), batch_size=2, length=16)
