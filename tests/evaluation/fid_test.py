"""FID against torchmetrics itself, and against the closed form for Gaussians."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
import torch

from padseg.errors import ModelUnavailable, PadsegError
from padseg.evaluation.fid import Inception, fid, inception_features, load_inception, resized


@pytest.fixture(scope='module')
def inception(inception_file):
    return load_inception(inception_file, 'cpu')


def some_pictures(seed, number, size=(40, 48)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(number)]


def cross(means, deviations):
    """Points whose mean and covariance (unbiased, diagonal, of these standard deviations) are exact: two along each axis."""
    size = len(means)
    reach = torch.tensor(deviations, dtype=torch.float64) * ((2 * size - 1) / 2) ** 0.5
    return torch.cat([torch.diag(reach), -torch.diag(reach)]) + torch.tensor(means, dtype=torch.float64)


def test_fid_of_gaussians_is_the_closed_form():
    ours, theirs = cross([1, 2, 3], [1, 2, 3]), cross([1, 0, 0], [2, 2, 1])
    assert fid(ours, theirs) == pytest.approx((0 + 4 + 9) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2)
    assert fid(theirs, ours) == pytest.approx(18)
    assert fid(ours, ours) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert fid(ours @ turn, theirs @ turn) == pytest.approx(18)


def test_fid_of_pictures_is_what_torchmetrics_computes(inception, inception_file):
    from torchmetrics.image.fid import FrechetInceptionDistance

    ours, theirs = some_pictures(0, 12), some_pictures(1, 9, (64, 32))
    by_network = inception._replace(resize='network')
    script = torch.jit.load(str(inception_file))

    class Network(torch.nn.Module):
        def forward(self, images):
            return script(images, return_features=True).double()

    metric = FrechetInceptionDistance(feature=Network())
    for pictures, real in ((ours, False), (theirs, True)):
        metric.update(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), real=real)
    expected = float(metric.compute())
    assert expected > 1e-4
    assert fid(inception_features(by_network, ours), inception_features(by_network, theirs)) == pytest.approx(expected, rel=1e-4)


def test_features_of_several_sizes_keep_their_order(inception):
    small, large = some_pictures(2, 3), some_pictures(3, 2, (20, 70))
    mixed = [small[0], large[0], small[1], small[2], large[1]]
    features = inception_features(inception._replace(resize='network'), mixed)
    alone = torch.cat([inception_features(inception._replace(resize='network'), [picture]) for picture in mixed])
    assert features.numpy() == pytest.approx(alone.numpy(), abs=1e-6)
    assert len(inception_features(inception, [])) == 0


def test_clean_resizing_is_smooth_and_leaves_what_has_the_size():
    picture = some_pictures(4, 1, (299, 299))[0]
    assert np.array_equal(resized(picture), picture)
    flat = np.full((1000, 600, 3), (10, 20, 30), np.uint8)
    assert resized(flat) == pytest.approx(np.broadcast_to(np.float32([10, 20, 30]), (299, 299, 3)), abs=1e-3)
    stripes = np.zeros((598, 598, 3), np.uint8)
    stripes[::2] = 200
    inner = resized(stripes)[10:-10]
    assert inner.min() > 80  # a resizing without a filter would keep 0 or 200
    assert inner.max() < 120


def test_own_networks_are_taken():
    own = Inception(lambda batch: batch.mean((2, 3)), resize='network')
    assert inception_features(own, [np.full((5, 7, 3), (1, 2, 3), np.uint8)]).tolist() == [[1, 2, 3]]


def test_a_network_that_gives_no_features_is_refused():
    pictures = some_pictures(0, 2)
    for network in (lambda batch: batch.mean(), lambda batch: batch.mean((2, 3)) / 0, lambda batch: 'features'):
        with pytest.raises(ModelUnavailable, match=r'no finite features \(2, D\)'):
            inception_features(Inception(network), pictures)


def test_files_that_hold_no_network_are_refused(tmp_path, inception_file):
    with pytest.raises(ModelUnavailable, match=r'there is no file .*: --inception takes inception-2015-12-05\.pt'):
        load_inception(tmp_path / 'none.pt')
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'weights.pt')
    (tmp_path / 'short.pt').write_bytes(inception_file.read_bytes()[:1000])
    for name in ('weights.pt', 'short.pt'):
        with pytest.raises(ModelUnavailable, match='no TorchScript file'):
            load_inception(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / 'other.pt'))
    with pytest.raises(ModelUnavailable, match=r'other\.pt does not take pictures'):
        inception_features(load_inception(tmp_path / 'other.pt'), some_pictures(0, 1))


def test_two_pictures_are_needed_on_both_sides():
    with pytest.raises(ValueError, match='two pictures or more'):
        fid(torch.zeros(1, 3), torch.zeros(5, 3))


def test_without_the_library_the_message_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(PadsegError, match=r"pip install 'padseg\[scores\]'"):
        fid(torch.zeros(5, 3), torch.zeros(5, 3))
