"""The door to transformers: a SynapseModel as an AutoModelForCausalLM, its state as generation's cache.

    import synapse_arch.hf
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**tokenizer("def f(", return_tensors="pt"))

Importing this module registers the model type "synapse". It needs the extra [hf]. No mathematics lives here: the core
is `SynapseForCausalLM.model`, a plain module, and `from_core` wraps one that is there already. B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from synapse_arch.errors import CheckpointError, ConfigError, StateError, explain
from synapse_arch.letters import byte_letters
from synapse_arch.model import SynapseConfig, SynapseModel, SynapseState
from synapse_arch.model.card import model_card
from synapse_arch.model.loss import IGNORED

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ModuleNotFoundError as error:
    remedy = "pip install 'synapse-arch[hf]'"
    raise ModuleNotFoundError(explain("synapse_arch.hf", "transformers", error, remedy), name=error.name) from error

__all__ = ["SynapseCache", "SynapseForCausalLM", "SynapseHFConfig", "byte_tokenizer"]

OPENING = "<|document|>"
"""How tokenizers call id 0, which opens a document."""
CARD = "README.md"


class SynapseHFConfig(PreTrainedConfig):
    """A SynapseConfig as transformers stores it.

    Attributes:
        synapse: the nested plain dict of `SynapseConfig.to_dict`; fields left out take their defaults.
        bos_token_id: what opens a document; id 0 in everything the recipes train.
        eos_token_id: what ends one.
        pad_token_id: what fills up shorter rows; masked, so any id will do.
    """

    model_type = "synapse"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    synapse: dict[str, Any] | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        core = SynapseConfig.from_dict(self.synapse or {})
        self.synapse = core.to_dict()
        kwargs.pop("tie_word_embeddings", None)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.tie_word_embeddings = core.tie_embeddings

    @classmethod
    def from_core(cls, config: SynapseConfig, **options: Any) -> SynapseHFConfig:
        """The same architecture for transformers."""
        return cls(synapse=config.to_dict(), **options)

    @property
    def core(self) -> SynapseConfig:
        """The architecture."""
        return SynapseConfig.from_dict(self.synapse or {})

    @property
    def vocab_size(self) -> int:
        """Token ids run from 0 to vocab_size - 1."""
        return self.core.vocab_size

    @property
    def hidden_size(self) -> int:
        """D, width of the residual stream."""
        return self.core.d_model

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self.core.n_layers


class SynapseCache(Cache):
    """A SynapseState where `generate` keeps keys and values: of constant size, however much was read.

    Args:
        state: what the rows remember before the first position, such as an earlier conversation; None for nothing.

    Attributes:
        state: what they remember now.
        columns: positions read since, padding included; what `generate` counts.
    """

    def __init__(self, state: SynapseState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = 0

    def __repr__(self) -> str:
        return f"SynapseCache({self.state}, columns={self.columns})"

    def read(self, state: SynapseState, columns: int) -> None:
        """Takes the state after so many more positions."""
        self.state, self.columns = state, self.columns + columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read since the cache was made."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows B, -1 before the first pass."""
        return -1 if self.state is None else self.state.batch_size

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, side by side."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The given rows."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot unread tokens.

        Raises:
            StateError: anything is to be removed.
        """
        if tokens_to_remove:
            remedy = "keep the state from before, or read the shorter text anew"
            raise StateError(explain("SynapseCache.crop", "0 tokens", tokens_to_remove, remedy))


class SynapseForCausalLM(PreTrainedModel, GenerationMixin):
    """A SynapseModel behind the interface of transformers.

    Args:
        config: the architecture.
        core: a model of it that is there already; None makes a new one.

    Attributes:
        model: the core.
    """

    config_class = SynapseHFConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 - as the base class declares it
    # The loss is a mean over a batch's tokens plus the routers' terms, so that Trainer averages micro-batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SynapseHFConfig, core: SynapseModel | None = None) -> None:
        super().__init__(config)
        self.model = SynapseModel(config.core) if core is None else core
        self._keep_in_fp32_modules_strict = {name.replace(".", r"\.") for name in self._float32_names()}
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_core(cls, model: SynapseModel, **options: Any) -> SynapseForCausalLM:
        """Wraps a model, weights shared; `SynapseModel.from_pretrained(folder)` gives one.

        Args:
            model: the core.
            options: of SynapseHFConfig, such as eos_token_id.
        """
        wrapped = cls(SynapseHFConfig.from_core(model.config, **options), core=model)
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Loads what `save_pretrained` wrote, in evaluation mode; arguments as for any model of transformers.

        Raises:
            CheckpointError: tensors are missing, superfluous or of another shape.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            got = "; ".join(f"{kind.replace('_', ' ')} {names[:10]}" for kind, names in wrong.items() if names)
            raise CheckpointError(explain(str(args[0]), "the tensors of its configuration", got))
        model._restore_marks()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """Writes config.json, safetensors and, where the folder has none, a model card."""
        super().save_pretrained(save_directory, *args, **options)
        card = Path(save_directory) / CARD
        if not card.exists():
            card.write_text(model_card(self.model), encoding="utf-8")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SynapseCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Reads tokens, predicts the next ones.

        Args:
            input_ids: (B, T) tokens; they follow what the cache has read.
            attention_mask: (B, T or more) 0 where a row is padded, on either side; the last T columns count.
            past_key_values: what an earlier pass returned; it is read on in place. None for a fresh one.
            labels: (B, T) the tokens themselves, shifted here; -100 is ignored.
            use_cache: return the state; None is the configuration's choice, and never while training.
            logits_to_keep: predict only at so many last positions; 0 means at all.
            return_dict: False returns a plain tuple; None is the configuration's choice.
            kwargs: nothing more: arguments that other models know must be None or False.

        Returns:
            loss (language, balance and z terms together), logits, and the cache as past_key_values.

        Raises:
            ConfigError: no input_ids, or an argument that this architecture has no meaning for.
            ShapeError, StateError: as SynapseModel.
        """
        asked = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
        if asked or input_ids is None:
            got = ", ".join(asked) or "no input_ids"
            raise ConfigError(explain("SynapseForCausalLM", "input_ids, attention_mask, labels and a cache", got))
        if past_key_values is not None and not isinstance(past_key_values, SynapseCache):
            got = type(past_key_values).__name__
            raise StateError(explain("past_key_values", "a SynapseCache", got, "pass SynapseCache(), or None"))
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        length = input_ids.shape[1]
        cache = past_key_values
        out = self.model(
            input_ids,
            cache.state if cache is not None else None,
            targets=None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED),
            mask=None if attention_mask is None else _mask(attention_mask[:, -length:]),
            logits_to_keep=logits_to_keep,
        )
        if cache is None and use_cache:
            cache = SynapseCache()
        if cache is not None:
            cache.read(out.state, length)
        result = CausalLMOutputWithPast(loss=out.loss, logits=out.logits, past_key_values=cache)
        named = self.config.return_dict if return_dict is None else return_dict
        return result if named else result.to_tuple()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.model.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another in its place."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return cast(nn.Module, self.model.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Puts another in its place."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Embedding:
        """Gives the embedding back as it is.

        Raises:
            ConfigError: another size is asked for: the vocabulary is part of the architecture.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            remedy = "train with a tokenizer of the size you need"
            raise ConfigError(explain("new_num_tokens", self.config.vocab_size, new_num_tokens, remedy))
        return self.get_input_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No keys, no values: forward makes the cache."""
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """A fresh cache where `generate` was given none, for prompts that are read in pieces."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SynapseCache()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves every module as its own constructor made it; a checkpoint that lacks tensors is refused instead."""

    def _float32_names(self) -> Iterator[str]:
        """What stays float32 when a model is loaded narrower; transformers would make floats of other buffers too."""
        yield from (name for name, one in self.named_parameters() if getattr(one, "_keep_float32", False))
        yield from (name for name, one in self.named_buffers() if one.is_floating_point())

    def _restore_marks(self) -> None:
        """Gives the parameters the marks (no weight decay, float32) that loading into new ones has lost."""
        with torch.device("meta"):
            fresh = SynapseModel(self.config.core)
        for parameter, marked in zip(self.model.parameters(), fresh.parameters(), strict=True):
            parameter.__dict__.update(marked.__dict__)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """UTF-8 bytes as tokens, each its own value, as the recipes train on; id 0 opens and ends a document.

    >>> byte_tokenizer()("né").input_ids, byte_tokenizer().decode([110, 195, 169])
    ([0, 110, 195, 169], 'né')
    """
    vocabulary = {letter: value for letter, value in byte_letters().items() if value} | {OPENING: 0}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single=f"{OPENING} $A", special_tokens=[(OPENING, 0)])
    special = {"bos_token": OPENING, "eos_token": OPENING, "pad_token": OPENING}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def _mask(attention_mask: Tensor) -> Tensor | None:
    """As bool; None where nothing is padded, since a masked pass costs more."""
    if attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ConfigError(explain("attention_mask", "(B, T) with 0 for padding", shape, "there is no attention here"))
    mask = attention_mask.bool()
    return None if bool(mask.all()) else mask


AutoConfig.register(SynapseHFConfig.model_type, SynapseHFConfig, exist_ok=True)
AutoModelForCausalLM.register(SynapseHFConfig, SynapseForCausalLM, exist_ok=True)
