"""The GPU benchmark at small sizes on the CPU: every part runs, and a part that fails is told and the rest measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import decoding, ops, parity, training, tuning
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.model.accounting import active_parameters
from synapse_arch.ops import _kernels, _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured by the program itself")


def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "gpu.json"
    assert program.main(["--quick", "--out", str(file)]) == 0
    report = json.loads(file.read_text())
    what = [figure["what"] for figure in report["figures"]]
    for part in ("limit", "parity of mlstm, chunked float32", "training, eager", "decoding, eager", "hebbian: forward"):
        assert any(line.startswith(part) for line in what), part
    assert report["environment"]["kernels"] == "there is no CUDA device"
    assert "distance from float64" in capsys.readouterr().out


def test_a_part_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(training, "ours", broken)
    file = tmp_path / "gpu.json"
    assert program.main(["--quick", "--only", "training", "decoding", "--out", str(file)]) == 1
    figures = {figure["what"]: figure for figure in json.loads(file.read_text())["figures"]}
    assert figures["training: failures"]["error"] == "RuntimeError: out of luck"
    assert any(name.startswith("decoding") for name in figures)
    assert "out of luck" in capsys.readouterr().err


def test_an_earlier_file_outlives_a_run_that_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "measure", broken)
    file = tmp_path / "gpu.json"
    file.write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        program.main(["--quick", "--only", "decoding", "--out", str(file)])
    assert file.read_text() == "earlier"
    assert json.loads(file.with_name("gpu.json.partial").read_text())["figures"]


def test_without_a_gpu_only_small_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    assert "--quick" in capsys.readouterr().err


def test_an_op_without_parity_is_not_timed() -> None:
    assert ops.measure(program.QUICK.widths, 1, 8, "cpu", set(), rounds=1, compiled=False, late=bool) == []


def test_parity_notices_another_function() -> None:
    case = parity.cases(program.QUICK.widths)["ssd"]

    def wrong(inputs: Any, *, backend: str, packing: Any) -> Any:
        found = case.call(inputs, backend=backend, packing=packing)
        return found | {"y": found["y"] * (1.02 if backend == "chunked" else 1.0)}

    found = parity.errors(parity.Case(case.draw, wrong, (), parity.CHUNKED), 1, 20, "cpu")
    assert found["chunked bfloat16"]["y"] > parity.goal("chunked bfloat16", "y")


def test_parity_is_asked_where_there_is_a_derivative() -> None:
    """mLSTM has none where |nᵀq| = e^-m; among 2,400 positions some are so near that bfloat16 picks a side."""
    case, packed = parity.cases(parity.Widths())["mlstm"], parity.packing(2, 300)
    case = replace(case, forms=(parity.FUSIBLE,))
    off = {}
    for settle in (case.settle, lambda drawn, _: drawn):
        (found,) = parity.errors(replace(case, settle=settle), 2, 300, "cpu", packed).values()
        off[settle] = max(float(found[f"grad {name}"]) for name in "qki")
    settled, unsettled = off.values()
    assert settled < parity.goal("fusible bfloat16", "grad q") < unsettled


def test_the_large_model_is_of_the_size_it_is_called_by_and_fits_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    config = program.Sizes().model
    assert 3.3e8 < active_parameters(config) < 3.8e8
    widths = program.Sizes().widths
    layer: Any = training._meta(config).layers[0]
    assert widths.heads == (layer.thalamus.mamba.n_heads, config.xlstm.n_heads, config.memory.n_heads)  # type: ignore[union-attr]
    assert (widths.key, widths.value) == (layer.xlstm.d_key, layer.xlstm.d_value)
    monkeypatch.setattr(_triton, "_missing", lambda: "")
    there: Any = type("OnCuda", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
    for key, value in ((widths.key, widths.value), (widths.state, widths.head), (widths.memory, widths.memory)):
        assert _kernels.choose("ssd", "auto", there, torch.float32, key, value) == "triton"


def test_bytes_that_a_step_reads() -> None:
    config = SynapseConfig.preset("tiny", n_layers=1, d_model=64)
    model = training.narrow(SynapseModel(config))
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.layers[0].thalamus.router.weight.dtype == torch.float32  # type: ignore[union-attr]
    stored = sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes
    assert decoding.weight_bytes(model, 8) == stored
    assert 2 * active_parameters(config) < decoding.weight_bytes(model, 1) < stored


def test_the_tuner_keeps_one_launch_of_each_block_size() -> None:
    class Launch:
        def __init__(self, size: int, warps: int, stages: int) -> None:
            self.kwargs, self.num_warps, self.num_stages = {"BK": size}, warps, stages

    launches = [Launch(size, warps, stages) for size in (32, 64) for warps in (1, 2, 4, 8) for stages in (2, 3, 4)]
    kept = tuning.fewest(launches)
    assert [(x.kwargs["BK"], x.num_warps, x.num_stages) for x in kept] == [(32, 4, 3), (64, 4, 3)]
    assert tuning.fewest(None) == []


def test_when_the_time_is_up_nothing_more_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.Run, "late", lambda _: True)
    (figure,) = program._guarded("decoding", program.Run(program.QUICK, "cpu"))
    assert figure.met is False
    assert "time was up" in figure.what
    everything = {f"{name} chunked" for name in parity.cases(program.QUICK.widths)}
    assert ops.measure(program.QUICK.widths, 1, 8, "cpu", everything, rounds=1, compiled=False, late=lambda: True) == []
