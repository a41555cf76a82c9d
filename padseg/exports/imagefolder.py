"""Export a run as a folder for Hugging Face's datasets library: metadata.csv pairs pictures with label maps."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2

from padseg.errors import UnreadableLabels
from padseg.exports.png import write_label_map
from padseg.exports.regions import Add, LabelledPicture, Place
from padseg.images import ImageError, contents, decode, file_and_frame
from padseg.system.files import atomic
from padseg.types import Image, LabelMap

FOLDER = 'hf-imagefolder'
PARTS: tuple[str, ...] = ('images', 'labels')
BESIDE = False
COLUMNS = ('file_name', 'mask_file_name')
LEGEND = 'id2label.json'  # the name that training scripts expect
UNLABELED = 'unlabeled'  # name of label 0, which needs one too
# Without this, a folder or file whose name contains a word such as test would become a separate split.
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
            image = source(place, picture)
            paths = [f'{part}/{picture.name}.png' for part in PARTS]
            with atomic(place.folder / paths[0]) as copy:
                copy.write_bytes(cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
            write_label_map(LabelMap(picture.labels, ()), place.folder / paths[1])
            table.writerow(paths)

        yield add
    if place.classes:
        write_legend(place.classes, place.folder / LEGEND)
    if not (place.folder / 'README.md').exists():  # the user may have edited it
        with atomic(place.folder / 'README.md') as card:
            card.write_text(CARD, encoding='ascii')


def write_legend(classes: Sequence[str], path: Path) -> None:
    """Write the name of every label value."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(dict(enumerate((UNLABELED, *classes))), indent=2) + '\n', encoding='ascii')


def source(place: Place, picture: LabelledPicture) -> Image:
    """Load the picture that was segmented, upright and without metadata such as camera and location."""
    file, frame = file_and_frame(picture.name)
    path = place.images / file
    try:
        data = contents(path, place.reading)
    except OSError as error:
        raise ImageError(f'cannot read {path}: {error.strerror} (--images says where the pictures are)') from error
    if picture.sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise ImageError(f'{path} is not the picture that was segmented')
    image = decode(data, place.reading, frame)
    if image.shape[:2] != picture.labels.shape:
        raise UnreadableLabels(path, 'differs in size from its label map')
    return image


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
