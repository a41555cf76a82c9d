"""Scenes: labels, names and caption agree, for every size and every class, and the same state gives the same scene."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.digests import digest

from padseg.train.scenes import CLASSES, SHADINGS, Scene, cover, describe, flat_ground, object_contours, place, renumbered, scene
from padseg.train.shapes import SHAPES, fill
from padseg.train.textures import TEXTURES, Style

ROOT = Path(__file__).parents[2]
GREY = Style('plain', np.full((2, 3), 90.0))


def check(made: Scene, height: int, width: int) -> None:
    assert made.image.shape == (height, width, 3)
    assert made.image.dtype == np.uint8
    assert made.labels.shape == (height, width)
    assert made.labels.dtype == np.int32
    assert np.unique(made.labels).tolist() == list(range(len(made.names)))
    assert set(made.names) <= set(CLASSES)
    words = made.caption.replace(',', '').split()
    assert set(words) - {'a', 'an', 'and', 'on'} == set(made.names)


@pytest.mark.parametrize('size', [(256, 256), (17, 300), (300, 17), (8, 8), (8, 200), (64, 65)])
def test_image_labels_names_and_caption_agree(size):
    for seed in range(20):
        check(scene(np.random.default_rng(seed), *size), *size)


@settings(max_examples=50, deadline=None)
@given(height=st.integers(8, 150), width=st.integers(8, 150), seed=st.integers(0, 2**32))
def test_any_size(height, width, seed):
    check(scene(np.random.default_rng(seed), height, width), height, width)


@pytest.mark.parametrize('size', [(7, 64), (64, 7), (0, 0)])
def test_too_small_is_refused(size):
    with pytest.raises(ValueError, match=f'at least 8 pixels; got {size[0]} and {size[1]}'):
        scene(np.random.default_rng(0), *size)


def test_same_state_same_scene():
    assert [digest(seed) for seed in range(10)] == [digest(seed) for seed in range(10)]
    assert len({digest(seed) for seed in range(10)}) == 10


def test_one_generator_gives_one_scene_after_another():
    rng = np.random.default_rng(3)
    first, second = scene(rng, 40, 40), scene(rng, 40, 40)
    assert not np.array_equal(first.image, second.image)


def test_another_process_gives_the_same_scene():
    code = 'from support.digests import digest; print(digest(5))'
    answer = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT / 'tests',
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == digest(5)


def test_every_class_occurs():
    seen = {name for seed in range(400) for name in scene(np.random.default_rng(seed), 48, 48).names}
    assert seen == set(CLASSES)


def test_classes_are_distinct_plain_words():
    assert len(set(CLASSES)) == len(CLASSES) == len(SHAPES) + len(TEXTURES)
    assert all(name.isalpha() and name.islower() for name in CLASSES)


def test_one_colour_stays_one_colour():
    assert np.all(cover(np.random.default_rng(0), GREY, (), 20, 30, 0.0) == 90)


def test_outside_its_mask_an_object_only_casts_shadow():
    shadows = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        before = np.full((64, 80, 3), 200, np.float32)
        contours = object_contours(rng, 'blob', 0.5, 64, 80)
        mask = fill(contours, 64, 80)
        after = place(rng, before, mask, contours, GREY, flat_ground)
        assert np.all(before == 200)
        assert np.all(after[mask == 0] <= 200.001)
        assert np.any(after[mask == 255] != 200)
        shadows += bool(np.any(after[mask == 0] < 199))
    assert 3 < shadows < 27


@pytest.mark.parametrize('shading', SHADINGS)
def test_light_is_finite_and_not_negative(shading):
    for seed, size in enumerate([(1, 1), (1, 30), (40, 30)] * 5):
        light = shading(np.random.default_rng(seed), np.full(size, 255, np.uint8))
        assert light.shape == size
        assert np.isfinite(light).all()
        assert light.min() >= 0


def test_hidden_regions_are_removed():
    labels, names = renumbered(np.array([[0, 3], [3, 5]]), ('rock', 'star', 'ring', 'disk', 'bar', 'disk'))
    assert labels.tolist() == [[0, 1], [1, 2]]
    assert names == ('rock', 'disk', 'disk')


@pytest.mark.parametrize(
    ('names', 'caption'),
    [
        (('stripes', 'disk', 'star'), 'a disk and a star on stripes'),
        (('rock', 'water', 'animal'), 'an animal on rock and water'),
        (('sand', 'disk', 'disk', 'ellipse', 'bar'), 'a disk, an ellipse and a bar on sand'),
        (('sand', 'sand'), 'sand'),
        (('disk',), 'a disk'),
    ],
)
def test_captions(names, caption):
    assert describe(names) == caption


def files(folder: Path) -> dict[str, bytes]:
    """The pictures and label maps of a data folder by name."""
    paths = [path for part in ('images', 'labels') for path in (folder / part).rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_prepare_images_makes_the_sample_pictures(tmp_path):
    for name in ('first', 'second'):
        subprocess.run([sys.executable, ROOT / 'bin/prepare-images', tmp_path / name], check=True)
    made = files(tmp_path / 'first')
    assert made == files(tmp_path / 'second')
    assert set(made) == set(files(ROOT / 'data'))


def test_sample_pictures_are_small_and_listed():
    samples = files(ROOT / 'data')
    table = (ROOT / 'data/README.md').read_text(encoding='utf-8')
    assert all(f'| `{name.removeprefix("images/")}` |' in table for name in samples if name.startswith('images/'))
    assert sum(map(len, samples.values())) < 3_000_000
    assert len([name for name in samples if name.startswith('images/')]) >= 12


def test_sample_labels_number_the_regions_of_their_scene():
    paths = sorted((ROOT / 'data/labels').iterdir())
    assert len(paths) == 6
    for path in paths:
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        image = cv2.imread(str(ROOT / 'data/images' / path.name))
        assert labels.dtype == np.uint8
        assert labels.shape == image.shape[:2]
        assert np.unique(labels).tolist() == list(range(1, int(labels.max()) + 1))
        made = scene(np.random.default_rng(int(path.stem.split('-')[1])), *labels.shape)
        assert (made.labels + 1 == labels).mean() > 0.999
        assert np.abs(made.image[..., ::-1].astype(int) - image).mean() < 1
