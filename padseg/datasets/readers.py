"""Read label files as raw values (H, W), one reader per format. Nothing is converted, so a palette PNG keeps its indices."""

from __future__ import annotations

import functools
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

from padseg.datasets.base import Sample
from padseg.errors import UnreadableLabels
from padseg.exports.png import png_pixels, read_label_map
from padseg.images import DAMAGE

if TYPE_CHECKING:
    from padseg.types import Array

MAT_HEADER, MAT_TAG, MAT_COMPRESSED = 128, 8, 15  # bytes, bytes, and the type of a compressed element


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
    """PASCAL Context's MATLAB files: one matrix `LabelMap`."""
    path = sample.truths[0]
    return (label_matrix(path, mat_variable(path, 'LabelMap')),)


def bsds_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """BSDS500's MATLAB files: a cell array `groundTruth` with one structure per annotator, which holds a matrix `Segmentation`."""
    path = sample.truths[0]
    cells = mat_variable(path, 'groundTruth').ravel()
    try:
        matrices = [cell['Segmentation'].item() for cell in cells]
    except (AttributeError, IndexError, TypeError, ValueError):
        refuse_labels(path, 'groundTruth is not a cell array of structures with a Segmentation')
    if not matrices:
        refuse_labels(path, 'groundTruth is empty')
    return tuple(label_matrix(path, matrix) for matrix in matrices)


def mat_variable(path: Path, name: str) -> Array:
    """Read one variable of a MATLAB file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # scipy warns about oddities that it can read
        try:
            inflate(path.read_bytes())
            variables = loadmat(path, variable_names=[name])
        except NotImplementedError:
            refuse_labels(path, 'a MATLAB file of version 7.3, which padseg cannot read: save it as version 7 or older')
        except (*DAMAGE, MatReadError) as error:
            refuse_labels(path, f'not a MATLAB file, or a damaged one: {error}')
    if name not in variables:
        refuse_labels(path, f'holds no {name}')
    return np.asarray(variables[name])


def inflate(data: bytes) -> None:
    """Decompress the parts of a MATLAB file of version 5 to 7 to verify their checksums. Raises one of DAMAGE if they are wrong.

    scipy uses bytes before verifying their checksum, and damaged ones can crash the process.
    """
    order = {b'IM': '<', b'MI': '>'}.get(data[MAT_HEADER - 2 : MAT_HEADER])
    place = MAT_HEADER
    while order and place < len(data):
        kind, size = struct.unpack_from(f'{order}II', data, place)
        place += MAT_TAG
        if kind == MAT_COMPRESSED:
            zlib.decompress(data[place : place + size])
        place += size


def label_matrix(path: Path, values: Any) -> Array:
    """Convert a matrix of whole numbers >= 0, stored as any type, to int32."""
    matrix = np.asarray(values)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in 'iufb':
        refuse_labels(path, f'labels are a matrix of numbers; this is {matrix.dtype} of shape {matrix.shape}')
    if not ((matrix >= 0) & (matrix <= np.iinfo(np.int32).max) & (matrix == np.floor(matrix))).all():
        refuse_labels(path, 'labels are whole numbers >= 0')
    return matrix.astype(np.int32)


def panoptic_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """COCO's panoptic PNG, whose colours encode segment numbers, as the segments' categories; 0 for no segment."""
    path = sample.truths[0]
    segments = panoptic_segments(annotations).get(path.name)
    if segments is None:
        refuse_labels(path, f'not among the annotations of {annotations}')
    colours, _ = png_pixels(path, ('RGB',), 'a panoptic PNG is RGB')  # (H, W, 3)
    numbers = colours.astype(np.int32) @ np.array([1, 256, 256 * 256], np.int32)  # (H, W)
    known = np.array(sorted({0: 0, **segments}.items()), np.int64)  # (segments, 2): number, category
    places = np.searchsorted(known[:, 0], numbers).clip(max=len(known) - 1)
    strange = numbers[known[places, 0] != numbers]
    if strange.size:
        refuse_labels(path, f'segment {strange[0]} is not in {annotations}')
    return (known[places, 1],)


@functools.lru_cache(maxsize=2)
def panoptic_segments(annotations: Path) -> dict[str, dict[int, int]]:
    """Read COCO's panoptic annotations: for each file, the category of each segment."""
    try:
        return {
            annotation['file_name']: {int(segment['id']): int(segment['category_id']) for segment in annotation['segments_info']}
            for annotation in read_annotations(annotations)['annotations']
        }
    except (KeyError, TypeError, ValueError) as error:
        refuse_labels(annotations, f'not panoptic annotations in COCO format: {error!r}')


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
    labels = np.zeros((painting.height, painting.width), np.int32)
    for category, runs in painting.regions:
        try:
            region = mask.decode(runs)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            refuse_labels(annotations, f'damaged region in {sample.name}: {error!r}')
        if region.shape != labels.shape:
            refuse_labels(annotations, f'a region of {sample.name} has size {region.shape}, the picture {labels.shape} (height, width)')
        labels[region.astype(bool)] = category
    return (labels,)


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
    except (KeyError, TypeError, ValueError) as error:
        refuse_labels(annotations, f'not annotations in the format of PASCAL in Detail: {error!r}')
    return dict(paintings.values())


def read_annotations(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        refuse_labels(path, f'not valid JSON: {error}')


READERS: dict[str, Reader] = {
    'png': png_labels,
    'context': context_labels,
    'bsds': bsds_labels,
    'panoptic': panoptic_labels,
    'detail': detail_labels,
}
