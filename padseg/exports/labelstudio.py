"""Export a run as Label Studio tasks: tasks.json with a brush mask for each region, and the labelling interface that shows them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from padseg.exports.cvat import in_xml, run_lengths
from padseg.exports.regions import Add, LabelledPicture, Place, Region, each_region
from padseg.images import ImageError
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array

FOLDER = 'label-studio'
PARTS: tuple[str, ...] = ()
BESIDE = True
TASKS = 'tasks.json'
INTERFACE = 'interface.xml'
VIEW = """<View>
  <Image name="image" value="$image" zoom="true"/>
  <BrushLabels name="brush" toName="image">
{labels}  </BrushLabels>
</View>
"""
CHANNELS = 4  # a brush mask is an RGBA picture whose pixels are all 0 or all 255
WORD = 8  # bits per value
SIZES = (3, 4, 8, 16)  # possible bits per run length; each run uses the first that is enough


@contextlib.contextmanager
def writer(place: Place) -> Iterator[Add]:
    """Write tasks.json and interface.xml. Picture URLs point into a local storage rooted at the folder above the pictures' folder."""
    folder = Path(os.path.abspath(place.images)).name
    model = ' '.join(filter(None, ('padseg', place.made_by['version'], place.made_by.get('model') or place.made_by.get('method'))))
    with atomic(place.folder / TASKS) as temporary, temporary.open('w', encoding='ascii') as file:
        file.write('[')
        separators = itertools.chain(['\n'], itertools.repeat(',\n'))

        def add(picture: LabelledPicture) -> None:
            url = f'/data/local-files/?d={quoted(f"{folder}/{picture.name}")}'
            file.write(next(separators) + json.dumps(task(picture, url, model, place)))

        yield add
        file.write('\n]\n')
    with atomic(place.folder / INTERFACE) as temporary:
        labels = ''.join(f'    <Label value={quoteattr(in_xml(name))}/>\n' for name in place.categories)
        temporary.write_text(VIEW.format(labels=labels), encoding='utf-8')


def quoted(path: str) -> str:
    try:
        return urllib.parse.quote(path)
    except UnicodeEncodeError as error:
        raise ImageError('its name is not valid UTF-8, so Label Studio cannot address it') from error


def task(picture: LabelledPicture, url: str, model: str, place: Place) -> dict[str, Any]:
    """A picture with its regions as a prediction, which annotators can start from."""
    shape: tuple[int, int] = picture.labels.shape
    result = [brush(region, shape, in_xml(place.name(region))) for region in each_region(picture.labels)]
    return {'data': {'image': url}, 'predictions': [{'model_version': model, 'result': result}]}


def brush(region: Region, shape: tuple[int, int], name: str) -> dict[str, Any]:
    height, width = shape
    return {
        'id': str(region.number),
        'type': 'brushlabels',
        'from_name': 'brush',
        'to_name': 'image',
        'original_width': width,
        'original_height': height,
        'image_rotation': 0,
        'value': {'format': 'rle', 'rle': brush_bytes(region.mask), 'brushlabels': [name]},
    }


def brush_bytes(mask: Array) -> list[int]:
    """Encode a bool mask (H, W) in Label Studio's bit stream, which differs from COCO's run-length encoding.

    Header: the number of values (32 bits), the bits per value minus 1 (5), and the bits of the four run lengths minus 1 (4 each).
    """
    head = f'{CHANNELS * mask.size:032b}{WORD - 1:05b}' + ''.join(f'{size - 1:04b}' for size in SIZES)
    alternating = zip(run_lengths(mask), itertools.cycle((0, 255)))
    bits = head + ''.join(run_bits(length, value) for pixels, value in alternating for length in pieces(CHANNELS * pixels))
    bits += '0' * (-len(bits) % 8)
    return list(int(bits, 2).to_bytes(len(bits) // 8, 'big'))


def pieces(length: int) -> Iterator[int]:
    """Split a length into parts that the widest of SIZES can hold."""
    longest = 1 << SIZES[-1]
    yield from itertools.repeat(longest, length // longest)
    if length % longest:
        yield length % longest


def run_bits(length: int, value: int) -> str:
    """Encode a repeated value: 1 for a run, the index into SIZES, the length minus 1, the value."""
    kind = next(kind for kind, size in enumerate(SIZES) if length <= 1 << size)
    return f'1{kind:02b}{length - 1:0{SIZES[kind]}b}{value:0{WORD}b}'
