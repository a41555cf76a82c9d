"""`--log-json`: every line on stderr is a JSON object, whatever happens."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from padseg.commands import main

ROOT = Path(__file__).parents[2]


def events(stderr: str) -> list[dict]:
    """What was said, without the times, which are UTC."""
    said = [json.loads(line) for line in stderr.splitlines()]
    for event in said:
        assert datetime.fromisoformat(event.pop('time')).utcoffset().total_seconds() == 0
    return said


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    shutil.copy(ROOT / 'data/images/scene-22.png', folder / 'a.png')
    (folder / 'b.png').write_bytes(b'')
    return folder


def test_a_run_as_events(run, pictures, tmp_path):
    code, (start, *done, end), out = run('--dir', pictures, '--out', tmp_path / 'out', '--json')
    assert code == 3
    assert [start['event'], start['pending'], end.pop('event')] == ['start', 2, 'end']
    written = [json.loads(line) for line in (tmp_path / 'out/manifest.jsonl').read_text().splitlines()]
    assert done == [{'event': 'picture', **entry} for entry in written]
    assert end == json.loads(out) and (end['done'], end['failed']) == (1, 1)


@pytest.fixture
def run(capfd):
    def run(*arguments: object) -> tuple[int, list[dict], str]:
        """Exit code, the events on stderr, and stdout."""
        code = main(['run', '--device', 'cpu', '--log-json', *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, events(err), out

    return run


@pytest.mark.parametrize(
    ('arguments', 'code', 'words'),
    [(('--dir', '{in}', '--model', 'nonsense'), 2, 'unknown model nonsense'), (('--dir', '{in}/none'), 5, 'there is no folder or picture')],
)
def test_an_error_as_an_event(run, pictures, tmp_path, arguments, code, words):
    arguments = [each.replace('{in}', str(pictures)) for each in arguments]
    ended, (event,), out = run('--out', tmp_path / 'out', *arguments)
    assert (ended, out, event['event'], event['exit_code']) == (code, '', 'error', code)
    assert words in event['message']


def test_a_warning_as_an_event(run, pictures, tmp_path):
    """One picture is in one of two shards: the other has nothing to do, and is missing when they are joined."""
    shards = [run('--dir', pictures, '--out', tmp_path / 'out', '--shard', f'{number}/2', '--include', 'a*') for number in (1, 2)]
    codes = [code for code, _, _ in shards]
    assert sorted(codes) == [0, 5]
    code, (warning, end), _ = run('--collect', tmp_path / 'out')
    assert (code, warning['event'], warning['level'], end['event'], end['done']) == (3, 'log', 'warning', 'end', 1)
    assert warning['message'] == f'no finished run was found for the shards {1 + codes.index(5)}/2'
