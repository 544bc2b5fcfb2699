"""Every measurement runs at tiny sizes, says sane things, and notices what it is there to notice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import core, merge, parity, streaming
from benchmarks.measure import Figure, interleaved, machine_slug, peak_bytes, table
from synapse_arch import ExpertsConfig, MemoryConfig, SynapseConfig, SynapseModel, ThalamusConfig, XLSTMConfig

MODEL = SynapseConfig(
    vocab_size=31, d_model=16, n_layers=2, thalamus=ThalamusConfig(d_state=4, head_dim=8), xlstm=XLSTMConfig(n_heads=2),
    experts=ExpertsConfig(n_experts=4, d_expert=8), memory=MemoryConfig(n_heads=2, d_key=4, d_value=4),
)  # fmt: skip
TINY = core.Sizes(
    parity_lengths=(1, 33), streamed=MODEL, stream_length=40, stream_calls=(1, 16), trained=MODEL, batch=2, length=8,
    product=32, train_rounds=2, short=16, long=64, length_rounds=2, near=5, far=50, decode_steps=3,
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in core.MEASUREMENTS if name != "memory"])
def test_a_measurement_gives_sane_figures(name: str) -> None:
    figures = core.MEASUREMENTS[name](TINY)
    assert figures
    for figure in figures:
        low, high = figure.spread
        assert low <= figure.median <= high
        assert all(math.isfinite(value) and value >= 0 for value in figure.values)
        assert figure.met in ((None,) if figure.goal is None else (True, False))
        assert not figure.exact or figure.met is not False, figure
        json.dumps(figure.to_dict(), allow_nan=False)


def test_memory_is_that_of_a_fresh_process() -> None:
    (figure,) = core.MEASUREMENTS["memory"](TINY)
    assert 50e6 < figure.details["at import"] <= figure.median < 4e9


def test_one_command_prints_one_table_and_writes_one_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(core, "QUICK", TINY)
    path = tmp_path / "results" / "core.json"
    assert core.main(["--quick", "--only", "length", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["environment"].keys() >= {"commit", "torch", "cpu", "threads", "dtype"}
    for figure in report["figures"]:
        assert shown.count(figure["what"]) == 1
        assert figure["low"] <= figure["median"] <= figure["high"]
    whats = [figure["what"] for figure in report["figures"]]
    assert whats[0].startswith("ops"), "parity comes before speed"


def test_no_speed_is_reported_when_a_fast_form_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Figure(what="fast forms", values=(1.0,), unit="relative", goal=1e-10, exact=True)
    monkeypatch.setitem(core.MEASUREMENTS, "parity", lambda sizes: [wrong])
    assert core.measure(TINY, ["decoding"]) == ([wrong], ["decoding"])


def test_parity_sees_a_wrong_gradient_and_a_number_that_is_none() -> None:
    expected = {"y": torch.ones(3), "grad x": torch.tensor([0.0, 2.0])}
    assert parity.difference(expected, expected) == 0
    assert parity.difference(expected | {"grad x": torch.tensor([0.0, 2.5])}, expected) == 0.25
    assert parity.difference(expected | {"y": torch.tensor([1.0, math.nan, 1.0])}, expected) == math.inf
    assert parity.difference({"y": torch.ones(1)}, {"y": torch.zeros(1)}) == math.inf


def test_streaming_tells_a_flip_from_its_consequences() -> None:
    torch.manual_seed(0)
    ids = torch.randint(MODEL.vocab_size, (2, 6))
    whole = streaming.read(SynapseModel(MODEL).eval(), ids, 6, "")
    experts, margins, logits = whole.experts.clone(), whole.margins.clone(), whole.logits.clone()
    experts[0, 1, 3], margins[0, 1, 3] = -1, 1e-9  # a tie in the first layer, row 1
    experts[1, 1, 4], margins[1, 1, 4] = -1, 0.1  # later and above it: its consequence
    experts[1, 0, 5], margins[1, 0, 5] = -1, 0.2  # in another row: a flip of its own
    logits[1, 3:] += 1
    found = streaming.compare(whole._replace(margins=margins), whole._replace(experts=experts, logits=logits))
    assert sorted(found.flips.tolist()) == pytest.approx([1e-9, 0.2])
    assert (found.before, found.state, found.compared) == (0, None, 3 + 5)
    assert found.after == pytest.approx(1 / whole.logits.abs().max().item())


def test_a_flip_that_is_no_tie_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(model: SynapseModel, ids: torch.Tensor, size: int, what: str) -> streaming.Pass:
        found = original(model, ids, size, what)
        return found if size == ids.shape[1] else found._replace(experts=found.experts.flip(0))

    original = streaming.read
    monkeypatch.setattr(streaming, "read", read)
    clear = streaming.streaming(MODEL, 20, (4,))[1]
    assert clear.median > 0
    assert clear.met is False


def test_a_figure_reaches_its_goal_from_the_right_side() -> None:
    floor = Figure(what="a", values=(0.4, 0.5, 0.9), unit="share", goal=0.5, better="more")
    assert (floor.median, floor.spread, floor.met) == (0.5, (0.4, 0.9), True)
    assert replace(floor, goal=0.6).met is False
    assert replace(floor, better="less", goal=0.4).met is False
    assert replace(floor, values=(math.nan,)).met is False
    assert replace(floor, goal=None).met is None
    assert replace(floor, values=(1.0, 2.0, 3.0, 4.0, 5.0)).spread == (2.0, 4.0)
    assert table([floor]).splitlines()[2].split("  ")[-1] == "yes"


def test_runs_are_timed_in_turn() -> None:
    order: list[str] = []
    times = interleaved({name: lambda n=name: order.append(n) for name in "ab"}, 2, "")
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_where_it_was_measured() -> None:
    assert machine_slug({"cpu": "AMD EPYC(TM) 7", "threads": 2}) == "amd-epyc-tm-7-2-threads"
    assert peak_bytes() > 50e6


@pytest.mark.parametrize(("limit", "rounds"), [(float("inf"), 5), (0.0, 3)])
def test_slow_rounds_are_fewer(limit: float, rounds: int) -> None:
    times = interleaved({"one": lambda: None, "other": lambda: None}, 5, "nothing", limit=limit)
    assert [len(values) for values in times.values()] == [rounds, rounds]


def test_a_merge_is_measured_in_a_folder_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that is measured runs in the repository's folder."""
    monkeypatch.chdir(tmp_path)
    place = Path("checkpoints")
    for name in ("base", "0"):
        (place / name).mkdir(parents=True)
        save_file({"w": torch.ones(4)}, place / name / "model.safetensors")
    for program in ("copy", "merge"):
        taken, peak = merge.measured(program, place, 1)
        assert taken > 0
        assert peak > 0
        assert (place / "out" / "model.safetensors").is_file()
