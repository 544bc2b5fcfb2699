"""Processes of their own for what is measured or trained: fresh interpreters, which end when their parent does.

Without the last, a killed benchmark leaves its workers computing, unseen, beside whatever is measured next.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def processes(
    jobs: int = 1, *, threads: int | None = None, prepare: Callable[[], object] | None = None
) -> ProcessPoolExecutor:
    """Fresh interpreters that functions can be submitted to.

    Args:
        jobs: how many.
        threads: of torch in each; None for as many as here.
        prepare: called first in each; importable, as everything that is submitted.
    """
    given = (torch.get_num_threads() if threads is None else threads, prepare)
    return ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=given
    )


def alone(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a function returns in a process that did nothing before."""
    with processes() as pool:
        return pool.submit(function, *args, **kwargs).result()


def _begin(threads: int, prepare: Callable[[], object] | None) -> None:
    torch.set_num_threads(threads)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
