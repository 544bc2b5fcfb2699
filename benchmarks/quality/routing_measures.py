"""Models read text, and how their experts' choices relate to its labels, to each other and to an even load."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import progress
from benchmarks.quality import routing_statistics as stats
from benchmarks.quality.routing_labels import Labelling, labellings
from benchmarks.quality.routing_statistics import Chance, Choices, Draw
from recipes.data import SEPARATOR, Corpus, Document, mix
from synapse_arch import SynapseModel, TraceSpec
from synapse_arch.errors import ConfigError, explain

WINDOW = 2048
BYTES = 256
GIVEN_BYTE = ("token", "next_token", "prose", "package")


@dataclass(frozen=True, kw_only=True)
class Text:
    """The held-out bytes that the models read, and their labels.

    Attributes:
        documents: read each from a fresh state.
        data: (N,) int64, their bytes.
        sizes: bytes of each document.
        labels: by name.
    """

    documents: tuple[Document, ...]
    data: Tensor
    sizes: tuple[int, ...]
    labels: dict[str, Labelling]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one model did with the text.

    Attributes:
        name: of the model's folder, or "untrained".
        seed: of its training or of its weights; None where unknown.
        config: its configuration.
        bits_per_byte: what the text costs it.
        layers: the experts it chose, by layer.
    """

    name: str
    seed: int | None
    config: dict[str, Any]
    bits_per_byte: float
    layers: dict[int, Choices]


def take(corpus: Corpus, limit: int) -> Text:
    """The first `limit` held-out bytes of a corpus; labels are made before the last document is cut."""
    whole, left = [], limit
    for document in corpus.held_out:
        if left > 0:
            whole.append(document)
            left -= len(document.data)
    labels = labellings(whole, limit)
    cut = len(whole[-1].data) + min(left, 0)
    last = Document(name=whole[-1].name, data=whole[-1].data[:cut])
    documents = (*whole[:-1], last)
    sizes = tuple(len(document.data) for document in documents)
    return Text(documents=documents, data=labels["byte_value"].ids, sizes=sizes, labels=labels)


@torch.no_grad()
def read(model: SynapseModel, text: Text, name: str, seed: int | None) -> Reading:
    """Reads the text and keeps which experts every byte visited.

    Raises:
        ConfigError: the model has no experts, or does not read bytes.
    """
    config = model.eval().config
    if config.vocab_size != BYTES or not config.n_experts:
        got = f"vocab_size={config.vocab_size}, {config.n_experts} experts"
        raise ConfigError(explain(name, f"a byte model (vocab_size={BYTES}) with experts", got))
    nats, parts = 0.0, dict[int, list[tuple[Tensor, Tensor]]]()
    for document in progress(text.documents, f"{name} reads"):
        ids, state = torch.tensor([SEPARATOR, *document.data])[None], None
        for start in range(0, ids.shape[1], WINDOW):
            window, following = ids[:, start : start + WINDOW], ids[0, start + 1 : start + 1 + WINDOW]
            out = model(window, state, trace=TraceSpec(level="routes", max_tokens=WINDOW))
            state, skipped = out.state, int(start == 0)  # the separator is no text
            nats += float(F.cross_entropy(out.logits[0, : len(following)].float(), following, reduction="sum"))
            for layer in out.trace.layers:
                chosen = layer.routing.experts[0, skipped:], layer.routing.weights[0, skipped:].float()
                parts.setdefault(layer.index, []).append(chosen)
    layers = {
        index: Choices(torch.cat([one for one, _ in found]), torch.cat([one for _, one in found]), config.n_experts)
        for index, found in parts.items()
    }
    bits = nats / len(text.data) / math.log(2)
    return Reading(name=name, seed=seed, config=config.to_dict(), bits_per_byte=bits, layers=layers)


def load(choices: Choices) -> dict[str, Any]:
    """How evenly the assignments, and the first choices, are spread; the fair share is 1 / E."""

    def spread(experts: Tensor) -> dict[str, Any]:
        shares = torch.bincount(experts.flatten(), minlength=choices.n_experts) / experts.numel()
        entropy = stats.entropy(shares)
        even = stats.entropy(torch.ones(choices.n_experts))
        return {
            "shares": shares.tolist(),
            "entropy_bits": entropy,
            "entropy_of_even": entropy / even if even else 1.0,
            "largest_over_fair": float(shares.max()) * choices.n_experts,
            "smallest_over_fair": float(shares.min()) * choices.n_experts,
            "dead": int((shares == 0).sum()),
        }

    return {"assignments": spread(choices.experts), "first": spread(choices.experts[:, 0])}


def ways(labelling: Labelling, sizes: Sequence[int]) -> dict[str, Draw]:
    """How labels can lose their place; an effect must exceed the first way.

    Classes of whole documents go to other documents ("groups"): documents differ anyway, whatever their class.
    """
    ids = labelling.ids
    found: dict[str, Draw] = {"shifts": partial(stats.shifts, ids), "tokens": partial(stats.tokens, ids)}
    if labelling.whole:
        return {"groups": partial(stats.groups, ids, sizes)} | found
    return found | {"blocks": partial(stats.blocks, ids, sizes)}


