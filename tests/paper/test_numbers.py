"""The numbers of the paper, worked out by hand on a handful of made-up records, and where real ones come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import records
from benchmarks.quality.models import ABLATIONS
from paper import numbers, tables
from synapse_arch import SynapseConfig
from tests.paper import fixture
from tests.paper.fixture import record


def test_the_median_is_that_of_the_cell_with_all_its_seeds(tmp_path: Path) -> None:
    found = fixture.numbers(
        tmp_path,
        [
            record("parity", "synapse", 0, 0.99, lr=3e-3),  # tried once in the grid, lucky
            record("parity", "synapse", 0, 0.90),
            record("parity", "synapse", 1, 0.60),
            record("parity", "synapse", 2, 0.80),
            record("parity", "mamba2", 0, 0.50),
        ],
    )
    cell = found.cell("parity")
    assert (cell.median, cell.low, cell.high, cell.best, cell.lr) == (0.80, 0.60, 0.90, 0.90, 1e-3)
    assert cell.scores == [0.90, 0.60, 0.80]
    assert found.cell("parity", "mamba2").median == 0.50
    assert cell.ahead_of(found.cell("parity", "mamba2")) is True
    assert found.cell("parity", "mlstm").median is None
    assert cell.better_than(found.cell("parity", "mlstm")) is None


def test_the_best_cell_of_a_grid_is_the_one_with_the_best_median(tmp_path: Path) -> None:
    high = [record("s3", "mlstm", 0, score, lr=lr) for lr, score in ((1e-3, 0.2), (3e-3, 0.4), (1e-2, 0.4))]
    low = [record("bytes", "mlstm", 0, score, lr=lr) for lr, score in ((1e-3, 2.2), (3e-3, 2.4))]
    found = fixture.numbers(tmp_path, high + low)
    assert (found.cell("s3", "mlstm").lr, found.cell("s3", "mlstm").median) == (3e-3, 0.4)
    assert (found.cell("bytes", "mlstm").lr, found.cell("bytes", "mlstm").median) == (1e-3, 2.2)


def test_longer_runs_speak_for_shorter_ones_and_other_scales_do_not(tmp_path: Path) -> None:
    runs = [record("s3", "mlstm", seed, 0.9) for seed in range(3)]
    runs += [record("s3", "mlstm", 0, 0.5, steps=80), record("s3", "mlstm", 1, 1.0, scale="published", steps=400)]
    assert fixture.numbers(tmp_path, runs).cell("s3", "mlstm").scores == [0.5]


def test_equal_data_means_equal_steps(tmp_path: Path) -> None:
    runs = [record("bytes", "synapse", seed, 2.0 + seed / 10, steps=40) for seed in range(3)]
    runs += [record("bytes", "synapse", 0, 1.5, steps=90), record("bytes", "mamba2", 0, 1.4, steps=70)]
    runs += [record("bytes", "mamba2", 0, 2.2, steps=40), record("bytes", "mlstm", 0, 2.3, steps=40)]
    runs += [record("bytes", "synapse", 0, 3.0, steps=20), record("bytes", "mamba2", 0, 3.1, steps=20)]
    found = fixture.numbers(tmp_path, runs).equal_data
    assert {name: cell.median for name, cell in found.items()} == {"synapse": 2.1, "mamba2": 2.2, "mlstm": 2.3}
    assert fixture.numbers(tmp_path / "none", []).equal_data == {}


def test_figures_of_the_core_are_of_its_newest_record(tmp_path: Path) -> None:
    files = (("autosize-a", 3, 0.3), ("core-a", 2, 0.2), ("core-b", 1, 0.1))
    for name, time, median in files:
        bench = {"environment": {"time": f"2026-01-0{time}"}, "figures": [{"what": "length", "median": median}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(bench), encoding="utf-8")
    found = numbers.Numbers({}, {}, {}, results=tmp_path / "none", core=tmp_path)
    assert found.core("length")["median"] == 0.2


def test_bars_are_met_missed_or_not_run(tmp_path: Path) -> None:
    runs = [record("memorization", "synapse", 0, 0.896), record("parity", "synapse", 0, 1.0)]
    runs += [record("bytes", "synapse", 0, 2.1), record("bytes", "mamba2", 0, 2.2), record("bytes", "mlstm", 0, 2.05)]
    bars = {bar.what: bar for bar in fixture.numbers(tmp_path, runs).bars}
    assert bars["memorization"].met is False, "it must be above its bar"
    assert bars["parity"].met is True, "reaching it is enough"
    assert bars["s3"].met is None
    text = bars["bytes, equal wall time, bits per byte"]
    assert (text.met, text.value, text.goal) == (False, "2.100 (one seed)", "below 2.050, the best peer")
    assert bars["configurations on the four MAD tasks"].met is None


def test_one_configuration_for_all_four(tmp_path: Path) -> None:
    runs = [
        record(task, "synapse", 0, 1.0, config={"vocab_size": size, "d_model": 8})
        for size, task in enumerate(numbers.MAD)
    ]
    assert fixture.numbers(tmp_path / "a", runs).one_configuration.met is True
    runs[2]["config"] = {"vocab_size": 2, "d_model": 16}
    assert fixture.numbers(tmp_path / "b", runs).one_configuration.met is False


def test_compressors_and_time(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir(parents=True)
    packed = {"compressors": {"gzip -9": 2.0, "xz -9": 1.7}}
    for name, score, seconds in (("a", 1.9, 290.0), ("b", 1.75, 1700.0), ("c", 1.6, 1900.0)):
        entry = record("bytes", "synapse", 0, score, seconds=seconds) | packed
        (folder / f"{name}.json").write_text(json.dumps(entry))
    bars = {bar.what: bar.met for bar in fixture.numbers(tmp_path, []).bars}
    assert bars["bytes, at most 5 minutes of training, bits per byte"] is True
    assert bars["bytes, at most 30 minutes of training, bits per byte"] is False


def timed(results: Path, seconds: dict[str, float]) -> None:
    """Leaves the record of how long each model's step on bytes takes."""
    (results / "speed").mkdir()
    (results / "speed" / "bytes.json").write_text(json.dumps({"task": "bytes", "step_seconds": seconds}))


