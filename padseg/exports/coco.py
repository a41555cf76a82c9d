"""Export a run as a COCO data set: instances.json with a run-length mask for each region."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask

from padseg.exports.regions import Add, LabelledPicture, Place, Region, each_region
from padseg.system.files import atomic

FOLDER = 'coco'
PARTS: tuple[str, ...] = ()
BESIDE = False
FILE = 'instances.json'


@contextlib.contextmanager
def writer(place: Place) -> Iterator[Add]:
    """Write instances.json; annotation ids are unique within the file."""
    numbers = itertools.count(1)
    with annotated(place.folder / FILE, place, categories(place)) as add:
        yield lambda picture: add(
            picture, (annotation(region, place.category(region), picture, next(numbers)) for region in each_region(picture.labels))
        )


def categories(place: Place) -> list[dict[str, Any]]:
    """COCO categories of regions; only one if there are no classes."""
    return [{'id': number, 'name': name, 'supercategory': ''} for number, name in enumerate(place.categories, start=1)]


def annotation(region: Region, category: int, picture: LabelledPicture, number: int) -> dict[str, Any]:
    """A region as a COCO annotation, its mask in pycocotools' compressed run-length encoding (column-major)."""
    runs = mask.encode(region.mask.astype(np.uint8, order='F'))
    return {
        'id': number,
        'image_id': picture.number,
        'category_id': category,
        'segmentation': {'size': list(picture.labels.shape), 'counts': runs['counts'].decode('ascii')},
        'area': region.area,
        'bbox': list(region.box),
        'iscrowd': 0,
    }


@contextlib.contextmanager
def annotated(
    path: Path, place: Place, categories: list[dict[str, Any]]
) -> Iterator[Callable[[LabelledPicture, Iterable[dict[str, Any]]], None]]:
    """Write a file in COCO's format atomically, with annotations as they come; the yielded function adds the annotations of one picture."""
    images: list[str] = []
    head = {'info': {'description': 'regions found by padseg', **place.made_by}, 'licenses': [], 'categories': categories}
    with atomic(path) as temporary, temporary.open('w', encoding='ascii') as file:
        file.write(json.dumps(head)[:-1] + ', "annotations": [')
        separators = itertools.chain(['\n'], itertools.repeat(',\n'))

        def add(picture: LabelledPicture, annotations: Iterable[dict[str, Any]]) -> None:
            height, width = picture.labels.shape
            images.append(json.dumps({'id': picture.number, 'file_name': picture.name, 'width': width, 'height': height}))
            for row in annotations:
                file.write(next(separators) + json.dumps(row))

        yield add
        file.write('\n], "images": [\n' + ',\n'.join(images) + '\n]}\n')
