"""Export a run in COCO's panoptic format: panoptic.json, and one PNG per picture whose colours encode region numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from padseg.exports.coco import annotated, categories
from padseg.exports.colours import voc_colours
from padseg.exports.regions import Add, LabelledPicture, Place, Region, each_region
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array

FOLDER = 'coco'
FILE = 'panoptic.json'
PARTS: tuple[str, ...] = ('panoptic',)
BESIDE = False
COLOUR = [220, 20, 60]  # of regions without classes


@contextlib.contextmanager
def writer(place: Place) -> Iterator[Add]:
    """Write panoptic.json and panoptic/<name>.png."""
    with annotated(place.folder / FILE, place, coloured(place)) as annotate:

        def add(picture: LabelledPicture) -> None:
            name = f'{picture.name}.png'
            segments = [segment_info(region, place.category(region)) for region in each_region(picture.labels)]
            with atomic(place.folder / PARTS[0] / name) as temporary:
                temporary.write_bytes(cv2.imencode('.png', coded(picture.labels))[1].tobytes())
            annotate(picture, [{'image_id': picture.number, 'file_name': name, 'segments_info': segments}])

        yield add


def coloured(place: Place) -> list[dict[str, Any]]:
    """Categories with the colours that their classes have in label maps."""
    colours = voc_colours(len(place.classes) + 1)[1:].tolist() or [COLOUR]
    return [{**category, 'isthing': 1, 'color': colour} for category, colour in zip(categories(place), colours, strict=True)]


def segment_info(region: Region, category: int) -> dict[str, Any]:
    """A region's entry in segments_info; its id is its number in the label map."""
    return {'id': region.number, 'category_id': category, 'area': region.area, 'bbox': list(region.box), 'iscrowd': 0}


def coded(labels: Array) -> Array:
    """Encode labels as (H, W, 3) uint8 in OpenCV's BGR order, with red + 256 green + 65536 blue = region; 0 is void."""
    wide = labels.astype(np.uint32)
    return np.stack([wide >> 16 & 255, wide >> 8 & 255, wide & 255], -1).astype(np.uint8)
