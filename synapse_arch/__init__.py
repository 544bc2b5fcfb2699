"""synapse_arch: a language model without attention, built of regions that can be read and used alone.

from synapse_arch import SynapseConfig, SynapseModel

model = SynapseModel(SynapseConfig.preset("tiny"))
"""

from synapse_arch import errors, introspection, ops
from synapse_arch.errors import (
    BackendUnavailable,
    CheckpointError,
    ConfigError,
    DataError,
    ShapeError,
    StateError,
    SynapseError,
)
from synapse_arch.introspection import TraceSpec
from synapse_arch.model import (
    Controls,
    GenerateOutput,
    LayerState,
    Sampling,
    StreamedToken,
    SynapseConfig,
    SynapseLayer,
    SynapseModel,
    SynapseOutput,
    SynapseState,
    TokenStream,
)
from synapse_arch.modules import (
    XLSTM,
    ExpertPool,
    ExpertsConfig,
    FastWeightMemory,
    Mamba,
    MambaConfig,
    MemoryConfig,
    MixerOutput,
    Routing,
    Thalamus,
    ThalamusConfig,
    XLSTMConfig,
)

__version__ = "0.1.0"

__all__ = [
    "XLSTM",
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "Controls",
    "DataError",
    "ExpertPool",
    "ExpertsConfig",
    "FastWeightMemory",
    "GenerateOutput",
    "LayerState",
    "Mamba",
    "MambaConfig",
    "MemoryConfig",
    "MixerOutput",
    "Routing",
    "Sampling",
    "ShapeError",
    "StateError",
    "StreamedToken",
    "SynapseConfig",
    "SynapseError",
    "SynapseLayer",
    "SynapseModel",
    "SynapseOutput",
    "SynapseState",
    "Thalamus",
    "ThalamusConfig",
    "TokenStream",
    "TraceSpec",
    "XLSTMConfig",
    "errors",
    "introspection",
    "ops",
]
