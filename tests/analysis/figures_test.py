"""Tables, sheet and figures of an analysis, from values made by hand; and `padseg analyze`."""

from __future__ import annotations

import json
import pathlib

import cv2
import numpy as np
import pytest

from padseg.analysis.blocks import Cell
from padseg.analysis.figures import COLUMNS, WIDTH, anatomy_figure, grouping_figure, map_sheet, tables
from padseg.analysis.measure import Analysis, labelled_pictures
from padseg.commands import main
from padseg.errors import NoImages
from padseg.methods.seg4diff import Options

DATA = pathlib.Path(__file__).parents[2] / 'data'
ANALYSIS = Analysis(
    model='mine',
    weights='f00',
    pictures=3,
    normalisation='share',
    step=2,
    steps=[1, 2],
    one_region=0.25,
    coverings={Cell(step, layer, head): 0.1 * step + 0.2 * layer + 0.01 * (head or 0) for step, layer, head in (
        (2, 0, None), (2, 0, 0), (2, 0, 1), (2, 1, None), (2, 1, 0), (2, 1, 1), (1, 0, None), (1, 1, None)
    )},
    words={},
    groups=['image', 'first', 'pads'],
    shares=np.array([[[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]], [[0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.4, 0.4, 0.2]]]),
    norms=np.array([[1.0, 2.0, 3.0], [10.5, 20.25, 30.0]]),
)  # fmt: skip


def test_tables_have_a_row_a_block():
    parts = '\n'.join(tables(ANALYSIS)).split('\n\n')
    assert parts[0] == 'mine, 3 pictures, share; one region for all: 0.2500'
    assert [line.split() for line in parts[1].splitlines()[1:]] == [
        ['block', 'mean', 'head', '0', 'head', '1'],
        ['0', '0.2000', '0.2000', '0.2100'],
        ['1', '0.4000', '0.4000', '0.4100'],
    ]
    assert [line.split() for line in parts[2].splitlines()[1:]] == [
        ['block', '1', '2'],
        ['0', '0.1000', '0.2000'],
        ['1', '0.3000', '0.4000'],
    ]
    assert parts[3].splitlines()[5].split() == ['1', 'first', '0.2000', '0.7000', '0.1000']
    assert parts[4].splitlines()[2].split() == ['1', '10.50', '20.25', '30.00']
    assert len(parts) == 5
    worded = ANALYSIS._replace(words={Cell(2, layer, head): 0.5 for layer in (0, 1) for head in (None, 0, 1)})
    assert 'mIoU of the words' in '\n'.join(tables(worded))


def test_figures_draw_what_was_measured():
    left, right = grouping_figure(ANALYSIS).axes
    curves = {line.get_label(): line.get_ydata() for line in left.lines}
    assert curves['mean of heads'] == pytest.approx([0.2, 0.4])
    assert [line.get_label() for line in right.lines] == ['block 0', 'block 1']
    assert right.lines[1].get_ydata() == pytest.approx([0.3, 0.4])
    left, right = anatomy_figure(ANALYSIS).axes
    assert left.lines[0].get_label() == 'image to text' and left.lines[0].get_ydata() == pytest.approx([0.5, 0.9])
    assert right.lines[2].get_label() == 'pads' and right.lines[2].get_ydata() == pytest.approx([3.0, 30.0])


def test_the_sheet_has_a_tile_for_the_picture_and_for_each_map(backbone, picture):
    sheet = map_sheet(picture, backbone, Options(side=32))
    height = round(WIDTH * 48 / 80)
    assert sheet.shape == (8 * (height + 2), COLUMNS * (WIDTH + 2), 3) and sheet.dtype == np.uint8
    tile = cv2.resize(picture[..., ::-1], (WIDTH, height), interpolation=cv2.INTER_AREA)
    assert np.array_equal(sheet[1 : height + 1, 1 : WIDTH + 1], tile)
    assert sheet[-1, -1].tolist() == [255, 255, 255]


def test_the_first_annotator_counts(tmp_path, picture):
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for name in ('b', 'a', 'c', 'unlabelled'):
        cv2.imwrite(str(tmp_path / 'images' / f'{name}.png'), picture)
        for annotator in range(2):
            if name != 'unlabelled':
                labels = np.full(picture.shape[:2], 10 * ord(name) % 100 + annotator, np.uint8)
                cv2.imwrite(str(tmp_path / 'labels' / f'{name}_{annotator}.png'), labels)
    pairs = labelled_pictures(tmp_path / 'images', tmp_path / 'labels', 2)
    assert [set(np.unique(truth)) for _, truth in pairs] == [{70}, {80}]
    assert pairs[0][0].shape == picture.shape
    (tmp_path / 'labels' / 'a_0.png').rename(tmp_path / 'labels' / 'z.png')
    for path in (tmp_path / 'labels').glob('?_?.png'):
        path.unlink()
    with pytest.raises(NoImages, match=r'no picture in .*images has labels in .*labels'):
        labelled_pictures(tmp_path / 'images', tmp_path / 'labels', 2)


def test_the_command_measures_and_draws(tmp_path, sd3_folder, capsys):
    (tmp_path / 'classes.txt').write_text('cat\ndog\n')
    flags = ['--dir', str(DATA / 'images'), '--labels', str(DATA / 'labels'), '--model', str(sd3_folder), '--device', 'cpu', '--count', '1']
    out = tmp_path / 'new' / 'out'
    assert main(['analyze', *flags, '--out', str(out), '--classes-file', str(tmp_path / 'classes.txt')]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / 'analysis.json').read_text())
    assert results['pictures'] == 1 and len(results['norms']) == 4
    table = {(cell['step'], cell['layer'], cell['head']): cell['covering'] for cell in results['covering']}
    step = next(step for step, _, head in table if head is not None)
    for line in printed.split('block   mean')[1].split('\n\n')[0].splitlines()[1:]:
        layer, *values = line.split()
        assert float(values[0]) == pytest.approx(table[step, int(layer), None], abs=1e-4)
    assert len(results['words_miou']) == 4 * 3 and all(0 <= cell['miou'] <= 1 for cell in results['words_miou'])
    assert sorted(path.name for path in out.iterdir()) == ['analysis.csv', 'analysis.json', 'anatomy.png', 'grouping.png', 'maps.png']
    cells = (out / 'analysis.csv').read_text().splitlines()
    assert cells[0] == 'step,layer,head,covering,words_miou' and len(cells) == 1 + len(table)
    assert all(cv2.imread(str(path)) is not None for path in out.glob('*.png'))
    assert main(['analyze', *flags, '--out', str(out), '--json', '-q']) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {**results, 'words_miou': []} and captured.err == ''


@pytest.mark.parametrize(('labels', 'code', 'words'), [(DATA / 'benchmarks', 5, 'there are no PNG files'), (DATA / 'none', 5, 'none')])
def test_a_folder_without_labels_is_refused_before_the_model_is_read(labels, code, words, tmp_path, capsys):
    flags = ['--dir', str(DATA / 'images'), '--labels', str(labels), '--out', str(tmp_path), '--model', 'sd99']
    assert main(['analyze', *flags]) == code
    assert words in capsys.readouterr().err
