"""Export a run as labelme files: one JSON per picture, with each region as a shape of type mask."""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from padseg.errors import UnreadableLabels
from padseg.exports.png import encoded
from padseg.exports.regions import Add, LabelledPicture, Place, Region, each_region
from padseg.system.files import atomic

FOLDER = 'labelme'
PARTS: tuple[str, ...] = ('',)
BESIDE = True
VERSION = '5.5.0'  # labelme version of this file format


@contextlib.contextmanager
def writer(place: Place) -> Iterator[Add]:
    """Write <name>.json where labelme looks for it. Outside the run's own folder, files with other content are never overwritten."""
    paths = {name: place.folder / file for name, file in file_names(place.names).items()}

    def add(picture: LabelledPicture) -> None:
        path = paths[picture.name]
        shown = os.path.relpath(os.path.join(os.path.realpath(place.images), picture.name), os.path.realpath(path.parent))
        data = (json.dumps(described(picture, shown, place), indent=2) + '\n').encode('ascii')
        if path.exists() and not place.own and not (path.is_file() and path.read_bytes() == data):
            raise UnreadableLabels(path, 'already exists with other annotations: move it away, or choose another --out')
        with atomic(path) as temporary:
            temporary.write_bytes(data)

    yield add


def file_names(names: Sequence[str]) -> dict[str, str]:
    """The file of each picture: its name with .json for the suffix; after the suffix where two pictures would share a file."""
    stems = {name: posixpath.splitext(name)[0] for name in names}
    # one rule on every system: some take a.json and A.json for the same file
    taken = collections.Counter(text.casefold() for text in (*stems.values(), *names))
    return {name: f'{stem if taken[stem.casefold()] == 1 else name}.json' for name, stem in stems.items()}


def described(picture: LabelledPicture, shown: str, place: Place) -> dict[str, Any]:
    """The file's content; shown: path of the picture relative to the file."""
    height, width = picture.labels.shape
    return {
        'version': VERSION,
        'flags': {},
        'shapes': [shape(region, place.name(region)) for region in each_region(picture.labels)],
        'imagePath': shown,
        'imageData': None,
        'imageHeight': height,
        'imageWidth': width,
    }


def shape(region: Region, name: str) -> dict[str, Any]:
    """A region as a shape. Its two points are the first and last pixel of its box, its mask the box as a PNG of 0 and 1."""
    left, top, width, height = region.box
    data = encoded('.png', region.patch.astype(np.uint8))
    return {
        'label': name,
        'points': [[left, top], [left + width - 1, top + height - 1]],
        'group_id': None,
        'description': '',
        'shape_type': 'mask',
        'flags': {},
        'mask': base64.b64encode(data).decode('ascii'),
    }
