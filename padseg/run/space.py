"""Estimate the disk space that a run's results need, and compare it with the free space."""

from __future__ import annotations

import logging

from padseg.images import Found, ImageError
from padseg.images.decode import opened_file, reasons
from padseg.run.job import Job, outputs
from padseg.system.disk import free_space, human

# Bytes on disk per picture pixel, in blocks of 4096: 40 photographs of 481 x 321 with 13 regions each took 0.04, 0.38, 0.35
# and 0.14 (padseg run --dir BSDS500/val --limit 40 --overlay --coco).
PER_PIXEL = {'labels': 0.05, 'masks': 0.4, 'overlays': 0.4, 'coco': 0.15}
RECORD = 1000  # bytes per manifest line
SAMPLE = 64  # pictures whose size is read for the estimate
TOKENS = 77
log = logging.getLogger(__name__)


def warn_if_short(job: Job, pending: list[Found], side: int) -> None:
    """Log a warning if the results of these pictures may not fit; side: of the model's view, in pixels."""
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
    maps = TOKENS * (side // 16) ** 2 * 4 if job.save_maps else 0  # before compression
    sizes = [size for picture in pending[:: len(pending) // SAMPLE + 1] if (size := pixels(picture, job))]
    mean = sum(sizes) / len(sizes) if sizes else 0.0
    return round(len(pending) * (per_pixel * mean + maps + RECORD))


def pixels(picture: Found, job: Job) -> int:
    """Number of pixels in a picture's label map, from its file's header; 0 for unreadable files."""
    try:
        with picture.path.open('rb') as file, reasons():
            image = opened_file(file, job.reading)
            return min(image.width * image.height, job.reading.shrink or image.width * image.height)
    except (ImageError, OSError):
        return 0
