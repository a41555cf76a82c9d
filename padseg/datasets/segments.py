"""ImageNet-Segmentation (Guillaumin et al., 2014): pictures of an object and its mask, all in one MATLAB file, read in another process."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from padseg.datasets.base import LayoutError, Sample, some
from padseg.datasets.mat import mat_matrices
from padseg.datasets.mat_child import SEGMENTS
from padseg.datasets.tables import Table, facts
from padseg.errors import UnreadableLabels
from padseg.images import ImageError, Reading, contents

if TYPE_CHECKING:
    from padseg.types import Array, Image

FILE, NAMES = 'gtsegs_ijcv.mat', 'names.json'
BACKGROUND = 'background'
NAME = re.compile(r'\w[\w.-]*', re.ASCII)
WORD = re.compile(r"[^\W_][\w '().,/-]{0,99}")


class Listing(NamedTuple):
    """What a file holds. names: of the pictures; synsets: WordNet's number of the class of each."""

    names: tuple[str, ...]
    synsets: tuple[str, ...]


class Segments(NamedTuple):
    """classes: names of all classes in the file, background last; table: of a mask's values, 0 and 1 + the class."""

    file: Path
    classes: tuple[str, ...]
    background: int
    samples: tuple[Sample, ...]
    table: Table


def found_segments(root: Path) -> Segments:
    """Find the file in a folder, and names of its classes. LayoutError if there is none, or a class has no name."""
    file = root / FILE
    if not file.is_file():
        raise LayoutError(f'{root} holds no {FILE}, the file of ImageNet-Segmentation')
    listed = listing(file)
    names = synset_names(root)
    nameless = sorted({synset for synset in listed.synsets if synset not in names})
    if nameless:
        raise LayoutError(f'no name for {some(nameless)}: give names in {root / NAMES}, such as {{"n02084071": "dog"}}')
    classes = tuple(sorted({names[synset] for synset in listed.synsets}))
    samples = tuple(Sample(name, file, (file,)) for name in listed.names)
    return Segments(file, (*classes, BACKGROUND), len(classes), samples, (len(classes), *range(len(classes))))


@functools.lru_cache(maxsize=2)
def listing(file: Path) -> Listing:
    """Names and classes of all pictures. Raises UnreadableLabels."""
    names, synsets = (tuple(map(text, rows)) for rows in mat_matrices(file, SEGMENTS, 'names'))
    strange = [name for name in (*names, *synsets) if not NAME.fullmatch(name)]
    if strange or len(set(names)) < len(names) or len(names) != len(synsets):
        raise UnreadableLabels(file, f'its names of pictures and classes are not distinct words: {some(strange)}')
    return Listing(names, synsets)


def text(letters: Array) -> str:
    """A text whose letters are numbers, with zeros behind its end: (L,)."""
    return ''.join(chr(letter) for letter in letters.tolist() if 0 < letter < 0xD800)


def synset_names(root: Path) -> dict[str, str]:
    """Names by WordNet's number: those of the classes of ImageNet's challenge, and those in a file of one's own, which come first.

    LayoutError for a file that is no JSON object of names, or calls a class background.
    """
    known: dict[str, str] = facts('imagenet1000')['names']
    own = root / NAMES
    if not own.exists():
        return known
    try:
        given = json.loads(contents(own, Reading(max_bytes=1 << 24)))
        if not isinstance(given, dict) or not all(
            isinstance(name, str) and WORD.fullmatch(name) and name != BACKGROUND for name in given.values()
        ):
            raise ValueError('expected an object of names')
    except (ImageError, OSError, ValueError, RecursionError) as error:
        raise LayoutError(f'{own} holds no names of classes such as {{"n02084071": "dog"}}: {error}') from error
    return {**known, **given}


def mask_labels(sample: Sample, annotations: Path) -> tuple[Array, ...]:
    """A picture's mask, (H, W): 0, and 1 + the number of its class where the object is."""
    number, value = places(annotations)[sample.name]
    (mask,) = mat_matrices(annotations, SEGMENTS, f'mask {number}')
    if mask.max() > 1:
        raise UnreadableLabels(annotations, f'the mask of {sample.name} has the value {mask.max()}; allowed are 0 and 1')
    return (mask * value,)


def segment_picture(sample: Sample, file: Path) -> Image:
    """A picture, (H, W, 3). Raises UnreadableLabels."""
    channels = mat_matrices(file, SEGMENTS, f'picture {places(file)[sample.name][0]}')
    return np.stack(channels, 2).astype(np.uint8)


@functools.lru_cache(maxsize=2)
def places(file: Path) -> dict[str, tuple[int, int]]:
    """By name of a picture its place in the file, and the value of its object in a label map."""
    listed, names, classes = listing(file), synset_names(file.parent), found_segments(file.parent).classes
    values = {name: 1 + number for number, name in enumerate(classes)}
    return {name: (number, values[names[synset]]) for number, (name, synset) in enumerate(zip(listed.names, listed.synsets, strict=True))}
