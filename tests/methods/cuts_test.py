"""DiffSeg and DiffCut on small random models: what they read, their settings by model, and whole runs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as PillowImage

from padseg.backbones.recorder import Request, watch
from padseg.backbones.spec import BACKBONES
from padseg.commands import main
from padseg.datasets.rows import DATASETS
from padseg.errors import UsageError
from padseg.images import ImageError, as_image
from padseg.methods import diffcut, diffseg, open_backbone, seg4diff, stages
from padseg.methods.stages import anchor_merging
from padseg.methods.stages.aggregation import enlarged
from padseg.types import TokenMaps

FLAT = np.full((40, 60, 3), 90, np.uint8)


def segmented(method, backbone, image, **options):
    prepared = method.prepare(backbone, method.Options(**options))
    return method.labels(image, method.maps([image], prepared)[0], prepared).labels


@pytest.mark.parametrize('kind', ['sd15', 'sdxl'])
def test_diffseg_reads_the_self_attention_of_all_layers(unets, picture, kind):
    backbone = unets[kind]
    prepared = diffseg.prepare(backbone, diffseg.Options(threshold=0.0, passes=1, anchors=3))
    found = diffseg.maps([picture], prepared)[0]
    scheduled = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=1000))
    latent = stages.encode_without_noise(picture, scheduled, prepared.options, 300)
    layers = range(len(backbone.layer_names()))
    requests = {
        layer: Request(
            backbone.self_attention_module(layer), lambda seen: (seen.query @ seen.key.mT / seen.query.shape[3] ** 0.5).softmax(3)
        )
        for layer in layers
    }
    with torch.no_grad(), watch(requests) as kept:
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    grids = [backbone.grid(layer, latent.z.shape) for layer in layers]
    to = max(grids)
    assert to == tuple(found.maps.shape[1:]) and to[0] < to[1] and len(set(grids)) > 1
    total = sum((grid[0] * grid[1]) ** 0.5 for grid in set(grids))
    points = anchor_merging.anchors(to, 3)
    for number, point in enumerate(points.tolist()):
        expected = torch.zeros(to)
        for grid in set(grids):
            own = [kept[layer][0].mean(0) for layer in layers if grids[layer] == grid]
            source = point // to[1] * grid[0] // to[0] * grid[1] + point % to[1] * grid[1] // to[1]
            large = enlarged((sum(own) / len(own))[source].view(grid), to)
            expected += (grid[0] * grid[1]) ** 0.5 / total * large / large.sum()
        assert torch.allclose(found.maps[number], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(('kind', 'level'), [('sd15', -2), ('ssd', -1)])
def test_diffcut_reads_the_output_of_the_last_self_attention_of_the_encoder(unets, picture, kind, level):
    backbone = unets[kind]
    module = backbone.transformer.down_blocks[level].attentions[-1].transformer_blocks[-1].attn1
    outputs = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    prepared = diffcut.prepare(backbone, diffcut.Options(side=64))
    whole = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=1000))
    latent = stages.encode_steps(picture, whole, prepared.options, (50,))[0]
    assert latent.timestep == 50
    with torch.no_grad():
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    handle.remove()
    maps = diffcut.maps([picture], prepared)[0].maps
    assert torch.allclose(maps.flatten(1).T, outputs[0][0], atol=1e-5)


def test_features_of_joint_attention(backbone, flux, picture):
    module = backbone.attention_module(2)
    outputs = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    found = {of: diffcut.maps([picture], diffcut.prepare(backbone, diffcut.Options(features=of)))[0] for of in diffcut.FEATURES}
    latent = stages.encode(picture, backbone, seg4diff.Options().resolve(backbone.spec))
    with torch.no_grad():
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    handle.remove()
    assert torch.allclose(found['output'].maps.flatten(1).T, outputs[-1][0], atol=1e-5)
    assert torch.equal(found['maps'].maps, seg4diff.token_maps(picture, backbone).maps)
    assert found['keys'].maps.shape == (32, *found['maps'].maps.shape[1:])
    for layer in ('1', 'vit-block3'):
        for of in diffcut.FEATURES:
            assert segmented(diffcut, flux, picture, features=of, layer=layer, tau=0.9).min() == 1


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        ('sd1.5', {'features': 'output', 'layer': 'encoder', 'step': 50, 'side': 1024, 'tau': 0.5}),
        ('ssd-1b', {'features': 'output', 'layer': 'encoder', 'step': 50, 'side': 1024, 'tau': 0.5}),
        ('sd3', {'features': 'maps', 'layer': '9', 'step': 8, 'schedule': 28, 'tau': 0.3}),
        ('pixart-sigma', {'features': 'output', 'layer': '13', 'step': 50}),
    ],
)
def test_settings_by_model(model, expected):
    assert expected.items() <= diffcut.recorded(diffcut.Options(), BACKBONES[model]).items()


def test_diffseg_is_told_of_noise_that_it_does_not_add(unets, picture):
    backbone = unets['sd15']
    options = diffseg.Options().resolve(BACKBONES['sd1.5'])
    assert (options.step, options.schedule, options.side, options.threshold) == (300, 1000, 512, 0.9)
    scheduled = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=1000))
    options = dataclasses.replace(options, side=32)
    clean = stages.encode_without_noise(picture, scheduled, options, options.step)
    noised = stages.encode(picture, scheduled, options)
    assert clean.timestep == noised.timestep == 300
    assert float((noised.z - 0.768 * clean.z).std()) == pytest.approx((1 - 0.768**2) ** 0.5, rel=0.1)


@pytest.mark.parametrize('kind', ['sd15', 'sd21', 'sdxl', 'ssd'])
def test_pictures_of_any_shape_and_of_one_colour(unets, picture, kind):
    for image in (picture, FLAT, np.ascontiguousarray(picture[:, :9])):
        for method, own in ((diffseg, {'threshold': 0.02}), (diffcut, {'side': 64, 'tau': 0.9})):
            found = segmented(method, unets[kind], image, **own)
            assert found.shape == image.shape[:2] and found.min() == 1


def test_the_threshold_decides_how_many_regions(backbone, picture):
    prepared = diffcut.prepare(backbone, diffcut.Options())
    maps = diffcut.maps([picture], prepared)[0]

    def regions(**changed):
        return diffcut.labels(picture, maps, prepared._replace(options=dataclasses.replace(prepared.options, **changed))).labels

    counts = [int(regions(tau=tau).max()) for tau in (0.0, 0.6, 0.9, 2.0)]
    assert counts[0] == 1 and counts == sorted(counts) and counts[-1] > counts[1]
    assert int(regions(tau=2.0, tokens=4).max()) <= 4
    assert regions(clusters='autosc').min() == regions(clusters='autosc-released').min() == 1
    assert regions(refine='pamr', pamr_times=3).shape == regions(refine='guided').shape == picture.shape[:2]
    assert not np.array_equal(regions(tau=0.9, refine='pamr'), regions(tau=0.9))
    assert np.array_equal(regions(tau=0.9, alpha=10.0), regions(tau=0.9))


def test_tiny_tells_three_colours_apart(picture):
    image = np.kron(picture, np.ones((4, 4, 1), np.uint8))
    found = segmented(diffcut, open_backbone(diffcut, diffcut.Options(features='keys'), 'tiny'), image, features='keys')
    inside = [found[60, 40], found[20, 260], found[150, 260]]
    assert len(set(inside)) == 3


def test_what_a_model_does_not_have(unets, backbone, picture):
    with pytest.raises(UsageError, match=r'^diffseg does not support .* of the family sd3; supported: unet$'):
        diffseg.prepare(backbone, diffseg.Options())
    with pytest.raises(UsageError, match=r'has no encoder: name a layer$'):
        diffcut.prepare(backbone, diffcut.Options(layer='encoder'))
    with pytest.raises(UsageError, match=r'^layers are in 0\.\.3 for .*; got 4$'):
        diffcut.prepare(backbone, diffcut.Options(layer='4'))
    with pytest.raises(UsageError, match=r'has no layer up-level9; it has 0\.\.15, such as up-level3-repeat2-vit-block0$'):
        diffcut.prepare(unets['sd15'], diffcut.Options(layer='up-level9'))
    with pytest.raises(UsageError, match=r'^step is in 1\.\.20, the schedule; got 21$'):
        diffseg.Options(step=21, schedule=20).resolve(unets['sd15'].spec)
    with pytest.raises(UsageError, match=r'^tau is a number >= 0; got -1$'):
        diffcut.Options(tau=-1)


def test_only_what_is_read_is_loaded(sd3_folder):
    for of, layers in (('maps', 3), ('keys', 3), ('output', 4)):
        assert open_backbone(diffcut, diffcut.Options(features=of), str(sd3_folder)).layers == layers
    last = open_backbone(diffcut, diffcut.Options(features='output', layer='3'), str(sd3_folder))
    assert last.layers == 4 and last.whole


@pytest.mark.parametrize('method', ['diffseg', 'diffcut'])
def test_runs(unet_folders, picture, tmp_path, method, capsys):
    (tmp_path / 'in').mkdir()
    PillowImage.fromarray(picture).save(tmp_path / 'in' / 'a.png')
    command = [
        'run',
        '--method',
        method,
        '--model',
        str(unet_folders['ssd']),
        '--dir',
        str(tmp_path / 'in'),
        '--out',
        str(tmp_path / 'out'),
    ]
    command += ['--side', '64', '--save-maps', '-q']
    assert main(command) == 0
    record = json.loads((tmp_path / 'out' / 'run.json').read_text())
    assert record['settings']['method'] == method and record['settings']['side'] == 64
    labels = np.asarray(PillowImage.open(tmp_path / 'out' / 'labels' / 'a.png.png'))
    with np.load(tmp_path / 'out' / 'maps' / 'a.png.npz') as kept:
        assert kept['maps'].ndim == 3 and len(kept['names']) == len(kept['maps'])
    assert labels.shape == picture.shape[:2] and labels.min() == 1
    assert main(command) == 0  # nothing is left to do
    assert main(['run', '--method', method, '--help']) == 0
    assert {'diffseg': '--anchors', 'diffcut': '--tau'}[method] in capsys.readouterr().out


def test_kept_features_are_cut_again(sd3_folder, picture, tmp_path):
    source, kept, again, whole = (tmp_path / name for name in ('in', 'kept', 'again', 'whole'))
    source.mkdir()
    PillowImage.fromarray(picture).save(source / 'a.png')
    run = ['run', '--method', 'diffcut', '--features', 'keys', '--model', str(sd3_folder), '--dir', str(source), '-q']
    assert main([*run, '--out', str(kept), '--save-maps', '--alpha', '4']) == 0
    later = ['--tau', '1.2', '--levels', '0.5,2,0.9']
    other = ['run', '--method', 'grid', '--dir', str(source), '--out', str(again), '-q']
    assert main(other) == 0  # results of another method, which are replaced
    assert main(['merge', '--overwrite', '--out', str(again), str(kept), '-q', *later]) == 0
    assert main([*run, '--out', str(whole), '--alpha', '4', *later]) == 0
    for name in ('labels/a.png.png', 'levels/a.png.tif'):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((again / 'run.json').read_text())['settings']['alpha'] == 4
    levels = tifffile.imread(again / 'levels' / 'a.png.tif')
    counts = [len(np.unique(level)) for level in levels]
    assert levels.shape == (3, *picture.shape[:2]) and counts == sorted(counts) and counts[-1] > counts[0] and levels.min() == 1
    for coarse, fine in zip(levels, levels[1:], strict=False):
        assert len({*zip(coarse.ravel().tolist(), fine.ravel().tolist(), strict=True)}) == len(np.unique(fine))
    assert main(['merge', str(again), '--out', str(tmp_path / 'none'), '-q']) == 5  # which kept no maps
    assert main([*run, '--out', str(whole), '--alpha', '4', *later, '--save-maps']) == 0
    assert main(['merge', str(whole), '--out', str(tmp_path / 'same'), '-q']) == 0  # with the levels of that run
    assert (tmp_path / 'same/levels/a.png.tif').read_bytes() == (whole / 'levels/a.png.tif').read_bytes()


def test_proposals_are_merged_again_only_in_what_comes_after_them(unet_folders, picture, tmp_path):
    (tmp_path / 'in').mkdir()
    PillowImage.fromarray(picture).save(tmp_path / 'in' / 'a.png')
    out = str(tmp_path / 'out')
    run = ['run', '--method', 'diffseg', '--model', str(unet_folders['sd15']), '--threshold', '0.001', '--dir', str(tmp_path / 'in')]
    assert main([*run, '--out', out, '--save-maps', '-q']) == 0
    assert main(['merge', out, '--out', str(tmp_path / 'large'), '--min-area', '0.5', '-q']) == 0
    few, many = (np.asarray(PillowImage.open(folder / 'labels' / 'a.png.png')) for folder in (tmp_path / 'large', tmp_path / 'out'))
    assert few.max() < many.max()
    assert main(['merge', out, '--out', str(tmp_path / 'no'), '--threshold', '0.5', '-q']) == 2


@pytest.mark.parametrize(('protocol', 'method'), [('diffseg', 'diffseg'), ('diffcut', 'diffcut')])
def test_evaluation_by_the_protocols_of_their_papers(unet_folders, picture, tmp_path, protocol, method):
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    PillowImage.fromarray(picture).save(tmp_path / 'images' / 'a.png')
    PillowImage.fromarray((picture[..., 0] > 99).astype(np.uint8)).save(tmp_path / 'labels' / 'a.png')
    command = ['eval', 'folder', '--root', str(tmp_path), '--num-classes', '2', '--protocol', protocol, '--method', method]
    command += ['--model', str(unet_folders['ssd']), '--side', '64', '--out', str(tmp_path / 'out'), '-q']
    assert main(command) == 0
    source = json.loads((tmp_path / 'out' / 'scores.json').read_text())['settings']['predictions']
    assert source['method'] == method and source['numbers'] == 'of proposals, from 0'


def test_thresholds_of_cuts_are_swept_on_kept_features(sd3_folder, picture, tmp_path):
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    PillowImage.fromarray(picture).save(tmp_path / 'images' / 'a.png')
    PillowImage.fromarray((picture[..., 0] > 99).astype(np.uint8)).save(tmp_path / 'labels' / 'a.png')
    command = ['eval', 'folder', '--root', str(tmp_path), '--regions', '--sweep', '0,0.9', '--model', str(sd3_folder), '-q']
    assert main([*command, '--method', 'diffcut', '--out', str(tmp_path / 'out')]) == 0
    assert [path.suffix for path in (tmp_path / 'out' / 'maps').iterdir()] == ['.npz']
    refused = [*command[:-3], '--model', 'tiny', '--method', 'diffseg', '--out', str(tmp_path / 'no')]
    assert main(refused) == 2


def test_thresholds_by_data_set():
    assert diffseg.DATASETS.keys() <= DATASETS.keys()


def test_one_picture_gives_the_same_alone_and_in_a_batch(unets, picture):
    backbone = unets['ssd']
    other = as_image(np.ascontiguousarray(picture[::-1]))
    for method, own in ((diffseg, {}), (diffcut, {'side': 64})):
        prepared = method.prepare(backbone, method.Options(**own))
        together = method.maps([picture, other], prepared)
        assert torch.equal(method.maps([other], prepared)[0].maps, together[1].maps)


def test_features_that_would_take_too_much_memory_are_refused():
    every = np.zeros((2**20, 1))
    maps = TokenMaps(torch.zeros(1, 1024, 1024), ('0',), None)
    with pytest.raises(ImageError, match='1024 regions of 1048576 tokens take too much memory'):
        diffcut.scored(diffcut.Features(every, every[:1024]), np.arange(1024), maps)
