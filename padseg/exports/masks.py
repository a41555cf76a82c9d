"""Write a label map as a folder of binary PNGs with metadata.csv, in the layout of Segment Anything's automatic mask generator."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from scipy.ndimage import find_objects

from padseg.errors import UsageError
from padseg.exports.enlarged import Box, enlarged_mask, sources
from padseg.exports.png import encoded, read_label_map
from padseg.system.files import atomic
from padseg.system.text import csv_cell

if TYPE_CHECKING:
    from padseg.types import Array, Image, LabelMap

SUFFIX = ''
BOX = ('bbox_x0', 'bbox_y0', 'bbox_w', 'bbox_h')
CROP = ('crop_box_x0', 'crop_box_y0', 'crop_box_w', 'crop_box_h')
UNKNOWN = ('point_input_x', 'point_input_y', 'predicted_iou', 'stability_score')  # left empty: only prompted masks have these
ENCODING = (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)  # faster and smaller for masks
COLUMNS = ('id', 'area', *BOX, *UNKNOWN, *CROP, 'region', 'tokens')


def write(image: Image | None, labels: LabelMap, path: Path) -> None:
    """`write_masks` with an exporter's signature; the picture is not needed."""
    write_masks(labels, path)


def write_masks(labels: LabelMap, folder: Path, size: tuple[int, int] | None = None) -> None:
    """Write region k as folder/{k-1}.png, 0 or 255, with a row in metadata.csv; boxes are x, y, width, height in pixels.

    If regions are classes, only those that the picture shows are written, with their names in an extra last column. size: (H, W) of the
    masks, if larger than the label map.
    """
    height, width = size or labels.labels.shape
    text = io.StringIO()
    table = csv.DictWriter(text, (*COLUMNS, 'name') if labels.names else COLUMNS, lineterminator='\n')
    table.writeheader()
    with atomic(folder) as temporary:
        temporary.mkdir()
        for region, data, area, box in masks_of(labels.labels, (height, width)):
            (temporary / f'{region - 1}.png').write_bytes(data)
            row: dict[str, Any] = {'id': region - 1, 'area': area, 'region': region}
            row |= dict(zip(BOX, box, strict=True))
            row |= dict(zip(CROP, (0, 0, width, height), strict=True))
            tokens = labels.tokens[region - 1] if labels.tokens else ()
            row |= {'tokens': ' '.join(map(str, tokens))}
            table.writerow(row | {'name': csv_cell(labels.names[region - 1])} if labels.names else row)
        (temporary / 'metadata.csv').write_text(text.getvalue(), encoding='utf-8')


def masks_of(labels: Array, size: tuple[int, int]) -> Iterator[tuple[int, bytes, int, Box]]:
    """Yield the number of each region, its mask as a PNG of this size (H, W), its area and its box."""
    if size != labels.shape:
        places = sources(labels.shape, size)
        for region, where in enumerate(find_objects(labels), start=1):
            if where:
                yield region, *enlarged_mask(labels, region, where, places)
        return
    for region in range(1, int(labels.max()) + 1):
        mask = (labels == region).view(np.uint8)  # (H, W)
        if area := cv2.countNonZero(mask):
            mask *= 255
            yield region, encoded('.png', mask, ENCODING), area, tuple(cv2.boundingRect(mask))


def read_masks(folder: Path) -> Array:
    """Read labels (H, W) int32 from a folder written by `write_masks`. UsageError if it holds no masks or they overlap."""
    paths = sorted(folder.glob('*.png'), key=lambda path: int(path.stem))
    if not paths:
        raise UsageError(f'there is no mask in {folder}')
    masks = np.stack([read_label_map(path) > 0 for path in paths])  # (K, H, W)
    if masks.sum(0).max() > 1:
        raise UsageError(f'the masks in {folder} overlap, so they are not a label map')
    numbers = np.array([int(path.stem) + 1 for path in paths], np.int32)
    return np.tensordot(numbers, masks.astype(np.int32), axes=1)  # (H, W)