def test_models_on_text_are_compared_at_equal_time(tmp_path: Path) -> None:
    runs = [
        record("bytes", "synapse", 0, 2.2, steps=100, seconds=101.0),
        record("bytes", "synapse", 0, 1.9, steps=300, seconds=305.0),
        record("bytes", "mamba2", 0, 2.3, steps=200),
        record("bytes", "mlstm", 0, 2.4, steps=52),
        record("bytes", "synapse:no-memory", 0, 2.25, steps=100),
        record("bytes", "synapse:dense-experts", 0, 2.0, steps=610),
    ]
    speed = {"synapse": 1.0, "mamba2": 0.5, "mlstm": 2.0, "synapse:no-memory": 0.9, "synapse:dense-experts": 0.5}
    timed(tmp_path, speed)
    found = fixture.numbers(tmp_path, runs)
    assert [found.cell("bytes", model).median for model in ("synapse", "mamba2", "mlstm")] == [2.2, 2.3, 2.4]
    assert [cell.median for cell in found.pair("bytes", "synapse:no-memory")] == [2.2, 2.25], "as many steps"
    assert [cell.median for cell in found.pair("bytes", "synapse:dense-experts")] == [1.9, 2.0], "as much time"
    assert found.costliest == "synapse:dense-experts"
    assert (found.read_in(5) or {})["score"] == 2.2, "the other took more than five minutes"
    assert found.longer == {}, "no peer was trained as long as the longer of ours"


def test_fewer_models_that_were_trained_longer_are_compared_beside_all(tmp_path: Path) -> None:
    runs = [
        record("bytes", "synapse", 0, 2.4, steps=50),
        record("bytes", "mamba2", 0, 2.6, steps=100),
        record("bytes", "synapse", 0, 2.2, steps=100),
        record("bytes", "mamba2", 0, 2.3, steps=200),
        record("bytes", "mlstm", 0, 2.1, steps=100),
        record("bytes", "synapse", 0, 1.8, steps=300),
        record("bytes", "mamba2", 0, 1.9, steps=610),
    ]
    timed(tmp_path, {"synapse": 1.0, "mamba2": 0.5, "mlstm": 1.0})
    found = fixture.numbers(tmp_path, runs)
    assert found.cell("bytes").median == 2.2
    medians = {time: {name: cell.median for name, cell in cells.items()} for time, cells in found.longer.items()}
    assert medians == {300.0: {"synapse": 1.8, "mamba2": 1.9}}
    bars = {bar.what: bar for bar in found.bars}
    assert bars["bytes, equal wall time, bits per byte"].met is False
    assert bars["bytes, 300 seconds each, bits per byte"].met is True
    rows = tables.text(found).splitlines()
    assert any("Mamba-2, longer" in row and "1.900" in row and "| 305 |" in row for row in rows), "its own seconds"


