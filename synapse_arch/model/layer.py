"""SynapseLayer: language module, thalamus, experts and memory around one residual stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from synapse_arch.introspection.records import LayerTrace
from synapse_arch.introspection.trace import Recorded, TraceSpec, made
from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.controls import LayerControls
from synapse_arch.model.state import LayerState
from synapse_arch.modules import XLSTM, ExpertPool, FastWeightMemory, Routing, Thalamus
from synapse_arch.modules.common import RMSNorm


class LayerOutput(NamedTuple):
    """What a layer returns."""

    x: Tensor
    """(B, T, D) the residual stream."""
    state: LayerState
    routing: Routing | None
    trace: Recorded[LayerTrace] | None


class SynapseLayer(nn.Module):
    """One layer: x + xLSTM, + thalamus, + experts (where the thalamus sent it), + memory; each behind an RMSNorm.

    Args:
        config: the model's configuration; parts that are None are left out.
        index: which layer this is, for its trace.
    """

    def __init__(self, config: SynapseConfig, index: int) -> None:
        super().__init__()
        self.index = index
        d, branches = config.d_model, config.residual_branches

        def norm() -> RMSNorm:
            return RMSNorm(d, eps=config.norm_eps)

        self.xlstm = self.experts = self.memory = None
        if config.xlstm is not None:
            self.xlstm_norm = norm()
            self.xlstm = XLSTM(d, config.xlstm, residual_branches=branches)
        idle = config.thalamus.mamba is None and config.experts is None
        self.thalamus_norm = nn.Identity() if idle else norm()
        self.thalamus = Thalamus(d, config.n_experts, config.thalamus, residual_branches=branches)
        if config.experts is not None:
            self.experts_norm = norm()
            self.experts = ExpertPool(d, config.experts, residual_branches=branches)
        if config.memory is not None:
            self.memory_norm = norm()
            self.memory = FastWeightMemory(d, config.memory, residual_branches=branches)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> LayerState:
        """The state before the first position."""
        return LayerState(
            xlstm=self.xlstm.init_state(batch_size, device=device) if self.xlstm else None,
            thalamus=self.thalamus.init_state(batch_size, device=device),
            memory=self.memory.init_state(batch_size, device=device) if self.memory else None,
        )

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        trace: TraceSpec | None = None,
        controls: LayerControls | None = None,
        expert_backend: str = "auto",
    ) -> LayerOutput:
        """(B, T, D) -> LayerOutput; arguments as for every mixer and as for the model."""
        spec = trace if trace is not None and trace.covers(self.index) else None
        common = {"segment_ids": segment_ids, "mask": mask, "trace": spec}
        xlstm = experts = memory = None
        if self.xlstm is not None:
            xlstm = self.xlstm(self.xlstm_norm(x), state and state.xlstm, **common)
            x = x + xlstm.y
        hands = {} if controls is None else {"rank_bias": controls.router_bias, "pathways": controls.pathways}
        thalamus = self.thalamus(self.thalamus_norm(x), state and state.thalamus, **hands, **common)
        if thalamus.y is not None:
            x = x + thalamus.y
        if self.experts is not None:
            experts = self.experts(self.experts_norm(x), thalamus.routing, trace=spec, backend=expert_backend)
            x = x + experts.y
        if self.memory is not None:
            plasticity = controls and controls.memory_write
            memory = self.memory(self.memory_norm(x), state and state.memory, plasticity=plasticity, **common)
            x = x + (memory.y if controls is None else controls.answer(memory.y))
        if controls is not None:
            x = controls.finish(x)
        record = None
        if spec is not None:
            parts = (thalamus, experts, xlstm, memory)
            record = self._record(spec, *(part and part.trace for part in parts))
        return LayerOutput(
            x, LayerState(xlstm and xlstm.state, thalamus.state, memory and memory.state), thalamus.routing, record
        )

    def _record(self, spec: TraceSpec, routing: Any, experts: Any, gates: Any, memory: Any) -> Recorded[LayerTrace]:
        """The regions' records as one; nothing else of the pass is held by it."""
        return spec.record(
            lambda: LayerTrace(
                index=self.index,
                routing=made(routing),
                experts=made(experts),
                gates=made(gates),
                memory=made(memory),
                expert_ids=self.experts.expert_ids if self.experts else None,
            )
        )
