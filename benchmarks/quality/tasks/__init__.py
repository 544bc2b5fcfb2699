"""Every task of the comparison, by name."""

from __future__ import annotations

from benchmarks.quality.tasks import mad, mqar, tracking
from benchmarks.quality.tasks.base import Task
from benchmarks.quality.tasks.text import BYTES

TASKS: dict[str, Task] = {task.name: task for task in (*mad.TASKS, *mqar.TASKS, *tracking.TASKS, BYTES)}
