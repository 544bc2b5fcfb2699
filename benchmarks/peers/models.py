"""Language models of transformers with as many active parameters as one of ours: Llama, Mixtral, Mamba-2.

Active parameters are those that a token is multiplied with: top_k of the experts, and no embedding table. Width, depth
and vocabulary are ours; what a model has left for its feed-forwards is spent there. Weights are random: only time and
memory are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from synapse_arch import SynapseConfig
from synapse_arch.model.accounting import active_parameters

HEAD = 64
"""Width of an attention head."""
EXPERTS, CHOSEN = 8, 2


def llama(config: SynapseConfig) -> nn.Module:
    """LLaMA's layers of attention and a dense SwiGLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = _spent(config, experts=1)
    return LlamaForCausalLM(LlamaConfig(**_shape(config), intermediate_size=width))


def mixtral(config: SynapseConfig) -> nn.Module:
    """Mixtral's: attention, and two of eight SwiGLU experts a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    width = _spent(config, experts=CHOSEN)
    sizes = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**_shape(config), **sizes, intermediate_size=width))


def mamba2(config: SynapseConfig) -> nn.Module:
    """Mamba-2, as deep as it takes."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    d, state = config.d_model, config.thalamus.d_state
    inner = 2 * d
    a_layer = d * (2 * inner + 2 * state + inner // HEAD) + inner * d
    layers = round((active_parameters(config) - config.vocab_size * d) / a_layer)
    sizes = {"num_heads": inner // HEAD, "head_dim": HEAD, "state_size": state, "n_groups": 1, "chunk_size": 64}
    return Mamba2ForCausalLM(
        Mamba2Config(hidden_size=d, num_hidden_layers=max(1, layers), vocab_size=config.vocab_size, **sizes)
    )


PEERS: dict[str, Callable[[SynapseConfig], nn.Module]] = {"llama": llama, "mixtral": mixtral, "mamba2": mamba2}


def active(model: nn.Module) -> int:
    """Parameters of a peer that a token is multiplied with."""
    idle = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    return total - idle - experts * (EXPERTS - CHOSEN) // EXPERTS


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Forward, loss, backward and a fused AdamW; ids (B, T + 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        logits: Tensor = model(ids[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoder(model: nn.Module, ids: Tensor, *, again: int) -> Callable[[], None]:
    """Steps of one token after ids (B, T) were read; after `again` of them attention has only ids before it again."""
    with torch.inference_mode():
        memory: dict[str, Any] = _memory(model(ids, use_cache=True))
    position = length = ids.shape[1]
    token = ids[:, :1].clone()

    def step() -> None:
        nonlocal memory, position
        if "past_key_values" in memory and position == length + again:
            memory["past_key_values"].crop(-again)  # so many are dropped
            position = length
        with torch.inference_mode():
            extra = {"cache_position": torch.tensor([position])} if "cache_params" in memory else {}
            memory = _memory(model(token, use_cache=True, **memory, **extra))
        position += 1

    return step


def _memory(out: Any) -> dict[str, Any]:
    """What a model carries from one call to the next, by the name of its argument."""
    if getattr(out, "cache_params", None) is not None:
        return {"cache_params": out.cache_params}
    return {"past_key_values": out.past_key_values}


def _shape(config: SynapseConfig) -> dict[str, Any]:
    heads = max(1, config.d_model // HEAD)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 1 << 17,
    }


def _spent(config: SynapseConfig, *, experts: int) -> int:
    """Hidden width of each of the feed-forwards that a token visits in a layer, a multiple of 16."""
    d = config.d_model
    left = active_parameters(config) - config.vocab_size * d - config.n_layers * 4 * d * d
    return round(left / (config.n_layers * 3 * d * experts) / 16) * 16
