"""The benchmark of where windows end: a small run, and its parts by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from padseg.backbones import load
from padseg.bench import seams
from padseg.bench.setting import bench_picture
from padseg.methods.seg4diff import Options


@pytest.fixture
def root(tmp_path):
    """Nine pictures in the layout of BSDS500's PNG files; one is higher than wide."""
    for number in range(9):
        picture = cv2.resize(bench_picture(321, number), (481, 321))
        picture = picture.transpose(1, 0, 2) if number == 2 else picture
        for annotator in range(2 + number % 2):
            truth = (picture[..., 0] > 128).astype(np.uint8) + 1
            for name, what in ((f'images/val/{number}.png', picture), (f'labels/val/{number}_{annotator}.png', truth)):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(tmp_path / name), what)
    return tmp_path


@pytest.mark.slow
def test_a_small_run(bench, root):
    measured, _ = bench('seams', '--root', str(root), '--tiles', '500', '--overlap', '100', '--limit', '1')
    assert (measured['pictures'], measured['width'], measured['height']) == (1, 962, 642)
    assert measured['across'] == pytest.approx((962 * 642) ** 0.5 / 500)
    for way in seams.WAYS:
        assert 0 < measured[way]['covering'] <= 1 and measured[way]['regions'] >= 1 and 0 <= measured[way]['near'] <= 1
    assert 0 < measured['tiled_by_whole'] <= 1 and 0 < measured['whole_by_tiled'] <= 1 and 0 < measured['near_area'] < 0.2
    assert '1.57 windows wide' in seams.in_words(measured)


def test_pictures_are_put_together_with_the_truths_of_all(root):
    dataset = seams.open_dataset('bsds500', root)
    first, second = seams.put_together(dataset, 2)
    assert first.image.shape == second.image.shape == (642, 962, 3) and len(first.truths) == 2
    wide = [sample for sample in dataset.samples if sample.name != '2']
    np.testing.assert_array_equal(first.image[321:, :481], dataset.picture(wide[2]))
    (truth, _), (quarter, *_) = first.truths, dataset.read(wide[3])
    assert not np.isin(truth[321:, 481:], truth[:321]).any()
    np.testing.assert_array_equal(truth[321:, 481:] - truth[321:, 481:].min(), quarter - quarter.min())


def test_ends_of_windows_by_hand():
    """Windows of 16 tokens in 31 by 21: two across from 0 and 15, two down from 0 and 5, of 31 pixels for a token."""
    near = seams.near_ends(np.zeros((642, 962, 3), np.uint8), load('tiny'), Options(tiles=500, overlap=80))
    down, across = near[:, 200], near[200]
    assert near.shape == (642, 962) and not near[0, 0] and not near[-1, -1]
    assert sorted({round(place * 21 / 642) for place in np.flatnonzero(down)}) == [5, 16]
    assert len(np.flatnonzero(down)) == 2 * 2 * seams.NEAR and len(np.flatnonzero(across)) >= 2 * seams.NEAR


def test_shares_by_hand():
    labels = np.array([[1, 1, 2, 2], [1, 1, 2, 2]])
    near = np.zeros((2, 4), bool)
    near[0] = True
    assert seams.shares(labels, (labels, labels), near) == (1.0, 2, 0.5)
