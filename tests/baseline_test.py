"""bin/baseline in a process of its own: what each method finds, where the label maps go, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from padseg.exports.png import read_label_map

ROOT = Path(__file__).parent.parent
NAMES = ('coffee.jpg', 'coins.png', 'more/rocket.jpg')
LONGEST = 160
METHODS = ('felzenszwalb-100', 'kmeans-4', 'slic-rag-30', 'grid-3', 'one')


def baseline(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, str(ROOT / 'bin' / 'baseline'), *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def label_maps(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): read_label_map(path) for path in sorted(folder.rglob('*.*'))}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample pictures in small."""
    folder = tmp_path_factory.mktemp('pictures')
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        with PIL.Image.open(ROOT / 'data' / 'images' / name) as picture:
            picture.thumbnail((LONGEST, LONGEST))
            picture.save(folder / name)
    return folder


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A picture (80, 120) with a red left third and a blue rest."""
    image = np.zeros((80, 120, 3), np.uint8)
    image[:, :40], image[:, 40:] = (0, 0, 200), (200, 0, 0)
    folder = tmp_path / 'halves'
    folder.mkdir()
    cv2.imwrite(str(folder / 'halves.png'), image)
    return folder


@pytest.mark.parametrize('method', METHODS)
def test_every_picture_gets_a_label_map_of_its_size(method: str, pictures: Path, tmp_path: Path) -> None:
    ran = baseline(method, '--dir', pictures, '--out', tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, '', '')
    found = label_maps(tmp_path)
    assert list(found) == [f'{name}.png' for name in NAMES]
    for name, labels in found.items():
        with PIL.Image.open(pictures / name.removesuffix('.png')) as picture:
            assert labels.shape == picture.size[::-1]
        ids, first = np.unique(labels, return_index=True)
        assert ids.tolist() == list(range(1, len(ids) + 1))
        assert first.tolist() == sorted(first)
        assert len(ids) == {'kmeans-4': 4, 'grid-3': 9, 'one': 1}.get(method, len(ids))
        assert method == 'one' or len(ids) > 1


@pytest.mark.parametrize('method', ['felzenszwalb-600', 'kmeans-2', 'slic-rag-30'])
def test_two_flat_areas_are_two_regions(method: str, halves: Path, tmp_path: Path) -> None:
    assert baseline(method, '--dir', halves, '--out', tmp_path / 'out').returncode == 0
    (labels,) = label_maps(tmp_path / 'out').values()
    truth = np.where(np.arange(120) < 40, 1, 2)[None].repeat(80, 0)
    wrong = np.flatnonzero((labels != truth).any(0))
    assert labels.max() == 2
    assert ((wrong >= 38) & (wrong <= 41)).all()  # smoothing and superpixels may shift the edge a little


@pytest.mark.parametrize('method', METHODS[:3])
def test_a_picture_of_one_pixel(method: str, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / 'dot.png'), np.full((1, 1, 3), 9, np.uint8))
    assert baseline(method, '--dir', tmp_path / 'dot.png', '--out', tmp_path / 'out').returncode == 0
    assert read_label_map(tmp_path / 'out' / 'dot.png.png').tolist() == [[1]]


def test_a_grid_by_hand(halves: Path, tmp_path: Path) -> None:
    assert baseline('grid-2', '--dir', halves, '--out', tmp_path / 'out').returncode == 0
    (labels,) = label_maps(tmp_path / 'out').values()
    assert np.array_equal(labels, np.kron([[1, 2], [3, 4]], np.ones((40, 60), int)))


def test_a_larger_parameter_leaves_fewer_regions(pictures: Path, tmp_path: Path) -> None:
    for few, many in (('felzenszwalb-300', 'felzenszwalb-30'), ('slic-rag-40.5', 'slic-rag-5')):
        regions = []
        for method in (few, many):
            assert baseline(method, '--dir', pictures / 'coffee.jpg', '--out', tmp_path / method).returncode == 0
            regions.append(int(read_label_map(tmp_path / method / 'coffee.jpg.png').max()))
        assert 1 < regions[0] < regions[1]


@pytest.mark.parametrize('method', ['kmeans-5', 'slic-rag-20'])
def test_label_maps_depend_on_the_picture_alone(method: str, pictures: Path, tmp_path: Path) -> None:
    baseline(method, '--dir', pictures, '--out', tmp_path / 'all')
    baseline(method, '--dir', pictures / 'more', '--out', tmp_path / 'one')
    assert (tmp_path / 'all' / 'more' / 'rocket.jpg.png').read_bytes() == (tmp_path / 'one' / 'rocket.jpg.png').read_bytes()


def test_more_than_255_regions_keep_their_numbers(halves: Path, tmp_path: Path) -> None:
    assert baseline('grid-20', '--dir', halves, '--out', tmp_path / 'out').returncode == 0
    (labels,) = label_maps(tmp_path / 'out').values()
    assert labels.max() == 400


def test_label_maps_inside_the_folder_of_pictures_are_no_pictures(halves: Path) -> None:
    for _ in range(2):
        assert baseline('one', '--dir', halves, '--out', halves / 'labels').returncode == 0
    assert list(label_maps(halves / 'labels')) == ['halves.png.png']


def test_a_damaged_picture_is_named_and_the_others_are_done(halves: Path, tmp_path: Path) -> None:
    (halves / 'damaged.jpg').write_bytes(b'\xff\xd8\xff')
    (halves / 'gone.jpg').symlink_to('nowhere.jpg')
    ran = baseline('one', '--dir', halves, '--out', tmp_path / 'out')
    assert ran.returncode == 3
    assert [line.split(': ')[1] for line in ran.stderr.splitlines()] == ['damaged.jpg', 'gone.jpg']
    assert list(label_maps(tmp_path / 'out')) == ['halves.png.png']


@pytest.mark.parametrize(
    'method',
    ['watershed-5', 'kmeans', 'kmeans-0', 'kmeans-2.5', 'grid--1', 'felzenszwalb-1e3', 'one-1', ''],
)
def test_an_unknown_method_is_refused_with_the_known_ones(method: str, halves: Path, tmp_path: Path) -> None:
    ran = baseline('--dir', halves, '--out', tmp_path / 'out', '--', method)
    assert (ran.returncode, ran.stdout) == (2, '')
    assert 'known: felzenszwalb-SCALE, kmeans-K, slic-rag-T, grid-N, one' in ran.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('missing', ['nowhere', 'empty'])
def test_a_folder_without_pictures_is_named(missing: str, tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    ran = baseline('one', '--dir', tmp_path / missing, '--out', tmp_path / 'out')
    assert (ran.returncode, ran.stdout) == (5, '')
    assert ran.stderr.startswith('baseline: ') and str(tmp_path / missing) in ran.stderr


def test_help_lists_every_method() -> None:
    ran = baseline('--help')
    assert ran.returncode == 0
    assert all(form in ran.stdout for form in ('felzenszwalb-SCALE', 'kmeans-K', 'slic-rag-T', 'grid-N', 'one'))
