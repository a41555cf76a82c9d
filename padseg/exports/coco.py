"""A run as one data set in COCO's form: instances.json with a run-length mask for each region."""

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
    """Write instances.json; ids of annotations are unique over the file."""
    numbers = itertools.count(1)
    with annotated(place.folder / FILE, place, categories(place)) as add:
        yield lambda picture: add(
            picture, (annotation(region, place.category(region), picture, next(numbers)) for region in each_region(picture.labels))
        )


def categories(place: Place) -> list[dict[str, Any]]:
    """What regions can be, all of one category if they have no classes."""
    return [{'id': number, 'name': name, 'supercategory': ''} for number, name in enumerate(place.categories, start=1)]


def annotation(region: Region, category: int, picture: LabelledPicture, number: int) -> dict[str, Any]:
    """A region as COCO has it: its mask as run lengths down the columns, in pycocotools' letters."""
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
    """Write a file of COCO's outline, complete or not at all, with the annotations as they come; what is yielded adds a picture's."""
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
