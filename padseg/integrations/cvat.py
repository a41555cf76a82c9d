"""An auto-annotation function for CVAT: `cvat-cli task auto-annotate ID --function-module padseg.integrations.cvat`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from padseg.errors import UsageError
from padseg.exports.regions import REGION

if TYPE_CHECKING:
    import PIL.Image
    from cvat_sdk.auto_annotation import DetectionFunction, DetectionFunctionContext
    from cvat_sdk.models import LabeledShapeRequest

    from padseg.types import Array, LabelMap

CORNERS = 3  # a polygon has at least that many


def create(model: str = 'tiny', classes: str = '', label: str = REGION, **options: str | int | float | bool) -> DetectionFunction:
    """The function that CVAT's command line asks for, with what follows `-p`.

    model: as for `padseg run --model`; it is loaded now. classes: names to find, separated by commas, which are also CVAT's labels; without
    them, every region gets the one label `label`. options: fields of `padseg.Options`, or of `padseg.LabelOptions` if there are classes.
    """
    import padseg

    names = tuple(name.strip() for name in classes.split(',') if name.strip())
    kind = padseg.LabelOptions if names else padseg.Options
    try:
        chosen: Any = kind(**options)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f'unknown options: {", ".join(sorted(options.keys() - kind.__dataclass_fields__.keys()))}') from error
    return Function(padseg.load(model), names, chosen, label)


class Function:
    """What CVAT calls. spec: its labels; the number of a label is that of the class from 0."""

    def __init__(self, backbone: Any, classes: tuple[str, ...], options: Any, label: str) -> None:
        import cvat_sdk.auto_annotation as cvataa

        self.backbone, self.classes, self.options = backbone, classes, options
        self.spec = cvataa.DetectionFunctionSpec(
            labels=[cvataa.label_spec(name, number, type='mask') for number, name in enumerate(classes or (label,))]
        )

    def detect(self, context: DetectionFunctionContext, image: PIL.Image.Image) -> list[LabeledShapeRequest]:
        """The regions of a picture as masks; as polygons if CVAT asks for these."""
        return list(shapes(self.segmented(image), context.conv_mask_to_poly))

    def segmented(self, image: PIL.Image.Image) -> LabelMap:
        import padseg

        if self.classes:
            return padseg.label(image, self.backbone, self.classes, self.options)
        return padseg.segment(image, self.backbone, self.options)


def shapes(labels: LabelMap, as_polygons: bool) -> Iterator[LabeledShapeRequest]:
    """The regions of a label map in CVAT's terms: a mask each, or a polygon for each outer contour. Polygons lose holes."""
    import cvat_sdk.auto_annotation as cvataa
    from cvat_sdk.masks import encode_mask

    for mask in labels.masks():
        number = mask['region'] - 1 if labels.names else 0
        left, top, width, height = mask['bbox']
        if as_polygons:
            for points in outlines(mask['segmentation']):
                yield cvataa.polygon(number, points)
        else:
            yield cvataa.mask(number, encode_mask(mask['segmentation'], [left, top, left + width, top + height]))


def outlines(mask: Array) -> Iterator[list[float]]:
    """The outer contours of a mask (H, W) as x0, y0, x1, y1, … in pixels; those of fewer than three points enclose nothing."""
    import cv2

    for contour in cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
        if len(contour) >= CORNERS:
            yield contour.reshape(-1).astype(float).tolist()
