"""The stages of a picture in a run: read the file, compute token maps, make the label map, write results."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.errors import ModelUnavailable, NotFinite, OutputConflict, ResourceExhausted
from padseg.exports import FORMATS, write_label_map, write_masks
from padseg.images import Found, ImageError, decode_apart
from padseg.run.job import Job, outputs, places
from padseg.run.records import Entry
from padseg.system.files import FULL, inside, remove

if TYPE_CHECKING:
    from padseg.methods.options import ViewOptions
    from padseg.types import Array, Image, LabelMap, TokenMaps

LONGEST = 500  # characters of a reason; torch's messages can include a C++ stack trace
SIZED = {'labels': write_label_map, 'masks': write_masks}  # are as large as the picture, of which what is segmented may be a reduced copy
MEMORY = 'not enough memory: try --shrink, a smaller --side or --batch, or fewer --workers'
log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """A picture that was read, with its results so far. image: None if it failed; maps, labels: None until they are made.

    void: (H, W) bool, pixels to leave unassigned, or None.
    """

    entry: Entry
    image: Image | None
    void: Array | None = None
    maps: TokenMaps | None = None
    labels: LabelMap | None = None


class OutOfMemory(ImageError):
    """A picture that does not fit in memory even on its own."""


class Stages(NamedTuple):
    """What a job does with pictures.

    maps: computes the token maps of a batch of pictures that have not failed so far, and marks those that fail now. labels: turns one
    picture's maps into a label map, without the model.
    """

    maps: Callable[[list[Taken]], list[Taken]]
    labels: Callable[[Image, Any], LabelMap]


def take(job: Job, picture: Found, stopped: Callable[[], bool] = lambda: False) -> Taken:
    """Read a picture and start its record. stopped: returns True once the picture is no longer wanted, which fails it."""
    began = time.perf_counter()
    entry = Entry(input=picture.name, status='failed')
    image = void = None

    def known(size: int, digest: str) -> None:
        entry.bytes, entry.sha256 = size, digest

    try:
        entry.modified = picture.path.stat().st_mtime_ns
        image, void, size, notes = decode_apart(picture.path, job.reading, picture.frame, known, stopped)
        entry.size = size if job.reading.reduce > 1 else (image.shape[0], image.shape[1])
        entry.reduced_from = None if size == entry.size else size
        entry.notes = list(notes)
        for note in notes:
            if note.startswith('first of'):  # the remaining frames are left out
                log.warning('%s: %s', picture.name, note)
    except Exception as error:
        fail(entry, error)
        image = None
    entry.stages['decode'] = round(time.perf_counter() - began, 4)
    return Taken(entry, image, void)


def mapped(stages: Stages, taken: list[Taken]) -> Iterator[Taken]:
    """Yield the pictures of a batch with their token maps."""
    good = [picture for picture in taken if picture.image is not None]
    began = time.perf_counter()
    made = iter(stages.maps(good) if good else ())
    share = round((time.perf_counter() - began) / max(1, len(good)), 4)
    for picture in taken:
        if picture.image is not None:
            picture.entry.stages['segment'] = share
        yield picture if picture.image is None else next(made)


def labelled(stages: Stages, taken: Taken) -> Taken:
    """Make a picture's label map; if that fails, mark the picture as failed."""
    if taken.image is None:
        return taken
    from padseg.methods.stages.labels import unassign

    began = time.perf_counter()
    try:
        labels = stages.labels(taken.image, taken.maps)
        if taken.void is not None:
            labels = unassign(labels, taken.void)
    except Exception as error:
        fail(taken.entry, error)
        return taken._replace(image=None, maps=None)
    taken.entry.stages['labels'] = round(time.perf_counter() - began, 4)
    return taken._replace(labels=labels)


def by_method(forward: Callable[..., Sequence[Any]], taken: list[Taken], sized: bool = False) -> list[Taken]:
    """Compute the token maps of a batch. If that raises an error, halve the batch and retry, so that only the picture at fault fails.

    sized: whether the method needs the sizes of the files' pictures, of which those here may be reduced copies.
    """
    images = [picture.image for picture in taken if picture.image is not None]
    names = [picture.entry.input for picture in taken if picture.image is not None]
    try:
        sizes = {'sizes': [picture.entry.size for picture in taken if picture.image is not None]} if sized else {}
        maps = forward(images, names=names, **sizes)
    except Exception as error:
        if len(taken) == 1:
            alone = OutOfMemory('out of memory with this picture alone: try a smaller --side') if of_memory(error) else error
            fail(taken[0].entry, alone)
            return [taken[0]._replace(image=None)]
        if is_of_run(error):
            raise
        if of_memory(error) or isinstance(error, NotFinite):
            log.warning('%s with %d pictures at once: trying half as many', 'out of memory' if of_memory(error) else error, len(taken))
    else:
        return [picture._replace(maps=own) for picture, own in zip(taken, maps, strict=True)]
    half = len(taken) // 2  # after the except block, whose traceback would keep the failed pass in memory
    return by_method(forward, taken[:half], sized) + by_method(forward, taken[half:], sized)


