"""The peers: are they what they are called, causal, and as large as they are said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.quality.models import synapse_config
from benchmarks.quality.peers import PEERS, Decoder, Hebbian, HebbianConfig, matched
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import ConfigError
from synapse_arch.model.accounting import active_parameters
from synapse_arch.model.state import named_tensors

RECURRENT = sorted(PEERS.keys() - {"transformer", "transformer-conv"})
PROTOCOLS = {
    "d 128, 2 blocks": (synapse_config(256, 128, 2), 2),
    "d 128, 2 blocks to a layer": (synapse_config(16, 128, 1), 2),
    "d 64, 2 blocks": (synapse_config(8192, 64, 2), 2),
    "d 64, 2 blocks to a layer": (synapse_config(2, 64, 1), 2),
    "d 64, 1 block": (synapse_config(8, 64, 1), 1),
    "d 128, 1 block": (synapse_config(8, 128, 1), 1),
}
VOCABULARY = 11


def reference(config: SynapseConfig) -> SynapseModel:
    with torch.device("meta"):
        return SynapseModel(config)


def peer(name: str) -> Decoder:
    return matched(name, SynapseModel(synapse_config(VOCABULARY, 32, 2)), 2)


def numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def numbers(tree: object) -> int:
    return sum(tensor.numel() for _, tensor in named_tensors(tree))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parameters_match(name: str, protocol: str) -> None:
    config, n_layers = PROTOCOLS[protocol]
    model = reference(config)
    decoder = matched(name, model, n_layers)
    assert len(decoder.blocks) == n_layers
    assert numel(decoder) == pytest.approx(numel(model) - model.head.weight.numel(), rel=0.02)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_state_matches(name: str, protocol: str) -> None:
    """At least the reference's and at most half as much more, counted on what the mixers return."""
    config, n_layers = PROTOCOLS[protocol]
    decoder, goal = matched(name, reference(config), n_layers), numbers(SynapseModel(config).init_state(1).layers)
    x = torch.randn(1, 3, config.d_model)
    states = [block.mixer(x).state for block in decoder.blocks]
    assert numbers(tuple(states)) == numbers(tuple(block.mixer.init_state(1) for block in decoder.blocks))
    assert decoder.state_numbers(0) == decoder.state_numbers(1000) == numbers(tuple(states))
    assert goal <= decoder.state_numbers(0) <= 1.5 * goal


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("tied", [False, True])
def test_active_parameters_match(name: str, tied: bool) -> None:
    model = reference(SynapseConfig(d_model=256, n_layers=1, tie_embeddings=tied))
    decoder = matched(name, model, 1, by="active")
    beside = active_parameters(model) - model.head.weight.numel()
    assert numel(decoder) - decoder.embedding.weight.numel() == pytest.approx(beside, rel=0.02)


@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_what_cannot_be_matched(name: str) -> None:
    message = "parameters: expected" if name == "transformer" else "state: expected"
    with pytest.raises(ConfigError, match=message):
        matched(name, reference(synapse_config(8, 64, 1)), 40)


def test_keys_and_values_are_counted() -> None:
    plain, conv = (peer(name) for name in ("transformer", "transformer-conv"))
    assert plain.state_numbers(10) == 10 * 2 * 2 * 32
    assert conv.state_numbers(10) == 10 * 2 * 2 * 32 + 2 * 3 * 96


@pytest.mark.parametrize("name", PEERS)
def test_nothing_looks_ahead_and_everything_looks_back(name: str) -> None:
    model, ids = peer(name).double(), torch.randint(VOCABULARY, (2, 70))
    other = ids.clone()
    other[:, 35] = (ids[:, 35] + 1) % VOCABULARY
    moved = (model(ids) - model(other)).abs().amax((0, 2))
    assert moved[:35].max() < 1e-12
    assert moved[35] > 1e-2
    assert moved[60:].max() > 1e-6  # further than the convolutions reach


@pytest.mark.parametrize("name", PEERS)
def test_initial_scales(name: str) -> None:
    """Embeddings of unit variance; whatever is added to the residual stream is smaller by its 2 L branches."""
    model = matched(name, SynapseModel(synapse_config(200, 128, 2)), 2)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    for block in model.blocks:
        for layer in (block.mixer.out_proj, block.mlp.out_proj):
            assert layer.weight.std().item() == pytest.approx((4 * layer.in_features) ** -0.5, rel=0.05)


