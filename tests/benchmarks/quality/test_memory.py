"""What memory buys: facts by replay, labels of overwriting, the capacity of a matrix, and everything once, small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quality import memory
from benchmarks.quality.memory_capacity import capacity, orthonormal_keys, predicted, random_keys, reading, recalled
from benchmarks.quality.memory_facts import FILLERS, IGNORED, SYMBOLS, VALUES, VOCABULARY, Facts, filler, keys
from benchmarks.quality.memory_facts import make_facts as facts_of
from benchmarks.quality.memory_facts import make_overwritten as overwritten_of
from benchmarks.quality.memory_training import MODELS, Training, configuration, training_facts
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError
from synapse_arch.ops import delta_rule


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replay(told: Tensor) -> list[dict[tuple[int, int], list[int]]]:
    """Of each row, the values told of each key, in order."""
    rows = []
    for row in told.tolist():
        values: dict[tuple[int, int], list[int]] = {}
        for first, second, value in zip(row[::3], row[1::3], row[2::3], strict=True):
            values.setdefault((first, second), []).append(value)
        rows.append(values)
    return rows


def check(made: Facts, pairs: Tensor) -> None:
    """Every answer is the last value told of its key, `first` the first; all tokens are of their alphabets."""
    known = {(pair // SYMBOLS, SYMBOLS + pair % SYMBOLS) for pair in pairs.tolist()}
    for values, asked, answers, first in zip(
        replay(made.told), made.asked.tolist(), made.answers.tolist(), made.first.tolist(), strict=True
    ):
        assert set(values) <= known
        assert all(2 * SYMBOLS <= value < 2 * SYMBOLS + VALUES for told in values.values() for value in told)
        questions = list(zip(asked[::2], asked[1::2], strict=True))
        assert len(set(questions)) == len(questions)
        assert answers[1::2] == [values[key][-1] for key in questions]
        assert first[1::2] == [values[key][0] for key in questions]
        assert set(answers[::2] + first[::2]) == {IGNORED}


@pytest.mark.parametrize(("facts", "questions", "retold"), [(1, None, 0), (1, None, 1), (6, 3, 0), (12, None, 5)])
def test_facts_replayed(facts: int, questions: int | None, retold: int) -> None:
    made = facts_of(generator(), keys(seen=False), 40, facts, questions=questions, retold=retold)
    check(made, keys(seen=False))
    assert made.told.shape == (40, 3 * (facts + retold))
    assert made.asked.shape == (40, 2 * (questions or facts))
    for values in replay(made.told):
        assert len(values) == facts
        assert sorted(map(len, values.values())) == [1] * (facts - retold) + [2] * retold


def test_questions_come_in_another_order() -> None:
    made = facts_of(generator(), keys(seen=True), 200, 8)
    places = [
        list(values).index((int(asked[0]), int(asked[1])))
        for values, asked in zip(replay(made.told), made.asked, strict=True)
    ]
    assert set(places) == set(range(8))


@pytest.mark.parametrize(("between", "after"), [(0, 0), (0, 3), (5, 0), (4, 2)])
def test_overwritten_replayed(between: int, after: int) -> None:
    made = overwritten_of(generator(), keys(seen=False), 60, between=between, after=after)
    check(made, keys(seen=False))
    assert not (made.answers[:, 1] == made.first[:, 1]).any()
    for row, values, asked in zip(made.told.tolist(), replay(made.told), made.asked.tolist(), strict=True):
        tellings = [index for index in range(0, len(row), 3) if row[index : index + 2] == asked]
        assert tellings == [0, 3 * (between + 1)]
        assert len(values) == 1 + between + after
        assert len(row) == 3 * (2 + between + after)


def test_overwriting_values_differ_in_every_way() -> None:
    made = overwritten_of(generator(), keys(seen=False), 2000, between=1)
    steps = (made.answers[:, 1] - made.first[:, 1]) % VALUES
    assert set(steps.tolist()) == set(range(1, VALUES))


def test_keys_asked_about_are_kept_from_training() -> None:
    seen, unseen = set(keys(seen=True).tolist()), set(keys(seen=False).tolist())
    assert not seen & unseen
    assert seen | unseen == set(range(SYMBOLS**2))


def test_filler_has_an_alphabet_of_its_own() -> None:
    words = filler(generator(), 50, 40)
    assert set(words.flatten().tolist()) == set(range(VOCABULARY - FILLERS, VOCABULARY))
    assert facts_of(generator(), keys(seen=True), 50, 9).told.max() < VOCABULARY - FILLERS


def test_training_mixes_all_that_is_measured() -> None:
    training = replace(Training(), steps=100)
    draws = [training_facts(generator(step), training, step) for step in range(0, 100, 2)]
    lengths = [gap.shape[1] for _, gap in draws]
    tellings = [(made.told.shape[1] // 3, made.asked.shape[1] // 2) for made, _ in draws]
    assert min(lengths) == 0 < max(lengths) <= training.max_filler
    assert any(told > asked for told, asked in tellings)
    assert max(asked for _, asked in tellings[:5]) <= training.few_facts + 2
    assert training.max_facts >= max(asked for _, asked in tellings[25:]) > training.max_facts / 2
    for made, _ in draws[:5]:
        check(made, keys(seen=True))


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_orthonormal_keys_are_held_up_to_their_width_and_no_further(rule: str) -> None:
    width = 16
    for facts in (1, width // 2, width, width + 4, 2 * width):
        made = orthonormal_keys(generator(), 50, facts, 2, width)
        values = torch.randint(VALUES, (50, facts), generator=generator(1))
        right = recalled(made, values, VALUES, rule)
        if facts <= width:
            assert right.all()
        elif rule == "delta":
            assert right[:, -width:].all()
            assert right[:, : facts - width].double().mean() < 0.2
        else:
            assert right.double().mean() < 0.9


def test_orthonormal_keys_are_orthonormal() -> None:
    made = orthonormal_keys(generator(), 3, 8, 2, 8)
    gram = torch.einsum("bnhk,bmhk->bhnm", made, made)
    torch.testing.assert_close(gram, torch.eye(8, dtype=made.dtype).expand_as(gram))
    norms = random_keys(generator(), 3, 8, 2, 8).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_signal_and_noise_follow_the_formulas(rule: str) -> None:
    """With a value of its own for every fact, what is read at the others' values is the noise."""
    facts, width = 24, 16
    made = random_keys(generator(), 2000, facts, 1, width)
    codes = torch.eye(facts, dtype=made.dtype)[None, :, None].expand(2000, -1, -1, -1)
    _, matrix = delta_rule(made, made, codes, torch.ones_like(made[..., 0]), rule=rule)
    weights = torch.einsum("bnhk,bhkc->bnc", made, matrix)
    noise = (weights * (1 - torch.eye(facts))).square().sum(-1).mean(0)
    signal, energy = reading(facts, width=width, rule=rule)
    torch.testing.assert_close(weights.mean(0).diagonal(), signal, rtol=0, atol=0.03)
    torch.testing.assert_close(noise, energy, rtol=0, atol=0.05)


