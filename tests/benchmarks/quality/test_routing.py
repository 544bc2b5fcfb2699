"""Routing is measured right: against tables worked by hand, planted routings, and models whose answer is known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quality import routing
from benchmarks.quality import routing_statistics as stats
from benchmarks.quality.routing_labels import TOKEN_CLASSES, Labelling, labellings, token_classes
from benchmarks.quality.routing_measures import Reading, Text, information, load, read, stability, take
from benchmarks.quality.routing_picture import lift, snippet
from recipes.data import Corpus, Document
from synapse_arch import (
    ExpertsConfig,
    MemoryConfig,
    SynapseConfig,
    SynapseModel,
    ThalamusConfig,
    TraceSpec,
    XLSTMConfig,
)

CONFIG = SynapseConfig(
    vocab_size=256, d_model=16, n_layers=2, thalamus=ThalamusConfig(d_state=4, head_dim=8),
    xlstm=XLSTMConfig(n_heads=2), experts=ExpertsConfig(n_experts=4, d_expert=8),
    memory=MemoryConfig(n_heads=2, d_key=4, d_value=4),
)  # fmt: skip
SOURCE = b'''"""What it is."""
import os  # why

def f(x):
    """Says
    more."""
    return x + 1.5 if "s" else None
'''
SHOWN = (
    "ddddddddddddddddd.kkkkkk nn  ccccc..kkk nonoo."
    "iiiidddddddddddddddddddd.iiiikkkkkk n o 000 kk sss kkkk kkkk."
)  # fmt: skip


def sticky(length: int, classes: int, seed: int) -> Tensor:
    """Labels that change about once in 100 tokens."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(length, generator=generator) < 0.01
    return torch.randint(classes, (length,), generator=generator)[change.cumsum(0)]


def as_choices(experts: Tensor, n_experts: int) -> stats.Choices:
    return stats.Choices(experts[:, None], torch.ones(len(experts), 1), n_experts)


def as_text(labels: Tensor, classes: int, sizes: tuple[int, ...], whole: bool = False) -> Text:
    data = torch.arange(len(labels)) % 7
    labelling = Labelling(tuple(map(str, range(classes))), labels, whole)
    return Text(documents=(), data=data, sizes=sizes, labels={"prose": labelling})


@pytest.mark.parametrize(
    ("table", "bits"),
    [([[5, 0], [0, 5]], 1.0), ([[3, 1], [6, 2]], 0.0), ([[2, 1], [0, 1]], 0.75 * math.log2(4 / 3) + 0.5 + 1 - 1.5)],
)
def test_mutual_information_of_tables_worked_by_hand(table: list[list[int]], bits: float) -> None:
    assert stats.mutual_information(torch.tensor(table, dtype=torch.float64)) == pytest.approx(bits, abs=1e-12)


def test_every_choice_counts_by_its_weight() -> None:
    choices = stats.Choices(torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), 3)
    labels = torch.tensor([1, 0])
    assert stats.counts(choices, labels, 2).tolist() == [[0, 0.75], [0.5, 0], [0.5, 0.25]]
    assert stats.counts(choices.first, labels, 2).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_what_the_byte_explains_is_taken_out() -> None:
    byte, coin = torch.arange(4000) % 5, torch.randint(2, (4000,))
    assert stats.conditional_information(as_choices(byte, 5), byte % 2 * 5 + byte, 2, 5) == pytest.approx(0, abs=1e-9)
    mixed = (byte % 2) ^ coin  # nothing alone, everything together
    assert stats.mutual_information(stats.counts(as_choices(mixed, 2), coin, 2)) < 0.05
    beyond = stats.conditional_information(as_choices(mixed, 2), coin * 5 + byte, 2, 5)
    assert beyond == pytest.approx(1, abs=0.01)


