"""`padseg.pipeline` gives what transformers' pipeline gives, as far as what takes its output can tell."""

from __future__ import annotations

import numpy as np
import pytest

import padseg
from padseg.errors import UsageError

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def test_masks_are_those_of_segment(backbone):
    generate = padseg.pipeline(backbone, options=padseg.Options(side=64, threshold=0.01))
    output = generate(PICTURE)
    expected = padseg.segment(PICTURE, backbone, padseg.Options(side=64, threshold=0.01)).labels
    assert output.keys() == {'masks', 'scores'} and output['scores'].shape == (expected.max(),) and output['scores'].isnan().all()
    for number, mask in enumerate(output['masks'], start=1):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected == number)
    first, second = generate([PICTURE, PICTURE[:, ::-1]])
    assert len(first['masks']) == expected.max() and second['masks'][0].shape == (48, 64)


def test_methods_without_a_model_and_unknown_ones():
    assert len(padseg.pipeline(method='grid')(PICTURE)['masks']) > 1
    with pytest.raises(UsageError, match='method is one of'):
        padseg.pipeline(method='sam')
