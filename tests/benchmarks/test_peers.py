"""The benchmark against peers: equal sizes, functions that are the same function, and jobs that do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks.measure import ROOT, Figure
from benchmarks.peers import __main__ as program
from benchmarks.peers import functions, language, models, parts, suite
from benchmarks.processes import alone
from synapse_arch import SynapseConfig
from synapse_arch.model.accounting import active_parameters
from synapse_arch.model.compiling import eager_step

TINY = SynapseConfig(vocab_size=64, d_model=64, n_layers=1)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    functions.quiet()


@pytest.mark.parametrize("config", [suite.Sizes().small, suite.Sizes().large], ids=["small", "large"])
@pytest.mark.parametrize("name", models.PEERS)
def test_peers_are_as_large_as_ours(name: str, config: SynapseConfig) -> None:
    """Feed-forwards come in sixteens; Mamba-2 comes in whole layers."""
    with torch.device("meta"):
        size = models.active(models.PEERS[name](config))
    assert size == pytest.approx(active_parameters(config), rel=0.05 if name == "mamba2" else 0.01)


def test_the_large_model_has_a_hundred_million_parameters() -> None:
    with torch.device("meta"):
        size = sum(p.numel() for p in models.mixtral(suite.Sizes().large).parameters())
    assert 0.8e8 < size < 2.5e8


@pytest.mark.parametrize("name", functions.functions())
def test_their_functions_are_ours(name: str) -> None:
    function = functions.functions()[name]
    for peer in (*function.peers.values(), function.loop):
        assert functions.disagreement(function, peer, 1, 70) < functions.AGREE


def test_another_function_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = functions.functions()["delta_rule"]
    wrong = functions.Function(found.draw, found.ours, found.loop, {"wrong": lambda z: 1.001 * found.loop(z)})
    monkeypatch.setattr(functions, "functions", lambda: {"delta_rule": wrong})
    (figure,) = functions.measure([(1, 16)], 2, looped=8, peaks=False)
    assert figure.met is False


def test_memory_is_that_of_a_process_which_did_nothing_else() -> None:
    """Also that what is submitted can be imported there."""
    assert alone(functions._added, "selective_scan", "ours", 4, 512) > 0
    assert alone(language._training_peak, "ours", TINY, 512) > 0


def test_a_peer_that_would_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(functions, "available_memory", lambda device: functions.ROOM_LEFT + 1000)
    function = replace(functions.functions()["delta_rule"], peers=dict.fromkeys(("small", "large", "unknown")))
    kept = functions._without_large("delta_rule", function, {"small": 10.0, "large": 11.0}, 100).peers
    assert set(kept) == {"small", "unknown"}
    assert "large is not called with 100 positions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_step_after_a_prompt_is_the_next_position(name: str) -> None:
    """What the timed step computes is what one pass over the whole text gives at its end."""
    torch.manual_seed(0)
    model = models.PEERS[name](TINY).eval()
    ids = torch.randint(64, (2, 9))
    seen = []
    model.register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1]))
    models.decoder(model, ids, again=20)()
    with torch.inference_mode():
        model(torch.cat([ids, ids[:, :1]], dim=1))
    torch.testing.assert_close(seen[1], seen[2], rtol=1e-4, atol=1e-5)


def test_attention_never_has_more_before_it_than_a_turn_leaves() -> None:
    model = models.PEERS["llama"](TINY).eval()
    lengths = []
    model.register_forward_hook(lambda *call: lengths.append(call[-1].past_key_values.get_seq_length()))
    step = models.decoder(model, torch.randint(64, (2, 9)), again=3)
    for _ in range(7):
        step()
    assert lengths == [9, 10, 11, 12, 10, 11, 12, 10]


def test_a_training_step_trains() -> None:
    torch.manual_seed(0)
    ids = torch.randint(64, (2, 9))
    for name, make in models.PEERS.items():
        model = make(TINY).train()
        before = [p.detach().clone() for p in model.parameters()]
        models.training_step(model, ids)()
        assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True)), name


def test_experts_that_are_not_the_definition_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = parts.dispatch([(4, 2, 16)], rounds=2)
    assert right.what.endswith("dense time over ours")
    plain = parts.expert_swiglu
    monkeypatch.setattr(parts, "expert_swiglu", lambda *z, backend="auto": plain(*z, backend=backend) * (
        1.0 if backend == "reference" else 1.01))  # fmt: skip
    (wrong,) = parts.dispatch([(4, 2, 16)], rounds=2)
    assert wrong.what.endswith("from the definition")
    assert wrong.met is False


def test_a_compiled_step_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(step: Any) -> list[str]:
        monkeypatch.setattr(language, "compiled_step", lambda: step)
        sizes = {"batches": (1,), "lengths": (8,), "peer_lengths": ()}
        return [f.what for f in language.decoding(TINY, **sizes, turns=1, compiled=True) if "compiled, " in f.what]

    equal, read = measured(lambda *z: eager_step(*z))
    assert "from those of the uncompiled step" in equal
    assert "time to read" in read
    (off,) = measured(lambda *z: (eager_step(*z)[0] + 1, z[2]))
    assert "from those of the uncompiled step" in off


def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(program, "QUICK", suite.Sizes(
        small=TINY, large=TINY, shapes=((1, 16),), looped=8, peaks=False, rounds=2, lengths=(16,), prefill=(16, 32),
        batches=(1,), read=(8, 16), peers_read=(8,), turns=2, compiled=False, cases=((8, 2, 16),),
    ))  # fmt: skip
    file = tmp_path / "peers.json"
    only = ["ops", "training", "prefill", "decoding", "dispatch"]
    program.main(["--quick", "--only", *only, "--out", str(file)])
    report = json.loads(file.read_text())
    what = " ".join(figure["what"] for figure in report["figures"])
    for part in ("ssd", "mixtral", "prefill", "decoding", "dispatch"):
        assert part in what
    assert all(value > 0 for figure in report["figures"] for value in figure["values"])
    assert "commit" in report["environment"]
    assert "best peer's time over ours" in capsys.readouterr().out


def test_an_earlier_file_outlives_a_run_that_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(name: str, sizes: suite.Sizes) -> list[Figure]:
        if name == broken:
            raise KeyboardInterrupt
        return [Figure(what=name, values=(1.0,), unit="ratio")]

    monkeypatch.setattr(program, "measure", measure)
    file, partial = tmp_path / "peers.json", tmp_path / "peers.json.partial"
    file.write_text("earlier")
    broken = "decoding"
    with pytest.raises(KeyboardInterrupt):
        program.main(["--out", str(file)])
    assert file.read_text() == "earlier"
    assert [figure["what"] for figure in json.loads(partial.read_text())["figures"]][:1] == ["ops"]
    assert f"what was measured is in {partial}" in capsys.readouterr().err
    broken = ""
    assert program.main(["--out", str(file)]) == 0
    assert [figure["what"] for figure in json.loads(file.read_text())["figures"]] == list(suite.MEASUREMENTS)
    assert not partial.exists()


def test_the_command_runs_as_users_run_it() -> None:
    """With -m, where a fresh process cannot find what the command's own file defines."""
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--only", "dispatch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dispatch: 8 experts" in done.stdout


def test_import_is_timed_in_a_fresh_interpreter() -> None:
    (figure,) = parts.start(1)
    assert 0 < figure.median < 30


def test_a_peer_that_takes_too_long_is_not_called_with_longer_texts() -> None:
    function = functions.functions()["mlstm"]
    quick, slow = function.peers
    times = {quick: [0.1, 99.0, 0.1], slow: [functions.PATIENCE + 1.0] * 3, "ours": [0.1] * 3}
    figure = Figure(what="mlstm", values=(1.0,), unit="ratio", goal=None, details={"seconds": times})
    assert list(functions._without_slow(function, [figure]).peers) == [quick]


def test_a_peer_whose_steps_take_too_long_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "PATIENCE", -1.0)
    found = language.training(TINY, batch=1, length=8, rounds=3, peers=["llama"])
    assert [len(figure.values) for figure in found] == [3, 1]
    assert language.patient(found) == []
    monkeypatch.setattr(language, "PATIENCE", 60.0)
    found = language.training(TINY, batch=1, length=8, rounds=3, peers=["llama"])
    assert [len(figure.values) for figure in found] == [3, 3]
    assert language.patient(found) == ["llama"]
