"""ExpertPool: sparse SwiGLU feed-forwards, each token through the few it was routed to.

B batch, T time, D model width, E experts, F expert width, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, ShapeError, explain
from synapse_arch.introspection.probes import expert_trace
from synapse_arch.introspection.records import ExpertTrace
from synapse_arch.introspection.trace import Recorded, TraceSpec
from synapse_arch.modules.common import check_input, check_positive, linear
from synapse_arch.modules.thalamus import Routing
from synapse_arch.ops import expert_swiglu


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The pool of experts.

    Attributes:
        n_experts: E.
        d_expert: F, hidden width of each.
        d_shared: hidden width of one more SwiGLU that every token visits; 0 for none.
        labels: the user's names for the experts, E of them; None for none.
    """

    n_experts: int = 8
    d_expert: int = 512
    d_shared: int = 0
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_positive(self, n_experts=1, d_expert=1, d_shared=0)
        if self.labels is not None:
            named = isinstance(self.labels, (tuple, list)) and all(isinstance(label, str) for label in self.labels)
            if not named:
                raise ConfigError(explain("ExpertsConfig.labels", "a sequence of names", repr(self.labels)))
            object.__setattr__(self, "labels", tuple(self.labels))
            if len(self.labels) != self.n_experts:
                raise ConfigError(explain("ExpertsConfig.labels", f"{self.n_experts} names", len(self.labels)))


class ExpertOutput(NamedTuple):
    """What an expert pool returns."""

    y: Tensor
    """(B, T, D), without the residual."""
    trace: Recorded[ExpertTrace] | None = None


class ExpertPool(nn.Module):
    """E stacked SwiGLU experts, dropless, with an optional shared one. Stateless.

    Args:
        d_model: D.
        config: sizes and labels.
        residual_branches: the output weights start 1/sqrt of this smaller.

    >>> from synapse_arch.modules.thalamus import Routing
    >>> pool = ExpertPool(16, ExpertsConfig(n_experts=4, d_expert=8))
    >>> indices = torch.tensor([[[0, 3], [2, -1]]])  # the second token visits one expert only
    >>> routing = Routing(indices, torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]), torch.zeros(1, 2, 4))
    >>> tuple(pool(torch.randn(1, 2, 16), routing).y.shape)
    (1, 2, 16)
    """

    expert_ids: Tensor

    def __init__(self, d_model: int, config: ExpertsConfig | None = None, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config or ExpertsConfig()
        c = self.config
        scale = residual_branches**-0.5
        self.w_in = nn.Parameter(torch.randn(c.n_experts, d_model, 2 * c.d_expert) * d_model**-0.5)
        self.w_out = nn.Parameter(torch.randn(c.n_experts, c.d_expert, d_model) * scale * c.d_expert**-0.5)
        self.register_buffer("expert_ids", torch.arange(c.n_experts))
        if c.d_shared:
            self.shared_in = linear(d_model, 2 * c.d_shared)
            self.shared_out = linear(c.d_shared, d_model, scale=scale)

    def forward(
        self, x: Tensor, routing: Routing, *, trace: TraceSpec | None = None, backend: str = "auto"
    ) -> ExpertOutput:
        """Sends each token through its experts.

        Args:
            x: (B, T, D).
            routing: indices and weights (B, T, k); an index of -1 is a slot without expert.
            trace: what to record; expert activity at level "full".
            backend: of `expert_swiglu`.

        Returns:
            ExpertOutput with y (B, T, D).

        Raises:
            ShapeError: x or routing do not fit. ConfigError, BackendUnavailable: the backend.
        """
        check_input("ExpertPool", x, self.d_model)
        if routing.indices.shape[:2] != x.shape[:2]:
            expected = (*x.shape[:2], "k")
            raise ShapeError(explain("routing", expected, tuple(routing.indices.shape), "route the same tokens"))
        tokens, indices = x.flatten(0, 1), routing.indices.flatten(0, 1)
        weights = routing.weights.flatten(0, 1)
        y = expert_swiglu(tokens, self.w_in, self.w_out, indices, weights, backend=backend).unflatten(0, x.shape[:2])
        if self.config.d_shared:
            gate, up = self.shared_in(x).chunk(2, dim=-1)
            y = y + self.shared_out(F.silu(gate) * up)
        record = None
        if trace is not None and trace.wants("full"):
            record = trace.record(lambda: expert_trace(x, self.w_in, self.w_out, routing.indices))
        return ExpertOutput(y, record)
