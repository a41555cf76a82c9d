"""Free disk space, and sizes in words."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_space(path: Path) -> int:
    """Free bytes on the disk where this folder is or would be created."""
    path = path.expanduser().absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def human(size: int) -> str:
    """Format a size: 13 B, 4.2 kB, 8.1 GB."""
    number, units = float(size), ['B', 'kB', 'MB', 'GB', 'TB']
    while number >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f'{number:.0f} B' if units[0] == 'B' else f'{number:.1f} {units[0]}'
