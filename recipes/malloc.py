"""One setting of the C library that CPU training lives on."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed for the next allocation, instead of returning it to the system.

    A training step frees and asks again for the same hundreds of megabytes. glibc gives large blocks back at once and
    the kernel hands them out again page by page, cleared: up to a tenth of a step on a virtual machine. The process
    keeps its peak size instead. Its peak is the same.

    Returns:
        Whether it was set: False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
