"""Parity with other people's implementations: the pure-PyTorch paths of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synapse_arch.errors import CheckpointError, ConfigError
from synapse_arch.modules import Mamba, MambaConfig
from synapse_arch.modules.convert import mamba_config_from_hf, mamba_state_dict_from_hf
from synapse_arch.ops import MLSTMState, delta_rule, expert_swiglu, mlstm, selective_scan, ssd
from tests.contracts import cases
from tests.helpers import Tensors, assert_same, cast, measure

transformers = pytest.importorskip("transformers")
T = 150


def drawn(draw: Any, *, state: bool = True) -> Tensors:
    """float32 inputs: most of the oracles compute in nothing wider."""
    return {name: x for name, x in cast(draw(2, T), torch.float32).items() if state or not name.startswith("state")}


def test_ssd_is_mamba2_chunk_scan() -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def theirs(z: Tensors) -> Tensors:
        y, state = mamba2_chunk_scan(
            z["x"], z["dt"], z["A"], z["B"], z["C"], chunk_size=32, D=z["D"], initial_states=z["state"],
            return_final_states=True,
        )  # fmt: skip
        return {"y": y, "state": state}

    tensors = drawn(cases.draw_ssd)
    assert_same(measure(lambda z: dict(zip(("y", "state"), ssd(**z), strict=True)), tensors), measure(theirs, tensors))


def test_selective_scan_is_mamba_selective_scan() -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def theirs(z: Tensors) -> Tensors:
        u, dt, B, C = (z[name].transpose(1, 2) for name in ("u", "dt", "B", "C"))
        y, state = mamba_selective_scan(u, dt, z["A"], B, C, z["D"], return_last_state=True)
        return {"y": y.transpose(1, 2), "state": state}

    tensors = drawn(cases.draw_scan, state=False)
    ours = measure(lambda z: dict(zip(("y", "state"), selective_scan(**z), strict=True)), tensors)
    assert_same(ours, measure(theirs, tensors))


@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_delta_rule_is_the_gated_delta_rule(form: str) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next

    def theirs(z: Tensors) -> Tensors:
        o, state = getattr(modeling_qwen3_next, form)(
            z["q"] * cases.K**0.5, z["k"], z["v"], z["log_decay"], z["beta"], initial_state=z["state"],
            output_final_state=True,
        )  # fmt: skip
        return {"y": o, "state": state}

    tensors = drawn(cases.draw_delta)
    ours = measure(lambda z: dict(zip(("y", "state"), delta_rule(**z), strict=True)), tensors)
    assert_same(ours, measure(theirs, tensors))


@pytest.mark.parametrize("chunk_size", [15, 64])
def test_mlstm_is_the_cell_of_xlstm_7b(chunk_size: int) -> None:
    """Both forms of their cell, in float64: chunks as far as they go, single steps for the rest."""
    from transformers.models.xlstm import modeling_xlstm as xlstm

    steps = partial(xlstm.mlstm_recurrent_sequence_native, dtype_state=torch.float64)
    chunks = xlstm.mlstm_chunkwise_native_autograd
    cell = partial(xlstm.wrap_chunkwise_arbitrary_sequence_length, chunks, steps, None, chunk_size=chunk_size, eps=0.0)

    def theirs(z: Tensors) -> Tensors:
        heads = {name: z[name].transpose(1, 2) for name in ("q", "k", "v", "i", "f")}
        h, (C, n, m) = cell(
            heads["q"], heads["k"], heads["v"], heads["f"], heads["i"],
            z["state.C"], z["state.n"], z["state.m"][..., None],
        )  # fmt: skip
        return {"y": h.transpose(1, 2), "state.C": C, "state.n": n, "state.m": m.flatten(1)}

    def ours(z: Tensors) -> Tensors:
        state = MLSTMState(z["state.C"], z["state.n"], z["state.m"])
        h, final = mlstm(z["q"], z["k"], z["v"], z["i"], z["f"], state)
        return {"y": h, "state.C": final.C, "state.n": final.n, "state.m": final.m}

    tensors = cases.draw_mlstm(2, T)
    assert_same(measure(ours, tensors), measure(theirs, tensors))


def test_experts_are_mixtral_experts() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    module = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=5)).double()

    def theirs(z: Tensors) -> Tensors:
        weights = {"gate_up_proj": z["w_in"].transpose(1, 2), "down_proj": z["w_out"].transpose(1, 2)}
        return {"y": torch.func.functional_call(module, weights, (z["x"], indices, z["weights"]))}

    indices = torch.stack([torch.randperm(5)[:2] for _ in range(40)])
    tensors = {
        "x": cases.normal(40, 8), "w_in": cases.normal(5, 8, 12), "w_out": cases.normal(5, 6, 8),
        "weights": cases.uniform(0, 1, 40, 2),
    }  # fmt: skip
    expected = measure(theirs, tensors)
    for backend in ("sorted", "reference"):
        ours = measure(lambda z, b=backend: {"y": expert_swiglu(**z, indices=indices, backend=b)}, tensors)
        assert_same(ours, expected)


def models() -> list[Any]:
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaForCausalLM
    from transformers import MambaConfig as Mamba1Config

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    wide = {"num_heads": 8, "head_dim": 4, "state_size": 6, "chunk_size": 16}
    return [
        MambaForCausalLM(Mamba1Config(**sizes, state_size=6)),
        MambaForCausalLM(Mamba1Config(**sizes, state_size=5, conv_kernel=3, time_step_rank=7, use_conv_bias=False)),
        Mamba2ForCausalLM(Mamba2Config(**sizes, **wide, n_groups=1)),
        Mamba2ForCausalLM(Mamba2Config(**sizes, **wide, n_groups=4, layer_norm_epsilon=1e-2, use_conv_bias=False)),
    ]


def scrambled(model: nn.Module) -> nn.Module:
    """Every weight moved, so that none can hide at its initial one or zero."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("which", range(4), ids=["mamba", "mamba-odd", "mamba2", "mamba2-groups"])
