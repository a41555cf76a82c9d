"""Estimate the disk space that a run's results need, and compare it with the free space."""

from __future__ import annotations

import logging
import time

from padseg.images import Found, ImageError, size_apart
from padseg.run.job import Job, outputs
from padseg.system.disk import free_space, human

# Bytes on disk per picture pixel, in blocks of 4096: 40 photographs of 481 x 321 with 13 regions each took 0.04, 0.38, 0.35
# and 0.14 (padseg run --dir BSDS500/val --limit 40 --overlay --coco).
PER_PIXEL = {'labels': 0.05, 'masks': 0.4, 'overlays': 0.4, 'levels': 0.1, 'coco': 0.15}
RECORD = 1000  # bytes of a line in the manifest
SAMPLE = 64  # pictures whose size is read
LOOK, LOOKS = 0.5, 5.0  # seconds that reading the size of one picture, and of all, may take
TOKENS = 77
log = logging.getLogger(__name__)


def warn_if_short(job: Job, pending: list[Found], side: int) -> None:
    """Log a warning if the results of these pictures may not fit on the disk. side: of the model's view, in pixels."""
    free, needed = free_space(job.out), reckon_space(job, pending, side)
    if needed > free:
        log.warning(
            '%s has %s free; the results of %d pictures take about %s. If the disk fills up, the run ends and nothing is lost',
            job.out,
            human(free),
            len(pending),
            human(needed),
        )


def reckon_space(job: Job, pending: list[Found], side: int) -> int:
    """Estimate the results' size on disk in bytes, from the sizes of a sample of pictures."""
    names = {*outputs('', job)} | ({'coco'} if job.coco else set())
    per_pixel = sum(PER_PIXEL.get(name, 0.0) for name in names)
    maps = TOKENS * (side // 16) ** 2 * 4 if job.save_maps else 0  # before they are compressed
    sizes = []
    ends = time.monotonic() + LOOKS
    for picture in pending[:: len(pending) // SAMPLE + 1]:
        if time.monotonic() < ends and (size := pixels(picture, job)):
            sizes.append(size)
    mean = sum(sizes) / len(sizes) if sizes else 0.0
    return round(len(pending) * (per_pixel * mean + maps + RECORD))


def pixels(picture: Found, job: Job) -> int:
    """Number of pixels in a picture's label map, from the file's header; 0 for an unreadable file."""
    try:
        width, height = size_apart(picture.path, job.reading._replace(max_seconds=min(LOOK, job.reading.max_seconds)))
    except (ImageError, OSError):
        return 0
    return min(width * height, job.reading.shrink or width * height)
