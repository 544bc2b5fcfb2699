"""The model card that goes to transformers with a model: its regions, its size, how to use it."""

from __future__ import annotations

import json

from synapse_arch.model import accounting
from synapse_arch.model.model import SynapseModel


def model_card(model: SynapseModel) -> str:
    """What save_pretrained says of a model: measured, not promised."""
    config, parts = model.config, accounting.parameters(model)
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in sorted(parts.items()))
    return CARD_TEXT.format(
        layers=config.n_layers, width=config.d_model, vocabulary=config.vocab_size, rows=rows,
        total=sum(parts.values()), active=accounting.active_parameters(model), state=accounting.state_bytes(config),
        config=json.dumps(config.to_dict(), indent=2),
    )  # fmt: skip


CARD_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- synapse_arch
- recurrent
---

# A SynapseModel

A language model without attention: {layers} layers of {width} channels, {vocabulary:,} tokens. Time a token and state
({state:,} bytes a sequence) do not grow with the length of the text.

| part | parameters |
|---|---:|
{rows}
| **total** | {total:,} |
| **a token is multiplied with** | {active:,} |

    import synapse_arch.hf  # registers the architecture
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("this folder")

What it was trained on, how well it does and what it must not be used for is for its trainer to add here.

```json
{config}
```
"""
