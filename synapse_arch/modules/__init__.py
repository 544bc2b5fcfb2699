"""The regions, each usable alone: one contract, state in and state out, nothing mutable inside."""

from synapse_arch.modules.common import MixerOutput
from synapse_arch.modules.experts import ExpertOutput, ExpertPool, ExpertsConfig
from synapse_arch.modules.mamba import Mamba, MambaConfig, MambaState
from synapse_arch.modules.memory import FastWeightMemory, FastWeightState, MemoryConfig
from synapse_arch.modules.thalamus import Routing, Thalamus, ThalamusConfig, ThalamusOutput, ThalamusState
from synapse_arch.modules.xlstm import XLSTM, MLSTMLayerState, XLSTMConfig

__all__ = [
    "XLSTM",
    "ExpertOutput",
    "ExpertPool",
    "ExpertsConfig",
    "FastWeightMemory",
    "FastWeightState",
    "MLSTMLayerState",
    "Mamba",
    "MambaConfig",
    "MambaState",
    "MemoryConfig",
    "MixerOutput",
    "Routing",
    "Thalamus",
    "ThalamusConfig",
    "ThalamusOutput",
    "ThalamusState",
    "XLSTMConfig",
]
