"""The regions wired into a language model: configuration, state, generation, checkpoints, accounting."""

from synapse_arch.model.config import SynapseConfig
from synapse_arch.model.controls import Controls
from synapse_arch.model.generation import GenerateOutput, Sampling, StreamedToken, TokenStream
from synapse_arch.model.layer import SynapseLayer
from synapse_arch.model.model import SynapseModel, SynapseOutput
from synapse_arch.model.state import LayerState, SynapseState

__all__ = [
    "Controls",
    "GenerateOutput",
    "LayerState",
    "Sampling",
    "StreamedToken",
    "SynapseConfig",
    "SynapseLayer",
    "SynapseModel",
    "SynapseOutput",
    "SynapseState",
    "TokenStream",
]
