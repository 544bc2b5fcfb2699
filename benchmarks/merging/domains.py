"""Three kinds of text that come with every installation of this library, and one model trained on each.

    python   the source of Python's standard library
    cpp      the C++ headers that torch ships with (its c10 library)
    prose    Python's language reference in English, from pydoc_data

One base is trained on all three by turns, then a specialist of it on each alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import progress
from recipes.data import Batch, Corpus, Document, Windows, held_out, load_corpus, mix, to_stream
from recipes.optim import Schedule, adamw, set_lr
from synapse_arch import SynapseConfig, SynapseModel

DOMAINS = ("python", "cpp", "prose")
CONFIG: dict[str, Any] = {
    "d_model": 96,
    "n_layers": 2,
    "thalamus.d_state": 32,
    "thalamus.head_dim": 32,
    "experts.n_experts": 4,
    "experts.d_expert": 128,
    "memory.d_key": 32,
    "memory.d_value": 32,
}
TRAINING: dict[str, Any] = {
    "batch_size": 4,
    "length": 256,
    "base_steps": 600,
    "base_lr": 3e-3,
    "specialist_steps": 150,
    "specialist_lr": 1e-3,
    "weight_decay": 0.1,
    "clip": 1.0,
}
HELD_OUT_BYTES = {"choice": 8 * 1024, "test": 24 * 1024}
"""Of each domain's held-out text: to choose by, and for the figures reported."""


def corpora() -> dict[str, Corpus]:
    """The text of each domain, split by file (by topic for the prose)."""
    headers = Path(torch.__file__).parent / "include" / "c10"
    cpp = replace(load_corpus(headers), source="torch/include/c10")
    return {"python": load_corpus(), "cpp": cpp, "prose": _prose()}


def _prose() -> Corpus:
    from pydoc_data.topics import topics

    sides: tuple[list[Document], list[Document]] = ([], [])
    for name, text in sorted(topics.items()):
        sides[held_out(name, 0.2)].append(Document(name=name, data=text.encode()))
    return Corpus(source="pydoc_data.topics", train=tuple(sides[0]), held_out=tuple(sides[1]))


def held_out_text(corpus: Corpus) -> dict[str, bytes]:
    """The held-out text of "choice" and of "test", of every other document each, cut at `HELD_OUT_BYTES`."""
    sides = {"choice": corpus.held_out[::2], "test": corpus.held_out[1::2]}
    return {side: b"".join(one.data for one in found)[: HELD_OUT_BYTES[side]] for side, found in sides.items()}


class Turns:
    """Windows of several streams by turns: the batch of a step is one stream's, the next step's the next one's."""

    def __init__(self, streams: Sequence[Tensor], *, seed: int) -> None:
        sizes = {"length": TRAINING["length"], "batch_size": TRAINING["batch_size"]}
        self.windows = [Windows(stream, seed=mix(seed, index), **sizes) for index, stream in enumerate(streams)]

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        turn, which = divmod(step, len(self.windows))
        return self.windows[which].batch(turn)


def train(model: SynapseModel, streams: Sequence[Tensor], *, steps: int, lr: float, seed: int, what: str) -> None:
    """Trains a model in place, cosine from `lr` to 0; deterministic under the seed."""
    turns = Turns(streams, seed=seed)
    optimizer = adamw(model, weight_decay=TRAINING["weight_decay"], betas=(0.9, 0.95))
    schedule = Schedule(peak=lr)
    model.train()
    for step in progress(range(steps), what):
        batch = turns.batch(step)
        set_lr(optimizer, schedule.lr((step + 1) / steps))
        out = model(batch.ids, targets=batch.targets, segment_ids=batch.segment_ids)
        assert out.loss is not None
        out.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip"])
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def prepare(folder: Path, texts: Mapping[str, Corpus], *, seed: int) -> dict[str, Path]:
    """Folders of the base and of each domain's specialist; what was trained before is not trained again."""
    places = {name: folder / name for name in ("base", *DOMAINS)}
    streams = {name: to_stream(texts[name].train) for name in DOMAINS}
    if not (places["base"] / "config.json").exists():
        torch.manual_seed(mix(seed, -1))
        model = SynapseModel(SynapseConfig.preset("tiny", **CONFIG))
        train(
            model,
            list(streams.values()),
            steps=TRAINING["base_steps"],
            lr=TRAINING["base_lr"],
            seed=seed,
            what=f"base, seed {seed}",
        )
        model.save_pretrained(places["base"])
    for index, name in enumerate(DOMAINS):
        if (places[name] / "config.json").exists():
            continue
        model = SynapseModel.from_pretrained(places["base"])
        train(
            model,
            [streams[name]],
            steps=TRAINING["specialist_steps"],
            lr=TRAINING["specialist_lr"],
            seed=mix(seed, 1 + index),
            what=f"{name}, seed {seed}",
        )
        model.save_pretrained(places[name])
    return places
