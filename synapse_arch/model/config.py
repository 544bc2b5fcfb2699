"""SynapseConfig: everything that decides a model's shape, as one frozen, validated record."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from synapse_arch.errors import ConfigError, explain
from synapse_arch.modules import ExpertsConfig, MemoryConfig, ThalamusConfig, XLSTMConfig
from synapse_arch.modules.common import check_flag, check_positive


@dataclass(frozen=True, kw_only=True)
class SynapseConfig:
    """The architecture of a SynapseModel.

    Attributes:
        vocab_size: token ids run from 0 to vocab_size - 1; 256 is bytes.
        d_model: D, width of the residual stream.
        n_layers: number of layers.
        tie_embeddings: the head uses the embedding's weights.
        norm_eps: added to the mean square in the layers' norms.
        thalamus: the Mamba router of each layer; with experts=None a plain relay, with mamba=None a plain router.
        xlstm: the language module, or None for none.
        experts: the expert pool, or None for none.
        memory: the fast-weight memory, or None for none.

    Raises:
        ConfigError: a value out of range, or parts that do not fit together.
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 3
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    thalamus: ThalamusConfig = field(default_factory=ThalamusConfig)
    xlstm: XLSTMConfig | None = field(default_factory=XLSTMConfig)
    experts: ExpertsConfig | None = field(default_factory=ExpertsConfig)
    memory: MemoryConfig | None = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        check_positive(self, vocab_size=1, d_model=1, n_layers=1, norm_eps=0.0)
        check_flag(self, "tie_embeddings")
        for name, kind in _nested(type(self)).items():
            value = getattr(self, name)
            optional = name != "thalamus"
            if not (isinstance(value, kind) or (optional and value is None)):
                expected = f"a {kind.__name__}" + (" or None" if optional else "")
                raise ConfigError(explain(f"SynapseConfig.{name}", expected, repr(value)))
        if self.experts is not None and self.thalamus.top_k > self.experts.n_experts:
            expected = f"at most n_experts={self.experts.n_experts}"
            remedy = "lower top_k or raise n_experts"
            raise ConfigError(explain("SynapseConfig.thalamus.top_k", expected, self.thalamus.top_k, remedy))

    @property
    def n_experts(self) -> int:
        """E, 0 where there is no pool."""
        return self.experts.n_experts if self.experts else 0

    @property
    def residual_branches(self) -> int:
        """How many outputs are added to the residual stream, over all layers."""
        parts = (self.xlstm, self.thalamus.mamba, self.experts, self.memory)
        return self.n_layers * sum(part is not None for part in parts)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SynapseConfig:
        """A named configuration, with fields replaced.

        Args:
            name: "tiny" (12M parameters at a byte vocabulary), "small", "base", or "titan" (about a billion).
            overrides: fields of SynapseConfig; nested ones by dots, as keys of a dict: ``**{"experts.n_experts": 4}``.

        Raises:
            ConfigError: an unknown preset or field.

        >>> SynapseConfig.preset("tiny", memory=None).memory is None
        True
        """
        if name not in PRESETS:
            raise ConfigError(_unknown("preset", name, PRESETS))
        data = cls.from_dict(PRESETS[name]).to_dict()
        for path, value in overrides.items():
            _assign(data, path, value)
        return cls.from_dict(data)

    @classmethod
    def auto(cls, *, tokens: int, memory: int | None = None, vocab_size: int = 256, **step: int) -> SynapseConfig:
        """The largest model that a machine can train and a text can fill; `autosize.choose` also says why.

        Args:
            tokens: of text to train on.
            memory: bytes there are for the training; None for what is free, on the GPU where there is one.
            vocab_size: the tokenizer's.
            step: batch_size and length of a training step.

        Raises:
            ConfigError: no size fits, or the system does not say how much memory it has.
        """
        from synapse_arch.model import autosize  # it builds models, which are made from this module

        room = autosize.available_memory() if memory is None else memory
        return autosize.choose(memory=room, tokens=tokens, vocab_size=vocab_size, **step).config

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, lists and numbers; what `from_dict` takes and JSON holds."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SynapseConfig:
        """The configuration that `to_dict` wrote; fields left out take their defaults.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a value out of range.
        """
        config: SynapseConfig = _build(cls, data, "config")
        return config


def _nested(cls: type) -> dict[str, type]:
    """The fields of a config class that are configs themselves, with their classes."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        classes = [option for option in options if dataclasses.is_dataclass(option)]
        if classes:
            found[name] = typing.cast(type, classes[0])
    return found


def _build(cls: type, data: Mapping[str, Any], path: str) -> Any:
    """A config class from a plain dict, its nested configs too."""
    if not isinstance(data, Mapping):
        raise ConfigError(explain(path, "a dict of fields", type(data).__name__))
    names = [f.name for f in dataclasses.fields(cls)]
    nested = _nested(cls)
    values = {}
    for name, value in data.items():
        if name not in names:
            raise ConfigError(_unknown(f"{path} key", name, names))
        if name in nested and isinstance(value, Mapping):
            value = _build(nested[name], value, f"{path}.{name}")
        values[name] = value
    return cls(**values)


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted path in nested dicts; a part that was None comes back with its defaults."""
    *parents, last = path.split(".")
    for parent in parents:
        if parent in data and data[parent] is None:
            data[parent] = {}
        if not isinstance(data.get(parent), dict):
            raise ConfigError(_unknown("config key", path, data))
        data = data[parent]
    data[last] = _plain(dataclasses.asdict(value)) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    remedy = f"did you mean {near[0]!r}?" if near else ""
    return explain(what, f"one of {', '.join(known)}", repr(name), remedy)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 256, "d_model": 256, "n_layers": 3},
    "small": {
        "vocab_size": 16384,
        "d_model": 512,
        "n_layers": 8,
        "experts": {"n_experts": 8, "d_expert": 1024},
        "memory": {"n_heads": 8},
        "xlstm": {"n_heads": 4},
    },
    "base": {
        "vocab_size": 32768,
        "d_model": 1024,
        "n_layers": 16,
        "thalamus": {"d_state": 128},
        "experts": {"n_experts": 16, "d_expert": 2048},
        "memory": {"n_heads": 8, "d_key": 128, "d_value": 128},
        "xlstm": {"n_heads": 4},
    },
    "titan": {
        "vocab_size": 151936,
        "d_model": 768,
        "n_layers": 12,
        "thalamus": {"mamba": "s6", "d_state": 16, "noise": 0.1},
        "xlstm": {"d_hidden": 1536, "n_heads": 4, "qk_ratio": 1.0},
        "experts": {"n_experts": 8, "d_expert": 3072},
        "memory": {"n_heads": 8, "d_key": 64, "d_value": 64},
    },
}
"""The presets, as overrides of the defaults."""
