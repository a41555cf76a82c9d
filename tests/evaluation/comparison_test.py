"""Comparisons: an evaluation for each method, one table for each protocol, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal

import cv2
import numpy as np
import PIL.Image
import pytest
from support.processes import start

from padseg.commands import main
from padseg.datasets import DATASETS
from padseg.errors import UsageError
from padseg.evaluation.comparison import compare
from padseg.evaluation.comparison_reports import in_words, write_csv
from padseg.evaluation.comparison_rows import Row, Shown, measured_row, published_row, tables
from padseg.evaluation.contenders import COSTS, Cost, evenly, mark_of
from padseg.evaluation.job import Asked, ground_of
from padseg.evaluation.papers import figures
from padseg.evaluation.protocols import PROTOCOLS
from padseg.evaluation.scores import ScoresRecord
from padseg.methods import METHODS

CLASSICAL = ('felzenszwalb', 'slic-rag', 'kmeans', 'grid')
COST_COLUMNS = ('seconds', 'processor_seconds', 'memory_mib', 'gpu_memory_mib')
TABLES = ('compare.csv', 'compare.md', 'compare.png', 'sheet.jpg')


@pytest.fixture
def bsds(tmp_path, picture):
    """Six pictures with regions as two annotators saw them, in the layout of BSDS500's PNG files."""
    truth = np.full(picture.shape[:2], 1, np.uint8)
    truth[:20, 30:], truth[20:, 30:] = 2, 3
    for folder in ('images/val', 'labels/val'):
        (tmp_path / 'bsds' / folder).mkdir(parents=True)
    for number in range(6):
        cv2.imwrite(str(tmp_path / f'bsds/images/val/{number}.png'), np.roll(picture, 9 * number, 1)[..., ::-1])
        for annotator in range(2):
            cv2.imwrite(str(tmp_path / f'bsds/labels/val/{number}_{annotator}.png'), np.roll(truth, 9 * number + 2 * annotator, 1))
    return tmp_path / 'bsds'


@pytest.fixture
def named(tmp_path, picture):
    """Three pictures with the classes cat and photo."""
    truth = np.zeros(picture.shape[:2], np.uint8)
    truth[:, 30:] = 1
    for folder, array in (('images', picture), ('labels', truth)):
        (tmp_path / 'set' / folder).mkdir(parents=True)
        for number in range(3):
            PIL.Image.fromarray(np.roll(array, 7 * number, 1)).save(tmp_path / f'set/{folder}/{number}.png')
    (tmp_path / 'set/padseg.toml').write_text('classes = ["cat", "photo"]\n')
    return tmp_path / 'set'


def command(*arguments, code=0):
    assert main(['compare', *map(str, arguments), '--no-apart', '--quiet']) == code


