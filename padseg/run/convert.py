"""Convert a run's stored results to other tools' formats; no model is needed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from padseg.errors import NoImages, UnreadableLabels, UsageError
from padseg.exports import CONVERTERS, read_label_map
from padseg.exports.regions import LabelledPicture, Place
from padseg.images import ImageError, file_and_frame
from padseg.run.job import settings_from
from padseg.run.locks import all_records
from padseg.run.records import Entry, Run, entry_of, read_run
from padseg.system.files import NAME_FAULTS, full_disk, sweep

if TYPE_CHECKING:
    from padseg.types import Array


class Converted(NamedTuple):
    """The result of a conversion. pictures: number written to `folder`; failed: the others, with reasons."""

    folder: Path
    pictures: int
    failed: dict[str, str]


def convert(out: Path, format: str, folder: Path | None = None, images: Path | None = None) -> Converted:
    """Write the finished pictures of the run in `out` in one of CONVERTERS; pictures that fail are reported and the others continue.

    folder: destination, by default inside `out`; images: where the pictures are now, by default where the run found them. Raises NoImages
    if `out` has no finished pictures or `images` does not exist, UsageError for an unknown format or if `folder` is `out`.
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
    place = place_of(out, run, done, folder or out / converter.FOLDER, images)
    for path in {place.folder, *((place.folder / part / name).parent for part in converter.PARTS for name in place.names)}:
        sweep(path)
    failed = {}
    with full_disk(place.folder), converter.writer(place) as add:
        for number, entry in enumerate(map(entry_of, done.values()), start=1):
            try:
                if converter.BESIDE:
                    refuse_other_size(entry, place)
                add(LabelledPicture(number, entry.input, entry.sha256, stored_label_map(out, entry)))
            except (UnreadableLabels, ImageError) as error:
                failed[entry.input] = str(error)
            except OSError as error:
                if error.errno not in NAME_FAULTS:
                    raise
                failed[entry.input] = f'{error.filename}: {error.strerror}'
    return Converted(place.folder, len(done) - len(failed), failed)


def write_coco(out: Path) -> dict[str, str]:
    """Write OUT/coco for a run: instances.json, panoptic.json and its PNGs. Returns the pictures that failed, with reasons."""
    return convert(out, 'coco').failed | convert(out, 'coco-panoptic').failed


def place_of(out: Path, run: Run, done: Collection[str], folder: Path, images: Path | None) -> Place:
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
        names=tuple(done),
        classes=settings.classes,
        made_by=made_by(run, settings.method_name),
    )


def made_by(run: Run, method: str) -> dict[str, str | None]:
    """What made the label maps: the model, or the method if it needs none."""
    if run.model is None:
        return {'version': run.padseg, 'method': method}
    return {'version': run.padseg, 'model': run.model.model, 'revision': run.model.revision, 'weights': run.model.weights}


def refuse_other_size(entry: Entry, place: Place) -> None:
    """Raise ImageError for a label map that does not fit the picture's file as other programs open it."""
    if entry.reduced_from:
        raise ImageError('it was reduced: its label map is smaller than its file')
    if place.reading.exif != 'apply':
        raise ImageError('it was not turned upright, as other programs show it')
    if file_and_frame(entry.input)[0] != entry.input:
        raise ImageError('it is a frame of a file')


def stored_label_map(out: Path, entry: Entry) -> Array:
    """Read the label map (H, W) of a finished picture. UnreadableLabels if it is missing, damaged or differs in size from the picture."""
    path = out / entry.outputs['labels']
    if not path.is_file():
        raise UnreadableLabels(path, 'missing')
    labels = read_label_map(path)
    if labels.shape != entry.size:
        raise UnreadableLabels(path, 'differs in size from its picture')
    return labels
