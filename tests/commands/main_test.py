"""The command line: exit codes, what goes to stdout and to stderr, and flags that cannot disagree with Options."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import signal
import struct
import termios
from pathlib import Path

import click
import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
from support.processes import padseg, start

from padseg import segment
from padseg.backbones.spec import BACKBONES
from padseg.commands import COMMANDS, main
from padseg.errors import ModelUnavailable
from padseg.methods.seg4diff import Options
from padseg.system import progress
from padseg.version import __version__


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / 'in').mkdir()
    for name in ('a.jpg', 'b.png', 'c.png'):
        PIL.Image.fromarray(picture).save(tmp_path / 'in' / name)
    return tmp_path / 'in'


@pytest.fixture
def arguments(folder, tmp_path, sd3_folder):
    return ['run', '--dir', str(folder), '--out', str(tmp_path / 'out'), '--model', str(sd3_folder), '--device', 'cpu']


def test_run_in_a_process_of_its_own(arguments, tmp_path):
    ran = padseg(*arguments, '--json')
    assert ran.returncode == 0, ran.stderr
    counts = json.loads(ran.stdout)
    assert (counts['images'], counts['done'], counts['failed'], counts['signal']) == (3, 3, 0, None)
    assert ran.stderr.splitlines()[-1] == (
        f'3 done, 0 failed, {counts["regions"]:.1f} regions per picture on average; label maps in {tmp_path}/out/labels'
    )
    assert len(list((tmp_path / 'out' / 'labels').iterdir())) == 3


def test_a_terminal_shows_a_bar_and_sigterm_stops_cleanly(arguments, folder, tmp_path):
    for number in range(200):
        (folder / f'{number}.png').symlink_to('b.png')
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    running = start(main, arguments, stderr=Path(os.ttyname(theirs)))
    shown = b''
    while b'pictures' not in shown:
        shown += os.read(ours, 1000)
    running.process.terminate()
    ran = running.wait()
    os.close(theirs)
    os.close(ours)
    assert b'/203' in shown
    assert (ran.returncode, ran.stdout) == (128 + signal.SIGTERM, '')
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['status'] == 'interrupted'


def test_some_failed(arguments, folder, tmp_path, capsys):
    (folder / 'empty.png').write_bytes(b'')
    assert main(arguments) == 3
    captured = capsys.readouterr()
    assert captured.out == ''
    assert f'3 done, 1 failed (see {tmp_path}/out/failures.jsonl), ' in captured.err
    assert main(arguments) == 3
    assert '3 done (3 by an earlier run), 1 failed' in capsys.readouterr().err


def test_quiet(arguments, capsys):
    assert main([*arguments, '-q']) == 0
    assert capsys.readouterr() == ('', '')


def test_options_reach_the_run(arguments, tmp_path):
    assert (
        main([*arguments, '--threshold', 'inf', '--layer', '1', '--components', '--geometry', 'stretch', '--seed', '7', '--overlay']) == 0
    )
    settings = json.loads((tmp_path / 'out' / 'run.json').read_text())['settings']
    assert settings.items() >= {'threshold': 'inf', 'layer': 1, 'components': True, 'geometry': 'stretch', 'seed': 7}.items()
    assert len(list((tmp_path / 'out' / 'overlays').iterdir())) == 3


@pytest.mark.parametrize(
    ('extra', 'code', 'words'),
    [
        (['--step', '0'], 2, 'step is counted from the end of the schedule, from 1; got 0'),
        (['--layer', '99'], 2, 'layer is one of 0..'),
        (['--threshold', '-1'], 2, 'threshold is a number >= 0'),
        (['--model', 'sd99'], 2, 'tiny, sd3, sd3.5'),
        (['--batch', '0'], 2, '--batch'),
        (['--normalisation', 'none'], 2, 'minmax-softmax'),
        (['--model', '{tmp}'], 4, 'transformer/config.json'),
        (['--dir', '{tmp}/nowhere'], 5, 'nowhere'),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_a_code(arguments, tmp_path, capsys, extra, code, words):
    assert main([*arguments, *(part.format(tmp=tmp_path) for part in extra)]) == code
    captured = capsys.readouterr()
    assert captured.out == ''
    assert words in captured.err
    assert 'Traceback' not in captured.err
    if 'Usage:' not in captured.err:
        assert captured.err.startswith('padseg: ') and captured.err.count('\n') == 1


def test_an_output_of_other_settings(arguments, capsys):
    assert main(arguments) == 0
    assert main([*arguments, '--seed', '1']) == 6
    assert 'seed 0 there, 1 now' in capsys.readouterr().err
    assert main([*arguments, '--seed', '1', '--overwrite']) == 0


@pytest.mark.parametrize('wrong', [['nothing'], ['run'], ['run', '--dir', '.', 'surplus'], ['run', '--nothing'], []])
def test_wrong_usage(wrong, capsys):
    assert main(wrong) == 2
    assert 'Usage: padseg' in capsys.readouterr().err


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_is_listed_with_help_for_each_option(command, capsys):
    from padseg.commands import group

    assert main(['--help']) == 0
    assert f'  {command} ' in capsys.readouterr().out
    found = group.get_command(click.Context(group), command)
    assert found is not None and found.help
    assert [option.name for option in found.params if isinstance(option, click.Option) and not option.help] == []


def test_flags_say_what_options_say(capsys):
    assert main(['run', '--help']) == 0
    text = ' '.join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Options):
        assert f'--{field.name.replace("_", "-")} ' in text
        default = field.metadata.get('default') or ("the model's own" if field.default is None else field.default)
        assert f'{field.metadata["help"]} (default: {default})' in text
    assert '--components / --no-components' in text


def test_version(capsys):
    assert main(['--version']) == 0
    out = capsys.readouterr().out
    assert out.startswith(f'padseg {__version__} (python 3.')
    assert 'torch 2.' in out


def test_models(capsys):
    assert main(['models', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {name: row['repo'] for name, row in rows.items()} == {name: spec.repo for name, spec in BACKBONES.items()}
    assert main(['models']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != ' '] == ['name', *BACKBONES]


@pytest.fixture
def truth(tmp_path):
    for name, rows in {'pred/a.jpg.png': [[1, 1, 2, 2]], 'truth/a.png': [[0, 0, 1, 1]]}.items():
        (tmp_path / name).parent.mkdir()
        PIL.Image.fromarray(np.array(rows, np.uint8)).save(tmp_path / name)
    return ['eval', '--pred', str(tmp_path / 'pred'), '--labels', str(tmp_path / 'truth')]


def test_eval_with_classes(truth, capsys):
    assert main([*truth, '--num-classes', '3', '--json']) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed['counts'] == {'pictures': 1, 'ignored': 0, 'failed': 0, 'missing': 0}
    assert printed['scores'] == {'accuracy': 1.0, 'mean_accuracy': 1.0, 'miou': 1.0, 'miou_order_free': 1.0}
    assert printed['iou'] == {'0': 1.0, '1': 1.0, '2': None}
    assert main([*truth, '--num-classes', '3']) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ['protocol', 'seg4diff-paper,', 'compared', 'at', 'native']
    assert lines[-3:] == [['0', '1.0000'], ['1', '1.0000'], ['2', '–']]


def test_eval_of_partitions(truth, capsys):
    assert main([*truth, '--regions', '--json']) == 0
    scores = {'covering': 1.0, 'pri': 1.0, 'vi': 0.0, 'precision': 1.0, 'recall': 1.0, 'f': 1.0, 'regions': 2.0}
    assert json.loads(capsys.readouterr().out)['scores'] == scores


def test_eval_must_know_what_to_compare(truth, tmp_path, capsys):
    assert main(truth) == 2
    assert main(['eval']) == 2
    assert main(['eval', 'camvid']) == 2
    assert main(['eval', 'camvid', '--root', str(tmp_path), '--num-classes', '3']) == 2
    assert main(['eval', '--check']) == 2
    assert main([*truth, '--regions', '--num-classes', '2']) == 2
    capsys.readouterr()
    assert main([*truth, '--num-classes', '3', '--protocol', 'best']) == 2
    assert 'diffseg, diffcut' in capsys.readouterr().err
    (tmp_path / 'truth' / 'a.png').rename(tmp_path / 'truth' / 'z.png')
    assert main([*truth, '--regions']) == 5
    assert 'no label map for z' in capsys.readouterr().err


def test_eval_warns_of_matching_by_rows(truth, capsys):
    assert main([*truth, '--num-classes', '3', '--protocol', 'seg4diff-release']) == 0
    assert 'every row of pixels, which inflates the score' in capsys.readouterr().err


def test_eval_of_a_data_set_that_is_not_there(tmp_path, capsys):
    assert main(['eval', 'voc21', '--root', str(tmp_path), '--check']) == 5
    assert 'SegmentationClass' in capsys.readouterr().err
    assert main(['eval', 'voc22', '--root', str(tmp_path), '--check']) == 2
    assert 'voc21' in capsys.readouterr().err


def test_kept_token_maps_are_merged_again_without_the_model(tmp_path, sd3_folder, picture, capsys):
    (tmp_path / 'in/sub').mkdir(parents=True)
    for name in ('a.png', 'sub/b.png'):
        PIL.Image.fromarray(picture).save(tmp_path / 'in' / name)
    run = ['run', '--dir', f'{tmp_path}/in', '--model', str(sd3_folder), '--device', 'cpu', '-q']
    wanted = ['--threshold', '0', '--normalisation', 'share', '--components', '--superpixels', '20', '--overlay']
    assert main([*run, '--out', f'{tmp_path}/direct', *wanted]) == 0
    assert main([*run, '--out', f'{tmp_path}/made', '--save-maps']) == 0
    assert main(['merge', f'{tmp_path}/made', '--out', f'{tmp_path}/merged', '-q', *wanted]) == 0

    def results(out):
        return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob('*.*')) if path.is_file() and path.parent != out}

    assert results(tmp_path / 'merged') == results(tmp_path / 'direct')
    records = [json.loads((tmp_path / out / 'run.json').read_text()) for out in ('direct', 'merged')]
    assert records[0]['settings'] == records[1]['settings'] and records[0]['key'] == records[1]['key']
    assert main(['merge', f'{tmp_path}/made', '--out', f'{tmp_path}/merged', '-q', '--threshold', '0.5']) == 6
    assert main(['merge', f'{tmp_path}/made', '--out', f'{tmp_path}/made', '-q']) == 2
    assert main(['merge', f'{tmp_path}/direct', '--out', f'{tmp_path}/other', '-q']) == 5
    assert 'holds no token maps' in capsys.readouterr().err
    PIL.Image.fromarray(picture[::-1]).save(tmp_path / 'in/a.png')
    assert main(['merge', f'{tmp_path}/made', '--out', f'{tmp_path}/other', '-q', '--threshold', '0']) == 3
    failures = [json.loads(line) for line in (tmp_path / 'other/failures.jsonl').read_text().splitlines()]
    assert [line['input'] for line in failures] == ['a.png'] and 'no token maps for this picture' in failures[0]['reason']


def test_groups_are_neither_recorded_nor_asked_for_where_superpixels_are_not_joined(tmp_path, sd3_folder, picture, capsys):
    PIL.Image.fromarray(picture).save(tmp_path / 'a.png')
    run = ['run', str(tmp_path / 'a.png'), '--model', str(sd3_folder), '--device', 'cpu', '-q', '--superpixels', '20']
    assert main([*run, '--out', f'{tmp_path}/grouped', '--join', '0.5', '--regroup', '0.7', '--save-maps']) == 0
    assert main([*run, '--out', f'{tmp_path}/direct', '--join', '0']) == 0
    assert main(['merge', f'{tmp_path}/grouped', '--out', f'{tmp_path}/merged', '--join', '0', '-q']) == 0
    records = [json.loads((tmp_path / out / 'run.json').read_text()) for out in ('grouped', 'direct', 'merged')]
    assert [record['settings'].get('regroup') for record in records] == [0.7, None, None]
    assert records[1]['settings'] == records[2]['settings'] and records[1]['key'] == records[2]['key']
    for command in ([*run, '--regroup', '0.7', '--join', '0'], ['merge', f'{tmp_path}/grouped', '--regroup', '0.5', '--join', '0', '-q']):
        assert main([*command, '--out', f'{tmp_path}/other']) == 2
        assert 'it needs --superpixels and --join above 0' in capsys.readouterr().err


def test_plain_progress_is_a_line_now_and_then(monkeypatch, capsys):
    for seconds, lines in ((0.0, 3), (3600.0, 0)):
        monkeypatch.setattr(progress, 'SECONDS_PER_LINE', seconds)
        shown = progress.shown(quiet=False)
        shown.start(3)
        for _ in range(3):
            shown.step()
        shown.close()
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == lines
    assert isinstance(progress.shown(quiet=True), progress.Silent)


def test_a_method_has_its_papers_model_where_the_embedded_one_is_of_no_use_to_it(capsys, tmp_path, monkeypatch, picture):
    for method, model in (('seg4diff', 'tiny'), ('diffcut', 'tiny'), ('diffseg', 'sd1.4'), ('felzenszwalb', 'tiny')):
        assert main(['run', '--method', method, '--help']) == 0
        shown = ' '.join(capsys.readouterr().out.split())
        assert f'or a folder [default: {model}]' in shown, shown
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ModelUnavailable, match='stable-diffusion-v1-4'):
        segment(picture, method='diffseg')
