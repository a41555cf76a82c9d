"""`bin/bench sizes`: networks counted without weights."""

from __future__ import annotations

import pytest

from padseg.backbones.spec import BACKBONES
from padseg.bench.sizes import SHAPES, size_of


@pytest.mark.slow
def test_a_named_model_is_counted():
    """FLUX.2 klein: its name says 4B; layer by layer by hand, 24 heads of 128 channels, MLPs of three times the width, no biases."""
    size = size_of('flux2-klein')
    width = 24 * 128
    double = 5 * (2 * (4 * width**2 + 9 * width**2) + 4 * 128)  # both streams: queries, keys, values, output; MLP; norms of heads
    single = 20 * (width * 9 * width + 4 * width * width + 2 * 128)  # one projection in, one out
    modulation = (6 + 6 + 3 + 2) * width**2  # of double blocks' two streams, of single ones, of the output
    ends = width * (128 + 7680 + 128) + width * (256 + width)  # image, text, output; time
    assert size.parameters == double + single + modulation + ends == 3_875_544_576
    assert size.transformer == pytest.approx(2e-9 * size.parameters)
    assert size.maps < size.transformer / 2 and size.download == pytest.approx(size.transformer + size.text + 0.168, abs=1e-3)


def test_shapes_are_of_named_models():
    assert SHAPES.keys() <= BACKBONES.keys()
