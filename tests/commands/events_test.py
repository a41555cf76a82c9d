"""`--log-json`: every line on stderr is a JSON object, whatever happens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ran(*arguments) -> tuple[int, list[dict], str]:
    """Exit code, the events on stderr, and stdout."""
    command = [sys.executable, '-m', 'padseg', 'run', '--device', 'cpu', '--log-json', *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    for event in events:
        assert datetime.fromisoformat(event.pop('time')).utcoffset().total_seconds() == 0
    return done.returncode, events, done.stdout


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    shutil.copy(ROOT / 'data/images/scene-22.png', folder / 'a.png')
    (folder / 'b.png').write_bytes(b'')
    return folder


def test_a_run_as_events(pictures, tmp_path):
    code, events, out = ran('--dir', pictures, '--out', tmp_path / 'out', '--json')
    assert code == 3
    assert [event['event'] for event in events] == ['start', 'picture', 'picture', 'end']
    assert events[0]['pending'] == 2
    written = [json.loads(line) for line in (tmp_path / 'out/manifest.jsonl').read_text().splitlines()]
    assert [{name: value for name, value in event.items() if name != 'event'} for event in events[1:3]] == written
    end = {name: value for name, value in events[-1].items() if name != 'event'}
    assert end == json.loads(out) and (end['done'], end['failed']) == (1, 1)


def test_errors_and_warnings_as_events(pictures, tmp_path):
    code, events, out = ran('--dir', pictures, '--out', tmp_path / 'out', '--model', 'nonsense')
    assert (code, out, len(events)) == (2, '', 1)
    assert events[0]['event'] == 'error' and events[0]['exit_code'] == 2 and events[0]['message'].startswith('unknown model nonsense')
    assert ran('--dir', tmp_path / 'none')[0] == 5
    assert ran('--dir', pictures, '--out', tmp_path / 'out', '--shard', '1/2', '--include', 'a*')[0] in (0, 5)
    assert ran('--dir', pictures, '--out', tmp_path / 'out', '--shard', '2/2', '--include', 'a*')[0] in (0, 5)
    code, events, _ = ran('--collect', tmp_path / 'out')
    assert [event['event'] for event in events] == ['log', 'end'] and events[0]['level'] == 'warning'
    assert 'no finished run was found of the shards' in events[0]['message']
