"""Two small runs that have not begun."""

from __future__ import annotations

import pytest
from support.runs import put_picture

from padseg.methods.classical import GridOptions
from padseg.run.job import Job


@pytest.fixture
def job(tmp_path):
    """A run that needs no model, over three pictures."""
    for seed, name in enumerate(('a.png', 'b.png', 'sub/e.png')):
        put_picture(tmp_path / 'in' / name, seed=seed)
    return Job(tmp_path / 'in', tmp_path / 'out', GridOptions(2), method='grid')


@pytest.fixture
def kept(tmp_path, sd3_folder):
    """A run with a model, which can keep token maps, over two pictures."""
    for seed, name in enumerate(('a.png', 'b.png')):
        put_picture(tmp_path / 'in' / name, (40, 56), seed)
    return Job(tmp_path / 'in', tmp_path / 'out', model=str(sd3_folder), device='cpu')
