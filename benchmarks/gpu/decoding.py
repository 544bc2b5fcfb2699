"""Steps of decoding in bfloat16: eager, compiled, as a CUDA graph, and both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.timing import attempt, interleaved
from benchmarks.gpu.training import narrow
from benchmarks.measure import Figure
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.model.compiling import GraphedStep, Step, compiled_step, eager_step
from synapse_arch.modules import ExpertPool


def measure(
    config: SynapseConfig, batches: tuple[int, ...], device: str, bandwidth: float, *, rounds: int, compiled: bool
) -> list[Figure]:
    """Tokens/s of each form, and its share of what the bandwidth allows if each weight it needs is read once."""
    model = narrow(SynapseModel(config).to(device).eval())
    figures = []
    for batch in batches:
        forms = {"eager": True, "CUDA graph": device == "cuda"}
        fuses = compiled and batch == batches[0]  # it takes a minute a batch size
        forms |= {"compiled": fuses, "compiled, CUDA graph": fuses and device == "cuda"}
        for form in (form for form, wanted in forms.items() if wanted):
            what = f"decoding, {form}, B {batch}"
            figures += attempt(what, partial(_steps, model, form, what, batch, device, bandwidth, rounds), device)
    return figures


def _steps(
    model: SynapseModel, form: str, what: str, batch: int, device: str, bandwidth: float, rounds: int
) -> list[Figure]:
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    step = compiled_step("cuda") if form.startswith("compiled") else eager_step
    if form.endswith("graph"):
        graphed = GraphedStep(model, model.init_state(batch), step=step)
        times = interleaved({form: lambda: graphed(ids)}, rounds, device, repeat=20)[form]
    else:
        times = interleaved({form: _stepper(model, ids, step)}, rounds, device, repeat=20)[form]
    needed = weight_bytes(model, batch)
    return [
        Figure(what=what, values=tuple(batch / t for t in times), unit="tokens/s"),
        Figure(
            what=f"{what}: share of the bandwidth limit", unit="share",
            values=tuple(needed / t / bandwidth for t in times), details={"bytes of weights": needed},
        ),
    ]  # fmt: skip


def weight_bytes(model: SynapseModel, batch: int) -> int:
    """Bytes of weights that a step reads, where its rows choose different experts as far as there are any."""
    tied = model.config.tie_embeddings
    total = sum(p.nbytes for p in model.parameters()) - (0 if tied else model.embedding.weight.nbytes)
    for pool in model.modules():
        if isinstance(pool, ExpertPool):
            visited = min(pool.config.n_experts, batch * model.config.thalamus.top_k)
            stacked = pool.w_in.nbytes + pool.w_out.nbytes
            total -= stacked * (pool.config.n_experts - visited) // pool.config.n_experts
    return total


def _stepper(model: SynapseModel, ids: Tensor, step: Step) -> Callable[[], None]:
    """Steps one after another, the state going from each to the next; it begins in the dtypes it stays in."""
    with torch.no_grad():
        _, state = eager_step(model, ids, model.init_state(len(ids)), None)

    def run() -> None:
        nonlocal state
        with torch.no_grad():
            _, state = step(model, ids, state, None)

    return run
