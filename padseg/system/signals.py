"""A clean stop on the first SIGINT or SIGTERM, an immediate one on the second."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """Context manager; `asked`: whether to stop; `signal`: the number of the signal that asked, or None.

    Outside the main thread no signal is noted.
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