def test_loaded_mixers_compute_the_same(which: int) -> None:
    """Outputs and gradients of the input, in one pass and in steps, from the object's or the file's configuration."""
    model = scrambled(models()[which])
    config = mamba_config_from_hf(model.config)
    assert config == mamba_config_from_hf(model.config.to_dict())
    x = torch.randn(2, 40, 16)
    for layer in range(2):
        theirs = model.backbone.layers[layer].mixer
        ours = Mamba(16, config)
        ours.load_state_dict(mamba_state_dict_from_hf(model.state_dict(), f"backbone.layers.{layer}.mixer.", config))
        expected = measure(lambda z, m=theirs: {"y": m(z["x"])}, {"x": x})
        assert_same(measure(lambda z, m=ours: {"y": m(z["x"]).y}, {"x": x}), expected)
        assert_same({"y": in_steps(ours, x)}, {"y": expected["y"]})


def in_steps(mixer: Mamba, x: Tensor) -> Tensor:
    outputs, state = [], None
    for t in range(x.shape[1]):
        y, state, _ = mixer(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected 'mamba' or 'mamba2', got 'llama'"),
        ({"use_bias": True}, "use_bias: expected False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ({"time_step_limit": (0.0, 1.0)}, "time_step_limit: expected"),
        ({"state_size": None}, "state_size: expected a value"),
    ],
)
def test_configurations_that_cannot_be_converted(changed: dict[str, Any], message: str) -> None:
    plain = {"model_type": "mamba", "state_size": 4, "expand": 2, "conv_kernel": 4}
    assert mamba_config_from_hf(plain) == MambaConfig(variant="s6", d_state=4)
    with pytest.raises(ConfigError, match=message):
        mamba_config_from_hf(plain | changed)


def test_weights_that_cannot_be_converted() -> None:
    model = models()[0]
    config, weights = mamba_config_from_hf(model.config), model.backbone.layers[0].mixer.state_dict()
    assert set(mamba_state_dict_from_hf(weights, "", config)) == set(Mamba(16, config).state_dict())
    with pytest.raises(CheckpointError, match=r"weights under 'layers\.7\.'"):
        mamba_state_dict_from_hf(weights, "layers.7.", config)
    with pytest.raises(CheckpointError, match="A_log"):
        mamba_state_dict_from_hf({k: x for k, x in weights.items() if k != "A_log"}, "", config)
    with pytest.raises(CheckpointError, match=r"also in_proj\.bias"):
        mamba_state_dict_from_hf(weights | {"in_proj.bias": torch.zeros(64)}, "", config)
