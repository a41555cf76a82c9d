"""Progress of a run on stderr: a bar on a terminal, an occasional plain line elsewhere, or one JSON object per event."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, Protocol

from tqdm import tqdm

SECONDS_PER_LINE = 10.0
UNIT = ' pictures'
LONG = 1 << 30  # bytes; what reads fewer is over before anybody looks
NO_BARS = 'HF_HUB_DISABLE_PROGRESS_BARS'  # a variable of the hub's client


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


def bytes_bar(words: str, total: int) -> tqdm[Any]:
    """A bar of bytes with the time left, where `bars_shown` says so. It does not stay when it is closed."""
    return tqdm(
        *(None, words, total), unit='B', unit_scale=True, file=sys.stderr, dynamic_ncols=True, leave=False, disable=not bars_shown(total)
    )


def bars_shown(total: int) -> bool:
    """Whether so many bytes deserve a bar: LONG or more, on a terminal, unless the bars of the hub's client are hidden."""
    if total < LONG or sys.stderr is None or not sys.stderr.isatty():
        return False
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled()


@contextlib.contextmanager
def bars_hidden() -> Iterator[None]:
    """Hide the bars of downloads and of long loads, here and in processes that are started, unless NO_BARS says otherwise."""
    if NO_BARS in os.environ:
        yield
        return
    os.environ[NO_BARS] = '1'  # all that is needed while the hub's client is not imported yet
    hub = sys.modules.get('huggingface_hub.utils')
    try:
        with hub.disable_progress_bars() if hub else contextlib.nullcontext():
            yield
    finally:
        del os.environ[NO_BARS]
