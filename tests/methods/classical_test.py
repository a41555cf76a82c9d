"""Classical methods: what they make of pictures with known answers, and `padseg run --method` from folder to folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from padseg.commands import main
from padseg.exports.png import read_label_map
from padseg.images import read
from padseg.methods import METHODS

ROOT = Path(__file__).parents[2]
NAMES = ('coffee.jpg', 'coins.png', 'more/rocket.jpg')
LONGEST = 160
CLASSICAL = ('felzenszwalb', 'kmeans', 'slic-rag', 'grid')


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
def halves() -> np.ndarray:
    """A picture (80, 120, 3) with a red left third and a blue rest."""
    image = np.zeros((80, 120, 3), np.uint8)
    image[:, :40], image[:, 40:] = (200, 0, 0), (0, 0, 200)
    return image


def regions(name: str, image: np.ndarray, **options: float) -> np.ndarray:
    method = METHODS[name]
    prepared = method.prepare(None, method.Options(**options))
    (maps,) = method.maps([image], prepared)
    labels = method.labels(image, maps, prepared)
    assert labels.labels.dtype == np.int32 and labels.tokens == ((),) * int(labels.labels.max())
    return labels.labels


@pytest.mark.parametrize('name', CLASSICAL)
def test_regions_are_numbered_by_first_appearance(name: str, pictures: Path) -> None:
    for path in NAMES:
        image = read(pictures / path)
        labels = regions(name, image)
        assert labels.shape == image.shape[:2]
        numbers, first = np.unique(labels, return_index=True)
        assert numbers.tolist() == list(range(1, len(numbers) + 1)) and len(numbers) > 1
        assert first.tolist() == sorted(first)
        assert len(numbers) == {'kmeans': 4, 'grid': 16}.get(name, len(numbers))


@pytest.mark.parametrize(('name', 'options'), [('felzenszwalb', {}), ('kmeans', {'clusters': 2}), ('slic-rag', {})])
def test_two_flat_areas_are_two_regions(name: str, options: dict[str, int], halves: np.ndarray) -> None:
    labels = regions(name, halves, **options)
    truth = np.where(np.arange(120) < 40, 1, 2)[None].repeat(80, 0)
    wrong = np.flatnonzero((labels != truth).any(0))
    assert labels.max() == 2
    assert ((wrong >= 38) & (wrong <= 41)).all()  # smoothing and superpixels may shift the edge a little


@pytest.mark.parametrize('name', CLASSICAL)
def test_a_picture_of_one_pixel(name: str) -> None:
    assert regions(name, np.full((1, 1, 3), 9, np.uint8)).tolist() == [[1]]


def test_a_grid_by_hand(halves: np.ndarray) -> None:
    assert np.array_equal(regions('grid', halves, cells=2), np.kron([[1, 2], [3, 4]], np.ones((40, 60), int)))
    assert (regions('grid', halves, cells=1) == 1).all()
    assert regions('grid', halves, cells=20).max() == 400


def test_a_larger_parameter_leaves_fewer_regions(pictures: Path) -> None:
    image = read(pictures / 'coffee.jpg')
    for name, option, few, many in (('felzenszwalb', 'scale', 300.0, 30.0), ('slic-rag', 'distance', 40.5, 5.0)):
        counts = [regions(name, image, **{option: value}).max() for value in (few, many)]
        assert 1 < counts[0] < counts[1]


def test_a_run_writes_what_a_run_of_a_model_writes(pictures: Path, tmp_path: Path) -> None:
    command = ['run', '--method', 'kmeans', '--clusters', '5', '--dir', str(pictures), '--out', str(tmp_path), '-q']
    assert main(command) == 0
    record = json.loads((tmp_path / 'run.json').read_text())
    assert record['model'] is record['dtype'] is None and record['device'] == 'cpu'
    assert (record['settings']['method'], record['settings']['clusters'], 'weights' in record['settings']) == ('kmeans', 5, False)
    for name in NAMES:
        labels = read_label_map(tmp_path / 'labels' / f'{name}.png')
        assert np.array_equal(labels, regions('kmeans', read(pictures / name), clusters=5))
        assert len(list((tmp_path / 'masks' / name).glob('*.png'))) == 5
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'labels').rglob('*.png')}
    assert main(command) == 0  # continues: all is done
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'labels').rglob('*.png')}


@pytest.mark.parametrize('format', ['coco', 'label-studio'])
def test_results_without_a_model_are_exported(format: str, pictures: Path, tmp_path: Path) -> None:
    assert main(['run', '--method', 'grid', '--cells', '2', '--dir', str(pictures), '--out', str(tmp_path), '-q']) == 0
    assert main(['export', str(tmp_path), '--format', format, '--images', str(pictures), '-q']) == 0
    text = ''.join(path.read_text() for path in (tmp_path / format).glob('*.json'))
    assert 'grid' in text


def test_results_of_another_method_are_not_mixed(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ['--dir', str(pictures), '--out', str(tmp_path), '-q']
    assert main(['run', '--method', 'grid', *shared]) == 0
    assert main(['run', '--method', 'kmeans', *shared]) == 6
    assert 'method grid there, kmeans now' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (
            ['--method', 'watershed'],
            "'watershed' is not one of 'seg4diff', 'diffseg', 'diffcut', 'felzenszwalb', 'slic-rag', 'kmeans', 'grid'",
        ),
        (['--method', 'open-vocabulary'], "'open-vocabulary' is not one of"),
        (['--method', 'kmeans', '--clusters', '0'], 'clusters is a whole number in 1..14400; got 0'),
        (['--method', 'kmeans', '--clusters', '2.5'], "'2.5' is not a valid integer"),
        (['--method', 'felzenszwalb', '--scale', '-1'], 'scale is a scale from 0 to below 1e9; got -1.0'),
        (['--method', 'felzenszwalb', '--threshold', '0.1'], '--threshold is an option of --method seg4diff and diffseg.'),
        (['--scale', '100'], '--scale is an option of --method felzenszwalb.'),
        (['--method', 'grid', '--save-maps'], 'grid has no maps to keep: omit --save-maps'),
    ],
)
def test_what_does_not_fit_the_method_is_refused(
    arguments: list[str], words: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['run', '--dir', str(pictures), '--out', str(tmp_path / 'out'), *arguments]) == 2
    assert words in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path / 'out' / 'labels').exists()


@pytest.mark.parametrize('method', ['seg4diff', 'felzenszwalb', 'kmeans'])
def test_help_shows_the_options_of_the_method(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['run', '--method', method, '--help']) == 0
    text = capsys.readouterr().out
    for name in METHODS[method].Options.__dataclass_fields__:
        assert f'--{name.replace("_", "-")} ' in text or f'--{name.replace("_", "-")} /' in text
    assert ('--threshold' in text) == (method == 'seg4diff')