def test_recall_of_random_keys_follows_the_formulas() -> None:
    facts = (2, 16, 48, 96)
    made = capacity(facts, heads=(1, 2), width=24, count=16, answers=3000)
    for heads, rules in made["random_keys"].items():
        for rule in ("delta", "hebbian"):
            for n, measured, expected in zip(facts, *rules[rule].values(), strict=True):
                assert expected == predicted(n, heads=int(heads), width=24, count=16, rule=rule)
                assert abs(measured - expected) < 0.06, (heads, rule, n)
        best = rules["least_squares"]["measured"]
        assert best[:2] == [1.0, 1.0]
        assert all(best[i] >= rules["hebbian"]["measured"][i] for i in range(4))


def test_a_fact_fades_with_age_under_the_delta_rule_only() -> None:
    made = random_keys(generator(), 400, 64, 1, 24)
    values = torch.randint(VALUES, (400, 64), generator=generator(1))
    delta, hebbian = (recalled(made, values, VALUES, rule).double().mean(0) for rule in ("delta", "hebbian"))
    assert delta[-1] == 1
    assert delta[-8:].mean() > delta[:8].mean() + 0.5
    assert abs(float(hebbian[-8:].mean() - hebbian[:8].mean())) < 0.1


def test_seeds_are_joined() -> None:
    runs = [
        {"model": "delta", "seed": seed, "loss": [0.0], "parameters": 7, "seen_keys": value, "a": {"b": [value, 0.5]}}
        for seed, value in enumerate((0.3, 0.1, 0.2))
    ]
    assert memory.over_seeds(runs) == {
        "parameters": 7,
        "seen_keys": {"median": 0.2, "min": 0.1, "max": 0.3},
        "a": {"b": {"median": [0.2, 0.5], "min": [0.1, 0.5], "max": [0.3, 0.5]}},
    }


@pytest.fixture(scope="module")
def tiny() -> SynapseModel:
    torch.manual_seed(0)
    return SynapseModel(configuration(MODELS["delta"])).eval()


def test_what_each_state_keeps(tiny: SynapseModel) -> None:
    told = facts_of(generator(), keys(seen=False), 3, 2).told
    state = tiny(told).state
    cut = {name: keep(tiny, state).to_tensors() for name, keep in memory.STATES.items()}
    fresh = tiny.init_state(3).to_tensors()
    for name, tensor in state.to_tensors().items():
        weights = name.endswith("memory.weights")
        assert cut["full"][name].equal(tensor)
        assert cut["memory_only"][name].equal(tensor if weights else fresh[name])
        assert cut["memory_cut"][name].equal(fresh[name] if ".memory." in name else tensor)
        assert cut["all_cut"][name].equal(fresh[name])


