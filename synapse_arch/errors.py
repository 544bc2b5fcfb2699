"""Every error this library raises on purpose, and the one way they are worded.

SynapseError
├── ConfigError         (ValueError)    a configuration that cannot be built
├── ShapeError          (ValueError)    a tensor of the wrong shape, dtype or value range
├── StateError          (ValueError)    a state that does not belong to this model or batch
├── DataError           (ValueError)    text, tokens or files that cannot be trained on
├── CheckpointError     (RuntimeError)  a checkpoint that is missing, damaged or foreign
└── BackendUnavailable  (RuntimeError)  an implementation asked for by name that cannot run here
"""

from __future__ import annotations


class SynapseError(Exception):
    """Base of every deliberate error of the library."""


class ConfigError(SynapseError, ValueError):
    """A configuration value that is unknown, out of range or contradicts another."""


class ShapeError(SynapseError, ValueError):
    """A tensor whose shape, dtype or values do not fit the operation."""


class StateError(SynapseError, ValueError):
    """A state of another configuration, batch size or dtype."""


class DataError(SynapseError, ValueError):
    """Data that is missing, empty, unreadable or outside the vocabulary."""


class CheckpointError(SynapseError, RuntimeError):
    """A checkpoint that is missing, truncated, foreign or of another schema."""


class BackendUnavailable(SynapseError, RuntimeError):  # noqa: N818 - the name callers catch
    """A backend asked for by name that cannot run on this machine."""


def explain(what: str, expected: object, got: object, remedy: str = "") -> str:
    """Words an error as the house does: what, expected, got, remedy.

    >>> explain("top_k", "1 to 8", 9, "lower top_k or raise n_experts")
    'top_k: expected 1 to 8, got 9; lower top_k or raise n_experts'
    """
    message = f"{what}: expected {expected}, got {got}"
    return f"{message}; {remedy}" if remedy else message
