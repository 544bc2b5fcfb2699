"""The load script runs, and what must hold at any size holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

from benchmarks.serving.__main__ import MEASUREMENTS, QUICK


def test_outputs_are_exact_and_nothing_is_left_behind() -> None:
    sizes = replace(QUICK, requests=40, soak_clients=8)
    figures = MEASUREMENTS["exactness"](sizes) + MEASUREMENTS["soak"](sizes)
    exact = {figure.what: figure.met for figure in figures if figure.exact}
    assert len(exact) == 4
    assert all(exact.values()), exact


def test_speeds_are_measured() -> None:
    figures = MEASUREMENTS["tracing"](QUICK) + MEASUREMENTS["engine"](QUICK)
    assert [figure.unit for figure in figures] == ["share"] * 5 + ["ratio"]
    assert all(value > -1 for figure in figures for value in figure.values)
