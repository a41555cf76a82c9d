"""The notebooks: clean as committed, and running from top to bottom where only the package and the sample pictures are."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from support.kernels import run_kernel
from support.processes import Started, start

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


class ForkedKernel(AsyncKernelManager):
    """A kernel in a process that has the libraries already."""

    started: Started | None = None

    async def _async_start_kernel(self, cwd: str, **_: Any) -> None:
        self.write_connection_file()
        self.started = start(run_kernel, self.connection_file, folder=Path(cwd))

    start_kernel = _async_start_kernel

    @property
    def has_kernel(self) -> bool:
        return self.started is not None and self.started.process.is_alive()

    async def _async_is_alive(self) -> bool:
        return self.has_kernel

    is_alive = _async_is_alive

    async def _async_shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        if self.started:
            self.started.process.kill()
            self.started.process.join()

    shutdown_kernel = _async_shutdown_kernel


RUN = [pytest.param(path, marks=[pytest.mark.slow] if path.stem == 'attention' else []) for path in NOTEBOOKS]


@pytest.fixture(scope='module', params=RUN, ids=lambda path: path.name)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    """A notebook after a run beside a copy of the sample pictures, in this interpreter, away from the user's own Jupyter settings."""
    checkout = tmp_path_factory.mktemp('checkout')
    home = tmp_path_factory.mktemp('jupyter')
    for name in ('data/images', 'data/labels', 'notebooks'):
        shutil.copytree(ROOT / name, checkout / name)
    write_kernel_spec(str(home / 'kernels' / 'padseg'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', str(home))
        patch.setenv('JUPYTER_RUNTIME_DIR', str(home / 'runtime'))
        patch.setenv('IPYTHONDIR', str(home / 'ipython'))
        patch.setenv('PYTHONPATH', os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))))
        notebook = read(checkout / 'notebooks' / request.param.name)
        client = NotebookClient(notebook, timeout=240, kernel_name='padseg', resources={'metadata': {'path': str(checkout / 'notebooks')}})
        client.kernel_manager_class = ForkedKernel
        client.execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    return ''.join(output.text for cell in code_cells(notebook) for output in cell.outputs if output.get('name') == 'stdout')


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ['attention.ipynb', 'quickstart.ipynb']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.name)
def test_committed_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.source for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None] == []


def test_runs_from_top_to_bottom(ran):
    for cell in code_cells(ran):
        assert cell.execution_count is not None
        assert [output.evalue for output in cell.outputs if output.output_type == 'error'] == []


def test_draws_all_it_announces(ran):
    drawn = [sum('image/png' in output.get('data', {}) for output in cell.outputs) for cell in code_cells(ran)]
    assert drawn == [0, *[1] * (len(drawn) - 1)]


def test_what_is_printed_holds_together(ran):
    text = printed(ran)
    if 'expert is block' in text:
        check_blocks(text)
    else:
        check_merge(text)


def check_blocks(text: str) -> None:
    """The best block is the best of those listed, and better than one region; shares are shares."""
    best, covering, one = re.search(r'best block: (\d), covering ([\d.]+); one region: ([\d.]+)', text).groups()
    means = dict(re.findall(r'block (\d): mean of heads ([\d.]+)', text))
    assert len(means) == 6 and max(means, key=lambda layer: float(means[layer])) == best
    assert float(means[best]) == float(covering) > float(one)
    shares = [float(value) for value in re.findall(r'image to text ([\d.]+)', text)]
    assert len(shares) == 6 and all(0 < value < 1 for value in shares)


def check_merge(text: str) -> None:
    groups = int(re.search(r'(\d+) groups of 77 tokens', text)[1])
    assert 2 <= groups <= 10
    steps = re.findall(r'anchor +(\d+) takes +(\d+) new', text)
    assert len(steps) == groups
    assert sum(1 + int(new) for _, new in steps) == 77
    assert sum(int(new) > 0 for _, new in steps) >= 2