def test_filler_accumulates(tiny: SynapseModel) -> None:
    start = tiny(facts_of(generator(), keys(seen=False), 2, 1).told).state
    positions = [int(state.position[0]) for state in memory._distances(tiny, start, (0, 3, 7), generator())]
    assert positions == [3, 6, 10]


def test_places_are_those_of_telling(tiny: SynapseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers as the last fact told would have it is right at the last place, by chance at the others."""

    def last_told(_: SynapseModel, facts: Facts, state: object) -> Tensor:
        return facts.told[:, -1:].expand(-1, facts.asked.shape[1] // 2)

    monkeypatch.setattr(memory, "answered", last_told)
    curve = memory.measure_places(tiny, replace(memory.Measuring(), recall_facts=3, answers=200, cut_after=(0,)))["0"]
    assert curve[-1] == 1
    assert max(curve[:-1]) < 0.2


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "memory.json"
    memory.main(["--quick", "--seeds", "3", "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    made = json.loads(text)
    assert {"commit", "machine", "config", "seeds", "axes", "chance", "models", "capacity", "runs"} == set(made)
    assert set(made["machine"]) == {"cpu", "threads", "torch", "python", "dtype"}
    assert set(made["axes"]) == {"filler", "sessions", "between", "facts"}
    assert {run["commit"] for run in made["runs"]} == {made["commit"]}
    assert [run["model"] for run in made["runs"]] == list(MODELS) == list(made["models"])
    for name, model in made["models"].items():
        for experiment, axis in (("forgetting", "filler"), ("interference", "facts")):
            for state in memory.STATES:
                assert len(model[experiment][state]["median"]) == len(made["axes"][axis])
        assert len(model["later_session"]["recall"]["max"]) == len(made["axes"]["sessions"])
        assert [len(curve["min"]) for curve in model["places"].values()] == [2, 2]
        assert model["later_session"]["file_equals_state"]["min"] == 1
        for shares in model["overwriting"].values():
            assert [sum(parts) for parts in zip(*(share["median"] for share in shares.values()), strict=True)] == [1, 1]
        assert model["memory_numbers"] == (0 if name == "none" else 2 * 2 * 32 * 32)
        assert model["state_numbers"] > model["memory_numbers"]
    assert "delta" in capsys.readouterr().out
    changed = out.stat().st_mtime_ns
    memory.main(["--quick", "--seeds", "3", "--out", str(out)])
    assert out.stat().st_mtime_ns == changed


def test_a_run_repeats_itself() -> None:
    first, second = (memory.perform("delta", 5, memory.QUICK_TRAINING, memory.QUICK_MEASURING) for _ in range(2))
    assert first == second
    assert memory.perform("delta", 6, memory.QUICK_TRAINING, memory.QUICK_MEASURING)["loss"] != first["loss"]


def test_an_interrupted_run_goes_on_and_keeps_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    performed = []

    def perform(name: str, seed: int, *_: object) -> dict[str, object]:
        performed.append((name, seed))
        if len(performed) == 3:
            raise KeyboardInterrupt
        return {"model": name, "seed": seed, "value": float(seed)}

    monkeypatch.setattr(memory, "perform", perform)
    monkeypatch.setattr(memory, "capacity", lambda *_, **__: {"facts": []})
    out = tmp_path / "memory.json"
    with pytest.raises(KeyboardInterrupt):
        memory.run(out, (0, 1), memory.QUICK_TRAINING, memory.QUICK_MEASURING)
    broken = json.loads(out.read_text(encoding="utf-8"))
    for run in broken["runs"]:
        del run["commit"]
    out.write_text(json.dumps(broken | {"commit": "older"}), encoding="utf-8")
    made = memory.run(out, (0, 1), memory.QUICK_TRAINING, memory.QUICK_MEASURING)
    assert performed == [("delta", 0), ("hebbian", 0), ("none", 0), ("none", 0), *((name, 1) for name in MODELS)]
    assert [run["commit"] == "older" for run in made["runs"]] == [True, True, False, False, False, False]
    assert made["models"]["delta"]["value"] == {"median": 0.5, "min": 0.0, "max": 1.0}
    more = memory.run(out, (2,), memory.QUICK_TRAINING, memory.QUICK_MEASURING)
    assert (more["seeds"], len(more["runs"]), len(performed)) == ([0, 1, 2], 9, 10)
    kept = out.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="runs of this configuration and machine"):
        memory.run(out, (0,), replace(memory.QUICK_TRAINING, steps=3), memory.QUICK_MEASURING)
    assert out.read_text(encoding="utf-8") == kept
