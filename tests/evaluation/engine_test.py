"""Evaluations of data sets: a model or stored label maps, records that a later run continues, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import PIL.Image
import pytest

from padseg import segment
from padseg.commands import main
from padseg.evaluation.evaluate import evaluate
from padseg.evaluation.protocols import WORDS, protocol
from padseg.evaluation.scores import PictureScores
from padseg.exports.png import read_label_map, write_label_map
from padseg.images import read
from padseg.methods.seg4diff import Options
from padseg.system.ledger import read_lines

NAMES = ('a', 'b', 'c')


@pytest.fixture
def camvid(tmp_path, picture):
    """Three pictures with labels 1..3, and 11 = void in a corner."""
    truth = np.full(picture.shape[:2], 1, np.uint8)
    truth[:20, 30:] = 2
    truth[20:, 30:] = 3
    truth[:4, :4] = 11
    for number, name in enumerate(NAMES):
        for folder, array in (('images', picture[:, :, ::-1]), ('labels', truth)):
            (tmp_path / 'set' / folder / 'val').mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / 'set' / folder / 'val' / f'{name}.png'), np.roll(array, 8 * number, 1))
    return tmp_path / 'set'


@pytest.fixture
def bsds(tmp_path, picture):
    truth = np.full(picture.shape[:2], 1, np.uint8)
    truth[:, 30:] = 2
    for folder in ('images/val', 'labels/val'):
        (tmp_path / 'bsds' / folder).mkdir(parents=True)
    for name in NAMES:
        cv2.imwrite(str(tmp_path / f'bsds/images/val/{name}.jpg'), picture)
        cv2.imwrite(str(tmp_path / f'bsds/labels/val/{name}_0.png'), truth)
        cv2.imwrite(str(tmp_path / f'bsds/labels/val/{name}_1.png'), np.roll(truth, 2, 1))
    return tmp_path / 'bsds'


def evaluated(*arguments, code=0):
    assert main(['eval', *map(str, arguments), '--json', '-q']) == code


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_model_is_scored_as_its_stored_label_maps_are(camvid, backbone, sd3_folder, tmp_path, capsys):
    """The whole picture at its own size: label maps made one by one and scored afterwards give the same figures."""
    options = Options(threshold=0.0)
    for name in NAMES:
        path = camvid / 'images' / 'val' / f'{name}.png'
        write_label_map(segment(path, backbone, options), tmp_path / 'pred' / f'{name}.png')
    evaluated('camvid', '--root', camvid, '--model', sd3_folder, '--threshold', 0, '--geometry', 'whole', '--compare', 'native')
    streamed = printed(capsys)
    evaluated('camvid', '--root', camvid, '--pred', tmp_path / 'pred')
    stored = printed(capsys)
    assert stored['scores'] == streamed['scores'] and stored['iou'] == streamed['iou']
    assert 0 < stored['scores']['miou'] < 1 and stored['counts']['pictures'] == 3
    assert streamed['settings']['predictions']['threshold'] == 0.0 and len(streamed['settings']['predictions']['weights']) == 64
    scores = evaluate(tmp_path / 'pred', camvid / 'labels' / 'val', num_classes=11, ignore=11)
    assert scores.miou == stored['scores']['miou']


def test_the_protocol_decides_what_the_model_sees(camvid, sd3_folder, tmp_path, capsys):
    evaluated('camvid', '--root', camvid, '--model', sd3_folder, '--out', tmp_path / 'out', '--threshold', 0)
    report = printed(capsys)
    assert report['protocol'] == 'seg4diff-paper' and report['settings']['compare'] == 'crop'
    assert report['settings']['predictions']['geometry'] == 'seg4diff-paper'
    assert read_label_map(tmp_path / 'out/labels/a.png').shape == (48, 48)
    pixels = {picture.name: picture.pixels for picture in read_lines(tmp_path / 'out/pictures.jsonl', PictureScores)}
    assert pixels['a'] == 48 * 48  # the void corner lies outside the square
    evaluated('camvid', '--root', camvid, '--model', sd3_folder, '--protocol', 'diffseg', '--out', tmp_path / 'out2')
    assert read_label_map(tmp_path / 'out2/labels/a.png').shape == (512, 512)


def test_maps_are_enlarged_straight_to_the_compared_size(camvid, backbone, sd3_folder, tmp_path, capsys):
    """DiffSeg compares at 512 x 512: the same as segmenting the cut square with the maps of the centre, numbered as its proposals are."""
    from padseg.methods.seg4diff import token_maps
    from padseg.methods.stages.labels import label_map
    from padseg.methods.stages.proposals import merge
    from padseg.types import Frame

    evaluated('camvid', '--root', camvid, '--model', sd3_folder, '--protocol', 'diffseg', '--threshold', 0, '--out', tmp_path / 'out')
    options = Options(threshold=0.0, geometry='diffseg')
    maps = token_maps(read(camvid / 'images/val/b.png'), backbone, options)
    proposals = merge(maps, 0.0, options.resolve(backbone.spec).normalisation)
    assert proposals.frame.box == (0, 16, 48, 48)
    expected = label_map(proposals._replace(frame=Frame((512, 512), (0, 0, 512, 512))))
    number = [-1] + [proposals.members.index(tokens) for tokens in expected.tokens]  # of each region
    assert len(set(number)) == len(number) > 3 and max(number) > len(number)  # some proposals have no pixel
    assert np.array_equal(read_label_map(tmp_path / 'out/labels/b.png'), np.array(number)[expected.labels])


def test_a_later_run_continues_and_gives_the_same(camvid, sd3_folder, tmp_path, capsys):
    arguments = ('camvid', '--root', camvid, '--model', sd3_folder)
    evaluated(*arguments, '--out', tmp_path / 'whole')
    whole = printed(capsys)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    lines = (tmp_path / 'cut/pictures.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'cut/pictures.jsonl').write_text(lines[0] + lines[1][:30])  # killed while writing the second
    changed = (tmp_path / 'cut/labels/a.png').stat().st_mtime_ns
    evaluated(*arguments, '--out', tmp_path / 'cut')
    assert printed(capsys)['scores'] == whole['scores']
    assert (tmp_path / 'cut/labels/a.png').stat().st_mtime_ns == changed
    for name in ('scores.md', 'per_image.csv', 'classes.png'):
        assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name
    first, second = (sorted((tmp_path / folder / 'pictures.jsonl').read_text().splitlines()) for folder in ('whole', 'cut'))
    assert first == second


def test_a_changed_label_map_is_scored_again(camvid, tmp_path, capsys):
    pred = tmp_path / 'pred'
    shutil.copytree(camvid / 'labels/val', pred)
    arguments = ('camvid', '--root', camvid, '--pred', pred, '--out', tmp_path / 'out')
    evaluated(*arguments)
    assert printed(capsys)['scores']['miou'] == 1.0
    PIL.Image.fromarray(np.zeros((48, 80), np.uint8)).save(pred / 'b.png')
    evaluated(*arguments)
    after = printed(capsys)
    assert after['scores']['miou'] < 1.0
    assert after['scores']['miou'] == evaluate(pred, camvid / 'labels/val', 11, 11).miou


def test_an_output_of_other_settings_is_refused(camvid, tmp_path, capsys):
    arguments = ('camvid', '--root', camvid, '--pred', camvid / 'labels/val', '--out', tmp_path / 'out')
    evaluated(*arguments)
    assert main(['eval', *map(str, arguments), '--protocol', 'diffcut']) == 6
    assert 'rules.background many-to-one' in capsys.readouterr().err.replace('rules.background class', 'rules.background many-to-one')
    evaluated(*arguments, '--protocol', 'diffcut', '--overwrite')
    (tmp_path / 'out/scores.json').write_text('[]')
    assert main(['eval', *map(str, arguments)]) == 6


def test_records_that_cannot_be_are_scored_again_and_lines_that_are_none_refused(camvid, tmp_path, capsys):
    arguments = ('camvid', '--root', camvid, '--pred', camvid / 'labels/val', '--out', tmp_path / 'out')
    evaluated(*arguments)
    expected = printed(capsys)['scores']
    path = tmp_path / 'out/pictures.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    for counts in ({'400': [1, 0, 0, 0]}, {'-1': [1, 0, 0, 0]}):  # no classes of the data set
        path.write_text(json.dumps({**json.loads(lines[0]), 'counts': counts}) + '\n' + ''.join(lines[1:]))
        evaluated(*arguments)
        assert printed(capsys)['scores'] == expected and sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    path.write_bytes(b'\xff no record\n' + ''.join(lines).encode())
    evaluated(*arguments, code=6)
    assert 'pictures.jsonl, line 1 is not a record of a picture: choose another --out, or --overwrite' in capsys.readouterr().err
    evaluated(*arguments, '--overwrite')
    assert printed(capsys)['scores'] == expected


def test_a_broken_file_is_named_and_counted(camvid, tmp_path, capsys):
    pred = tmp_path / 'pred'
    shutil.copytree(camvid / 'labels/val', pred)
    (pred / 'b.png').write_bytes((pred / 'b.png').read_bytes()[:50])
    arguments = ('camvid', '--root', camvid, '--pred', pred, '--out', tmp_path / 'out')
    evaluated(*arguments, code=3)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report['counts'] == {'pictures': 2, 'ignored': 0, 'failed': 1, 'missing': 0}
    assert 'b.png' in report['failed']['b'] and 'padseg: b: ' in captured.err
    shutil.copy(camvid / 'labels/val/b.png', pred / 'b.png')
    evaluated(*arguments)  # failed pictures are tried again
    assert printed(capsys)['counts']['pictures'] == 3


def test_missing_pictures_are_said(camvid, tmp_path, capsys):
    (tmp_path / 'pred').mkdir()
    shutil.copy(camvid / 'labels/val/a.png', tmp_path / 'pred')
    assert main(['eval', 'camvid', '--root', str(camvid), '--pred', str(tmp_path / 'pred')]) == 5
    assert 'no label map for b, c' in capsys.readouterr().err
    evaluated('camvid', '--root', camvid, '--pred', tmp_path / 'pred', '--allow-missing')
    assert printed(capsys)['counts'] == {'pictures': 1, 'ignored': 0, 'failed': 0, 'missing': 2}


def test_partitions_and_a_sweep_over_thresholds(bsds, sd3_folder, tmp_path, capsys):
    arguments = ('bsds500', '--root', bsds, '--model', sd3_folder, '--out', tmp_path / 'out')
    evaluated(*arguments, '--sweep', '0,0.0001,1000')
    sweep = printed(capsys)['sweep']
    assert [row['threshold'] for row in sweep['rows']] == [0.0, 0.0001, 1000.0]
    assert sweep['rows'][2]['recall'] == 0.0 and sweep['rows'][2]['covering'] == (50**2 + 30**2) / 80**2
    assert sweep['ods']['covering'] == max(row['covering'] for row in sweep['rows']) <= sweep['ois']['covering']
    assert sweep['ods']['f'] == max(row['f'] for row in sweep['rows'])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out/maps').iterdir()}
    assert len(kept) == 3
    evaluated(*arguments, '--sweep', '0', '--overwrite')  # from the kept maps
    again = printed(capsys)
    assert again['scores']['covering'] == sweep['rows'][0]['covering'] and again['sweep'] is None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'out/maps').iterdir()} == kept
    evaluated('bsds500', '--root', bsds, '--model', sd3_folder, '--threshold', '0')
    assert printed(capsys)['scores'] == again['scores']
    for wrong in ('low', '-1', 'inf'):
        assert main(['eval', 'bsds500', '--root', str(bsds), '--sweep', wrong]) == 2


def test_maps_of_other_settings_are_not_taken(bsds, sd3_folder, tmp_path, capsys):
    arguments = ('bsds500', '--root', bsds, '--model', sd3_folder, '--out', tmp_path / 'out', '--sweep', '0')
    evaluated(*arguments)
    first = printed(capsys)['scores']
    evaluated(*arguments, '--layer', '0', '--overwrite')
    changed = printed(capsys)['scores']
    evaluated('bsds500', '--root', bsds, '--model', sd3_folder, '--threshold', '0', '--layer', '0')
    assert printed(capsys)['scores'] == changed != first


def test_regions_without_names_are_no_classes(camvid, sd3_folder, capsys):
    assert main(['eval', 'camvid', '--root', str(camvid), '--model', str(sd3_folder), '--protocol', 'goca']) == 2
    assert 'scores named regions' in capsys.readouterr().err


def test_a_look_at_the_data_only(camvid, capsys):
    assert main(['eval', 'camvid', '--root', str(camvid), '--check']) == 0
    text = capsys.readouterr().out
    assert '80 x 48' in text and 'building (1)' in text and 'ignored' in text
    (camvid / 'labels/val/a.png').write_bytes(b'no picture')
    assert main(['eval', 'camvid', '--root', str(camvid), '--check', '--json']) == 3
    assert printed(capsys)['good'] is False


def test_values_that_a_data_set_does_not_have_are_refused_with_their_histogram(camvid, tmp_path, capsys):
    shutil.copytree(camvid / 'labels/val', tmp_path / 'pred')
    odd = np.full((48, 80), 1, np.uint8)
    odd[:2, :5] = 77
    PIL.Image.fromarray(odd).save(camvid / 'labels/val/c.png')
    assert main(['eval', 'camvid', '--root', str(camvid), '--pred', str(tmp_path / 'pred')]) == 2
    words = capsys.readouterr().err
    assert 'c.png' in words and '77' in words and '10' in words


def test_in_a_process_of_its_own_without_torch(camvid, tmp_path):
    """Stored label maps need no torch, which takes seconds to import."""
    (tmp_path / 'torch.py').write_text("raise ImportError('no torch here')\n")
    ran = subprocess.run(
        [sys.executable, '-m', 'padseg', 'eval', 'camvid', '--root', camvid, '--pred', camvid / 'labels/val', '--workers', '2'],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join((str(tmp_path), os.getcwd()))},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert 'miou             1.0000' in ran.stdout.splitlines()


def test_protocols_of_the_api(camvid):
    rules = protocol('diffcut-fixed', compare='native')
    assert evaluate(camvid / 'labels/val', camvid / 'labels/val', 12, None, background=11, rules=rules).miou == 1.0


def test_names_that_are_no_utf8_are_continued(camvid, tmp_path, capsys):
    odd = os.fsdecode(b'caf\xe9')
    for folder in ('images', 'labels'):
        shutil.copy(camvid / folder / 'val/a.png', camvid / folder / 'val' / f'{odd}.png')
    arguments = ('camvid', '--root', camvid, '--pred', camvid / 'labels/val', '--out', tmp_path / 'out')
    evaluated(*arguments)
    capsys.readouterr()
    before = (tmp_path / 'out/pictures.jsonl').read_bytes()
    assert {picture.name for picture in read_lines(tmp_path / 'out/pictures.jsonl', PictureScores)} == {*NAMES, odd}
    evaluated(*arguments)
    assert printed(capsys)['counts']['pictures'] == 4
    assert (tmp_path / 'out/pictures.jsonl').read_bytes() == before


def test_flags_can_stand_for_the_file_that_describes_a_folder(camvid, capsys):
    arguments = ('folder', '--root', camvid, '--pred', camvid / 'labels/val')
    evaluated(*arguments, code=5)  # there is no padseg.toml
    capsys.readouterr()
    evaluated(*arguments, '--num-classes', '4', '--ignore', '11')
    assert printed(capsys)['iou'] == {'0': None, '1': 1.0, '2': 1.0, '3': 1.0}
    (camvid / 'padseg.toml').write_text("classes = ['sky', 'building', 'pole', 'road']\nignore_index = 11\n")
    evaluated(*arguments)
    assert printed(capsys)['iou'] == {'sky': None, 'building': 1.0, 'pole': 1.0, 'road': 1.0}


def test_runs_and_evaluations_keep_out_of_each_others_folders(camvid, sd3_folder, tmp_path, capsys):
    run = ['run', '--dir', str(camvid / 'images'), '--model', str(sd3_folder), '-q', '--out']
    evaluation = ['eval', 'camvid', '--root', str(camvid), '--model', str(sd3_folder), '-q', '--out']
    assert main([*run, str(tmp_path / 'first')]) == 0
    assert main([*evaluation, str(tmp_path / 'first')]) == 6
    assert 'holds run.json' in capsys.readouterr().err
    assert main([*evaluation, str(tmp_path / 'second')]) == 0
    assert main([*run, str(tmp_path / 'second')]) == 6
    assert 'holds scores.json' in capsys.readouterr().err


# ---- stored records of other settings, and records that somebody made up


def test_an_evaluation_by_earlier_rules_of_a_preset_is_not_continued(camvid, tmp_path, capsys):
    """diffseg once renumbered ids: its scores do not mix with those of now."""
    arguments = ('camvid', '--root', camvid, '--pred', camvid / 'labels/val', '--protocol', 'diffseg', '--out', tmp_path / 'out')
    evaluated(*arguments)
    path = tmp_path / 'out/scores.json'
    record = json.loads(path.read_text())
    assert record['settings']['rules']['ids'].startswith('as they are')
    record['settings']['rules']['ids'] = f'compact: {WORDS["ids"]["compact"]}'
    path.write_text(json.dumps(record))
    evaluated(*arguments, code=6)
    assert 'rules.ids compact' in capsys.readouterr().err
    evaluated(*arguments, '--overwrite')


def test_what_values_mean_is_among_the_settings(camvid, tmp_path, capsys):
    folders = ('--pred', camvid / 'labels/val', '--labels', camvid / 'labels/val', '--num-classes', 12, '--out', tmp_path / 'out')
    evaluated(*folders, '--ignore', 11)
    first = printed(capsys)
    assert first['settings']['values'] == {'first': 0, 'ignored': [11], 'background': None}
    for others in ([], ['--ignore', 3], ['--ignore', 11, '--background', 1]):
        evaluated(*folders, *others, code=6)
        assert 'holds an evaluation made with other settings (values.' in capsys.readouterr().err
    path = tmp_path / 'out/scores.json'
    record = json.loads(path.read_text())
    del record['settings']['values']  # as padseg wrote it before
    path.write_text(json.dumps(record))
    evaluated(*folders, '--ignore', 3)
    assert printed(capsys)['iou']['3'] is None and first['iou']['3'] == 1.0


@pytest.mark.parametrize(
    'field',
    [
        {'counts': {'0': [2**70, 0, 0, 0]}},
        {'counts': {'0': [-1, 0, 0, 0]}},
        {'pixels': 2**70},
        {'found': -1},
        {'status': 'odd'},
        {'name': []},
    ],
)
def test_made_up_records_are_refused_in_one_line(camvid, tmp_path, capsys, field):
    arguments = ('camvid', '--root', camvid, '--pred', camvid / 'labels/val', '--out', tmp_path / 'out')
    evaluated(*arguments)
    path = tmp_path / 'out/pictures.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(lines[0]), **field}) + '\n' + ''.join(lines[1:]))
    capsys.readouterr()
    evaluated(*arguments, code=6)
    assert 'pictures.jsonl, line 1 is not a record of a picture' in capsys.readouterr().err


def test_made_up_records_of_partitions_are_refused(bsds, tmp_path, capsys):
    (tmp_path / 'pred').mkdir()
    for name in NAMES:
        shutil.copy(bsds / f'labels/val/{name}_0.png', tmp_path / f'pred/{name}.png')
    arguments = ('bsds500', '--root', bsds, '--pred', tmp_path / 'pred', '--out', tmp_path / 'out')
    evaluated(*arguments)
    path = tmp_path / 'out/pictures.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[0])
    for field in ({'covering': float('inf')}, {'vi': float('nan')}, {'boundary': [10**400, 1, 1, 1]}, {'boundary': [-5, 1, 1, 1]}):
        path.write_text(json.dumps({**record, 'regions': [{**record['regions'][0], **field}]}) + '\n' + ''.join(lines[1:]))
        evaluated(*arguments, code=6)
    path.write_text(''.join(lines))
    evaluated(*arguments)
