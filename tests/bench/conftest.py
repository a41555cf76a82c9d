"""Benchmarks run from here, whose fresh processes are forked from one that has the libraries, with fewer repeats: a tenth of the time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.processes import FORKS


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], float]]:
    """Run a benchmark: its figures, and the seconds that it took in all."""
    from padseg.bench import __main__, measure, setting

    monkeypatch.setattr(measure, 'START', FORKS.get_start_method())
    monkeypatch.setattr(measure, 'REPEATS', 2)
    monkeypatch.setattr(measure, 'TIMED', 3)
    for name in setting.QUIET:
        monkeypatch.setenv(name, '')  # put back at the end, whatever a command makes of it

    def run(*arguments: str) -> tuple[dict[str, Any], float]:
        began = time.perf_counter()
        __main__.main([*arguments, '--json'], standalone_mode=False)
        return json.loads(capsys.readouterr().out), time.perf_counter() - began

    return run
