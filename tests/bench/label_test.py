"""The benchmark of names: a small run, and what it says."""

from __future__ import annotations

import pytest

from padseg.bench import label


@pytest.mark.slow
def test_a_small_run(bench, tmp_path):
    arguments = ['--size', 'small', '--dtype', 'float32', '--repeats', '1', '--folder', str(tmp_path)]
    measured, seconds = bench('label', *arguments, '--classes', '1', '--classes', '37', '--classes', '38')
    rows = measured['classes']
    assert [row['prompts'] for row in rows.values()] == [1, 1, 2]  # 75 tokens hold 37 names of two
    taken = [measured['run'], *(row[name] for row in rows.values() for name in ('picture', 'words', 'again'))]
    assert set(map(len, taken)) == {1} and min(map(min, taken)) > 0 and sum(map(sum, taken)) < seconds
    assert rows['1']['again'] < rows['1']['words']  # no text encoder is read a second time
    lines = label.in_words({**measured, 'run': [2.0], 'classes': {38: {'prompts': 2, 'words': [1.0], 'again': [0.5], 'picture': [3.0]}}})
    assert lines.splitlines()[-1].split() == '38 2 3.00 (3.00..3.00) 1.50 1.00 (1.00..1.00) 0.50 (0.50..0.50)'.split()
