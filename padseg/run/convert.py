"""Convert a run's stored results to other tools' formats; no model is needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from padseg.errors import NoImages, UnreadableLabels, UsageError
from padseg.exports import CONVERTERS, FORMATS, Converter, read_label_map
from padseg.exports.regions import LabelledPicture, Place
from padseg.images import ImageError, file_and_frame
from padseg.run.job import settings_from
from padseg.run.locks import all_records
from padseg.run.records import Entry, Run, entry_of, read_run
from padseg.system.files import NAME_FAULTS, full_disk, inside, sweep, together

if TYPE_CHECKING:
    from padseg.types import Array


class Converted(NamedTuple):
    """The result of a conversion. pictures: number written to `folder`; failed: the others, with reasons."""

    folder: Path
    pictures: int
    failed: dict[str, str]


def convert(out: Path, format: str, folder: Path | None = None, images: Path | None = None) -> Converted:
    """Write the done pictures of the run in `out` with one of CONVERTERS. A picture that fails or is gone is named, and the others go on.

    folder: where to, by default inside `out`; images: where the pictures are now, by default where the run found them.
    Raises NoImages if `out` has no done picture or `images` does not exist, UsageError for an unknown format or if `folder` is `out`, and,
    before anything is written, OutputConflict for records that no run writes and for links in place of results.
    """
    if format not in CONVERTERS:
        raise UsageError(f'unknown format {format}; known: {", ".join(CONVERTERS)}')
    run = read_run(out / 'run.json')
    if run is None:
        raise NoImages(f'there are no results of `padseg run` in {out}')
    done = {name: record for name, record in sorted(all_records(out).items()) if record.status == 'done'}
    if not done:
        raise NoImages(f'no picture is done in {out}: see failures.jsonl there')
    converter = CONVERTERS[format]
    place = place_of(out, run, tuple(done), folder or inside(out, converter.FOLDER), images)
    parents = parents_of(place, converter)
    for name in done:
        stored_path(out, name)
    failed = {}
    with (
        full_disk(place.folder),
        together(place.folder, lambda: sweep_all(parents)),
        converter.writer(place) as add,
    ):
        for number, entry in enumerate(map(entry_of, done.values()), start=1):
            try:
                refuse_gone(entry, place)
                if converter.BESIDE:
                    refuse_other_size(entry, place)
                labels = stored_label_map(out, entry, len(place.classes))
                height, width = entry.reduced_from or labels.shape
                add(LabelledPicture(number, entry.input, entry.sha256, labels, height * width))
            except (UnreadableLabels, ImageError) as error:
                failed[entry.input] = str(error)
            except OSError as error:
                if error.errno not in NAME_FAULTS:
                    raise
                failed[entry.input] = f'{error.filename}: {error.strerror}'
    return Converted(place.folder, len(done) - len(failed), failed)


def parents_of(place: Place, converter: Converter) -> set[Path]:
    """The folders that files are written to. Raises OutputConflict if a link leads to one."""
    parts = [f'{part}/{name}'.lstrip('/') for part in converter.PARTS for name in place.names]
    return {place.folder, *(inside(place.folder, path, linked=True).parent for path in parts)}


def sweep_all(folders: Iterable[Path]) -> None:
    for folder in folders:
        sweep(folder)


def write_coco(out: Path) -> dict[str, str]:
    """Write OUT/coco for a run: instances.json, panoptic.json and its PNGs. Returns the pictures that failed, with reasons."""
    return convert(out, 'coco').failed | convert(out, 'coco-panoptic').failed


def place_of(out: Path, run: Run, names: tuple[str, ...], folder: Path, images: Path | None) -> Place:
    if folder.resolve() == out.resolve():
        raise UsageError(f'the files would mix with those of the run in {out}: choose another --out')
    if images and not images.exists():
        raise NoImages(f'there is no folder {images}')
    source = images or Path(run.source)
    settings = settings_from(run.settings)
    return Place(
        folder=folder,
        own=folder.resolve().is_relative_to(out.resolve()),
        images=source.parent if source.is_file() else source,
        reading=settings.reading,
        names=names,
        classes=settings.classes,
        made_by=made_by(run, settings.method_name),
    )


def made_by(run: Run, method: str) -> dict[str, str | None]:
    """What made the label maps: the model, or the method if it needs none."""
    if run.model is None:
        return {'version': run.padseg, 'method': method}
    return {'version': run.padseg, 'model': run.model.model, 'revision': run.model.revision, 'weights': run.model.weights}


def refuse_gone(entry: Entry, place: Place) -> None:
    """Raise ImageError for a picture that no longer exists, unless the whole folder of pictures is gone."""
    path = place.images / file_and_frame(entry.input)[0]
    if not os.path.lexists(path) and place.images.is_dir():
        raise ImageError(f'cannot read {path}: {os.strerror(errno.ENOENT)} (--images says where the pictures are)')


def refuse_other_size(entry: Entry, place: Place) -> None:
    """Raise ImageError for a label map that does not fit the picture's file as other programs open it."""
    if entry.reduced_from:
        raise ImageError('it was reduced: its label map is smaller than its file')
    if place.reading.exif != 'apply':
        raise ImageError('it was not turned upright, as other programs show it')
    if file_and_frame(entry.input)[0] != entry.input:
        raise ImageError('it is a frame of a file')


def stored_path(out: Path, name: str) -> Path:
    """Where the label map of a picture is."""
    return inside(out, f'labels/{name}{FORMATS["labels"].SUFFIX}')


def stored_label_map(out: Path, entry: Entry, classes: int) -> Array:
    """Read the label map (H, W) of a done picture. Raises UnreadableLabels if it is missing, damaged, of another size than the picture, or
    has a number above `classes`, unless that is 0."""
    path = stored_path(out, entry.input)
    if not path.is_file():
        raise UnreadableLabels(path, 'missing')
    labels = read_label_map(path, entry.size)
    if classes and int(labels.max()) > classes:
        raise UnreadableLabels(path, f'has the number {int(labels.max())}, but there are {classes} classes')
    return labels
