"""Evaluations that are killed, or find the disk full, and output folders in which something lies in the way."""

from __future__ import annotations

import os

import numpy as np
import PIL.Image
import pytest
from support import eval_faults
from support.jobs import with_small_files
from support.processes import padseg, start


@pytest.fixture
def command(tmp_path):
    """Label maps of three pictures, of which the first two regions of a truth are one in the prediction, and the words that score them."""
    for number, name in enumerate('abc'):
        truth = np.repeat([[0, 0, 1, 2, 2, 2]], 4, 0).astype(np.uint8)
        for folder, labels in (('truth', truth), ('pred', np.maximum(truth, number % 2 + 1))):
            (tmp_path / folder).mkdir(exist_ok=True)
            PIL.Image.fromarray(labels).save(tmp_path / folder / f'{name}.png')
    folders = ['--pred', tmp_path / 'pred', '--labels', tmp_path / 'truth', '--num-classes', '4', '--out', tmp_path / 'out']
    return ['eval', '-q', '--json', *map(str, folders)]


@pytest.mark.parametrize(('fault', 'overwrite', 'first'), [('kill', False, 0), ('kill', True, 8), ('full', True, 0)])
def test_at_every_write_nothing_is_lost_and_scores_of_other_settings_never_count(command, tmp_path, fault, overwrite, first):
    every = int(os.environ.get('PADSEG_TEST_EVERY', '9'))
    new, old = [*command[:-2], '--protocol', 'diffcut-fixed'], [*command[:-2], '--protocol', 'seg4diff-release']
    end = command[-2:]
    arguments = ([*new, '--overwrite', *end], [*old, *end]) if overwrite else ([*new, *end], [])
    ran = start(eval_faults.at_every_write, *arguments, tmp_path / 'out', fault, first, every).wait()
    assert ran.returncode == 0, ran.stderr
