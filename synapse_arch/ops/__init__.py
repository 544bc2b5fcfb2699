"""The recurrences and the expert product, as pure functions on tensors.

Each op has a reference form (a loop over time: the definition) and a fast form that equals it in outputs,
states and all gradients; `backend` chooses. State is always last in and last out, and never modified.
"""

from synapse_arch.ops._kernels import report as backends
from synapse_arch.ops.conv import causal_conv1d
from synapse_arch.ops.delta_rule import delta_rule
from synapse_arch.ops.experts import expert_swiglu
from synapse_arch.ops.mlstm import MLSTMState, mlstm
from synapse_arch.ops.selective_scan import selective_scan
from synapse_arch.ops.ssd import ssd

__all__ = [
    "MLSTMState",
    "backends",
    "causal_conv1d",
    "delta_rule",
    "expert_swiglu",
    "mlstm",
    "selective_scan",
    "ssd",
]