def rows_in(out):
    with (out / 'compare.csv').open(encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def without_costs(out):
    return [{name: cell for name, cell in row.items() if name not in COST_COLUMNS} for row in rows_in(out)]


@pytest.mark.slow
def test_each_row_is_an_evaluation_and_an_impossible_pair_is_named(bsds, sd3_folder, tmp_path, capsys):
    out = tmp_path / 'out'
    words = ('bsds500', '--root', bsds, '--models', sd3_folder, '--methods', 'seg4diff:threshold=0.001,diffcut,diffseg')
    command(*words, '--out', out)
    assert f'–  diffseg {sd3_folder}  (not possible: diffseg does not support {sd3_folder} of the family sd3; supported: unet)' in (
        capsys.readouterr().out
    )
    rows = {row['method']: row for row in rows_in(out)}
    assert list(rows) == ['seg4diff', 'diffcut', 'diffseg', *CLASSICAL]
    assert rows['diffseg']['state'] == 'not possible' and rows['diffseg']['folder'] == rows['diffseg']['partitions: covering'] == ''
    assert (rows['seg4diff']['settings'], rows['diffcut']['settings']) == ('threshold 0.001', '')
    for name in ('seg4diff', 'grid'):
        options = ('--model', sd3_folder, '--threshold', '0.001') if name == 'seg4diff' else ()
        single = tmp_path / 'single' / name
        arguments = ('bsds500', '--root', bsds, '--method', name, *options, '-q')
        assert main(['eval', *map(str, arguments), '--out', str(single)]) == 0
        folder = out / rows[name]['folder']
        for file in ('scores.json', 'per_image.csv', 'scores.md', 'sheet.jpg'):
            assert (folder / file).read_bytes() == (single / file).read_bytes(), (name, file)
        scores = json.loads((single / 'scores.json').read_text())['scores']
        assert {measure: float(rows[name][f'partitions: {measure}']) for measure in scores} == scores
    before = {name: (out / name).read_bytes() for name in TABLES}
    records = (out / rows['diffcut']['folder'] / 'pictures.jsonl').read_bytes()
    command(*words, '--out', out)  # which does nothing twice
    assert {name: (out / name).read_bytes() for name in TABLES} == before
    assert (out / rows['diffcut']['folder'] / 'pictures.jsonl').read_bytes() == records

    cut = tmp_path / 'cut'  # as if it had been killed at the third picture of the second method
    shutil.copytree(out, cut)
    for name in (*TABLES, rows['grid']['folder']):
        shutil.rmtree(cut / name) if (cut / name).is_dir() else (cut / name).unlink()
    for file in ('pictures.jsonl', COSTS):
        lines = (cut / rows['diffcut']['folder'] / file).read_text().splitlines(keepends=True)
        (cut / rows['diffcut']['folder'] / file).write_text(''.join(lines[:2]) + lines[2][:20])
    command(*words, '--out', cut)
    assert without_costs(cut) == without_costs(out)
    assert (cut / 'sheet.jpg').read_bytes() == before['sheet.jpg']
    costs = [Cost.model_validate_json(line) for line in (cut / rows['diffcut']['folder'] / COSTS).read_text().splitlines()]
    assert [cost.name for cost in costs] == [str(number) for number in range(6)]
    assert main(['compare', *map(str, words), '--sample', '3', '--out', str(out), '--no-apart', '-q']) == 6
    assert 'split val there, val, 3 of 6 pictures now' in capsys.readouterr().err


def first_then_killed(arguments, line):
    """Run the command in a process and kill it when it says this line; returns when all that it started is gone."""
    started = start(main, arguments, stderr=line)
    with line.open(encoding='utf-8') as said:
        for text in said:
            if '2 of 2' in text:
                os.kill(started.process.pid, signal.SIGKILL)
    assert started.wait().returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_and_continued_it_says_what_it_would_have_said(bsds, tmp_path):
    words = ['compare', 'bsds500', '--root', str(bsds), '--methods', 'kmeans,grid', '--no-classical', '--out']
    os.mkfifo(tmp_path / 'said')
    first_then_killed([*words, str(tmp_path / 'cut')], tmp_path / 'said')
    assert not (tmp_path / 'cut/compare.csv').exists()
    for out in ('cut', 'whole'):
        assert main([*words, str(tmp_path / out), '--no-apart', '--quiet']) == 0
    assert without_costs(tmp_path / 'cut') == without_costs(tmp_path / 'whole')
    memory = {row['method']: row['memory_mib'] for row in rows_in(tmp_path / 'cut')}
    assert 20 < float(memory['kmeans']) < 1000  # a process of its own, which knew no model
    assert {row['memory_mib'] for row in rows_in(tmp_path / 'whole')} == {''}


def test_names_and_regions_have_a_table_each(named, texts_folder, tmp_path):
    out = tmp_path / 'out'
    command('folder', '--root', named, '--models', texts_folder, '--methods', 'open-vocabulary,grid', '--no-classical', '--out', out)
    rows = {row['method']: row for row in rows_in(out)}
    assert {name: row['protocol'] for name, row in rows.items()} == {'grid': 'seg4diff-paper', 'open-vocabulary': 'seg4diff-ovss'}
    for row in rows.values():
        for column, cell in row.items():
            protocol, colon, _ = column.partition(': ')
            assert not colon or bool(cell) == (protocol == row['protocol']), column
    words = (out / 'compare.md').read_text()
    assert words.index('## seg4diff-paper') < words.index('| grid |') < words.index('## seg4diff-ovss') < words.index('| open-vocabulary |')
    assert compare('folder', named, out, ['grid'], classical=False, apart=False)[0].scores['miou'] == float(
        rows['grid']['seg4diff-paper: miou']
    )


WRONG = {
    '--methods goca': 'goca names classes, and bsds500 has regions without classes: leave it out',
    '--methods grid --protocols diffcut': 'bsds500 has regions without classes, which are compared in one way only: leave out --protocols',
    '--methods grid --names all': '--names is for methods that take class names, and none is compared here',
    '--methods grid --papers --sample 2': 'published figures are for all pictures of a split: give either --papers or --sample',
    '--methods grid:size=3': 'grid takes options as grid:OPTION=VALUE, of cells; got size=3',
    '--methods grid:cells=many': 'cells is a whole number; got many',
    '--methods grid:cells=0': 'cells is a whole number in 1..10000; got 0',
    '--methods grid:cells=2:cells=3': 'grid:cells=2:cells=3 gives cells twice',
    '--methods nothing': 'method is one of seg4diff, open-vocabulary,',
    '--models nothing': 'nothing',
}


@pytest.mark.parametrize('options', WRONG)
def test_what_cannot_be_compared_is_said_in_one_line(bsds, tmp_path, options, capsys):
    command('bsds500', '--root', bsds, '--out', tmp_path / 'out', *options.split(), code=2)
    said = capsys.readouterr().err
    assert WRONG[options] in said and said.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'methods': 'grid'}, "methods is a list of names; got 'grid'"),
        ({'names': 'some'}, 'names is one of present, all; got some'),
        ({'sample': 0}, 'sample is a number of pictures >= 1; got 0'),
        ({'sheet': 'best'}, 'sheet is one of even, worst; got best'),
    ],
)
def test_what_python_cannot_compare(bsds, tmp_path, options, words):
    with pytest.raises(UsageError, match=f'^{words}$'):
        compare('bsds500', bsds, tmp_path / 'out', **options)


