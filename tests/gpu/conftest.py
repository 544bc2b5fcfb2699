"""GPU tests: the kernels' autotuner is kept short, and what other packages warn of is theirs."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.gpu.tuning import few_configs

if importlib.util.find_spec("triton"):
    few_configs()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))