def information(layers: Sequence[Choices], name: str, text: Text, shuffles: int) -> list[dict[str, Any]]:
    """What the experts of each of these layers and one labelling say about each other."""
    labelling, seed = text.labels[name], mix(list(text.labels).index(name))
    ids, classes = labelling.ids, len(labelling.classes)
    firsts, drawn = [choices.first for choices in layers], ways(labelling, text.sizes)
    strongest = next(iter(drawn))

    def shared(of: Sequence[Choices], labels: Tensor) -> list[float]:
        return [stats.mutual_information(stats.counts(one, labels, classes)) for one in of]

    def beyond(pairs: Tensor) -> list[float]:
        return [stats.conditional_information(one, pairs, classes, BYTES) for one in firsts]

    label_bits = stats.entropy(torch.bincount(ids))
    results: list[dict[str, Any]] = [{"against": strongest, "label_bits": label_bits} for _ in layers]
    for kind, of, used in (("first", firsts, drawn), ("weighted", layers, {strongest: drawn[strongest]})):
        found, chances = stats.compare(partial(shared, of), ids, used, shuffles, seed)
        for result, one, bits, chance in zip(results, of, found, chances, strict=True):
            expert_bits = stats.entropy(stats.counts(one, ids, classes).sum(1))
            result[kind] = _shares(bits, expert_bits, label_bits, chance)
    if name in GIVEN_BYTE:
        pairs = ids * BYTES + text.data
        found, chances = stats.compare(beyond, pairs, _ways_of_pairs(labelling, pairs, text), shuffles, seed)
        for result, bits, chance in zip(results, found, chances, strict=True):
            result["given_byte"] = _against(bits, chance)
    return results


def _ways_of_pairs(labelling: Labelling, pairs: Tensor, text: Text) -> dict[str, Draw]:
    """As `ways`, for labels and bytes together: bytes keep their labels, or their place where classes are regrouped."""
    if not labelling.whole:
        return {"shifts": partial(stats.shifts, pairs)}
    return {"groups": lambda generator: stats.groups(labelling.ids, text.sizes, generator) * BYTES + text.data}


def stability(one: Reading, other: Reading, text: Text, shuffles: int) -> list[dict[str, Any]]:
    """How far two models' first choices agree, by layer: as information, and as experts that belong together."""
    results = []
    for layer, choices in one.layers.items():
        first, ids, experts = choices.first, other.layers[layer].experts[:, 0], choices.n_experts

        def alike(first: Choices, labels: Tensor) -> list[float]:
            found = stats.counts(first, labels, first.n_experts)
            return [stats.mutual_information(found), stats.agreement(found)]

        def beyond(first: Choices, pairs: Tensor) -> list[float]:
            return [stats.conditional_information(first, pairs, first.n_experts, BYTES)]

        pairs = ids * BYTES + text.data
        shifts, joint = {"shifts": partial(stats.shifts, ids)}, {"shifts": partial(stats.shifts, pairs)}
        (bits, agreed), chances = stats.compare(partial(alike, first), ids, shifts, shuffles, mix(layer))
        (left,), (left_chance,) = stats.compare(partial(beyond, first), pairs, joint, shuffles, mix(layer))
        table = stats.counts(first, ids, experts)
        results.append(
            {
                "layer": layer,
                **_shares(bits, stats.entropy(table.sum(1)), stats.entropy(table.sum(0)), chances[0]),
                "agreement": {"share": agreed, "excess": _excess(agreed, chances[1]), "chance": chances[1]},
                "matching": list(stats.match(table)),
                "given_byte": _against(left, left_chance),
            }
        )
    return results


def _shares(bits: float, one: float, other: float, chance: Mapping[str, Chance]) -> dict[str, Any]:
    """Mutual information as bits and as shares; `adjusted` is 0 at chance, 1 for equals (Vinh et al. 2010, eq. 8)."""
    excess, mean = _excess(bits, chance), (one + other) / 2
    room = mean - (bits - excess)
    return {
        "bits": bits,
        "excess": excess,
        "of_expert": bits / one if one else 0.0,
        "of_label": bits / other if other else 0.0,
        "normalised": bits / mean if mean else 0.0,
        "adjusted": excess / room if room > 0 else 0.0,
        "chance": chance,
    }


def _against(bits: float, chance: Mapping[str, Chance]) -> dict[str, Any]:
    return {"bits": bits, "excess": _excess(bits, chance), "chance": chance}


def _excess(score: float, chance: Mapping[str, Chance]) -> float:
    """By how much a score exceeds the mean of the chance that stands first."""
    return score - float(next(iter(chance.values()))["mean"] or 0.0)


def describe(readings: Sequence[Reading], text: Text, shuffles: int) -> dict[str, Any]:
    """All measurements of models that belong together."""
    models = [_head(one, text) for one in readings]
    everywhere = [choices for one in readings for choices in one.layers.values()]
    layers = [layer for model in models for layer in model["layers"]]
    for name in progress(list(text.labels), "labels"):
        for layer, result in zip(layers, information(everywhere, name, text, shuffles), strict=True):
            layer["information"][name] = result
    pairs = list(itertools.combinations(range(len(readings)), 2))
    agreed = [
        {"models": [a, b], "layers": stability(readings[a], readings[b], text, shuffles)}
        for a, b in progress(pairs, "pairs")
        if readings[a].config == readings[b].config
    ]
    return {"models": models, "stability": agreed}


def _head(one: Reading, text: Text) -> dict[str, Any]:
    """What is known of a model before its choices are compared with anything."""
    token = text.labels["token"]
    layers = [
        {
            "layer": index,
            "load": load(choices),
            "token_counts": stats.counts(choices.first, token.ids, len(token.classes)).long().tolist(),
            "information": {},
        }
        for index, choices in one.layers.items()
    ]
    head = {"name": one.name, "seed": one.seed, "config": one.config, "bits_per_byte": one.bits_per_byte}
    return {**head, "layers": layers}
