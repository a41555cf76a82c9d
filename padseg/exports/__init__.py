"""Write label maps to files. FORMATS write one label map, CONVERTERS a whole run; each format has its own module.

The keys of FORMATS are also the result folders in a run's output.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from padseg.errors import UsageError
from padseg.exports import coco, cvat, imagefolder, labelme, labelstudio, levels, masks, overlay, panoptic, png
from padseg.exports.masks import read_masks, write_masks
from padseg.exports.png import read_label_map, write_label_map
from padseg.exports.regions import Add, Place

if TYPE_CHECKING:
    from padseg.types import Image, LabelMap

__all__ = ['CONVERTERS', 'FORMATS', 'export', 'read_label_map', 'read_masks', 'write_label_map', 'write_masks']


class Format(Protocol):
    """Interface of a format's module. SUFFIX: appended to the picture's name; '' for a folder."""

    SUFFIX: str

    def write(self, image: Image | None, labels: LabelMap, path: Path) -> None: ...


FORMATS: dict[str, Format] = {
    'labels': png,
    'masks': masks,
    'overlays': overlay,
    'levels': levels,
}


class Converter(Protocol):
    """Interface of a converter's module. FOLDER: its folder in the run's output; PARTS: folders in it with one file per picture.

    BESIDE: whether masks are laid over the picture's original file, which must then have the same size.
    """

    FOLDER: str
    PARTS: tuple[str, ...]
    BESIDE: bool

    def writer(self, place: Place) -> AbstractContextManager[Add]:
        """Return a context manager that yields a function.

        The function writes one picture, or raises UnreadableLabels or ImageError and leaves nothing of that picture behind.
        """


CONVERTERS: dict[str, Converter] = {
    'coco': coco,
    'coco-panoptic': panoptic,
    'labelme': labelme,
    'hf-imagefolder': imagefolder,
    'cvat': cvat,
    'label-studio': labelstudio,
}


def export(labels: LabelMap, path: str | Path, image: Image | None = None, format: str | None = None) -> None:
    """Write a label map in the named format, or in the one that the path's suffix implies; no suffix means a folder of masks.

    Raises UsageError for an unknown format, or an overlay without the picture (H, W, 3).
    """
    path = Path(path)
    by_suffix = {module.SUFFIX: name for name, module in FORMATS.items()}
    name = format or by_suffix.get(path.suffix.lower())
    if name not in FORMATS:
        known = ', '.join(f'{name} ({module.SUFFIX or "a folder"})' for name, module in FORMATS.items())
        raise UsageError(f'unknown format {name or path.suffix}; known: {known}')
    FORMATS[name].write(image, labels, path)
