"""Steps of decoding in bfloat16: eager, compiled, as a CUDA graph, and both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.timing import Jobs, interleaved
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
        jobs = _jobs(model, batch, device, compiled and batch == batches[0])  # compiling takes a minute a batch size
        times = interleaved(jobs, rounds, device, repeat=20)
        needed = weight_bytes(model, batch)
        for form, taken in times.items():
            what = f"decoding, {form}, B {batch}"
            figures += [
                Figure(what=what, values=tuple(batch / t for t in taken), unit="tokens/s"),
                Figure(
                    what=f"{what}: share of the bandwidth limit", unit="share",
                    values=tuple(needed / t / bandwidth for t in taken), details={"bytes of weights": needed},
                ),
            ]  # fmt: skip
    return figures


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


def _jobs(model: SynapseModel, batch: int, device: str, compiled: bool) -> Jobs:
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
    jobs: Jobs = {"eager": _stepper(model, ids, eager_step)}
    if compiled:
        torch.compiler.reset()
        jobs["compiled"] = _stepper(model, ids, compiled_step())
    if device == "cuda":
        graphed = GraphedStep(model, model.init_state(batch))
        jobs["CUDA graph"] = lambda: graphed(ids)
        if compiled:
            both = GraphedStep(model, model.init_state(batch), step=compiled_step())
            jobs["compiled, CUDA graph"] = lambda: both(ids)
    return jobs


def _stepper(model: SynapseModel, ids: Tensor, step: Step) -> Callable[[], None]:
    """Steps one after another, the state going from each to the next."""
    state = model.init_state(len(ids))

    def run() -> None:
        nonlocal state
        with torch.no_grad():
            _, state = step(model, ids, state, None)

    return run