def test_labels_without_a_place_keep_what_they_must() -> None:
    labels, generator, sizes = torch.randint(5, (9000,)), torch.Generator().manual_seed(1), (2000, 4000, 3000)
    turned = stats.shifts(labels, generator)
    (by,) = [s for s in range(len(labels)) if torch.equal(labels.roll(s), turned)]
    assert stats.NEAR <= by <= len(labels) - stats.NEAR
    moved = stats.blocks(labels, sizes, generator)
    parts = labels.split(list(sizes))
    assert any(torch.equal(moved, torch.cat(order)) for order in itertools.permutations(parts))
    assert torch.equal(stats.tokens(labels, generator).sort().values, labels.sort().values)
    whole = torch.tensor([4, 1, 3]).repeat_interleave(torch.tensor(sizes))
    regrouped = stats.groups(whole, sizes, generator)
    assert sorted({part.unique().item() for part in regrouped.split(list(sizes))}) == [1, 3, 4]


def test_a_planted_routing_shares_all_its_bits() -> None:
    labels = sticky(20_000, 4, seed=0)
    text = as_text(labels, 4, (20_000,))
    (found,) = information([as_choices(3 - labels, 4)], "prose", text, 40)
    first = found["first"]
    assert (
        first["bits"]
        == pytest.approx(found["label_bits"])
        == pytest.approx(first["chance"]["tokens"]["mean"] + 2, abs=0.1)
    )
    assert [first[key] for key in ("of_expert", "of_label", "normalised", "adjusted")] == pytest.approx([1] * 4)
    assert first["chance"]["shifts"]["p"] == pytest.approx(1 / 41)
    assert found["given_byte"]["bits"] == pytest.approx(found["label_bits"], abs=0.01)


def test_labels_that_say_nothing_stay_within_chance() -> None:
    surprises, discoveries = [], []
    for seed in range(40):
        text = as_text(sticky(10_000, 4, seed=seed), 4, (10_000,))
        (found,) = information([as_choices(sticky(10_000, 4, seed=100 + seed), 4)], "prose", text, 19)
        assert found["against"] == "shifts"
        assert abs(found["first"]["adjusted"]) < 0.15
        surprises.append(found["first"]["chance"]["shifts"]["p"] <= 0.05)
        surprises.append(found["given_byte"]["chance"]["shifts"]["p"] <= 0.05)
        discoveries.append(found["first"]["chance"]["tokens"]["p"] <= 0.05)
    assert sum(surprises) <= 10, "1 in 20 is expected"
    assert all(discoveries), "shuffling one by one would have called every one a discovery"


def test_documents_that_differ_anyway_are_no_evidence_for_their_groups() -> None:
    sizes, surprises = (100, 300) * 20, []
    for seed in range(40):
        generator, lengths = torch.Generator().manual_seed(seed), torch.tensor(sizes)
        experts, group = (torch.randint(3, (40,), generator=generator).repeat_interleave(lengths) for _ in range(2))
        text = as_text(group, 3, sizes, whole=True)
        (found,) = information([as_choices(experts, 3)], "prose", text, 19)
        assert found["against"] == "groups"
        surprises.append(found["first"]["chance"]["groups"]["p"] <= 0.05)
    assert sum(surprises) <= 6, "1 in 20 is expected"
    (found,) = information([as_choices(group, 3)], "prose", text, 60)
    assert found["first"]["chance"]["groups"]["p"] == found["given_byte"]["chance"]["groups"]["p"] == 1 / 61


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_matching_is_the_best_of_all(n: int) -> None:
    for _ in range(10):
        table = torch.rand(n, n, dtype=torch.float64).round(decimals=1)  # with ties
        orders = itertools.permutations(range(n))
        best = max(sum(float(table[row, order[row]]) for row in range(n)) for order in orders)
        found = stats.match(table)
        assert sorted(found) == list(range(n))
        assert sum(float(table[row, found[row]]) for row in range(n)) == pytest.approx(best)


def test_every_byte_of_a_snippet_gets_its_class() -> None:
    initials = {"i": "indentation", ".": "newline", " ": "space", "d": "docstring", "c": "comment", "o": "operator"}
    initials |= {"k": "keyword", "n": "name", "s": "string", "0": "number"}
    expected = [initials[letter] for letter in SHOWN]
    assert [TOKEN_CLASSES[i] for i in token_classes(SOURCE)] == expected