def test_a_method_needs_a_protocol_and_a_protocol_a_method(named, tmp_path, capsys):
    words = ('folder', '--root', named, '--out', tmp_path / 'out', '--protocols')
    command(*words, 'diffcut', '--methods', 'goca', code=2)
    assert 'goca names classes, which no protocol of --protocols scores: add one of seg4diff-ovss, goca, conceptattention' in (
        capsys.readouterr().err
    )
    command(*words, 'goca', '--methods', 'diffcut', code=2)
    assert 'diffcut gives regions without names, which no protocol of --protocols scores: add one of diffseg,' in capsys.readouterr().err
    command(*words, 'goca,diffcut', '--methods', 'diffcut', code=2)
    assert 'goca has nothing to score: no method that is asked for names classes with these models' in capsys.readouterr().err


def test_a_folder_of_another_command_or_a_link_is_refused(bsds, tmp_path, capsys):
    words = ('bsds500', '--root', bsds, '--methods', 'grid', '--no-classical', '--out')
    for name, make in (('run.json', lambda path: path.write_text('{}')), ('partitions-grid', lambda path: path.symlink_to(bsds))):
        out = tmp_path / f'with-{name}'
        out.mkdir()
        make(out / name)
        command(*words, out, code=6)
        said = capsys.readouterr().err
        assert str(out) in said and said.count('\n') == 1
    command(*words, tmp_path / 'out')
    (tmp_path / 'out/partitions-grid' / COSTS).write_text('{"name": "1", "settings": "", "seconds": -1, "processor": 0}\n{}\n')
    command(*words, tmp_path / 'out', code=6)
    assert 'costs.jsonl, line 1 is not a record' in capsys.readouterr().err


# tables made by hand


def of(protocol, method, model, covering, **more):
    return Row(Shown(protocol, method, model, {}, not model), 'measured', {'pictures': 4, 'ignored': 0}, {'covering': covering}, **more)


def test_a_table_by_hand(bsds, tmp_path):
    rules = {'dataset': 'bsds500', 'names': None}
    costs = {
        'mark': '0a1b',
        'device': 'cpu float32',
        'seconds': 0.25,
        'processor': 0.5,
        'memory': 3 * 2**20,
        'folder': 'one',
        'rules': rules,
    }
    rows = [
        of('partitions', 'diffcut', 'tiny', 0.5, settings={'tau': 0.3}, **costs),
        Row(Shown('partitions', 'diffseg', 'tiny'), 'not possible', reason='=no | net', rules={}),
        Row(
            Shown('partitions', 'diffcut', 'ssd-1b'),
            'published',
            scores={'covering': 0.75},
            source='A paper, table 1',
            measured_with='PAMR',
        ),
    ]
    write_csv(tables(rows), tmp_path / 'table.csv')
    assert (tmp_path / 'table.csv').read_text().splitlines() == [
        'protocol,method,model,state,settings,hash,device,pictures,ignored,failed,missing,partitions: covering,'
        'seconds,processor_seconds,memory_mib,gpu_memory_mib,folder,reason,source,measured_with',
        'partitions,diffcut,tiny,measured,tau 0.3,0a1b,cpu float32,4,0,,,0.5,0.25,0.5,3.0,,one,,,',
        "partitions,diffseg,tiny,not possible,,,,,,,,,,,,,,'=no | net,,",
        'partitions,diffcut,ssd-1b,"published, not measured here",,,,,,,,0.75,,,,,,,"A paper, table 1",PAMR',
    ]
    asked = dict.fromkeys(Asked._fields) | {'dataset': 'bsds500', 'root': bsds, 'allow_missing': False}
    text = in_words(tables(rows), [ground_of(Asked(**asked))])
    assert text.split('\n\n')[4:] == [
        '| method | model | settings | hash | pictures | covering | s a picture | of processors | MiB |\n'
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n'
        '| diffcut | tiny | tau 0.3 | 0a1b | 4 | 0.5000 | 0.250 | 0.500 | 3 |\n'
        '| diffseg | tiny | not possible: =no \\| net | – | – | – | – | – | – |\n'
        '| diffcut | ssd-1b | published, not measured here, note 1 | – | – | 0.7500 | – | – | – |',
        '1. A paper, table 1. Measured with: PAMR.\n',
    ]


