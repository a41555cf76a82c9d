"""--config: settings of a file are those of flags that are not given, and are refused as they are."""

from __future__ import annotations

import json

import cv2
import pytest

from padseg.commands import main


@pytest.fixture
def place(tmp_path, picture):
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images' / 'a.png'), picture)
    return tmp_path


def used(place, command: list[str], stated: dict[str, object], *flags: str):
    """The settings that a run with this file records."""
    (place / 'own.json').write_text(json.dumps(stated))
    usual = [*command, '--dir', str(place / 'images'), '--out', str(place / 'out'), '--device', 'cpu', '--overwrite', '-q']
    assert main([*usual, '--config', str(place / 'own.json'), *flags]) == 0
    return json.loads((place / 'out' / 'run.json').read_text())['settings']


STATED = {'layer': 1, 'seg4diff': {'step': 3, 'threshold': 1}, 'open-vocabulary': {'layers': [0, 1], 'scores': 'share'}}


def test_flags_that_are_not_given_are_those_of_the_file(place, sd3_folder):
    settings = used(place, ['run', '--model', str(sd3_folder)], STATED, '--step', '2')
    assert (settings['layer'], settings['step'], settings['threshold']) == (1, 2, 1.0) and settings['side'] == 32
    named = used(place, ['label', '--model', str(sd3_folder), '--classes', 'cat,dog'], STATED)
    assert (named['layers'], named['scores'], named['steps']) == ('0, 1', 'share', '8')


def test_a_run_with_the_file_goes_on_with_the_same_flags(place, sd3_folder):
    used(place, ['run', '--model', str(sd3_folder)], STATED)
    usual = ['run', '--model', str(sd3_folder), '--dir', str(place / 'images'), '--out', str(place / 'out'), '--device', 'cpu', '-q']
    assert main([*usual, '--layer', '1', '--step', '3', '--threshold', '1']) == 0
    assert main(usual) == 6


def test_eval_reads_it(place, sd3_folder, capsys):
    (place / 'labels').mkdir()
    height, width = cv2.imread(str(place / 'images' / 'a.png')).shape[:2]
    truth = cv2.resize(cv2.imread(str(place / 'images' / 'a.png'), 0) // 128, (width, height), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(place / 'labels' / 'a.png'), truth)
    (place / 'own.json').write_text(json.dumps(STATED))
    flags = ['--root', str(place), '--regions', '--model', str(sd3_folder), '--device', 'cpu', '-q', '--json']
    assert main(['eval', 'folder', *flags, '--config', str(place / 'own.json')]) == 0
    printed = capsys.readouterr().out
    assert all(stated in printed for stated in ('"layer": 1,', '"step": 3,', '"threshold": 1.0,'))


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('{"seg4diff": {"threshold": -1}}', 'threshold is a number >= 0 or inf; got -1'),
        ('{"layer": true}', 'layer is counted from 0; got True'),
        ('{"seg4diff": {"normalisation": "none"}}', 'normalisation is one of released'),
        ('{"open-vocabulary": {"steps": [1, 1]}}', 'steps are distinct numbers >= 1; got 1, 1'),
        ('{"seg4diff": {"steps": 1}}', 'seg4diff has no settings steps'),
        ('{"other": {}}', 'settings of unknown methods: other'),
        ('{"step": 1}', 'keys that are not settings: step'),
        ('{"steps": 28}', "steps can be set only in padseg.json in the model's folder"),
        ('[]', 'must hold a JSON object'),
        ('{', 'is not valid JSON'),
    ],
)
def test_a_bad_file_is_refused_by_name(text, words, place, capsys):
    (place / 'own.json').write_text(text)
    assert main(['run', '--dir', str(place / 'images'), '--out', str(place / 'out'), '--config', str(place / 'own.json')]) == 2
    told = capsys.readouterr().err
    assert words in told and str(place / 'own.json') in told and not (place / 'out').exists()


def test_no_file(place, capsys):
    assert main(['run', '--dir', str(place / 'images'), '--config', str(place / 'none.json')]) == 2
    assert 'there is no file' in capsys.readouterr().err
