"""Cores and memory of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

MEMINFO = Path('/proc/meminfo')
CONTAINER = Path('/sys/fs/cgroup/memory.max')


def usable_cpus() -> int:
    """The number of CPUs that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def memory_in_all() -> int | None:
    """Bytes of memory of the machine, or of the container that padseg runs in; None where the system does not say."""
    if 'SC_PHYS_PAGES' not in os.sysconf_names:
        return None
    machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limit = CONTAINER.read_text().strip() if CONTAINER.is_file() else 'max'
    return min(machine, int(limit)) if limit.isdecimal() else machine


def memory_available() -> int | None:
    """Bytes available without swapping; SC_AVPHYS_PAGES would leave out what the system only caches. None where it does not say."""
    text = MEMINFO.read_text() if MEMINFO.is_file() else ''
    match = re.search(r'^MemAvailable: +(\d+) kB$', text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None