def test_the_hash_does_not_depend_on_where_things_are():
    settings = {'root': '/a', 'rules': {'void': 'ignored'}, 'predictions': {'folder': '/b', 'weights': '01'}}
    assert mark_of(settings) == mark_of(settings | {'root': '/c', 'predictions': {'folder': '/d', 'weights': '01'}})
    assert mark_of(settings) != mark_of(settings | {'predictions': {'folder': '/b', 'weights': '02'}})


def test_figures_of_two_protocols_are_refused_in_one_column(tmp_path):
    def row(name, **settings):
        record = ScoresRecord(protocol='diffcut', settings={'compare': '128', 'predictions': {}, **settings}, versions={})
        (tmp_path / name).mkdir()
        return measured_row(Shown('diffcut', 'grid'), record, {}, tmp_path / name, [])

    one, other = row('one', rules={'void': 'ignored'}), row('other', rules={'void': 'background'})
    with pytest.raises(UsageError, match='^other and one differ in rules: figures of two protocols cannot stand in one column$'):
        tables([one, other])
    named = row('named', rules={'void': 'ignored'}, predictions={'names': 'all'})
    with pytest.raises(UsageError, match='differ in names'):
        tables([one, named])
    assert tables([one, other._replace(shown=Shown('diffcut-fixed', 'grid'))]).keys() == {'diffcut', 'diffcut-fixed'}


@pytest.mark.parametrize(
    ('length', 'number', 'places'), [(6, 6, [0, 1, 2, 3, 4, 5]), (10, 2, [2, 7]), (101, 4, [12, 37, 63, 88]), (2, 5, [0, 1])]
)
def test_pictures_are_spread_evenly(length, number, places):
    assert evenly(length, min(number, length)) == places


# published figures


def test_published_figures_say_what_they_are():
    for figure in figures():
        splits = DATASETS[figure.dataset].splits
        assert figure.protocol in PROTOCOLS and figure.metric == 'miou' and 0 < figure.value < 1
        assert figure.splits and set(figure.splits) <= splits.keys() and figure.source and figure.measured_with
        assert figure.method.split(',')[0] in METHODS
        assert (figure.names is None) == (PROTOCOLS[figure.protocol].matching != 'none')


def test_papers_are_marked_and_never_stand_with_another_protocol(tmp_path, picture):
    home = tmp_path / 'VOCdevkit' / 'VOC2012'
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (home / folder).mkdir(parents=True)
    truth = np.full(picture.shape[:2], 15, np.uint8)
    truth[:, :30] = 0
    PIL.Image.fromarray(picture).save(home / 'JPEGImages/one.jpg')
    PIL.Image.fromarray(truth).save(home / 'SegmentationClass/one.png')
    (home / 'ImageSets/Segmentation/val.txt').write_text('one\n')
    out = tmp_path / 'out'
    command(
        *('voc21', '--root', tmp_path, '--out', out, '--methods', 'grid:cells=1', '--no-classical', '--papers'),
        *('--protocols', 'diffcut,diffcut-fixed'),
    )
    rows = rows_in(out)
    assert [(row['protocol'], row['state']) for row in rows if row['method'] == 'grid'] == [
        ('diffcut', 'measured'),
        ('diffcut-fixed', 'measured'),
    ]
    papers = [row for row in rows if row['state'] == 'published, not measured here']
    assert [(row['method'], row['model'], row['diffcut: miou'], row['diffcut-fixed: miou']) for row in papers] == [
        ('diffcut', 'ssd-1b', '0.652', ''),
        ('diffcut', 'ssd-1b', '0.62', ''),
        ('diffseg', 'sd1.4', '0.498', ''),
    ]
    assert all(row['source'] and row['measured_with'] and not row['seconds'] for row in papers)
    words = (out / 'compare.md').read_text()
    assert words.count('published, not measured here, note') == 3 < words.index('## diffcut-fixed')
    asked = dict.fromkeys(Asked._fields) | {'dataset': 'voc21', 'root': tmp_path, 'protocol': 'diffcut-fixed', 'allow_missing': False}
    figure = next(figure for figure in figures() if (figure.dataset, figure.protocol) == ('voc21', 'diffcut'))
    with pytest.raises(UsageError, match='a figure for voc21 by diffcut cannot stand beside those for voc21 by diffcut-fixed'):
        published_row(figure, ground_of(Asked(**asked)))