def test_a_changed_part_beside_the_default_after_every_number_of_steps(tmp_path: Path) -> None:
    dense = "synapse:dense-experts"
    runs = [record("bytes", "synapse", 0, score, steps=steps) for steps, score in ((50, 2.4), (90, 2.0), (70, 2.1))]
    runs += [record("bytes", dense, seed, 2.2, steps=steps) for steps in (90, 50, 80) for seed in (0, 1)]
    pairs = fixture.numbers(tmp_path, runs).pairs("bytes", dense)
    medians = {steps: [cell.median for cell in pair] for steps, pair in pairs.items()}
    assert list(medians.items()) == [(50, [2.4, 2.2]), (90, [2.0, 2.2])]


def test_the_default_of_the_ablations_is_the_one_most_are_beside(tmp_path: Path) -> None:
    runs = [record("bytes", "synapse", 0, score, steps=steps) for steps, score in ((50, 2.4), (90, 2.0))]
    runs += [record("bytes", f"synapse:{part}", 0, 2.5, steps=50) for part in ("no-memory", "no-xlstm")]
    runs += [record("bytes", "synapse:dense-experts", 0, 2.1, steps=90)]
    rows = {row.split("|")[1].strip(): row for row in tables.ablations(fixture.numbers(tmp_path, runs)).splitlines()}
    assert "2.400" in rows["*default*"]
    assert "+0.100" in rows["no\u00a0memory"]
    assert "steps" not in rows["no\u00a0memory"]
    assert "(90 steps)" in rows["dense\u00a0experts"]


def test_what_was_neither_timed_nor_trained_as_long_is_not_compared(tmp_path: Path) -> None:
    runs = [
        record("bytes", "synapse", 0, 2.0, steps=300),
        record("bytes", "mamba2", 0, 1.9, steps=300),
        record("bytes", "synapse:no-memory", 0, 2.3, steps=100),
        record("s3", "synapse", 0, 0.99, steps=300),
        record("s3", "synapse:no-memory", 0, 0.5, steps=200),
    ]
    timed(tmp_path, {"synapse": 1.0, "mamba2": 1.0})
    found = fixture.numbers(tmp_path, runs)
    assert not found.cell("bytes", "synapse:no-memory").found
    for task in ("bytes", "s3"):
        ours, changed = found.pair(task, "synapse:no-memory")
        assert not ours.found
        assert changed.found
    assert found.costliest is None


def test_how_much_of_the_grid_was_searched(tmp_path: Path) -> None:
    runs = [record("s3", "mamba2", 0, 0.5, lr=lr) for lr in (1e-3, 3e-3)]
    runs += [record("s3", "synapse", seed, 0.5) for seed in (0, 1)] + [record("s3", "synapse", 0, 0.5, steps=7)]
    assert fixture.numbers(tmp_path, runs).searched == (1, 3)


def test_a_changed_part_is_compared_with_the_default_it_was_changed_in() -> None:
    """The committed records: what differs between the two configurations is the change, and nothing else."""
    found = numbers.gather()
    for name in found.ablations:
        change = ABLATIONS[name.partition(":")[2]][1]
        for task in found.ran([name]):
            ours, changed = found.pair(task, name)
            if ours.found:
                wanted = change(SynapseConfig.from_dict(ours.config))
                assert SynapseConfig.from_dict(changed.config) == wanted, (task, name)


def test_where_our_model_leads_and_where_it_is_level(tmp_path: Path) -> None:
    tasks = {"parity": (1.0, 1.0), "s3": (0.9, 0.8), "mqar-64": (0.7, 0.8), "bytes": (2.0, 2.1)}
    runs = [record(task, "synapse", 0, ours) for task, (ours, _) in tasks.items()]
    runs += [record(task, "mlstm", 0, theirs) for task, (_, theirs) in tasks.items()]
    found = fixture.numbers(tmp_path, [*runs, record("compression", "synapse", 0, 0.5)])
    assert (found.led, found.tied) == (["s3", "bytes"], ["parity"])
    assert found.compared == ["mqar-64", "parity", "s3", "bytes"]