def test_the_transformer_is_llama() -> None:
    """Float64 but for their norms, softmax and angles, which stay float32."""
    transformers = pytest.importorskip("transformers")
    model = peer("transformer").double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    d_ff = model.blocks[0].mlp.up_proj.out_features
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=d_ff, num_hidden_layers=2,
        num_attention_heads=model.blocks[0].mixer.config.n_heads, rms_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).double()
    llama.lm_head.weight.data[:] = torch.eye(VOCABULARY, 32)  # the first features stand in the logits
    llama.model.load_state_dict(as_llama(model))
    ids = torch.randint(VOCABULARY, (3, 50))
    ours, theirs = model(ids), llama(ids)
    assert_close(ours, llama.model(ids).last_hidden_state, atol=1e-5, rtol=0)
    assert_close(ours[..., :VOCABULARY], theirs.logits, atol=1e-5, rtol=0)
    ours[..., :VOCABULARY].square().sum().backward()
    theirs.logits.square().sum().backward()
    assert_close(model.embedding.weight.grad, llama.model.embed_tokens.weight.grad, atol=1e-4, rtol=1e-5)


def as_llama(model: Decoder) -> dict[str, Tensor]:
    weights = {"embed_tokens.weight": model.embedding.weight, "norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        q, k, v = block.mixer.in_proj.weight.chunk(3)
        weights |= {
            f"layers.{i}.{name}.weight": x
            for name, x in {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.mixer.out_proj.weight,
                "mlp.gate_proj": block.mlp.gate_proj.weight,
                "mlp.up_proj": block.mlp.up_proj.weight,
                "mlp.down_proj": block.mlp.out_proj.weight,
                "input_layernorm": block.mixer_norm.weight,
                "post_attention_layernorm": block.mlp_norm.weight,
            }.items()
        }
    return weights


def test_hebbian_is_the_predecessors_rule() -> None:
    c = HebbianConfig(n_heads=2, d_key=3, d_value=5)
    module = Hebbian(8, c).double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, before = torch.randn(12, 8, dtype=torch.float64), module.init_state(1)
    y, state = module(x[None], before)[:2]
    expected, final = hebbian_by_hand(module, x.numpy())
    assert_close(y[0].detach().numpy(), expected)
    assert_close(state.weights[0].detach().numpy(), final)
    first, middle, _ = module(x[None, :7])
    second, last, _ = module(x[None, 7:], middle)
    assert_close(torch.cat([first, second], dim=1), y)
    assert_close(last.weights, state.weights)
    assert before.weights.abs().max() == 0


def hebbian_by_hand(module: Hebbian, x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    p: dict[str, Any] = {name: value.detach().numpy() for name, value in module.named_parameters()}

    def sigmoid(z: Any) -> Any:
        return 1 / (1 + np.exp(-z))

    def unit(z: Any) -> Any:
        return z / np.sqrt((z**2).sum(-1, keepdims=True) + z.shape[-1] * 1e-6)

    mixed, gates = x @ p["in_proj.weight"].T, x @ p["gate_proj.weight"].T
    padded = np.concatenate([np.zeros((3, mixed.shape[1])), mixed])
    mixed = np.stack([(padded[t : t + 4] * p["conv.weight"].T).sum(0) for t in range(len(x))]) + p["conv.bias"]
    mixed = mixed * sigmoid(mixed)
    weights, rows = np.zeros((2, 3, 5)), []
    for z, opening, g in zip(mixed, gates[:, :10], gates[:, 10:], strict=True):
        q, k, v = z[:6].reshape(2, 3), z[6:12].reshape(2, 3), z[12:].reshape(2, 5)
        written = unit(k)[:, :, None] * v[:, None, :]
        weights = 0.95 * weights + 0.1 * sigmoid(g)[:, None, None] * written
        o = (weights * unit(q)[:, :, None]).sum(1)
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * p["norm.weight"]
        rows.append(o.flatten() * opening * sigmoid(opening))
    return np.stack(rows) @ p["out_proj.weight"].T, weights
