"""What a terminal shows of downloads and of long loads, and that nothing else shows it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
import sys
import termios
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from support.hub import serve
from support.processes import start

import padseg
from padseg.backbones.source import read_hash
from padseg.backbones.weights import sizes_in
from padseg.commands import main
from padseg.system import progress

LEFT = (
    r'\d+%\|[^|]*\| [\d.]+[kM]?/[\d.]+[kM]? \[\d\d:\d\d<\d\d:\d\d, [\d.]+[kM]?B/s\]'  # share, bytes, time and time left, bytes per second
)


class Terminal:
    """A terminal of 120 columns. place: its file; text: all that was written to it."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack('4H', 40, 120, 0, 0))
        self.place = Path(os.ttyname(self.theirs))
        self.said = b''
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        while part := os.read(self.ours, 4096):
            self.said += part
            if self.said.endswith(b'\x04end'):
                return

    def text(self) -> str:
        """All that was written until now."""
        os.write(self.theirs, b'\x04end')
        self.reader.join(20)
        return self.said.decode().removesuffix('\x04end')


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    os.close(made.theirs)
    os.close(made.ours)


@pytest.fixture
def hub(sd3_folder, tmp_path):
    with serve(Path(shutil.copytree(sd3_folder, tmp_path / 'model'))) as running:
        yield running


@pytest.fixture
def ran(hub, tmp_path):
    """Run `padseg run` with the hub's model, which is downloaded anew each time."""
    PIL.Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / 'a.png')

    def run(name, *flags, stderr=None):
        environment = {
            'HF_HOME': str(tmp_path / name),
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_ENDPOINT': hub.url,
            'PADSEG_CACHE': str(tmp_path / name / 'cache'),
        }
        words = ['run', tmp_path / 'a.png', '--model', 'org/model', '--device', 'cpu', '--out', tmp_path / name / 'out', *flags]
        ended = start(main, [str(word) for word in words], stderr=stderr, **environment).wait()
        assert ended.returncode == 0, ended.stderr
        return ended

    return run


def test_a_download_shows_bytes_and_the_time_left_on_a_terminal(ran, terminal):
    ran('shown', stderr=terminal.place)
    said = terminal.text()
    assert re.search(f'Downloading: +{LEFT}', said), said
    assert 'Reconstructing' not in said and 'Downloading bytes' not in said and 'Fetching' in said


@pytest.mark.parametrize('flag', ['-q', '--no-progress', '--log-json'])
def test_a_download_shows_nothing_where_no_progress_is_wanted(ran, terminal, flag):
    ran('hidden', flag, stderr=terminal.place)
    said = terminal.text()
    assert 'Downloading' not in said and 'Fetching' not in said
    if flag == '--log-json':
        assert all(json.loads(line)['event'] for line in said.splitlines())


def test_a_download_shows_nothing_off_a_terminal(ran):
    ended = ran('piped', '--json')
    assert 'Downloading' not in ended.stderr and 'Fetching' not in ended.stderr and '\r' not in ended.stderr
    assert json.loads(ended.stdout)['done'] == 1


@contextlib.contextmanager
def watched(terminal, monkeypatch):
    """Inside the block, the terminal is stderr, and little is enough for a bar."""
    monkeypatch.setattr(progress, 'LONG', 1)
    with terminal.place.open('w') as stream:
        monkeypatch.setattr(sys, 'stderr', stream)
        yield


def test_long_loads_show_bytes_and_the_time_left(sd3_folder, terminal, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path))
    with watched(terminal, monkeypatch):
        padseg.load(str(sd3_folder), device='cpu')
    said = terminal.text()
    for part in ('transformer', 'vae'):
        assert f'loading {part} of {sd3_folder}: ' in said
    assert 'checking diffusion_pytorch_model.safetensors: ' in said
    assert 'Loading weights' in said  # of the text encoders, by transformers


def test_a_bar_counts_all_bytes_and_goes_away(terminal, tmp_path, monkeypatch):
    (tmp_path / 'weights').write_bytes(bytes(3_000_000))
    with watched(terminal, monkeypatch):
        read_hash(tmp_path / 'weights')
        with progress.bytes_bar('loading', 4_000_000) as bar:
            bar.update(1_000_000)
            bar.refresh()
            assert bar.n == 1_000_000
    said = terminal.text()
    assert 'checking weights:   0%|' in said and '/3.00M' in said
    assert re.search(r'loading:  25%\|.*1.00M/4.00M \[00:00<00:00, ', said)
    assert said.endswith('\r') and 'loading' not in said.rsplit('\r', 2)[-2]


@pytest.mark.parametrize('hidden', [True, False])
def test_small_and_hidden_reads_have_no_bar(terminal, monkeypatch, hidden):
    with terminal.place.open('w') as stream:
        monkeypatch.setattr(sys, 'stderr', stream)
        with progress.bars_hidden() if hidden else contextlib.nullcontext():
            with progress.bytes_bar('loading', progress.LONG if hidden else progress.LONG - 1) as bar:
                bar.update(1)
        assert progress.bars_shown(progress.LONG)  # and what was hidden is no longer
    assert terminal.text() == ''


def test_sizes_are_those_of_the_tensors(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.zeros(3, 5).to(kind) for kind in kinds}
    safetensors.torch.save_file(tensors, tmp_path / 'a.safetensors')
    assert sizes_in(tmp_path / 'a.safetensors') == {name: tensor.nbytes for name, tensor in tensors.items()}
