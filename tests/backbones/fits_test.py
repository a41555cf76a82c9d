"""Memory on graphics cards, against sums by hand."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from padseg.backbones import fits, load
from padseg.bench.cards import command
from padseg.commands import main


def test_bytes_by_hand():
    network = nn.Sequential(nn.Linear(10, 3), nn.Conv2d(2, 5, 1, bias=False))  # 30 + 3 and 10 numbers
    assert fits.bytes_of(network, torch.float32) == 43 * 4 and fits.bytes_of(network, torch.bfloat16) == 43 * 2
    assert fits.bytes_of(network, torch.bfloat16, 'int8') == 30 + 3 * fits.SCALE + 13 * 2


def test_the_smallest_card():
    need = fits.Need(6 << 30, 1 << 30)
    assert need.total == 7 << 30 and need.card == 8 and need._replace(weights=(6 << 30) + 1).card == 12
    assert need._replace(weights=23 << 30).card is None


def test_doctor_reckons_what_load_loads(sd3_folder, capsys):
    assert main(['doctor', '--model', str(sd3_folder), '--device', 'cpu', '--json']) == 0
    cards = json.loads(capsys.readouterr().out)['cards']
    loaded = load(str(sd3_folder), device='cpu', dtype='float32')
    held = sum(tensor.nbytes for part in (loaded.transformer, loaded.vae) for tensor in part.state_dict().values())
    assert cards['float32']['weights'] == held == 2 * cards['bfloat16']['weights'] and cards['int8']['card'] == 8
    picture = fits.VAE_TENSORS * 8 * 32 * 32 * 4, fits.TOKEN_TENSORS * 128 * (8 * 8 + 77) * 4
    assert cards['float32']['picture'] == max(picture)
    assert main(['doctor', '--model', str(sd3_folder), '--device', 'cpu']) == 0
    assert 'int8' in capsys.readouterr().out


@pytest.mark.slow
def test_published_shapes():
    """SD3-medium took 1761 MiB when it was loaded in 16 bits, and 3210 MiB at most, by the records of an H100 in data/benchmarks."""
    ran = CliRunner().invoke(command, ['--json'])
    sd3 = json.loads(ran.output)['sd3']['bfloat16']
    assert abs(sd3['weights'] / 2**20 - 1761) < 40 and 1 <= (sd3['weights'] + sd3['picture']) / 2**20 / 3210 < 1.1
    first = CliRunner().invoke(command).output.splitlines()[1].split()
    assert first[0] == 'sd3' and first[2:4] == ['GiB,', '8']
