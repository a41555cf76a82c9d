"""CVAT's own driver checks what the auto-annotation function returns, without a server."""

from __future__ import annotations

import logging

import numpy as np
import PIL.Image
import pytest

from padseg.errors import UsageError
from padseg.integrations import cvat
from padseg.types import LabelMap

HOLED = np.array([[1, 1, 1, 1, 2], [1, 2, 2, 1, 2], [1, 2, 2, 1, 2], [1, 1, 1, 1, 0]], np.int32).repeat(4, 0).repeat(4, 1)


@pytest.fixture(scope='module')
def driver():
    return pytest.importorskip('cvat_sdk.auto_annotation.driver', reason='cvat-sdk is not installed')


def annotated(driver, function, image, as_polygons):
    """The shapes that CVAT's driver accepts for frame 0 of a task with the function's labels, as numbered from 100."""
    from cvat_sdk import models

    labels = [models.Label(id=100 + label.id, name=label.name, type='any', attributes=[], sublabels=[]) for label in function.spec.labels]
    mapper = driver._AnnotationMapper(
        logging.getLogger(__name__), function.spec.labels, labels, allow_unmatched_labels=False, conv_mask_to_poly=as_polygons
    )
    context = driver._DetectionFunctionContextImpl(frame_name='a.png', conv_mask_to_poly=as_polygons)
    shapes = function.detect(context, image)
    mapper.validate_and_remap(shapes, 0)
    return shapes


@pytest.mark.parametrize('classes', ['', 'animal, water'])
def test_the_driver_accepts_masks_and_polygons(driver, classes):
    function = cvat.create(classes=classes)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1))
    names = [label.name for label in function.spec.labels]
    assert names == (['animal', 'water'] if classes else ['region'])
    masks = annotated(driver, function, image, as_polygons=False)
    from cvat_sdk.masks import decode_mask

    decoded = [decode_mask(shape.points, image_width=160, image_height=120) for shape in masks]
    assert np.sum(decoded, 0).max() == 1 and all(shape.frame == 0 and shape.label_id in range(100, 102) for shape in masks)
    expected = function.segmented(image)
    assert [mask.sum() for mask in decoded] == [mask['area'] for mask in expected.masks()]
    polygons = annotated(driver, function, image, as_polygons=True)
    assert polygons and all(shape.type.value == 'polygon' and len(shape.points) >= 6 for shape in polygons)


def test_masks_keep_holes_and_polygons_are_outer_outlines(driver):
    from cvat_sdk.masks import decode_mask

    labels = LabelMap(HOLED, ((), ()))
    masks = list(cvat.shapes(labels, as_polygons=False))
    for number, shape in enumerate(masks, start=1):
        np.testing.assert_array_equal(decode_mask(shape.points, image_width=20, image_height=16), HOLED == number)
    polygons = list(cvat.shapes(labels, as_polygons=True))
    assert len(polygons) == 3  # region 2 is in two parts
    assert sorted(zip(polygons[0].points[::2], polygons[0].points[1::2], strict=True)) == [(0, 0), (0, 15), (15, 0), (15, 15)]


def test_lines_of_pixels_are_no_polygons():
    mask = np.zeros((5, 5), bool)
    mask[2, 1:4] = True
    assert list(cvat.outlines(mask)) == []


def test_unknown_options_are_named(driver):
    with pytest.raises(UsageError, match='unknown options: treshold'):
        cvat.create(treshold=0.1)