def of_memory(error: Exception) -> bool:
    """Whether this is an out-of-memory error of Python, NumPy or torch, on the host or the device."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or 'DefaultCPUAllocator' in str(error)


def by_maps(
    out: Path, known: dict[str, str | None], options: ViewOptions, taken: list[Taken], shares: bool = True, halved: bool = False
) -> list[Taken]:
    """Read the maps of a batch that the run in `out` kept. Pictures without maps, or that differ from the ones mapped, fail.

    shares, halved: as for `maps_of_picture`.
    """
    from padseg.methods.stages.saved_maps import maps_of_picture

    mapped_pictures = []
    for picture in taken:
        assert picture.image is not None
        height, width = picture.image.shape[:2]
        try:
            if known.get(picture.entry.input) != picture.entry.sha256:
                raise ImageError('there are no token maps for this picture: run the model with --save-maps')
            maps = maps_of_picture(inside(out, f'maps/{picture.entry.input}.npz'), (height, width), options, shares, halved)
        except (ImageError, OutputConflict) as error:
            fail(picture.entry, ImageError(str(error)))
            mapped_pictures.append(picture._replace(image=None))
        else:
            mapped_pictures.append(picture._replace(maps=maps))
    return mapped_pictures


def save(job: Job, taken: Taken) -> Entry:
    """Write a picture's results, or remove those of a failed one, and return its complete record. Raises OSError if the disk is full."""
    entry, image, _, maps, labels = taken
    if image is not None and labels is not None:
        began = time.perf_counter()
        try:
            write_results(job, entry, image, maps, labels)
        except Exception as error:
            fail(entry, error)
        entry.stages['write'] = round(time.perf_counter() - began, 4)
    if entry.status == 'failed':
        discard(job, places(entry.input))
    entry.seconds = round(sum(entry.stages.values()), 4)
    return entry


def write_results(job: Job, entry: Entry, image: Image, maps: TokenMaps | None, labels: LabelMap) -> None:
    places = outputs(entry.input, job)
    for name, path in places.items():
        if name in SIZED:
            SIZED[name](labels, job.out / path, entry.size)
        elif name != 'maps':
            FORMATS[name].write(image, labels, job.out / path)
        elif maps is not None:
            from padseg.methods.stages.saved_maps import write_maps

            write_maps(maps, job.out / path)
    entry.regions = count_regions(labels)
    entry.outputs = places
    entry.status = 'done'


def count_regions(labels: LabelMap) -> int:
    """Number of regions, or of classes in the picture."""
    if not labels.names:
        return int(labels.labels.max())
    import numpy as np

    return int(np.count_nonzero(np.bincount(labels.labels.ravel())[1:]))


def discard(job: Job, results: Mapping[str, str]) -> None:
    """Remove results that a picture's record no longer names, so that nothing takes them for results of this run."""
    for kind, place in results.items():
        path = job.out / place
        with contextlib.suppress(OSError):  # such as a name too long to have been written
            if kind == 'masks' or path.is_symlink() or not path.is_dir():  # x.png.png may be the folder of other label maps
                remove(path)


def fail(entry: Entry, error: Exception) -> None:
    """Record that a picture failed, and why. An error that concerns the whole run is raised again."""
    if is_of_run(error):
        raise error
    log.debug('%s failed', entry.input, exc_info=error)
    if isinstance(error, MemoryError):
        error = OutOfMemory(MEMORY)
    entry.status = 'failed'
    entry.error = type(error).__name__
    entry.reason = (error.strerror if isinstance(error, OSError) else None) or shortened(str(error)) or entry.error


def is_of_run(error: Exception) -> bool:
    """Whether an error concerns the whole run: a full disk, an unusable model, or an output folder in conflict."""
    return isinstance(error, (ModelUnavailable, OutputConflict, ResourceExhausted)) or (isinstance(error, OSError) and error.errno in FULL)


def shortened(reason: str) -> str:
    """The reason on one line, cut off after LONGEST characters."""
    line = ' '.join(reason.split())
    return line if len(line) <= LONGEST else f'{line[:LONGEST]} …'
