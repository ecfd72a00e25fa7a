"""Ctrl-C and SIGTERM end a run between two steps, where its state can be saved."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Training was asked to stop; `checkpoint` resumes it. exit_code is the shell's: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum
        self.checkpoint: str | None = None


class StopRequest:
    """Context manager that turns the first signal into a flag; check() raises it. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self._signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            raise KeyboardInterrupt
        self._signum = signum

    def check(self) -> None:
        if self._signum:
            raise Interrupted(self._signum)
