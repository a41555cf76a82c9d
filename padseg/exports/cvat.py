"""Export a run as CVAT's XML for images: annotations.xml with a run-length mask for each region."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from padseg.exports.regions import Add, LabelledPicture, Place, Region, each_region
from padseg.images import ImageError
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array

FOLDER = 'cvat'
PARTS: tuple[str, ...] = ()
BESIDE = True
FILE = 'annotations.xml'
HEAD = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <mode>annotation</mode>
      <labels>
"""
LABEL = """        <label>
          <name>{name}</name>
          <type>mask</type>
          <attributes></attributes>
        </label>
"""
TAIL = """      </labels>
    </task>
  </meta>
"""
FOOT = '</annotations>\n'
NOT_IN_XML = re.compile('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')  # characters that XML forbids even as references


@contextlib.contextmanager
def writer(place: Place) -> Iterator[Add]:
    """Write annotations.xml; CVAT matches its images to those of a task by name."""
    with atomic(place.folder / FILE) as temporary, temporary.open('w', encoding='utf-8') as file:
        file.write(HEAD + ''.join(LABEL.format(name=escape(in_xml(name))) for name in place.categories) + TAIL)

        def add(picture: LabelledPicture) -> None:
            if NOT_IN_XML.search(picture.name):
                raise ImageError('its name has a control character or is not valid UTF-8, which XML cannot hold')
            height, width = picture.labels.shape
            file.write(f'  <image id="{picture.number - 1}" name={quoteattr(picture.name)} width="{width}" height="{height}">\n')
            file.writelines(element(region, in_xml(place.name(region))) for region in each_region(picture.labels))
            file.write('  </image>\n')

        yield add
        file.write(FOOT)


def in_xml(name: str) -> str:
    """Replace characters in a class name that XML cannot hold."""
    return NOT_IN_XML.sub('?', name)


def element(region: Region, name: str) -> str:
    """A region as a mask element: the runs within its box."""
    left, top, width, height = region.box
    rle = ', '.join(map(str, run_lengths(region.patch)))
    box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'    <mask label={quoteattr(name)} source="auto" occluded="0" rle="{rle}" {box} z_order="0"/>\n'


def run_lengths(mask: Array) -> list[int]:
    """Run lengths of a bool mask, row by row, alternating between 0s and 1s; the first is 0 if the mask starts with 1."""
    bits = mask.ravel()
    ends = np.flatnonzero(bits[1:] != bits[:-1]) + 1
    lengths: list[int] = np.diff(ends, prepend=0, append=bits.size).tolist()
    return [0, *lengths] if bits[0] else lengths
