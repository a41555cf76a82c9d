"""From picture to label map: the stages composed by hand, every geometry, and independence of batch and order."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from skimage.measure import label as connected_components

import padseg
from padseg.commands import main
from padseg.errors import UsageError
from padseg.images import as_image
from padseg.methods.options import GEOMETRIES, NORMALISATIONS
from padseg.methods.seg4diff import Options, regions, segment, token_maps
from padseg.methods.stages.forwards import batched
from padseg.methods.stages.labels import label_map
from padseg.methods.stages.latents import encode
from padseg.methods.stages.proposals import merge
from padseg.methods.stages.superpixels import superpixels_of
from padseg.types import Proposals

SIZES = [(48, 80), (80, 48), (64, 64), (48, 80), (33, 47), (64, 64), (1, 40)]
SPLITTING = Options(threshold=0.001, normalisation='minmax-softmax')  # low enough that random models give several regions


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def same(first, second) -> bool:
    return np.array_equal(first.labels, second.labels) and first.tokens == second.tokens


@pytest.mark.parametrize('family', ['backbone', 'backbone35'])
def test_neither_batch_size_nor_order_matters(family, request):
    backbone = request.getfixturevalue(family)
    images = pictures()
    alone = [segment(image, backbone, SPLITTING) for image in images]
    assert any(found.labels.max() > 1 for found in alone)
    for batch in (1, 2, 3, len(images)):
        order = random.Random(batch).sample(range(len(images)), len(images))
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            for number, found in zip(numbers, segment([images[number] for number in numbers], backbone, SPLITTING), strict=True):
                assert same(found, alone[number])
    assert segment([], backbone) == []


def test_pictures_share_no_forward_on_a_cpu(backbone):
    """Matrix products round by batch size, which shows in a label map only now and then."""
    resolved = Options().resolve(backbone.spec)
    latents = [encode(image, backbone, resolved) for image in pictures()]
    groups: list[list] = []
    assert batched(latents, backbone, lambda group: groups.append(group) or group) == latents
    assert [len(group) for group in groups] == [1] * len(latents)


def test_elsewhere_all_of_one_shape_share_a_forward_wherever_they_stand(backbone):
    resolved = Options().resolve(backbone.spec)
    latents = [encode(image, backbone, resolved) for image in pictures()]
    groups: list[list] = []
    elsewhere = SimpleNamespace(device=torch.device('meta'))
    assert batched(latents, elsewhere, lambda group: groups.append(group) or group) == latents
    shapes = [{latent.z.shape for latent in group} for group in groups]
    assert all(len(each) == 1 for each in shapes) and len(groups) == len({latent.z.shape for latent in latents}) < len(latents)


def test_a_path_and_an_array_give_the_same(backbone, picture, tmp_path):
    path = tmp_path / 'picture.png'
    PIL.Image.fromarray(picture).save(path)
    expected = segment(picture, backbone, SPLITTING)
    assert same(segment(path, backbone, SPLITTING), expected)
    assert same(segment(str(path), backbone, SPLITTING), expected)


@pytest.mark.parametrize('normalisation', NORMALISATIONS)
@pytest.mark.parametrize('geometry', ['whole', 'diffcut'])
def test_segmenting_is_its_stages_one_after_the_other(backbone, picture, normalisation, geometry):
    options = Options(normalisation=normalisation, geometry=geometry, threshold=0.01, layer=1, step=4, seed=2)
    maps = token_maps(picture, backbone, options)
    assert same(segment(picture, backbone, options), label_map(merge(maps, 0.01, normalisation)))
    assert same(regions(picture, maps, options), segment(picture, backbone, options))
    other = dataclasses.replace(options, threshold=float('inf'))
    assert same(regions(picture, maps, other), segment(picture, backbone, other))


@pytest.mark.parametrize('family', ['backbone', 'backbone35'])
@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize(
    ('size', 'square'),
    [((48, 81), (slice(None), slice(16, 64))), ((90, 41), (slice(24, 65), slice(None)))],
)
def test_every_geometry_labels_its_part_of_the_picture(family, geometry, size, square, request):
    backbone = request.getfixturevalue(family)
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = segment(image, backbone, Options(geometry=geometry, threshold=0.001))
    assert found.labels.shape == size and found.labels.dtype == np.int32
    looked_at = np.zeros(size, bool)
    if geometry in ('diffseg', 'seg4diff-paper'):
        looked_at[square] = True
    elif geometry == 'diffcut':  # one pixel less on each side of the square
        rows, columns = {(48, 81): (slice(0, 47), slice(17, 64)), (90, 41): (slice(25, 65), slice(0, 40))}[size]
        looked_at[rows, columns] = True
    else:
        looked_at[:] = True
    assert np.array_equal(found.labels > 0, looked_at)
    names = np.unique(found.labels[looked_at])
    assert names.tolist() == list(range(1, len(found.tokens) + 1))
    firsts = [int(np.flatnonzero(found.labels == name)[0]) for name in names]
    assert firsts == sorted(firsts)


def test_thresholds_at_the_ends(backbone, picture):
    one = segment(picture, backbone, Options(threshold=float('inf')))
    assert (one.labels == 1).all() and one.tokens == (tuple(range(77)),)
    each = segment(picture, backbone, Options(threshold=0.0))
    assert all(len(tokens) == 1 for tokens in each.tokens)


def test_split_regions_are_connected_parts_of_the_regions(backbone, picture):
    whole = segment(picture, backbone, SPLITTING)
    parts = segment(picture, backbone, dataclasses.replace(SPLITTING, components=True))
    assert parts.labels.max() > whole.labels.max()  # else the picture shows nothing
    for number in range(1, parts.labels.max() + 1):
        inside = parts.labels == number
        assert connected_components(inside, connectivity=1).max() == 1
        (parent,) = np.unique(whole.labels[inside])
        assert parts.tokens[number - 1] == whole.tokens[parent - 1]
    components = sum(connected_components(whole.labels == number, connectivity=1).max() for number in range(1, whole.labels.max() + 1))
    assert parts.labels.max() == components


@pytest.mark.parametrize('geometry', ['whole', 'diffseg'])
def test_superpixels_are_never_cut(backbone, picture, geometry):
    options = dataclasses.replace(SPLITTING, superpixels=40.0, geometry=geometry)
    found = segment(picture, backbone, options)
    inside = superpixels_of(picture, 40.0)
    seen = found.labels > 0
    assert len(np.unique(inside[seen])) > 1
    for number in np.unique(inside[seen]):
        assert len(np.unique(found.labels[seen & (inside == number)])) == 1
    free = segment(picture, backbone, dataclasses.replace(options, superpixels=0.0))
    assert any(len(np.unique(free.labels[seen & (inside == number)])) > 1 for number in np.unique(inside[seen]))


NESTED = Options(superpixels=20.0, join=1.0, components=True, min_area=0.01, levels=(3.0, 0.3, 1.0))


@pytest.mark.parametrize('geometry', ['whole', 'diffseg'])
def test_every_level_divides_the_regions_of_the_one_before_it(geometry):
    photograph, backbone = as_image('data/images/chelsea.jpg'), padseg.load('tiny')
    options = dataclasses.replace(NESTED, geometry=geometry)
    found = segment(photograph, backbone, options)
    plain = segment(photograph, backbone, dataclasses.replace(options, levels=()))
    assert same(found, plain) and not plain.levels
    finest = segment(photograph, backbone, dataclasses.replace(options, levels=(), join=0.3, regroup=0.0))
    assert np.array_equal(found.levels[-1], finest.labels)
    counts = [len(np.unique(level[level > 0])) for level in found.levels]
    assert len(counts) == 3 and counts[0] < counts[-1] and counts == sorted(counts)
    for coarse, fine in zip(found.levels, found.levels[1:], strict=False):
        assert len({*zip(coarse.ravel().tolist(), fine.ravel().tolist(), strict=True)}) == len(np.unique(fine))
        assert ((coarse > 0) == (fine > 0)).all()
    for level in found.levels:
        assert np.array_equal(connected_components(level, background=0, connectivity=1) > 0, level > 0)
        assert connected_components(level, background=0, connectivity=1).max() == level.max()


def test_levels_need_superpixels_that_are_joined():
    for wrong in ({'superpixels': 0.0}, {'join': 0.0}, {'levels': (1.0, 1.0)}, {'levels': (-1.0,)}, {'levels': (float('inf'),)}):
        with pytest.raises(UsageError, match='levels'):
            dataclasses.replace(NESTED, **wrong)
    with pytest.raises(UsageError, match='at most 64 levels are made; got 65'):
        dataclasses.replace(NESTED, levels=tuple(range(65)))
    assert dataclasses.replace(NESTED, levels=tuple(range(64))).levels == tuple(range(64))
    with pytest.raises(UsageError, match='leave out --tiles'):
        dataclasses.replace(NESTED, tiles=256)


def test_levels_of_a_run_are_made_again_or_left_out(tmp_path, capsys):
    PIL.Image.fromarray(as_image('data/images/scene-43.png')).save(tmp_path / 'a.png')
    assert main(['run', str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out'), '--levels', '0.3,2', '--save-maps', '-q']) == 0
    again, merge = tmp_path / 'again', ['merge', str(tmp_path / 'out'), '-q', '--out']
    assert main([*merge, str(again)]) == 0
    assert (again / 'levels/a.png.tif').read_bytes() == (tmp_path / 'out/levels/a.png.tif').read_bytes()
    assert main([*merge, str(tmp_path / 'none'), '--join', '0']) == 2
    assert "need --superpixels and --join above 0; --levels '' leaves out those of" in capsys.readouterr().err
    assert main([*merge, str(tmp_path / 'none'), '--join', '0', '--levels', '']) == 0
    assert not (tmp_path / 'none/levels').exists()


def test_the_row_of_the_model_decides_what_is_left_open(backbone, picture):
    settled = dataclasses.replace(
        backbone, spec=backbone.spec._replace(layer=1, own={'seg4diff': {'threshold': 0.0, 'normalisation': 'share', 'components': True}})
    )
    expected = segment(picture, backbone, Options(threshold=0.0, normalisation='share', components=True, layer=1))
    assert same(segment(picture, settled), expected)
    assert not same(segment(picture, backbone), expected)


@pytest.mark.parametrize('family', ['backbone', 'backbone35', 'flux'])
def test_the_default_is_the_released_path_by_loops(family, picture, request):
    """Random models of SD3, SD3.5 and Flux, whose folders state no settings of the method: pixel by pixel, token by token."""
    backbone = request.getfixturevalue(family)
    resolved = Options().resolve(backbone.spec)
    assert (resolved.normalisation, resolved.threshold, resolved.step) == ('released', 0.1, 8)
    maps = token_maps(picture, backbone)
    tokens, h, w = maps.maps.shape
    rows = [released_row([[float(value) for value in row] for row in maps.maps.flatten(1).tolist()], token) for token in range(tokens)]
    for threshold in (0.1, divide_in_two(rows)):
        groups, taken = [], set()
        for anchor in range(tokens):
            if anchor not in taken:
                groups.append(
                    [other for other in range(tokens) if other == anchor or half_symmetric_kl(rows[anchor], rows[other]) < threshold]
                )
                taken.update(groups[-1])
        means = torch.tensor(np.array([np.mean([rows[member] for member in group], 0) for group in groups]).reshape(-1, h, w))
        expected = label_map(Proposals(means, tuple(map(tuple, groups)), maps.frame))
        found = segment(picture, backbone, Options(threshold=None if threshold == 0.1 else threshold))
        assert same(found, expected)
    assert found.labels.max() > 1  # else the last threshold would have shown nothing


def released_row(maps: list[list[float]], token: int) -> np.ndarray:
    """One of the maps (T, h w) on the scale of all tokens' values at each pixel, 1e-6 added to the range; then a softmax over space."""
    columns = list(zip(*maps, strict=True))
    unit = [(column[token] - min(column)) / (max(column) - min(column) + 1e-6) for column in columns]
    raised = np.exp(np.array(unit))
    return raised / raised.sum()


