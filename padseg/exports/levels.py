"""Write nested label maps as one TIFF of a page a level, from coarse to fine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile

from padseg.errors import UsageError
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Image, LabelMap

SUFFIX = '.tif'
HIGHEST = np.iinfo(np.uint16).max


def write(image: Image | None, labels: LabelMap, path: Path) -> None:
    """Write the levels of a label map, 16-bit grey; the picture is not needed. UsageError if it has none, or more than 65535 regions."""
    if not labels.levels:
        raise UsageError('this label map has no levels')
    highest = max(int(level.max()) for level in labels.levels)
    if highest > HIGHEST:
        raise UsageError(f'a TIFF of levels holds at most {HIGHEST} regions; got {highest}')
    with atomic(path) as temporary, tifffile.TiffWriter(temporary) as file:
        for level in labels.levels:
            file.write(level.astype(np.uint16), photometric='minisblack', compression='zlib', metadata=None)
