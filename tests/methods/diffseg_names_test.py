"""DiffSeg's naming on small random models: the words' maps against explicit attention, both rules, and whole commands."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from support.crossing import WORDS

import padseg
from padseg.backbones.recorder import Request, watch
from padseg.commands import main
from padseg.errors import UsageError
from padseg.methods import diffseg, diffseg_names
from padseg.methods.stages.aggregation import enlarged
from padseg.types import Frame, LabelMap, TokenMaps

NAMES = ['cat', 'dog']


@pytest.mark.parametrize('kind', ['sd15', 'sdxl'])
def test_maps_of_words_are_the_cross_attention_of_all_layers(unets, picture, kind):
    backbone = unets[kind]
    prepared = diffseg_names.prepare(backbone, diffseg_names.Options(background_words=('grass',)), NAMES)
    assert sorted(prepared.columns) == [0, 1, 2] and all(columns for columns in prepared.columns.values())
    found = diffseg_names.maps([picture], prepared)[0]
    assert found.names[:4] == ('cat', 'dog', 'grass', 'proposal 0')
    latent = diffseg.latents_of([picture], prepared.regions)[0]
    grids = {layer: backbone.grid(layer, latent.z.shape) for layer in range(backbone.layers)}
    requests = {
        layer: Request(
            backbone.attention_module(layer),
            lambda seen: (seen.query @ seen.key.transpose(2, 3) * seen.query.shape[-1] ** -0.5).softmax(-1).mean(1)[0],
        )
        for layer in grids
    }
    with torch.no_grad(), watch(requests, stop=False) as kept:
        backbone.denoise(latent.z, latent.timestep, prepared.prompt)
    finest = max(grids.values())
    total = 0
    for grid in set(grids.values()):
        mean = torch.stack([kept[layer] for layer in grids if grids[layer] == grid]).mean(0)  # (N, T)
        large = enlarged(mean.T.unflatten(1, grid), finest)
        total = total + large / large.sum(0)
    words = torch.stack([total[list(prepared.columns[number])].mean(0) for number in range(3)])
    assert torch.allclose(found.maps[:3], words / words.flatten(1).norm(dim=1)[:, None, None], atol=1e-5)


def test_both_rules_by_hand():
    """The first region is a little dog on average, but cat at most of its pixels."""
    maps = TokenMaps(torch.tensor([[[4.0, 4, 0, 1]], [[3, 3, 9, 2]], [[0, 0, 0, 3]]]), ('cat', 'dog', 'grass'), Frame((1, 4), (0, 0, 1, 4)))
    regions = LabelMap(np.array([[1, 1, 1, 2]], np.int32), ((0,), (1,)))
    assert diffseg_names.strongest(regions, maps) == [0, 2]
    assert diffseg_names.name_regions(regions, maps, ('cat', 'dog')).labels.tolist() == [[2, 2, 2, 0]]


def test_names_that_it_cannot_look_for(unets, backbone):
    with pytest.raises(UsageError, match='diffseg-names does not support .*; supported: unet$'):
        diffseg_names.prepare(backbone, diffseg_names.Options(), NAMES)
    with pytest.raises(UsageError, match=r'too long together: \d+ of 77 tokens'):
        diffseg_names.prepare(unets['sd15'], diffseg_names.Options(), [f'cat {"dog " * number}' for number in range(1, 20)])
    assert {'cat', 'dog', 'grass'} <= set(WORDS)


def test_label_and_the_function(unet_folders, picture, tmp_path):
    (tmp_path / 'in').mkdir()
    PIL.Image.fromarray(picture).save(tmp_path / 'in' / 'a.png')
    folder = str(unet_folders['sd15'])
    command = ['label', '--method', 'diffseg-names', '--model', folder, '--classes', 'cat, dog', '--threshold', '0.001', '--by', 'majority']
    assert main([*command, '--dir', str(tmp_path / 'in'), '--out', str(tmp_path / 'out'), '-q']) == 0
    record = json.loads((tmp_path / 'out/run.json').read_text())
    assert record['settings']['by'] == 'majority' and record['settings']['threshold'] == 0.001
    labels = padseg.label(picture, folder, NAMES, padseg.DiffSegNamesOptions(threshold=0.001, by='majority'), method='diffseg-names')
    written = np.array(PIL.Image.open(next((tmp_path / 'out/labels').glob('a*.png'))))
    assert np.array_equal(written, labels.labels) and labels.names == ('cat', 'dog') and 0 < labels.labels.max() <= 2