def half_symmetric_kl(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * np.log(one / other)).sum() + (other * np.log(other / one)).sum()) / 2


def divide_in_two(rows: list[np.ndarray]) -> float:
    """A threshold in the widest gap between the distances of the first map from the others, where rounding decides nothing."""
    far = sorted(half_symmetric_kl(rows[0], other) for other in rows[1:])
    widest = int(np.argmax(np.diff(far)))
    return (far[widest] + far[widest + 1]) / 2


def test_the_seed_decides(backbone, picture):
    options = dataclasses.replace(SPLITTING, step=14)
    first = segment(picture, backbone, options)
    torch.manual_seed(99)
    assert same(segment(picture.copy(), backbone, options), first)
    others = [segment(picture, backbone, dataclasses.replace(options, seed=seed)) for seed in (1, 2)]
    assert not any(same(other, first) for other in others) and not same(*others)


def test_options_that_the_model_cannot_follow(backbone, picture):
    with pytest.raises(UsageError, match=r'layer is one of 0\.\.3'):
        segment(picture, backbone, Options(layer=4))
    with pytest.raises(UsageError, match=r'step is one of 1\.\.28'):
        segment(picture, backbone, Options(step=29))
    with pytest.raises(UsageError, match=r'side is a multiple of 4 in 4\.\.96 for diffseg'):
        segment(picture, backbone, Options(geometry='diffseg', side=100))


def test_a_side_beyond_the_models_is_cut_to_it(backbone, picture):
    assert token_maps(picture, backbone, Options(side=5000)).maps.shape == (77, 24, 24)


def test_the_public_names_in_four_lines(sd3_folder, picture, tmp_path):
    backbone = padseg.load(str(sd3_folder), device='cpu')
    maps = padseg.token_maps(picture, backbone, padseg.Options(threshold=0.001))
    labels = padseg.label_map(padseg.merge(maps, threshold=0.001))
    padseg.export(labels, tmp_path / 'labels.png')
    assert same(labels, padseg.segment(picture, backbone, padseg.Options(threshold=0.001)))
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / 'labels.png')), labels.labels)
