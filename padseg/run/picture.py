"""The stages of a picture in a run: read the file, compute token maps, make the label map, write results."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.errors import NotFinite
from padseg.exports import FORMATS
from padseg.images import Found, ImageError, contents, decode_with_notes
from padseg.run.job import Job, outputs
from padseg.run.records import Entry
from padseg.system.files import NAME_FAULTS

if TYPE_CHECKING:
    from padseg.types import Array, Image, LabelMap, TokenMaps

log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """A picture that was read, and what is known about it so far. image: None if it failed; maps, labels: what was found in it.

    void: (H, W) bool, pixels to leave unassigned, or None.
    """

    entry: Entry
    image: Image | None
    void: Array | None = None
    maps: TokenMaps | None = None
    labels: LabelMap | None = None


class OutOfMemory(ImageError):
    """A picture that by itself exceeds the device's memory."""


class Stages(NamedTuple):
    """What a job does with pictures.

    maps: computes token maps of a batch, none of which has failed before; pictures that fail now are marked. labels: turns one picture's
    maps into a label map, without the model.
    """

    maps: Callable[[list[Taken]], list[Taken]]
    labels: Callable[[Image, Any], LabelMap]


def take(job: Job, picture: Found) -> Taken:
    """Read a picture and start its record."""
    began = time.perf_counter()
    entry = Entry(input=picture.name, status='failed')
    image = void = None
    try:
        entry.modified = picture.path.stat().st_mtime_ns
        data = contents(picture.path, job.reading)
        entry.bytes = len(data)
        entry.sha256 = hashlib.sha256(data).hexdigest()
        image, void, size, notes = decode_with_notes(data, job.reading, picture.frame)
        entry.size = (image.shape[0], image.shape[1])
        entry.reduced_from = None if size == entry.size else size
        entry.notes = list(notes)
        for note in notes:
            if note.startswith('first of'):  # the remaining frames are left out
                log.warning('%s: %s', picture.name, note)
    except (ImageError, OSError) as error:
        fail(entry, error)
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
    """Add a picture's label map; a failed picture is returned unchanged."""
    if taken.image is None:
        return taken
    from padseg.methods.stages.labels import unassign

    began = time.perf_counter()
    labels = stages.labels(taken.image, taken.maps)
    taken.entry.stages['labels'] = round(time.perf_counter() - began, 4)
    return taken._replace(labels=labels if taken.void is None else unassign(labels, taken.void))


def by_method(forward: Callable[[Sequence[Image]], Sequence[Any]], taken: list[Taken]) -> list[Taken]:
    """Compute token maps of a batch with `forward`, halving the batch if memory runs out or attention is not finite.

    A picture for which this happens alone has failed.
    """
    images = [picture.image for picture in taken if picture.image is not None]
    try:
        maps = forward(images)
    except RuntimeError as error:
        memory = of_memory(error)
        if not memory and not isinstance(error, NotFinite):
            raise
        if len(taken) == 1:
            fail(taken[0].entry, OutOfMemory('out of memory, alone in its batch: try a smaller --side') if memory else error)
            return [taken[0]._replace(image=None)]
        log.warning('%s with %d pictures at once: trying half as many', 'out of memory' if memory else error, len(taken))
        half = len(taken) // 2
        return by_method(forward, taken[:half]) + by_method(forward, taken[half:])
    return [picture._replace(maps=own) for picture, own in zip(taken, maps, strict=True)]


def of_memory(error: Exception) -> bool:
    """Return whether torch reports that the device's memory is full."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def by_maps(folder: Path, known: dict[str, str | None], taken: list[Taken]) -> list[Taken]:
    """Load a batch's stored token maps. A picture without them, or that changed since they were made, has failed."""
    from padseg.methods.stages.saved_maps import read_maps

    mapped_pictures = []
    for picture in taken:
        maps = read_maps(folder / f'{picture.entry.input}.npz')
        if maps is None or known.get(picture.entry.input) != picture.entry.sha256:
            fail(picture.entry, ImageError('there are no token maps for this picture: run the model with --save-maps'))
            mapped_pictures.append(picture._replace(image=None))
        else:
            mapped_pictures.append(picture._replace(maps=maps))
    return mapped_pictures


def save(job: Job, taken: Taken) -> Entry:
    """Write a picture's results and return its complete record. OSError for problems that are not specific to this picture."""
    entry, image, _, maps, labels = taken
    if image is not None and labels is not None:
        began = time.perf_counter()
        try:
            write_results(job, entry, image, maps, labels)
        except (ImageError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NAME_FAULTS:
                raise
            fail(entry, error)
        entry.stages['write'] = round(time.perf_counter() - began, 4)
    entry.seconds = round(sum(entry.stages.values()), 4)
    return entry


def write_results(job: Job, entry: Entry, image: Image, maps: TokenMaps | None, labels: LabelMap) -> None:
    from padseg.methods.stages.saved_maps import write_maps

    places = outputs(entry.input, job)
    for name, path in places.items():
        if name != 'maps':
            FORMATS[name].write(image, labels, job.out / path)
        elif maps is not None:
            write_maps(maps, job.out / path)
    entry.regions = count_regions(labels)
    entry.outputs = places
    entry.status = 'done'


def count_regions(labels: LabelMap) -> int:
    """Number of regions, or of classes that the picture shows."""
    if not labels.names:
        return int(labels.labels.max())
    import numpy as np

    return int(np.count_nonzero(np.bincount(labels.labels.ravel())[1:]))


def fail(entry: Entry, error: Exception) -> None:
    entry.error = type(error).__name__
    entry.reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
