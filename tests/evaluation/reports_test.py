"""Reports of evaluations: the table of pictures, the words, the charts, and the sheet, from small data sets on disk."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from padseg.datasets import VOID, label_folder, open_dataset
from padseg.evaluation import reports, sheet, words
from padseg.evaluation.engine import Evaluation, run_evaluation
from padseg.evaluation.evaluate import Task, score_stored, stored
from padseg.evaluation.protocols import PROTOCOLS, Classes, class_counts, class_map, protocol, rules
from padseg.evaluation.scores import PictureScores, Regions, ScoresRecord
from padseg.exports.colours import voc_colours
from padseg.system.ledger import read_lines

NATIVE = protocol('seg4diff-paper', compare='native')
JPEG = 24  # how far a channel may be from its value inside a flat area


def labels_of(*rows):
    """A label map given as rows of digits; - is 255."""
    return np.array([[255 if letter == '-' else int(letter) for letter in row] for row in rows], np.uint8)


def put(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(labels_of(*rows)).save(path)


def evaluated(tmp_path, num_classes, chosen=NATIVE):
    """The evaluation of tmp_path/pred against tmp_path/truth."""
    task = Task(label_folder(tmp_path / 'truth', num_classes), chosen, stored(tmp_path / 'pred'))
    return run_evaluation(Evaluation(task, 'seg4diff-paper', {'folder': 'pred', 'seed': 7}, out=tmp_path / 'out')).report


def csv_rows(path):
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def four(tmp_path):
    """A perfect picture, one half right, one without a pixel that counts, and one that cannot be read."""
    for name, truth, pred in (('z', '00112', '33445'), ('b/half', '00001111', '22222222'), ('void', '----', '1122')):
        put(tmp_path / 'truth' / f'{name}.png', truth)
        put(tmp_path / 'pred' / f'{name}.png', pred)
    put(tmp_path / 'truth' / 'a.png', '0011')
    (tmp_path / 'pred' / 'a.png').write_bytes(b'nothing')
    return tmp_path


def test_the_table_has_each_picture_by_name(four):
    evaluated(four, 4)
    rows = csv_rows(four / 'out' / 'per_image.csv')
    assert [row['name'] for row in rows] == ['a', 'b/half', 'void', 'z']
    records = {picture.name: picture for picture in read_lines(four / 'out' / 'pictures.jsonl', PictureScores)}
    for row in rows:
        record = records[row['name']]
        assert row['status'] == record.status and row['reason'] == (record.reason or '')
        assert (int(row['pixels']), int(row['regions'])) == (record.pixels, record.found)
        assert [row['accuracy'], row['miou']] == ['' if value is None else repr(value) for value in (record.accuracy, record.miou)]
    assert [row['miou'] for row in rows] == ['', '0.25', '', '1.0']  # of classes 0 and 1: 4/8 and 0
    assert 'not a PNG' in rows[0]['reason']


def test_the_table_is_sorted_whatever_the_order_of_the_records(tmp_path):
    records = [PictureScores(name=name, accuracy=0.5, miou=1 / 3) for name in 'cab']
    reports.write_table(records, True, tmp_path / 'table.csv')
    assert (tmp_path / 'table.csv').read_text().splitlines()[1:] == [f'{name},done,,0,0,0.5,0.3333333333333333' for name in 'abc']


def test_a_table_of_partitions(tmp_path):
    put(tmp_path / 'truth' / 'a_0.png', '0011', '0011')
    put(tmp_path / 'truth' / 'a_1.png', '0000', '0000')
    put(tmp_path / 'pred' / 'a.png', '1122', '1122')
    evaluated(tmp_path, None)
    (row,) = csv_rows(tmp_path / 'out' / 'per_image.csv')
    assert list(row) == ['name', 'status', 'reason', 'pixels', 'regions', 'covering', 'pri', 'vi', 'precision', 'recall', 'f']
    assert [float(row[name]) for name in ('covering', 'vi', 'precision', 'recall', 'f')] == [0.75, 0.5, 1, 1, 1]
    assert (tmp_path / 'out' / 'covering.png').exists() and not (tmp_path / 'out' / 'classes.png').exists()


def test_the_words_hold_scores_rules_and_settings(four):
    report = evaluated(four, 4)
    text = (four / 'out' / 'scores.md').read_text(encoding='utf-8')
    lines = text.splitlines()
    assert lines[0] == '# folder all, protocol seg4diff-paper'
    for line in (
        '| pictures scored | 2 |',
        '| pictures without a pixel that counts | 1 |',
        '| pictures failed | 1 |',
        '| pictures left out | 0 |',
        '| mIoU | 0.6444 |',  # of 6 / 10, 2 / 6 and 1 / 1; class 3 is neither there nor predicted
        '| 0 | 0.6000 |',
        '| 3 | – |',
        '| predictions seed | 7 |',
        f'| numpy | {np.__version__} |',
    ):
        assert line in lines
    expected = rules(NATIVE)
    assert len(expected) > 6
    for name, text in expected.items():
        assert f'- **{name}**: {text}' in lines
    for name, value in report.scores.items():
        assert f'| {words.MEASURES[name]} | {value:.4f} |' in lines
    assert any(line.startswith('| a | ') and 'not a PNG' in line for line in lines)


def test_only_so_many_failed_pictures_are_named(tmp_path):
    report = ScoresRecord(
        protocol='diffseg',
        settings={'dataset': 'd', 'split': 's', 'layout': 'l', 'root': '/r', 'rules': {}},
        counts={'pictures': 0, 'ignored': 0, 'failed': 9, 'missing': 0},
        failed={'a': 'torn', 'b': 'torn'},
        versions={},
    )
    assert words.scores_in_words(report).endswith('| b | torn |\n\nAnd 7 more: per_image.csv lists all.\n')


def test_text_stays_in_its_cell():
    assert words.listing(('a', 'b'), [('x|y\nz', 'snow_man *')]).splitlines()[-1] == r'| x\|y z | snow\_man \* |'


def test_a_sweep_has_one_line_a_threshold():
    row = {'covering': 0.5, 'pri': 0.25, 'vi': 2.0, 'precision': 1.0, 'recall': 0.5, 'f': 2 / 3}
    ends = {'f': 0.7, 'covering': 0.6, 'pri': 0.3, 'vi': 1.5}
    table = words.sweep_table({'rows': [{'threshold': 0.1, **row}], 'ods': {**ends, 'threshold': 0.1}, 'ois': ends})
    assert table.splitlines()[2:] == [
        '| 0.1 | 0.5000 | 0.2500 | 2.0000 | 1.0000 | 0.5000 | 0.6667 |',
        '| ODS, F at 0.1 | 0.6000 | 0.3000 | 1.5000 | – | – | 0.7000 |',
        '| OIS | 0.6000 | 0.3000 | 1.5000 | – | – | 0.7000 |',
    ]


def test_the_chart_grows_with_the_classes(tmp_path):
    sizes = []
    for number in (0, 1, 19, 150):
        iou = {f'{each} $\\no{{$' + 'x' * 50: each / number for each in range(number)}
        reports.write_class_chart({**iou, 'absent': None}, 0.5 if number else None, tmp_path / 'classes.png')
        with PIL.Image.open(tmp_path / 'classes.png') as chart:
            assert chart.format == 'PNG'
            sizes.append(chart.size)
    widths, heights = zip(*sizes, strict=True)
    assert set(widths) == {800}
    assert np.diff(heights).tolist() == [20, 360, 2620]  # 20 pixels a class; one that does not count takes none


def test_bars_are_sorted_and_as_long_as_their_iou(tmp_path):
    reports.write_class_chart({'low': 0.25, 'high': 1.0, 'middle': 0.5}, None, tmp_path / 'classes.png')
    pixels = np.asarray(PIL.Image.open(tmp_path / 'classes.png').convert('RGB')).astype(int)
    blue = (abs(pixels - (0x44, 0x77, 0xAA)).max(2) < 8).sum(1)  # of each line of pixels
    lengths = [int(length) for length in blue[np.diff(blue, prepend=0) > 20]]  # where a bar begins
    assert len(lengths) == 3
    assert np.allclose(np.array(lengths) / lengths[0], (1, 0.5, 0.25), atol=0.02)


def test_a_covering_chart_without_pictures(tmp_path):
    reports.write_covering_chart([], tmp_path / 'covering.png')
    assert PIL.Image.open(tmp_path / 'covering.png').size == (800, 400)


# --- matched predictions


@st.composite
def pairs(draw):
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    number = draw(st.integers(1, 4))
    background = draw(st.sampled_from([None, *range(number)]))
    truth = draw(arrays(np.int32, shape, elements=st.integers(VOID, number - 1)))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, 6))), truth, number, background


@pytest.mark.parametrize('name', PROTOCOLS)
@settings(deadline=None, max_examples=60)
@given(pairs())
def test_the_colours_are_those_classes_that_were_counted(name, drawn):
    """Counting pixels of the matched prediction gives what the protocol counted."""
    pred, truth, number, background = drawn
    chosen = PROTOCOLS[name]
    classes = Classes(tuple(map(str, range(number))), background)
    if chosen.matching == 'none':
        pred = pred % number
    counts = class_counts(pred, truth, classes, chosen)
    truth = class_map(truth, classes, chosen)
    shown = sheet.matched(pred, truth, classes, chosen)
    each = np.arange(number)[:, None, None]
    assert ((shown == each) & (truth == each)).sum((1, 2)).tolist() == counts.true_positive.tolist()
    counted = (truth != VOID) | (chosen.void == 'wrong')
    assert ((shown == each) & (truth != each) & counted).sum((1, 2)).tolist() == counts.false_positive.tolist()


def test_a_region_has_the_colour_of_its_class_by_hand():
    classes = Classes(('a', 'b'), None)
    truth = np.array([[0, 0, 0, 1, 1, VOID]])
    pred = np.array([[7, 7, 9, 4, 4, 4]])
    assert sheet.matched(pred, truth, classes, NATIVE).tolist() == [[0, 0, sheet.UNMATCHED, 1, 1, 1]]
    merged = protocol('diffcut-fixed', compare='native')
    assert sheet.matched(pred, truth, classes._replace(background=1), merged).tolist() == [[0, 0, 1, 1, 1, 1]]


def test_classes_are_painted_void_is_black_and_the_unmatched_are_striped():
    labels = np.repeat(np.array([[VOID, 0, 2, sheet.UNMATCHED]]), 4, 0)
    drawn = sheet.painted_labels(labels, 3)
    assert drawn.shape == (240, 240, 3) and drawn.dtype == np.uint8
    assert {tuple(colour) for colour in drawn[:, :60].reshape(-1, 3).tolist()} == {(0, 0, 0)}
    assert {tuple(colour) for colour in drawn[:, 60:120].reshape(-1, 3).tolist()} == {tuple(voc_colours()[1].tolist())}
    assert {tuple(colour) for colour in drawn[:, 120:180].reshape(-1, 3).tolist()} == {tuple(voc_colours()[3].tolist())}
    stripes = drawn[:, 180:].reshape(-1, 3)
    assert {tuple(colour) for colour in stripes.tolist()} == {tuple(colour) for colour in sheet.STRIPES.tolist()}
    assert 0.45 < (stripes == 255).all(1).mean() < 0.55


def test_more_classes_than_a_byte_has_have_colours():
    colours = sheet.painted_labels(np.arange(300).reshape(15, 20), 300)[6::12, 6::12].reshape(-1, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 300


def test_thumbnails_keep_their_shape_and_have_an_end():
    assert sheet.fitted(100, 200) == (120, 240)
    assert sheet.fitted(2000, 1000) == (360, 180)
    assert sheet.fitted(1, 5000) == (1, 240)


def test_boundaries_are_white():
    labels = np.repeat([[5, 5, 8, 8]], 2, 0)
    drawn = sheet.outlined(labels, np.zeros((120, 240, 3), np.uint8))
    assert (drawn == 255).all(2).sum(1).tolist() == [1] * 120 and (drawn[:, 119] == 255).all()
    alone = sheet.outlined(labels, None)
    assert alone[60, 60].tolist() == voc_colours()[1].tolist() and alone[60, 180].tolist() == voc_colours()[2].tolist()
    assert (alone[:, 119] == 255).all()


# --- the sheet


def folder(tmp_path, names, number=3, size=(24, 36)):
    """Pictures, all red, with labels in `number` upright stripes of classes 0, 1, ...; the first line is void."""
    for kind in ('images', 'labels'):
        (tmp_path / 'set' / kind).mkdir(parents=True)
    truth = np.repeat([np.arange(size[1]) * number // size[1]], size[0], 0).astype(np.uint8)
    truth[0] = 255
    for name in names:
        PIL.Image.new('RGB', size[::-1], (220, 30, 30)).save(tmp_path / 'set' / 'images' / f'{name}.png')
        PIL.Image.fromarray(truth).save(tmp_path / 'set' / 'labels' / f'{name}.png')
    (tmp_path / 'set' / 'padseg.toml').write_text(f'classes = {json.dumps([f"{each}|$x" for each in range(number)])}\n')
    return truth


def cell(drawn, place, column, height, row_height=None):
    """A thumbnail of the sheet: place and column from 0, all rows of one height."""
    line = sheet.LETTERS + sheet.GAP
    top = 2 * line + place * (line + (row_height or height) + sheet.GAP)
    left = sheet.GAP + column * (sheet.WIDTH + sheet.GAP)
    return np.asarray(drawn).astype(int)[top : top + height, left : left + sheet.WIDTH]


def near(colours, expected):
    return abs(colours - np.asarray(expected)).max() < JPEG


def test_the_sheet_shows_picture_truth_and_matched_prediction(tmp_path):
    truth = folder(tmp_path, ['a', 'b'])
    for name, values in (('a', [40, 20, 30]), ('b', [1, 1, 2])):  # all right; the first two classes are one region
        (tmp_path / 'pred').mkdir(exist_ok=True)
        PIL.Image.fromarray(np.append(values, [0] * 253).astype(np.uint8)[truth % 255]).save(tmp_path / 'pred' / f'{name}.png')
    dataset = open_dataset('folder', tmp_path / 'set')
    run_evaluation(Evaluation(Task(dataset, NATIVE, stored(tmp_path / 'pred')), 'seg4diff-paper', {}, out=tmp_path / 'out'))
    drawn = PIL.Image.open(tmp_path / 'out' / 'sheet.jpg')
    assert drawn.format == 'JPEG' and drawn.size == (752, 21 + 2 * (21 + 160 + 8))
    colours = voc_colours().astype(int)
    for place in (0, 1):
        assert near(cell(drawn, place, 0, 160)[10:-10, 10:-10], (220, 30, 30))
        shown = cell(drawn, place, 1, 160)
        for number in range(3):
            assert near(shown[20:-10, 80 * number + 10 : 80 * number + 70], colours[number + 1])
        assert near(shown[1:4, 20:60], 0)
    best, worst = cell(drawn, 0, 2, 160), cell(drawn, 1, 2, 160)
    for number, expected in enumerate((1, 2, 3)):
        assert near(best[20:-10, 80 * number + 10 : 80 * number + 70], colours[expected])
    for number, expected in enumerate((1, 1, 3)):
        assert near(worst[20:-10, 80 * number + 10 : 80 * number + 70], colours[expected])
    assert (np.asarray(drawn)[21:40, :200] < 100).any()  # something is written above the row
    assert '| 1\\|$x | ' in (tmp_path / 'out' / 'scores.md').read_text(encoding='utf-8')


def test_without_pictures_the_first_column_is_left_out(four):
    evaluated(four, 4)
    drawn = PIL.Image.open(four / 'out' / 'sheet.jpg')
    assert drawn.size == (504, 21 + (21 + 48 + 8) + (21 + 30 + 8))  # z is 5 x 1 pixels, b/half 8 x 1
    assert near(cell(drawn, 0, 0, 48)[10:-10, 10:80], voc_colours()[1].astype(int))


def test_a_model_prediction_is_read_from_the_output(tmp_path):
    """It lies there at the compared pixels, which are the square in the middle."""
    truth = folder(tmp_path, ['a'])
    PIL.Image.fromarray((truth[:, 6:30] + 1).astype(np.uint8)).save(tmp_path / 'a.png')
    (tmp_path / 'out' / 'labels').mkdir(parents=True)
    (tmp_path / 'a.png').rename(tmp_path / 'out' / 'labels' / 'a.png')
    task = Task(open_dataset('folder', tmp_path / 'set'), PROTOCOLS['seg4diff-paper'])
    image, true, shown = sheet.sheet_row(task, task.dataset.samples[0], 'title', tmp_path / 'out').cells
    assert image.shape == true.shape == shown.shape == (240, 240, 3)
    assert np.array_equal(true[10:], shown[10:])
    assert [true[100, column].tolist() for column in (30, 120, 210)] == voc_colours()[1:4].tolist()


def test_a_picture_that_cannot_be_shown_is_grey_and_one_that_is_gone_has_no_cells(tmp_path):
    folder(tmp_path, ['a'])
    (sample,) = open_dataset('folder', tmp_path / 'set').samples
    task = Task(open_dataset('folder', tmp_path / 'set'), NATIVE, {'a': sample.truths[0]})
    PIL.Image.new('RGB', (5, 5)).save(sample.image)  # of another size than its labels
    cells = sheet.sheet_row(task, sample, 'title', tmp_path).cells
    assert len(cells) == 3 and (cells[0] == 224).all()
    sample.truths[0].unlink()
    gone = sheet.sheet_row(task, sample, 'title', tmp_path)
    assert gone.cells == [] and gone.title.startswith('title: ') and 'a.png' in gone.title
    assert sheet.sheet([gone], ('picture', 'ground truth', 'prediction')).size == (752, 21 + 21 + 8)


def test_the_best_and_the_worst_are_chosen_once_each():
    def pictures(number):
        return [PictureScores(name=f'p{place}', miou=(place * 7 % number) / number) for place in range(number)]

    def ranks(number):
        return [round(each.miou * number) for _, each in sheet.ranked(pictures(number))]

    assert ranks(20) == [19, 18, 17, 16, 3, 2, 1, 0]
    assert ranks(6) == [5, 4, 3, 2, 1, 0]
    assert ranks(1) == [0]
    titles = [title for title, _ in sheet.ranked(pictures(6))]
    assert titles[0].startswith('best, mIoU 0.8333: p') and titles[-1].startswith('worst, mIoU 0.0000: p')
    partition = PictureScores(name='x', regions=(Regions(covering=0.5, pri=1, vi=0, boundary=(0, 0, 0, 0)),))
    unscored = [PictureScores(name='y', status='failed'), PictureScores(name='z', status='ignored')]
    assert sheet.ranked([partition, *unscored]) == [('best, covering 0.5000: x', partition)]


def test_odd_names_do_no_harm(tmp_path):
    names = ('grün 山 🙂', 'x' * 240, os.fsdecode(b'bytes \xff'), "it's | a *b*")
    for name in names:
        put(tmp_path / 'truth' / f'{name}.png', '0011')
        put(tmp_path / 'pred' / f'{name}.png', '1122')
    put(tmp_path / 'truth' / f'{"y" * 240}.png', '0011')
    (tmp_path / 'pred' / f'{"y" * 240}.png').write_bytes(b'')
    report = evaluated(tmp_path, 2)
    task = Task(label_folder(tmp_path / 'truth', 2), NATIVE, stored(tmp_path / 'pred'))
    records = list(score_stored(task, task.dataset.samples))
    reports.write_reports(tmp_path / 'out', report, task, lambda: records)
    rows = csv_rows(tmp_path / 'out' / 'per_image.csv')
    assert {row['name'] for row in rows} == {names[0], names[1], r'bytes \udcff', names[3], 'y' * 240}
    assert 'y' * 240 in (tmp_path / 'out' / 'scores.md').read_text(encoding='utf-8')
    assert PIL.Image.open(tmp_path / 'out' / 'sheet.jpg').size == (504, 21 + 4 * (21 + 60 + 8))


def test_a_long_title_fits_and_keeps_both_ends():
    font = sheet.ImageFont.load_default(sheet.LETTERS)
    title = f'best, mIoU 0.5000: {"W" * 5000}.end'
    short = sheet.within(title, font, 488)
    assert 400 < font.getlength(short) <= 488
    assert short.startswith('best, mIoU 0.5000: W') and short.endswith('W.end') and '...' in short
    assert sheet.within('short', font, 488) == 'short'
    assert [sheet.shortened('abcdefghij', length) for length in (10, 9, 8)] == ['abcdefghij', 'abc...hij', 'ab...hij']


def test_all_failed_still_gives_reports(tmp_path):
    put(tmp_path / 'truth' / 'a.png', '0011')
    (tmp_path / 'pred').mkdir()
    (tmp_path / 'pred' / 'a.png').write_bytes(b'')
    for out, number in (('classes.png', 2), ('covering.png', None)):
        report = evaluated(tmp_path, number)
        assert report.counts['failed'] == 1
        assert {'scores.md', 'per_image.csv', 'sheet.jpg', out} <= {path.name for path in (tmp_path / 'out').iterdir()}
        for path in (tmp_path / 'out').glob('[!.]*'):
            path.unlink()
