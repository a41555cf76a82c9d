"""The training program, a few steps of it: exact resume, refusal of other settings, a model that the loader takes."""

from __future__ import annotations

import csv
import os
import pathlib
import subprocess
import sys

import pytest
from safetensors.torch import load_file


def train(out: pathlib.Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        '-m',
        'padseg.train_tiny',
        '--out',
        str(out),
        '--vae-steps',
        '2',
        '--workers',
        '0',
        '--save-every',
        '1',
        *arguments,
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, capture_output=True, text=True, check=check, env=environment, cwd=pathlib.Path(__file__).parent.parent)


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp('run')
    train(out, '--steps', '3')
    return out


def test_the_model_loads_and_segments(trained, picture):
    from padseg import load
    from padseg import segment

    backbone = load(str(trained / 'model'), device='cpu')
    assert (backbone.spec.layers, backbone.spec.layer, backbone.spec.side) == (6, 4, 256)
    labels = segment(picture, backbone).labels
    assert labels.shape == picture.shape[:2] and labels.min() == 1


def test_the_loss_sees_the_maps_that_inference_reads(backbone):
    import torch

    from padseg.attention import watch
    from padseg.mask_loss import share
    from padseg.maps import attention_maps
    from padseg.train_tiny import token_maps

    z = torch.randn((2, 4, 12, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watch({2: backbone.attention_module(2)}) as seen:
        backbone.denoise(z, 50.0)
    expected = torch.nn.functional.interpolate(attention_maps(z, 50.0, backbone, 2), scale_factor=2, mode='bilinear')
    torch.testing.assert_close(token_maps(seen[2], z.shape), share(expected))


def test_what_is_written(trained):
    for name in ('autoencoder.png', 'transformer.png', 'autoencoder.pt', 'transformer.pt'):
        assert (trained / name).stat().st_size > 1000
    rows = list(csv.reader((trained / 'transformer.csv').open(newline='')))
    assert [row[0] for row in rows] == ['0', '1', '2']
    assert all(0 < float(row[2]) < 10 for row in rows)
    size = sum(path.stat().st_size for path in (trained / 'model').rglob('*') if path.is_file())
    assert size < 32e6


def test_a_stopped_run_goes_on_exactly(trained, tmp_path):
    """Stopped by a kill after the first step's checkpoint, then continued: the same weights to the last bit."""
    command = [sys.executable, '-m', 'padseg.train_tiny', '--out', str(tmp_path), '--vae-steps', '2', '--workers', '0', '--save-every', '1']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    process = subprocess.Popen(
        [*command, '--steps', '3'], env=environment, cwd=pathlib.Path(__file__).parent.parent, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / 'transformer.pt').exists() and process.poll() is None:
        pass
    process.kill()
    process.wait()
    train(tmp_path, '--steps', '3')
    for part in ('transformer', 'vae'):
        name = f'model/{part}/diffusion_pytorch_model.safetensors'
        straight, resumed = load_file(trained / name), load_file(tmp_path / name)
        assert straight.keys() == resumed.keys()
        assert all(straight[key].equal(resumed[key]) for key in straight)


def test_a_checkpoint_of_other_settings_is_refused(trained):
    result = train(trained, '--steps', '4', check=False)
    assert result.returncode == 2 and 'choose another --out' in result.stderr
