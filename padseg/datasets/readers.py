"""Read label files as raw values (H, W), one reader per format. Nothing is converted, so a palette PNG keeps its indices."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

from padseg.datasets.base import Sample
from padseg.datasets.mat import mat_matrices
from padseg.datasets.segments import mask_labels
from padseg.errors import UnreadableLabels
from padseg.exports.png import png_pixels, read_label_map
from padseg.images import MAX_PIXELS, ImageError, Reading, contents

if TYPE_CHECKING:
    from padseg.types import Array

NO_RECORD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what JSON of another form raises
COLOURS = 1 << 24
LONGEST = 1 << 33  # bytes of annotations; those of PASCAL in Detail take much of one gigabyte
FIRST, LAST, MORE, SIGN = 48, 48 + 63, 0x20, 0x10  # bytes of run lengths in COCO's form; the bits for `another one follows` and for minus
LETTERS = 6  # of a number after its first: more than any picture needs


class Reader(Protocol):
    """Reads the raw values of every annotator of a picture, (H, W) integers >= 0; annotations: a JSON file that some readers need.

    Raises UnreadableLabels.
    """

    def __call__(self, sample: Sample, annotations: Path) -> tuple[Array, ...]: ...


def refuse_labels(path: Path, reason: str) -> NoReturn:
    raise UnreadableLabels(path, reason)


def png_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """One PNG per annotator."""
    return tuple(map(read_label_map, sample.truths))


def context_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """PASCAL Context's MATLAB file: one matrix `LabelMap`."""
    return mat_matrices(sample.truths[0], 'LabelMap')


def bsds_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """BSDS500's MATLAB file: a cell array `groundTruth` with a structure an annotator, its matrix `Segmentation` among others."""
    return mat_matrices(sample.truths[0], 'groundTruth', 'Segmentation')


def panoptic_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """COCO's panoptic PNG, whose colours encode segment numbers, as the segments' categories; 0 for no segment."""
    path = sample.truths[0]
    segments = panoptic_segments(annotations).get(path.name)
    if segments is None:
        refuse_labels(path, f'not among the annotations of {annotations}')
    known = np.array(sorted({0: 0, **segments}.items()), np.int64)  # (segments, 2): number, category
    places = segment_places(path, known[:, 0], annotations)
    return (known[places, 1],)


def segment_places(path: Path, numbers: Array, annotations: Path, size: tuple[int, int] | None = None) -> Array:
    """For each pixel of a panoptic PNG, where its segment's number stands in the sorted `numbers`: (H, W).

    size: (H, W) that the PNG has to have. Raises UnreadableLabels for a number that is not among them.
    """
    colours, _ = png_pixels(path, ('RGB',), 'a panoptic PNG is RGB', size)  # (H, W, 3)
    seen = colours.astype(np.int32) @ np.array([1, 256, 256 * 256], np.int32)  # (H, W)
    places = np.searchsorted(numbers, seen).clip(max=len(numbers) - 1)
    strange = seen[numbers[places] != seen]
    if strange.size:
        refuse_labels(path, f'segment {strange[0]} is not in {annotations}')
    return places


@functools.lru_cache(maxsize=2)
def panoptic_segments(annotations: Path) -> dict[str, dict[int, int]]:
    """Read COCO's panoptic annotations: for each file, the category of each segment."""
    try:
        return {
            annotation['file_name']: {number(segment['id']): number(segment['category_id']) for segment in annotation['segments_info']}
            for annotation in read_annotations(annotations)['annotations']
        }
    except NO_RECORD as error:
        refuse_labels(annotations, f'not panoptic annotations in COCO format: {error!r}')


def number(value: Any) -> int:
    """What a colour of 24 bits can say. ValueError for anything else."""
    if not 0 <= int(value) < COLOURS:
        raise ValueError(f'number {value}')
    return int(value)


class Painting(NamedTuple):
    """A picture's labels as regions (category, run lengths), in painting order."""

    phase: str
    height: int
    width: int
    regions: list[tuple[int, Any]]


def detail_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """PASCAL in Detail's annotations as categories, later regions on top of earlier ones; 0 for no region."""
    from pycocotools import mask

    painting = detail_paintings(annotations)[sample.name]
    size = painting.height, painting.width
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        refuse_labels(annotations, f'{sample.name} has size {size} (height, width); allowed are up to {MAX_PIXELS} pixels')
    labels = np.zeros(size, np.int32)
    for category, runs in painting.regions:
        try:
            own = tuple(runs['size'])
            region = mask.decode({'size': size, 'counts': whole_counts(runs['counts'], size[0] * size[1])}) if own == size else None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            refuse_labels(annotations, f'damaged region in {sample.name}: {error!r}')
        if region is None:
            refuse_labels(annotations, f'a region of {sample.name} has size {own}, the picture {size} (height, width)')
        labels[region.astype(bool)] = category
    return (labels,)


def whole_counts(counts: str, pixels: int) -> bytes:
    """Run lengths in COCO's form of a mask of so many pixels. ValueError for others: pycocotools would read memory that is not theirs."""
    letters = np.frombuffer(counts.encode('ascii'), np.uint8)
    if not len(letters) or letters.min() < FIRST or letters.max() > LAST or (letters[-1] - FIRST) & MORE:
        raise ValueError('no run lengths')
    lengths = run_lengths(letters)
    if lengths.min() < 0 or lengths.sum() != pixels:
        raise ValueError(f'run lengths of {lengths.sum()} pixels in all for a mask of {pixels}')
    return letters.tobytes()


def run_lengths(letters: Array) -> Array:
    """Unpack run lengths: five bits a letter, lowest first and signed; from the fourth number on, what it exceeds the last but one by."""
    bits = letters.astype(np.int64) - FIRST
    last = bits & MORE == 0
    starts = np.flatnonzero(np.concatenate(([True], last[:-1])))
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, np.diff(starts, append=len(bits))))
    if shifts.max() > 5 * LETTERS:
        raise ValueError('no run lengths')
    numbers = np.add.reduceat((bits & MORE - 1) << shifts, starts)
    numbers -= np.where(bits[last] & SIGN, 1 << shifts[last] + 5, 0)
    for first in (1, 2):
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers


@functools.lru_cache(maxsize=1)
def detail_paintings(annotations: Path) -> dict[str, Painting]:
    """Read a file in PASCAL in Detail's format: its pictures, by name."""
    try:
        content = read_annotations(annotations)
        paintings = {
            image['image_id']: (Path(image['file_name']).stem, Painting(image['phase'], int(image['height']), int(image['width']), []))
            for image in content['images']
        }
        for region in content['annos_segmentation']:
            paintings[region['image_id']][1].regions.append((int(region['category_id']), region['segmentation']))
    except NO_RECORD as error:
        refuse_labels(annotations, f'not annotations in the format of PASCAL in Detail: {error!r}')
    return dict(paintings.values())


def read_annotations(path: Path, longest: int = LONGEST) -> Any:
    """Parse a JSON file of at most so many bytes. Raises UnreadableLabels."""
    try:
        return json.loads(contents(path, Reading(max_bytes=longest)))
    except (ImageError, OSError, ValueError, RecursionError) as error:
        refuse_labels(path, f'not valid JSON: {error}')


READERS: dict[str, Reader] = {
    'png': png_labels,
    'context': context_labels,
    'bsds': bsds_labels,
    'panoptic': panoptic_labels,
    'detail': detail_labels,
    'segments': mask_labels,
}
