"""Processes of benchmarks: fresh, with the threads they are given, and gone with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.processes import alone, processes

PARENT = """
import os, time
from benchmarks.processes import processes

if __name__ == "__main__":
    pool = processes()
    worker = pool.submit(os.getpid).result()
    pool.submit(time.sleep, 600)
    print(worker, flush=True)
    time.sleep(600)
"""


def test_a_process_has_the_threads_it_is_given_and_is_another() -> None:
    assert alone(os.getpid) != os.getpid()
    assert alone(torch.get_num_threads) == torch.get_num_threads()
    with processes(threads=2) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        parent.send_signal(signal.SIGKILL)
    try:
        for _ in range(100):
            if not Path(f"/proc/{worker}").exists():
                return
            time.sleep(0.1)
        raise AssertionError("the worker goes on without its parent")
    finally:
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGKILL)
