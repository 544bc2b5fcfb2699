"""`--preset auto`: the size of model that suits the machine and the text, and what it will take."""

from __future__ import annotations

import json
from dataclasses import replace

from recipes._accelerate import PartialState, broadcast_object_list
from recipes.config import AUTO, RunConfig
from synapse_arch.model import autosize


def sized(config: RunConfig, state: PartialState, *, vocab_size: int, tokens: int) -> RunConfig:
    """The run with every field of a chosen architecture as overrides, in front of its own; others as they are.

    The main process chooses, says why, and times what a step will take; all hear of it.

    Args:
        config: the run.
        state: the processes, which share a machine's memory on the CPU.
        vocab_size: the tokenizer's.
        tokens: of text to train on.

    Raises:
        ConfigError: no size fits into the memory.
    """
    if config.preset != AUTO:
        return config
    result: list[tuple[str, ...]] = [()]
    if state.is_main_process:
        shared = state.num_processes if state.device.type == "cpu" else 1
        memory = autosize.available_memory(state.device) // shared
        rows = max(1, config.batch_size // (state.num_processes * config.accumulate))
        shape = {"batch_size": rows, "length": config.length}
        choice = autosize.choose(memory=memory, tokens=tokens, vocab_size=vocab_size, **shape)
        step = autosize.predict(choice.config, device=state.device, **shape)
        print("\n".join(f"auto    {line}" for line in choice.why))
        print(f"auto    a step should take {config.accumulate * step.seconds:.2f} s in float32")
        result = [tuple(f"{name}={json.dumps(value)}" for name, value in choice.config.to_dict().items())]
    return replace(config, overrides=(*broadcast_object_list(result)[0], *config.overrides))
