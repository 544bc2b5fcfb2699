"""The model on a GPU: it streams, trains, compiles and is graphed as on the CPU, and never waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.training import narrow
from synapse_arch import Sampling, SynapseConfig, SynapseModel, SynapseOutput
from synapse_arch.model.compiling import GraphedStep, compiled_step, eager_step

CONFIG = SynapseConfig(vocab_size=256, d_model=256, n_layers=2)


@pytest.fixture
def model() -> SynapseModel:
    torch.manual_seed(0)
    return SynapseModel(CONFIG).cuda().eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


def close(found: Tensor, expected: Tensor, allowed: float) -> None:
    off = (found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()
    assert off <= allowed, float(off)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training_step(model: SynapseModel, ids: Tensor) -> SynapseOutput:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(ids[:, :-1], targets=ids[:, 1:])
    assert out.loss is not None
    out.loss.backward()
    return out


def test_streaming_equals_the_full_pass(model: SynapseModel) -> None:
    ids = tokens(2, 200)
    with torch.no_grad():
        whole = model(ids)
        state, logits = None, []
        for piece in ids.split([1, 63, 64, 71, 1], dim=1):
            out = model(piece, state)
            state, logits = out.state, [*logits, out.logits]
    close(torch.cat(logits, 1), whole.logits, 1e-4)
    for name, x in whole.state.to_tensors().items():
        if x.is_floating_point():
            close(out.state.to_tensors()[name], x, 1e-4)


def test_the_cpu_says_the_same(model: SynapseModel) -> None:
    ids = tokens(2, 100)
    with torch.no_grad():
        there = model(ids).logits
        close(there, model.cpu()(ids.cpu()).logits, 1e-4)


def test_a_training_step_in_bfloat16(model: SynapseModel) -> None:
    """Losses near those of float32, all gradients finite, those of the same direction."""
    ids = tokens(4, 257)
    model.train()
    wide = model(ids[:, :-1], targets=ids[:, 1:])
    assert wide.loss is not None
    wide.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = training_step(model, ids)
    close(out.losses["language"], wide.losses["language"], 1e-2)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.cosine_similarity(found, torch.cat([x.flatten() for x in expected.values()]), dim=0) > 0.95


def test_neither_training_nor_decoding_waits_for_the_device(model: SynapseModel) -> None:
    ids, segments = tokens(2, 129), torch.arange(128, device="cuda").expand(2, -1) // 50
    model.train()
    training_step(model, ids)  # what is set up once
    model.zero_grad()
    with no_waiting():
        training_step(model, ids)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(ids[:, :-1], targets=ids[:, 1:], segment_ids=segments).loss.backward()  # type: ignore[union-attr]
    model.eval()
    for batch, autocast in ((1, True), (4, True), (1, False)):
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            state, one = model.init_state(batch), tokens(batch, 1)
            model(one, state)
            with no_waiting():
                model(one, model(one, state).state)


def test_a_layer_compiles_to_one_graph_and_trains_the_same(model: SynapseModel) -> None:
    torch.compiler.reset()
    ids = tokens(2, 129)
    model.train()
    expected = training_step(model, ids)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for layer in model.layers:
        layer.compile(fullgraph=True)
    found = training_step(model, ids)
    assert found.loss is not None
    assert expected.loss is not None
    close(found.loss, expected.loss, 1e-2)
    mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.cosine_similarity(mine, torch.cat([x.flatten() for x in grads.values()]), dim=0) > 0.95


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_graphed_step_is_the_step(model: SynapseModel, compiled: bool) -> None:
    torch.compiler.reset()
    narrow(model)
    step = compiled_step("cuda") if compiled else eager_step
    with torch.no_grad():
        state = model(tokens(4, 33)).state
        graphed = GraphedStep(model, state, step=step)
        for _ in range(2):  # the second time from where it began
            expected = state
            for t in range(5):
                one = tokens(4, 5)[:, t : t + 1]
                logits, expected = step(model, one, expected, None)
                close(graphed(one), logits, 1e-2)
            for name, x in expected.to_tensors().items():
                close(graphed.state.to_tensors()[name], x, 1e-2)
            graphed.load(state)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_generation(model: SynapseModel, compile: bool) -> None:
    torch.compiler.reset()
    sampling = Sampling(max_tokens=8, seed=3, top_k=20)
    out = model.generate(tokens(2, 20), sampling=sampling, compile=compile)
    assert [len(ids) for ids in out.ids] == [8, 8]
    assert out.state.position.tolist() == [28, 28]
    assert out.state.device.type == "cuda"
    if not compile:
        again = model.cpu().generate(tokens(2, 20).cpu(), sampling=sampling)
        assert again.ids == out.ids
