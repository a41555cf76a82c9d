"""Stop cleanly on the first SIGINT or SIGTERM, immediately on the second."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """Context manager that catches signals. asked: whether to stop; signal: number of the signal received, or None.

    Outside the main thread, signals are not caught.
    """

    def __init__(self) -> None:
        self.asked = False
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.signal = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
