"""CPU cores and memory of this machine and of this process."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from pathlib import Path

MEMINFO = Path('/proc/meminfo')
CONTAINER = Path('/sys/fs/cgroup/memory.max')
STATUS = Path('/proc/self/status')
RESTART = Path('/proc/self/clear_refs')


def usable_cpus() -> int:
    """Number of CPUs that this process may use, or of all CPUs if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def memory_in_all() -> int | None:
    """Total memory in bytes of the machine, or of the container that padseg runs in; None if unknown."""
    if 'SC_PHYS_PAGES' not in os.sysconf_names:
        return None
    machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limit = CONTAINER.read_text().strip() if CONTAINER.is_file() else 'max'
    return min(machine, int(limit)) if limit.isdecimal() else machine


def memory_available() -> int | None:
    """Memory in bytes available without swapping; None if unknown. SC_AVPHYS_PAGES would leave out reclaimable caches."""
    text = MEMINFO.read_text() if MEMINFO.is_file() else ''
    match = re.search(r'^MemAvailable: +(\d+) kB$', text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def peak_memory() -> int:
    """Most memory in bytes that this process has had in RAM, since its start or since `restart_peak`."""
    if STATUS.is_file():  # getrusage would include the parent's memory at the time of the fork
        return 1024 * int(re.findall(r'^VmHWM:\s+(\d+) kB$', STATUS.read_text(), re.MULTILINE)[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def restart_peak() -> None:
    """Let `peak_memory` begin anew, at the memory of this moment; where the system has no such thing it goes on."""
    with contextlib.suppress(OSError):
        RESTART.write_text('5')
