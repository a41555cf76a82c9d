"""Progress of a run on stderr: a bar on a terminal, an occasional plain line elsewhere, or one JSON object per event."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Protocol

from tqdm import tqdm

SECONDS_PER_LINE = 10.0
UNIT = ' pictures'


class Progress(Protocol):
    """What the engine reports: the number of pictures, each finished picture with its record, and the end."""

    def start(self, total: int) -> None: ...

    def step(self, record: Mapping[str, Any] | None = None) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Prints nothing."""

    def start(self, total: int) -> None:
        pass

    def step(self, record: Mapping[str, Any] | None = None) -> None:
        pass

    def close(self) -> None:
        pass


class Bar:
    """A progress bar with pictures per second and the time left."""

    def start(self, total: int) -> None:
        self.bar = tqdm(total=total, unit=UNIT, file=sys.stderr, dynamic_ncols=True, smoothing=0.1)

    def step(self, record: Mapping[str, Any] | None = None) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class Lines:
    """The same figures as lines of text, at most one every ten seconds."""

    def start(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.began = self.last = time.monotonic()

    def step(self, record: Mapping[str, Any] | None = None) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last >= SECONDS_PER_LINE:
            self.last = now
            print(tqdm.format_meter(self.done, self.total, now - self.began, ncols=0, unit=UNIT), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class Events:
    """A line of JSON for the start and for each picture with its record."""

    def start(self, total: int) -> None:
        event('start', pending=total)

    def step(self, record: Mapping[str, Any] | None = None) -> None:
        event('picture', **(record or {}))

    def close(self) -> None:
        pass


def event(name: str, **fields: Any) -> None:
    """Print one event on stderr: its time in UTC, its name and its fields."""
    time = datetime.now(timezone.utc).isoformat(timespec='milliseconds')
    print(json.dumps({'time': time, 'event': name, **fields}), file=sys.stderr, flush=True)


class EventHandler(logging.Handler):
    """Prints log records of any library as events."""

    def emit(self, record: logging.LogRecord) -> None:
        event('log', level=record.levelname.lower(), logger=record.name, message=record.getMessage())


def shown(quiet: bool) -> Progress:
    """Choose the progress display that suits stderr."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