def test_classes_hold_behind_wide_characters_marks_and_windows_newlines() -> None:
    for source in (
        "é = 'ü'  # ö\nx = 1\n".encode(),
        b"\xef\xbb\xbfx = 1\r\ny = 2\r\n",
        b"# coding: latin-1\n\xe9 = 2\n",
    ):
        found = token_classes(source)
        for character, name in ((b"=", "operator"), (b"\n", "newline")):
            for place in (i for i in range(len(source)) if source[i : i + 1] == character):
                assert TOKEN_CLASSES[found[place]] == name, source
    assert [TOKEN_CLASSES[i] for i in token_classes(b'f"a{b!r:>{c}}" + x')] == ["string"] * 14 + [
        "space", "operator", "space", "name",
    ]  # fmt: skip
    assert TOKEN_CLASSES[token_classes(b"x = 's'\n")[4]] == "string", "no statement by itself"
    assert {TOKEN_CLASSES[i] for i in token_classes(b"a = (1\n")} == {"other", "space", "newline"}, "no Python"


def test_labels_and_documents_are_cut_alike() -> None:
    documents = (Document(name="a/b.py", data=SOURCE), Document(name="c.py", data=b"def g():\n    pass\n"))
    whole = labellings(documents)
    assert [whole["prose"].classes[i] for i in whole["prose"].ids[:18]] == ["prose"] * 17 + ["code"]
    assert whole["package"].classes == ("a", "modules")
    assert torch.equal(whole["next_token"].ids[: len(SOURCE) - 1], whole["token"].ids[1 : len(SOURCE)])
    assert sum(whole["byte"].shares.values()) == pytest.approx(1)
    text = take(Corpus(source="", train=(), held_out=documents), len(SOURCE) + 8)
    assert text.sizes == (len(SOURCE), 8)
    assert bytes(text.data.tolist()) == SOURCE + b"def g():"
    assert torch.equal(text.labels["token"].ids, whole["token"].ids[: len(text.data)])


def test_load_is_measured_against_the_fair_share() -> None:
    experts = torch.tensor([[0, 1]] * 3 + [[1, 0]])
    found = load(stats.Choices(experts, torch.full((4, 2), 0.5), 4))
    assert found["assignments"]["shares"] == [0.5, 0.5, 0, 0]
    assert (found["assignments"]["dead"], found["assignments"]["largest_over_fair"]) == (2, 2)
    assert found["assignments"]["entropy_of_even"] == pytest.approx(0.5)
    assert found["first"]["largest_over_fair"] == 3


def tiny_text() -> Text:
    return take(Corpus(source="", train=(), held_out=(Document(name="a.py", data=SOURCE * 3),)), 10_000)


def test_the_choices_read_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.routing_measures.WINDOW", 37)
    model, text = SynapseModel(CONFIG), tiny_text()
    found = read(model, text, "m", 3)
    ids = torch.cat((torch.zeros(1).long(), text.data))[None]
    out = model(ids, targets=torch.cat((ids[0, 1:], torch.tensor([-100])))[None], trace=TraceSpec(max_tokens=9999))
    for trace in out.trace.layers:
        assert torch.equal(found.layers[trace.index].experts, trace.routing.experts[0, 1:])
        assert torch.allclose(found.layers[trace.index].weights, trace.routing.weights[0, 1:], atol=1e-4)
    assert found.bits_per_byte == pytest.approx(float(out.losses["language"].detach()) / math.log(2), rel=1e-4)


def test_a_model_with_its_experts_in_another_order_is_recognised() -> None:
    model, text, order = SynapseModel(CONFIG), tiny_text(), torch.tensor([2, 0, 3, 1])
    one = read(model, text, "one", 0)
    turned = {i: c._replace(experts=order[c.experts]) for i, c in one.layers.items()}
    other = Reading(name="other", seed=1, config=one.config, bits_per_byte=0.0, layers=turned)
    for layer in stability(one, other, text, 5):
        seen = one.layers[layer["layer"]].experts[:, 0].unique().tolist()
        assert [layer["matching"][e] for e in seen] == order[seen].tolist()
        assert layer["agreement"]["share"] == 1
        assert layer["normalised"] == pytest.approx(1)
        assert layer["agreement"]["chance"]["shifts"]["mean"] < 1


