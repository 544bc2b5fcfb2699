"""What the model's regions report about a forward pass: what to trace, the records, text and JSON."""

from synapse_arch.introspection.analysis import Pathway, TopToken
from synapse_arch.introspection.joining import join_traces
from synapse_arch.introspection.records import (
    SCHEMA,
    ExpertStats,
    ExpertTrace,
    GateTrace,
    LayerTrace,
    MemoryTrace,
    RoutingTrace,
    SynapseTrace,
)
from synapse_arch.introspection.trace import LEVELS, Level, TraceSpec

__all__ = [
    "LEVELS",
    "SCHEMA",
    "ExpertStats",
    "ExpertTrace",
    "GateTrace",
    "LayerTrace",
    "Level",
    "MemoryTrace",
    "Pathway",
    "RoutingTrace",
    "SynapseTrace",
    "TopToken",
    "TraceSpec",
    "join_traces",
]
