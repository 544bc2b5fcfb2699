"""Ctrl-C and SIGTERM as a wish to stop, not an end."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Set by Ctrl-C or SIGTERM; one more after `GRACE` seconds interrupts at once.

    Sooner ones are the same wish told twice, as launchers pass on what the terminal has already sent to every process.
    """

    GRACE = 2.0

    def __init__(self) -> None:
        self.made = False
        self.at = math.inf

    def _note(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.at + self.GRACE:
            raise KeyboardInterrupt
        if not self.made:
            self.made, self.at = True, time.monotonic()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