def test_the_text_shown_has_the_experts_of_its_own_bytes() -> None:
    documents = (Document(name="a.py", data=b"#\n" * 30), Document(name="b.py", data=SOURCE * 3))
    tokens = labellings(documents)["token"].ids
    place = torch.arange(len(tokens))
    shown = snippet(documents, tokens, {0: as_choices(place, len(place))})
    data = b"".join(document.data for document in documents)
    assert shown["document"] == "b.py"
    assert len(shown["text"]) == 12
    for line, places in zip(shown["text"], shown["experts"]["0"], strict=True):
        assert bytes(data[place] for place in places).decode() == line


def test_lift_is_one_where_an_expert_does_not_care() -> None:
    even = [[2] * len(TOKEN_CLASSES), [6] * len(TOKEN_CLASSES)]
    assert torch.allclose(lift({"token_counts": even})[0], torch.ones(()).double())
    values, names = lift({"token_counts": [[30, 0, 10] + [0] * 8, [0, 20, 20] + [0] * 8]})
    assert names == TOKEN_CLASSES[:3]
    assert torch.allclose(values, torch.tensor([[2, 0, 2 / 3], [0, 2, 4 / 3]]).double())


def test_one_command_writes_the_report_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "text").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "text" / name).write_bytes(SOURCE * 5 + name.encode())
    for seed in (4, 5):
        torch.manual_seed(seed)
        SynapseModel(CONFIG).save_pretrained(tmp_path / f"bytes_s{seed}")
    out, picture = tmp_path / "results" / "routing.json", tmp_path / "routing.png"
    folders = [str(tmp_path / f"bytes_s{seed}") for seed in (4, 5)]
    options = ["--bytes", "400", "--shuffles", "5", "--data", str(tmp_path / "text")]
    assert routing.main([*folders, *options, "--out", str(out), "--picture", str(picture)]) == 0
    report = json.loads(out.read_text())
    assert report["seeds"] == [4, 5]
    assert report.keys() >= {
        "commit",
        "machine",
        "config",
        "seeds",
        "text",
        "trained",
        "untrained",
        "picture",
        "protocol",
    }
    assert report["text"]["bytes"] == 400
    assert str(tmp_path) not in json.dumps(report), "no path of this machine"
    labels = {"byte_value", "byte", "token", "next_token", "prose", "package"}
    for kind in ("trained", "untrained"):
        assert [model["seed"] for model in report[kind]["models"]] == [4, 5]
        for model in report[kind]["models"]:
            assert [layer["information"].keys() for layer in model["layers"]] == [labels, labels]
            assert all(sum(map(sum, layer["token_counts"])) == 400 for layer in model["layers"])
        assert [len(pair["layers"]) for pair in report[kind]["stability"]] == [2]
        assert report[kind]["summary"]["information"]["token"].keys() >= {
            "first_bits",
            "given_byte_excess",
            "first_p_worst",
        }
    trained, untrained = (report[kind]["models"] for kind in ("trained", "untrained"))
    assert [model.pop("name").split("/")[-1] for model in trained] == ["bytes_s4", "bytes_s5"]
    assert trained == [{key: model[key] for key in model if key != "name"} for model in untrained], "same seeds"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "next_token" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert routing.main([str(tmp_path / "nothing"), "--data", str(tmp_path)]) == 2
    (tmp_path / "a.txt").write_text("a\n" * 200)
    SynapseModel(SynapseConfig.from_dict(CONFIG.to_dict() | {"experts": None})).save_pretrained(tmp_path / "dense")
    assert routing.main([str(tmp_path / "dense"), "--data", str(tmp_path / "a.txt")]) == 2
    assert "with experts" in capsys.readouterr().err
    assert routing.main([str(tmp_path), "--seeds", "1", "2"]) == 2
