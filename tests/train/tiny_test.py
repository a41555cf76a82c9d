"""`padseg train-tiny`, a few steps of it: exact resume, refusal of other settings, a model that the loader takes."""

from __future__ import annotations

import csv
import json
import pathlib
import shutil
from functools import partial

import pytest
from safetensors.torch import load_file
from support.processes import Ran, start
from support.training import train_small

from padseg.commands import main


def ended(ran: Ran) -> None:
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Trained with a worker, which once hung: it was forked after the first stage's sheet had started OpenCV's threads."""
    out = tmp_path_factory.mktemp('run')
    ended(start(train_small, out, None, 1).wait())
    return out


def test_the_model_loads_and_segments(trained, picture):
    from padseg import load, segment

    backbone = load(str(trained / 'model'), device='cpu')
    assert (backbone.spec.layers, backbone.spec.layer, backbone.spec.side) == (6, 4, 256)
    labels = segment(picture, backbone).labels
    assert labels.shape == picture.shape[:2] and labels.min() == 1


def test_the_settings_of_a_trained_model_are_those_of_the_embedded_one(trained):
    folders = trained / 'model', pathlib.Path('padseg/models/tiny')
    written, embedded = (json.loads((folder / 'padseg.json').read_text()) for folder in folders)
    assert all(written[section] == embedded[section] for section in ('seg4diff', 'generate'))
    assert [written[name] for name in ('layers', 'layer', 'side', 'words')] == [
        embedded[name] for name in ('layers', 'layer', 'side', 'words')
    ]


def test_the_loss_sees_the_maps_that_inference_reads(backbone):
    import torch

    from padseg.backbones.recorder import requests_of, watch
    from padseg.methods.stages.token_maps import attention_maps
    from padseg.train.denoiser import training_maps

    z = torch.randn((2, 4, 12, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watch(requests_of(backbone, [2], partial(training_maps, shape=z.shape))) as kept:
        backbone.denoise(z, 50.0, backbone.null_prompt)
    maps = attention_maps(z, 50.0, backbone, backbone.null_prompt, 2)
    torch.testing.assert_close(kept[2], torch.nn.functional.interpolate(maps, scale_factor=2, mode='bilinear'))


def test_autocast_leaves_the_maps_in_float32():
    """Maps from queries and keys of 16 bits, but sums and softmax of 32."""
    import torch

    from padseg.train.denoiser import training_maps
    from padseg.types import Attention

    seen = Attention(*torch.randn((2, 1, 2, 12 + 154, 16), generator=torch.Generator().manual_seed(0)).bfloat16())
    shape = torch.Size((1, 4, 6, 8))
    with torch.autocast('cpu', torch.bfloat16):
        maps = training_maps(seen, shape)
    assert maps.dtype == torch.float32 and torch.equal(maps, training_maps(seen, shape))


def test_what_is_written(trained):
    for name in ('autoencoder', 'together', 'transformer'):
        assert (trained / f'{name}.png').stat().st_size > 1000
        assert (trained / f'{name}.sheet.png').stat().st_size > 1000
        assert (trained / f'{name}.pt').stat().st_size > 100_000
    assert sorted(path.suffix for path in trained.iterdir()) == sorted(['', *3 * ['.csv', '.png', '.png', '.pt']])
    rows = list(csv.DictReader((trained / 'together.csv').open(newline='')))
    assert [row['step'] for row in rows] == ['0', '1']
    assert all(0 < float(row['mask']) < 10 for row in rows)


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(trained, tmp_path):
    """Stopped by a kill after the first checkpoint of the second stage, then continued: the same weights to the last bit."""
    for path in trained.glob('autoencoder.*'):
        shutil.copy(path, tmp_path)
    run = start(train_small, tmp_path)
    while not (tmp_path / 'together.pt').exists() and run.process.is_alive():
        run.process.join(0.02)
    run.process.kill()
    run.process.join()
    ended(start(train_small, tmp_path).wait())
    for part in ('transformer', 'vae'):
        name = f'model/{part}/diffusion_pytorch_model.safetensors'
        straight, resumed = load_file(trained / name), load_file(tmp_path / name)
        assert straight.keys() == resumed.keys()
        assert all(straight[key].equal(resumed[key]) for key in straight)


def test_the_command_refuses_a_checkpoint_of_other_settings(trained, capsys):
    assert main(['train-tiny', '--out', str(trained), '--batch', '2', '--seed', '1', '--device', 'cpu']) == 2
    assert 'choose another --out' in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert main(['train-tiny', '--out', str(tmp_path / 'file'), '--device', 'no such device']) == 2
    assert 'cannot create the output folder' in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_trained_further_without_its_autoencoder_and_masks(trained, tmp_path):
    ended(start(train_small, tmp_path, trained / 'model').wait())
    assert not list(tmp_path.glob('autoencoder*')) and not list(tmp_path.glob('together*'))
    before, after = (load_file(out / 'model/vae/diffusion_pytorch_model.safetensors') for out in (trained, tmp_path))
    assert all(before[name].equal(after[name]) for name in before)
    configs = [json.loads((out / 'model/vae/config.json').read_text()) for out in (trained, tmp_path)]
    for config in configs:
        config['shift_factor'], config['scaling_factor'] = round(config['shift_factor'], 5), round(config['scaling_factor'], 5)
    assert configs[0] == configs[1]
    before, after = (load_file(out / 'model/transformer/diffusion_pytorch_model.safetensors') for out in (trained, tmp_path))
    assert any(not before[name].equal(after[name]) for name in before)
    rows = list(csv.DictReader((tmp_path / 'transformer.csv').open(newline='')))
    assert [[row[name] for name in ('reconstruction', 'mask', 'affinity', 'words')] for row in rows] == [['', '', '', '']]
    assert float(rows[0]['flow']) > 0


def test_the_averaged_weights_are_written(trained):
    import torch

    state = torch.load(trained / 'together.pt', weights_only=True)
    assert state['averaged']['n_averaged'] == 2
    state = torch.load(trained / 'transformer.pt', weights_only=True)
    written = load_file(trained / 'model/transformer/diffusion_pytorch_model.safetensors')
    averaged = {name: state['averaged'][f'module.transformer.{name}'].half() for name in written}
    assert len(averaged) > 100 and all(written[name].equal(value) for name, value in averaged.items())
    mean, deviation = state['model']['statistics'].tolist()
    config = json.loads((trained / 'model/vae/config.json').read_text())
    assert (config['shift_factor'], config['scaling_factor']) == pytest.approx((mean, 1 / deviation))


def test_a_folder_without_a_model_of_this_kind_is_refused(trained, tmp_path):
    from padseg.errors import ModelUnavailable
    from padseg.train import tiny_model as tiny
    from padseg.train.vocabulary import WORDS

    with pytest.raises(ModelUnavailable, match='no model to start from'):
        tiny.read_tiny(tmp_path, WORDS)
    with pytest.raises(ModelUnavailable, match='different vocabulary'):
        tiny.read_tiny(trained / 'model', [*WORDS, 'unheard'])


def test_latents_of_a_growing_spread_stay_normal():
    import torch

    from padseg.train.denoiser import normalised
    from padseg.train.tiny import track_statistics

    statistics = torch.tensor([0.0, 1.0])
    latents = torch.randn((4, 16, 8, 8), generator=torch.Generator().manual_seed(0)) * 3 + 2
    for _ in range(400):
        track_statistics(statistics, latents)
    z = normalised(latents, statistics)
    assert float(z.mean()) == pytest.approx(0, abs=0.02) and float(z.std()) == pytest.approx(1, abs=0.02)


def test_muon_has_the_matrices_of_the_blocks_and_every_weight_is_learnt_once():
    from torch import nn

    from padseg.train import tiny_model as tiny
    from padseg.train.run import make_optimisers
    from padseg.train.settings import TrainingSettings
    from padseg.train.vocabulary import WORDS

    learner = nn.ModuleDict(tiny.build_tiny(WORDS)._asdict())
    optimisers = make_optimisers(learner, TrainingSettings(), TrainingSettings.together)
    of_muon, of_adam, of_encoder = ([id(weight) for group in each.param_groups for weight in group['params']] for each in optimisers)
    assert sorted(of_muon + of_adam + of_encoder) == sorted(id(weight) for weight in learner.parameters())
    assert sorted(of_encoder) == sorted(id(weight) for weight in learner['vae'].parameters())
    block = learner['transformer'].transformer_blocks[2]
    assert {id(block.attn.to_q.weight), id(block.ff.net[2].weight)} <= set(of_muon)
    assert id(block.norm1.linear.weight) in of_adam and id(block.attn.to_q.bias) in of_adam
