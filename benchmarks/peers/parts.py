"""Expert dispatch against the dense product, and what importing the library costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Figure, interleaved
from benchmarks.parity import difference
from benchmarks.peers.functions import AGREE
from recipes.malloc import keep_freed_memory
from synapse_arch.ops import expert_swiglu

D_MODEL, D_EXPERT = 256, 512
CHECKED = 32
"""Tokens whose outputs are compared with the definition, which sends each through every expert."""


def dispatch(cases: Sequence[tuple[int, int, int]], rounds: int) -> list[Figure]:
    """Time of a dense SwiGLU of equal arithmetic over that of the experts, with freed memory kept, as in training.

    Experts whose first tokens are not those of the definition are not timed.

    Args:
        cases: (experts, experts a token, tokens).
        rounds: how often the pair is timed.
    """
    keep_freed_memory()
    return [_dispatch(*case, rounds) for case in cases]


def _dispatch(experts: int, chosen: int, tokens: int, rounds: int) -> Figure:
    torch.manual_seed(0)
    x = torch.randn(tokens, D_MODEL)
    w_in = torch.randn(experts, D_MODEL, 2 * D_EXPERT) * D_MODEL**-0.5
    w_out = torch.randn(experts, D_EXPERT, D_MODEL) * D_EXPERT**-0.5
    indices = torch.rand(tokens, experts).topk(chosen).indices
    weights = torch.full((tokens, chosen), 1 / chosen)
    dense_in, dense_out = w_in[0], w_out[0]
    rows = x.repeat(chosen, 1)

    def dense() -> Tensor:
        gate, up = (rows @ dense_in).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ dense_out

    def sparse() -> Tensor:
        return expert_swiglu(x, w_in, w_out, indices, weights)

    each = tokens * chosen // experts
    what = f"dispatch: {experts} experts, {chosen} a token, {each} rows an expert"
    some = slice(CHECKED)
    with torch.inference_mode():
        defined = expert_swiglu(x[some], w_in, w_out, indices[some], weights[some], backend="reference")
        off = difference({"y": sparse()[some]}, {"y": defined})
        if off > AGREE:
            return Figure(what=f"{what}: outputs, ours from the definition", values=(off,), unit="relative", goal=AGREE,
                          exact=True)  # fmt: skip
        times = interleaved({"dense": dense, "sparse": sparse}, rounds, f"dispatch, {experts} experts")
    return Figure(
        what=f"{what}: dense time over ours",
        values=tuple(a / b for a, b in zip(times["dense"], times["sparse"], strict=True)),
        unit="share", goal=0.8 if each >= 64 else None, better="more", details={"difference from the definition": off},
    )  # fmt: skip


CASES = tuple(
    (experts, chosen, 128 * experts // chosen) for experts in (8, 64, 256) for chosen in (1, 2, 16) if chosen <= experts
)
"""(experts, chosen, tokens) with 128 rows an expert."""


def start(rounds: int) -> list[Figure]:
    """Seconds that `import synapse_arch` adds to `import torch`, each in fresh interpreters.

    The first one, which is not counted, writes the bytecode that an installed package comes with.
    """
    program = "import time, torch; a = time.perf_counter(); import synapse_arch; print(time.perf_counter() - a)"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        variables["PYTHONPYCACHEPREFIX"] = folder
        for _ in range(rounds + 1):
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=variables
            )
            found.append(float(done.stdout))
    what = "start: what import synapse_arch adds to import torch"
    return [Figure(what=what, values=tuple(found[1:]), unit="seconds", goal=0.2)]
