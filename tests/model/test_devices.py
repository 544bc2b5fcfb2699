"""What would stop an accelerator: numbers read out of its tensors, and tensors that lie elsewhere.

On torch's meta device, whose tensors hold no data, either raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch import MemoryConfig, SynapseConfig, SynapseModel, ThalamusConfig

CONFIGS = {
    "default": {},
    "s6": {"thalamus": ThalamusConfig(mamba="s6", noise=0.1), "memory": MemoryConfig(write_gate=True)},
}


def meta_model(**changes: Any) -> SynapseModel:
    """In bfloat16, in which the experts' products are grouped."""
    with torch.device("meta"):
        return SynapseModel(SynapseConfig(d_model=128, n_layers=1, **changes)).to(torch.bfloat16)


def there(batch: int, length: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.zeros(batch, length, dtype=dtype, device="meta")


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_training_step_waits_for_nothing(changes: dict[str, Any], packed: bool) -> None:
    model, ids = meta_model(**changes), there(2, 100)
    options = {"segment_ids": ids, "mask": there(2, 100, torch.bool)} if packed else {}
    model(ids, targets=ids, **options).loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_decoding_waits_for_nothing(changes: dict[str, Any], batch: int) -> None:
    model = meta_model(**changes).eval()
    with torch.no_grad():
        state = model(there(batch, 1), model.init_state(batch)).state
        out = model(there(batch, 1), state, mask=there(batch, 1, torch.bool))
    assert out.logits.is_meta
    assert all(x.is_meta for x in out.state.to_tensors().values())


def test_one_float32_token_waits_for_nothing_either() -> None:
    model = meta_model().float().eval()
    with torch.no_grad():
        assert model(there(1, 1)).logits.is_meta
