"""Label maps to files. FORMATS writes one label map, CONVERTERS a whole run; each has one module per format.

A key of FORMATS is also the folder of a run's output that holds the results.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from padseg.errors import UsageError
from padseg.exports import coco, cvat, imagefolder, labelme, labelstudio, masks, overlay, panoptic, png
from padseg.exports.masks import read_masks, write_masks
from padseg.exports.png import read_label_map, write_label_map
from padseg.exports.regions import Add, Place

if TYPE_CHECKING:
    from padseg.types import Image, LabelMap

__all__ = ['CONVERTERS', 'FORMATS', 'export', 'read_label_map', 'read_masks', 'write_label_map', 'write_masks']


class Format(Protocol):
    """What a format's module offers. SUFFIX is what it adds to a picture's name; '' for a folder."""

    SUFFIX: str

    def write(self, image: Image | None, labels: LabelMap, path: Path) -> None: ...


FORMATS: dict[str, Format] = {
    'labels': png,
    'masks': masks,
    'overlays': overlay,
}


class Converter(Protocol):
    """What a converter's module offers. FOLDER: where it goes inside the run's output; PARTS: folders in it with a file a picture.

    BESIDE: whether its masks are laid over the picture's own file, which has to be of their size.
    """

    FOLDER: str
    PARTS: tuple[str, ...]
    BESIDE: bool

    def writer(self, place: Place) -> AbstractContextManager[Add]:
        """What is entered writes one picture, or raises UnreadableLabels or ImageError and leaves nothing of it."""


CONVERTERS: dict[str, Converter] = {
    'coco': coco,
    'coco-panoptic': panoptic,
    'labelme': labelme,
    'hf-imagefolder': imagefolder,
    'cvat': cvat,
    'label-studio': labelstudio,
}


def export(labels: LabelMap, path: str | Path, image: Image | None = None, format: str | None = None) -> None:
    """Write a label map in the named format, or in the one that the path's suffix says; no suffix means a folder of masks.

    Raises UsageError for an unknown format, and for an overlay without the picture (H, W, 3).
    """
    path = Path(path)
    by_suffix = {module.SUFFIX: name for name, module in FORMATS.items()}
    name = format or by_suffix.get(path.suffix.lower())
    if name not in FORMATS:
        known = ', '.join(f'{name} ({module.SUFFIX or "a folder"})' for name, module in FORMATS.items())
        raise UsageError(f'unknown format {name or path.suffix}; known: {known}')
    FORMATS[name].write(image, labels, path)
