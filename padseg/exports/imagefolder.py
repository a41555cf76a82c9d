"""Export a run as a folder for Hugging Face's datasets library: metadata.csv pairs pictures with label maps."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2

from padseg.errors import OutputConflict, UnreadableLabels
from padseg.exports.png import encoded, write_label_map
from padseg.exports.regions import Add, LabelledPicture, Place
from padseg.images import ImageError, decode_apart, file_and_frame
from padseg.system.files import atomic, inside
from padseg.types import Image, LabelMap

FOLDER = 'hf-imagefolder'
PARTS: tuple[str, ...] = ('images', 'labels')
BESIDE = False
COLUMNS = ('file_name', 'mask_file_name')
LEGEND = 'id2label.json'  # the name that training scripts for such folders look for
UNLABELED = 'unlabeled'  # name of 0 in label maps; the file must name it too
# What the library, or its table reader, does not take as part of a name: the sign of a variable, the end of a row, and the beginnings of
# hidden folders and of others that it leaves out.
SPECIAL = re.compile(r'[$\r]|(?<![^/])\.|(?<![^/])_(?=_)')
ESCAPED = re.compile('%[0-9A-F]{2}')
# Without this, a folder or file whose name holds a word such as test would become a split of its own.
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: "**"
---
"""


@contextlib.contextmanager
def writer(place: Place) -> Iterator[Add]:
    """Write images/<name>.png, labels/<name>.png, metadata.csv, README.md, which declares a single split, and class names if any."""
    with atomic(place.folder / 'metadata.csv') as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(COLUMNS)

        def add(picture: LabelledPicture) -> None:
            if '\\' in picture.name or not is_utf8(picture.name):
                raise ImageError('its name has a backslash or is not valid UTF-8, so the datasets library cannot open it')
            data = encoded('.png', cv2.cvtColor(source(place, picture), cv2.COLOR_RGB2BGR))
            names = [f'{part}/{portable(picture.name)}.png' for part in PARTS]
            paths = [inside(place.folder, name, linked=True) for name in names]  # whose folders can have other names than the picture's
            with atomic(paths[0]) as copy:
                copy.write_bytes(data)
            write_label_map(LabelMap(picture.labels, ()), paths[1])
            table.writerow(names)

        yield add
    if place.classes:
        write_legend(place.classes, place.folder / LEGEND)
    if not (place.folder / 'README.md').exists():  # the user may have edited it
        with atomic(place.folder / 'README.md') as card:
            card.write_text(CARD, encoding='ascii')


def portable(name: str) -> str:
    """A picture's name in a form that the library can open, still unique. Special characters are escaped as in URLs: %24 for $."""
    if not (SPECIAL.search(name) or ESCAPED.search(name)):
        return name
    return SPECIAL.sub(lambda match: f'%{ord(match[0]):02X}', name.replace('%', '%25'))


def write_legend(classes: Sequence[str], path: Path) -> None:
    """Write the name of every label value."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(dict(enumerate((UNLABELED, *classes))), indent=2) + '\n', encoding='ascii')


def source(place: Place, picture: LabelledPicture) -> Image:
    """Load the picture that was segmented, upright and without metadata such as camera and location."""
    file, frame = file_and_frame(picture.name)
    path = place.images / file
    reading = place.reading._replace(max_pixels=picture.pixels)

    def refuse_another(size: int, sha256: str) -> None:
        if picture.sha256 not in (None, sha256):
            raise ImageError(f'{path} is not the picture that was segmented')

    try:
        image = decode_apart(inside(place.images, file, linked=True), reading, frame, refuse_another).image
    except OutputConflict as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        raise ImageError(f'cannot read {path}: {error.strerror} (--images says where the pictures are)') from error
    if image.shape[:2] != picture.labels.shape:
        raise UnreadableLabels(path, 'differs in size from its label map')
    return image


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
