"""The benchmark of names: a small run, and what it says."""

from __future__ import annotations

import json

from click.testing import CliRunner

from padseg.bench import label


def test_a_small_run(tmp_path):
    arguments = ['--size', 'small', '--dtype', 'float32', '--repeats', '1', '--folder', str(tmp_path), '--json']
    ran = CliRunner().invoke(label.command, [*arguments, '--classes', '1', '--classes', '37', '--classes', '38'])
    assert ran.exit_code == 0, ran.output
    measured = json.loads(ran.stdout)
    assert [row['prompts'] for row in measured['classes'].values()] == [1, 1, 2]  # 75 tokens hold 37 names of two
    assert all(
        len(row[name]) == 1 and 0 < row[name][0] < 60 for row in measured['classes'].values() for name in ('picture', 'words', 'again')
    )
    assert 0 < measured['run'][0] < 60
    lines = label.in_words(measured).splitlines()
    assert len(lines) == 3 + 3 and lines[-1].split()[:2] == ['38', '2']
