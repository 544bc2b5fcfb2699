"""What all regions share: norms, the marks on parameters, and that every size leaves a usable module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from synapse_arch.modules import (
    XLSTM,
    ExpertPool,
    FastWeightMemory,
    Mamba,
    MambaConfig,
    Thalamus,
)
from synapse_arch.modules.common import HeadNorm
from tests.helpers import assert_close


def test_head_norm_by_its_formula() -> None:
    norm = HeadNorm(3, 5, eps=0.1).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight)


def marked(module: nn.Module, mark: str) -> set[str]:
    return {name for name, parameter in module.named_parameters() if getattr(parameter, mark, False)}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Mamba(64), {"A_log", "dt_bias", "D"}),
        (Mamba(64, MambaConfig(variant="s6")), {"A_log", "dt_bias", "D"}),
        (XLSTM(64), {"input_gate_bias", "forget_gate_bias"}),
        (FastWeightMemory(64), {"A_log", "dt_bias"}),
        (Thalamus(64, 4), {"mamba.A_log", "mamba.dt_bias", "mamba.D", "router.weight", "router_norm.weight"}),
    ],
    ids=["ssd", "s6", "xlstm", "memory", "thalamus"],
)
def test_rates_and_gates_stay_float32_and_undecayed(module: nn.Module, names: set[str]) -> None:
    assert marked(module, "_keep_float32") == names
    assert names <= marked(module, "_no_weight_decay")


def test_defaults_run() -> None:
    x = torch.randn(1, 3, 64)
    for module in (Mamba(64), Mamba(64, MambaConfig(variant="s6")), XLSTM(64), FastWeightMemory(64)):
        assert module(x).y.shape == x.shape
    _, routing, _, _ = Thalamus(64, 8)(x)
    assert ExpertPool(64)(x, routing).y.shape == x.shape
