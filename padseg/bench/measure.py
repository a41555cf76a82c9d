"""Code shared by all benchmarks: fresh processes, times, memory, and records of the figures and the machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import cv2
import numpy as np

from padseg.system.machine import peak_memory
from padseg.system.versions import versions

if TYPE_CHECKING:
    from padseg.types import Array

T = TypeVar('T')

CHECKOUT = Path(__file__).parents[2]
RECORDS = CHECKOUT / 'data/benchmarks'

START = 'spawn'  # how processes start: without a copy of this process's memory
REGIONS = 14  # per label map
CELLS = 16  # grid points of the random numbers that a surface interpolates
TIMED = 8  # pictures used to time single steps
REPEATS = 7


def fresh(function: Callable[..., T], *arguments: object) -> T:
    """Call the function in a new process and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context(START)) as pool:
        return pool.submit(function, *arguments).result()


def timed(taken: list[float], function: Callable[..., T], *arguments: object) -> T:
    """Call the function several times, append the milliseconds of the fastest call to `taken`, and return the result."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function(*arguments)
        times.append(1000 * (time.perf_counter() - start))
    taken.append(min(times))
    return result


def peak() -> float:
    """Return the peak memory of this process so far, in MiB."""
    return peak_memory() / 2**20


def surface(rng: np.random.Generator, size: int) -> Array:
    """Draw smooth random fields: (size, size, REGIONS)."""
    return cv2.resize(rng.standard_normal((CELLS, CELLS, REGIONS)), (size, size), interpolation=cv2.INTER_CUBIC)


def output_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Add the flags that `finish_bench` needs."""
    function = click.option('--json', 'as_json', is_flag=True, help='print one JSON object')(function)
    return click.option('--record', is_flag=True, help='also write the figures to data/benchmarks/')(function)


def finish_bench(
    command: str, case: str, measured: dict[str, Any], record: bool, as_json: bool, words: Callable[[dict[str, Any]], str]
) -> None:
    """Print the figures, and with `record` write them to RECORDS. measured: the figures, including `surroundings`."""
    print(json.dumps(measured) if as_json else words(measured))
    if record:
        where = measured['processor'] if measured['device'] == 'cpu' else measured['device']
        name = re.sub('[^a-z0-9]+', '-', f'{where} {measured["processors"]} {command} {case}'.lower()).strip('-')
        RECORDS.mkdir(parents=True, exist_ok=True)
        (RECORDS / f'{name}.json').write_text(json.dumps(measured, indent=2) + '\n')


def surroundings(device: str = 'cpu') -> dict[str, Any]:
    """Describe the machine, library versions and revision that the figures belong to."""
    import torch  # here, so that processes without torch do not pay for its memory

    return {
        'processor': processor(),
        'processors': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'device': torch.cuda.get_device_name(device) if device.startswith('cuda') else 'cpu',
        'load': os.getloadavg()[0],
        'system': platform.platform(),
        'versions': versions(),
        'revision': revision(),
    }


def processor() -> str:
    """Return the name of the processor."""
    information = Path('/proc/cpuinfo')
    names = re.findall(r'^model name\s*: (.+)$', information.read_text(), re.MULTILINE) if information.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def revision() -> str | None:
    """Return the checkout's commit, marked if files have changed; None without git or outside a checkout."""
    try:
        ran = subprocess.run(
            ('git', 'describe', '--always', '--dirty', '--abbrev=12'), cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def measured_on(measured: dict[str, Any]) -> str:
    """Name the machine on which the figures were measured, in a few words."""
    where = f'{measured["processor"]}, {measured["processors"]} processors, {measured["threads"]} threads, load {measured["load"]:.2f}'
    return where if measured['device'] == 'cpu' else f'{measured["device"]}; {where}'


def spread(values: list[float]) -> dict[str, float]:
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values)}


def row_of_numbers(name: str, *columns: list[float], digits: int = 3) -> str:
    return f'{name:22}' + ''.join(f'{between(spread(values), digits):>28}' for values in columns)


def between(values: dict[str, float], digits: int = 2) -> str:
    return f'{values["median"]:.{digits}f} ({values["least"]:.{digits}f}..{values["most"]:.{digits}f})'