@pytest.mark.parametrize(("theirs", "learned"), [(0.001, False), (0.06, True)])
def test_a_task_that_no_peer_learned_is_not_led(theirs: float, learned: bool, tmp_path: Path) -> None:
    runs = [record("mqar-64", "synapse", 0, 0.8), record("mqar-64", "mlstm", 0, theirs)]
    found = fixture.numbers(tmp_path, [*runs, record("bytes", "synapse", 0, 0.01), record("bytes", "mlstm", 0, 0.02)])
    assert found.led == (["mqar-64", "bytes"] if learned else ["bytes"])
    assert found.unlearned == ([] if learned else ["mqar-64"])


@pytest.mark.parametrize(("seeds", "level"), [((0.88, 0.9, 0.92), False), ((0.75, 0.9, 0.92), True)])
@pytest.mark.parametrize("model", ["synapse", "mlstm"])
def test_a_lead_is_more_than_the_spread_over_seeds(
    model: str, seeds: tuple[float, ...], level: bool, tmp_path: Path
) -> None:
    other = {"synapse": "mlstm", "mlstm": "synapse"}[model]
    runs = [record("s3", model, seed, score) for seed, score in enumerate(seeds)] + [record("s3", other, 0, 0.8)]
    found = fixture.numbers(tmp_path, runs)
    assert found.tied == (["s3"] if level else [])
    assert found.led == (["s3"] if model == "synapse" and not level else [])


@pytest.mark.parametrize(("ours", "theirs", "level"), [(0.996, 1.0, True), (0.996, 0.99, False), (0.9, 0.996, False)])
def test_scores_beyond_where_training_stops_are_level(
    ours: float, theirs: float, level: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [record("s3", "synapse", 0, ours), record("s3", "mlstm", 0, theirs)]
    found = fixture.numbers(tmp_path, runs)
    assert found.tied == []
    monkeypatch.setattr(found.tasks["s3"].protocols["cpu"], "stop_at", 0.995)
    assert found.stops == {"s3": 0.995}
    assert found.tied == (["s3"] if level else [])


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    found = fixture.numbers(tmp_path, fixture.everything())
    for task, model in (("partiy", "synapse"), ("parity", "mamba9")):
        with pytest.raises(KeyError):
            found.cell(task, model)
    with pytest.raises(AttributeError):
        _ = found.cell("parity").perplexity
    with pytest.raises(KeyError):
        found.core("no such figure")


def test_the_seeds_of_a_score_are_of_one_configuration() -> None:
    found: dict[tuple[object, ...], str] = {}
    for result in records.read(numbers.RESULTS / "runs"):
        run = tuple(result[key] for key in ("task", "model", "scale", "steps", "lr", "weight_decay"))
        config = json.dumps(result["config"], sort_keys=True)
        assert found.setdefault(run, config) == config, result["file"]


def test_models_whose_medians_are_printed_alike_are_bold_alike(tmp_path: Path) -> None:
    runs = [record("parity", "synapse", 0, 0.99996), record("parity", "mlstm", 0, 1.0), record("s3", "mlstm", 0, 0.5)]
    table = tables.scores(fixture.numbers(tmp_path, [*runs, record("s3", "synapse", 0, 0.4)]), ["parity", "s3"])
    ours, theirs = (line for line in table.splitlines() if line.startswith(("| Synapse", "| mLSTM")))
    assert ours.count("**") == 2
    assert theirs.count("**") == 4


def test_what_rounds_to_nothing_has_no_sign() -> None:
    assert [tables._signed(shown) for shown in ("-0.000", "0.000", "-0.001", "0.001")] == [
        "0.000", "0.000", "−0.001", "+0.001",
    ]  # fmt: skip


def test_every_result_says_where_it_comes_from() -> None:
    for result in records.read(numbers.RESULTS):
        assert not records.unsourced(result), result["file"]


def test_a_result_without_its_origin_is_seen() -> None:
    whole = record("s3", "synapse", 0, 1.0)
    assert records.unsourced(whole) == []
    assert records.unsourced({**whole, "commit": "", "config": {}}) == ["commit", "config"]
    del whole["seed"]
    assert records.unsourced(whole) == ["seed"]
    assert records.unsourced({**whole, "seeds": [0, 1]}) == []


def test_an_unfinished_experiment_says_nothing(tmp_path: Path) -> None:
    report = fixture.memory()
    (tmp_path / "memory.json").write_text(json.dumps(report))
    assert fixture.numbers(tmp_path, []).memory == report
    del report["models"]["none"]
    (tmp_path / "memory.json").write_text(json.dumps(report))
    assert fixture.numbers(tmp_path, []).memory is None
