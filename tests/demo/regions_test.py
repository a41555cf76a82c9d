"""What the demo makes of a picture, against `padseg.segment` and the files of `padseg run`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import zipfile

import numpy as np
import PIL.Image
import pytest

import padseg
from padseg.commands import main
from padseg.demo.downloads import write_files, write_region
from padseg.demo.picture import TooLong, class_names, hold, named, read_picture
from padseg.demo.regions import agreement, command, count_in_words, in_words, knob, region_at, regions_of, shares, turned
from padseg.demo.settings import Settings
from padseg.errors import UsageError
from padseg.images import ImageError

SETTINGS = Settings(shrink=20_000)
ORIENTATION = 0x0112


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """A JPEG that EXIF turns by 90 degrees, larger than the demo works on."""
    y, x = np.mgrid[:200, :300]
    image = np.dstack([(x > 100) * 200, (y > 90) * 180, ((x - 200) ** 2 + (y - 100) ** 2 < 2500) * 250]).astype(np.uint8)
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path_factory.mktemp('demo') / 'turned.jpg'
    PIL.Image.fromarray(image).save(path, exif=exif)
    return path


@pytest.fixture(scope='module')
def picture(path):
    return read_picture(str(path), SETTINGS)


@pytest.fixture(scope='module')
def held(picture):
    return hold(picture, 'seg4diff', 'tiny', SETTINGS)


def test_upload_is_read_as_by_a_run(picture):
    assert picture.size == (300, 200)
    assert picture.image.shape[0] > picture.image.shape[1] and picture.image.shape[0] * picture.image.shape[1] <= 20_000


@pytest.mark.parametrize(('coarser', 'smallest'), [(0.0, None), (-2.0, 0.0), (1.25, 0.02), (3.0, 0.003)])
def test_sliders_give_what_segment_gives(held, coarser, smallest):
    options = turned(held, coarser, smallest)
    given = padseg.Options(join=held.options.join * 2**coarser, min_area=held.options.min_area if smallest is None else smallest)
    assert options.join == pytest.approx(given.join, abs=1e-6)
    expected = padseg.segment(held.picture.image, 'tiny', dataclasses.replace(given, join=options.join))
    np.testing.assert_array_equal(regions_of(held, options).labels.labels, expected.labels)


@pytest.mark.parametrize(('method', 'option'), [('felzenszwalb', 'scale'), ('slic-rag', 'distance'), ('grid', 'cells'), ('diffcut', 'tau')])
def test_other_methods_have_their_own_knob(picture, method, option):
    own = hold(picture, method, 'tiny', SETTINGS)
    assert knob(own) == option
    fine, coarse = (len(shares(regions_of(own, turned(own, turn)).labels)) for turn in (-1.0, 1.0))
    assert fine >= coarse
    np.testing.assert_array_equal(regions_of(own, turned(own)).labels.labels, padseg.segment(picture.image, 'tiny', method=method).labels)


def test_region_under_a_click():
    labels = np.array([[1, 1, 2, 2], [3, 3, 4, 4]])
    assert [region_at(labels, place, (20, 40)) for place in ((0, 0), (19, 9), (20, 0), (39, 19), (0, 10), (99, -5))] == [1, 1, 2, 4, 3, 2]


def test_words(held):
    labels = np.zeros((10, 20), np.int32)
    labels[2:4, 5:9] = 1
    made = padseg.segment(held.picture.image, 'tiny')._replace(labels=labels, names=())
    assert in_words(made, 1) == 'Region 1 of 1: 8 pixels, 4.0% of the picture; box from (5, 2), 4 wide, 2 high'
    assert in_words(made, 0).startswith('No region here')
    assert count_in_words(made) == '1 region' and shares(made) == {1: 0.04}
    assert agreement(made, made).startswith('They agree by 100%')


def test_files_are_those_of_the_command_shown(held, path, tmp_path, monkeypatch):
    options = turned(held, -1.0, 0.01)
    found = regions_of(held, options)
    files = write_files(held.picture, found, tmp_path)
    monkeypatch.chdir(path.parent)
    words = shlex.split(command(held, options, SETTINGS))
    assert words[0] == 'padseg' and main([*words[1:], '--out', str(tmp_path / 'out'), '-q']) == 0
    out = tmp_path / 'out'
    assert files.labels.read_bytes() == (out / 'labels/turned.jpg.png').read_bytes()
    assert json.loads(files.coco.read_text()) == json.loads((out / 'coco/instances.json').read_text())
    with zipfile.ZipFile(files.masks) as archive:
        masks = {name.removeprefix('masks/'): archive.read(name) for name in archive.namelist()}
    assert masks == {file.name: file.read_bytes() for file in (out / 'masks/turned.jpg').iterdir()}
    mask = np.asarray(PIL.Image.open(write_region(found._replace(lit=2), tmp_path)))
    np.testing.assert_array_equal(mask, np.where(found.labels.labels == 2, 255, 0))


def test_names(picture):
    labels = named(picture, 'open-vocabulary', 'tiny', ' tree ,  water,', SETTINGS)
    expected = padseg.label(picture.image, 'tiny', ['tree', 'water'])
    np.testing.assert_array_equal(labels.labels, expected.labels)
    assert labels.names == ('tree', 'water')
    assert class_names('a  b, c') == ['a b', 'c']
    for words in ('', ' , ', 'x' * 41, ','.join(map(str, range(21)))):
        with pytest.raises(UsageError, match='1 to 20 names'):
            class_names(words)


def test_limits(picture, path, tmp_path):
    with pytest.raises(TooLong, match='limit of this demo'):
        hold(picture, 'seg4diff', 'tiny', SETTINGS._replace(max_seconds=1e-9))
    hold(picture, 'seg4diff', 'tiny', SETTINGS)  # the model is as it was
    with pytest.raises(ImageError, match='pixels'):
        read_picture(str(path), SETTINGS._replace(max_pixels=59_999))
    (tmp_path / 'text.jpg').write_text('no picture')
    with pytest.raises(ImageError, match='not a picture'):
        read_picture(str(tmp_path / 'text.jpg'), SETTINGS)
    with pytest.raises(ImageError, match='no longer here'):
        read_picture(str(tmp_path / 'gone.jpg'), SETTINGS)
    with pytest.raises(ImageError, match='choose a picture'):
        read_picture(None, SETTINGS)
