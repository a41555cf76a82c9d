"""bin/bench maps on small models of every class: how many blocks there are, which weights they share, and a whole run."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from padseg.bench.__main__ import main
from padseg.bench.cards import needs_of
from padseg.bench.maps import MapsSetting, needed, random_backbone, read, summary, taken

BLOCKS = {'sd3': (3,), 'openflux': (2, 2), 'flux2-klein': (2, 2), 'auraflow': (2, 2), 'z-image': (3,)}


def test_only_blocks_up_to_the_one_behind_a_layer_are_built():
    assert needed({'double': 5, 'single': 20}, 8) == {'double': 5, 'single': 5}
    assert needed({'double': 19, 'single': 38}, 17) == {'double': 19, 'single': 0}
    assert needed({'n': 24}, 23) == {'n': 24}


@pytest.mark.parametrize('model', BLOCKS)
def test_a_whole_network_has_all_blocks_and_the_weights_of_two_of_a_kind(model):
    setting = MapsSetting(model, 64, 'float32', True)
    backbone = random_backbone(setting, whole=True)
    blocks = backbone.family.blocks(backbone.transformer)
    assert len(blocks) == backbone.layers == sum(BLOCKS[model])
    kinds = [len({id(weight) for weight in block.parameters()} & {id(weight) for weight in blocks[0].parameters()}) for block in blocks]
    same = kinds[0]
    assert [count == same for count in kinds] == [number < BLOCKS[model][0] - 1 for number in range(len(blocks))]
    with torch.no_grad():
        read('whole', backbone, 64)
        cut = random_backbone(setting, whole=False)
        read('maps', cut, 64)
    assert cut.layers == cut.spec.layer + 1 == len(cut.family.blocks(cut.transformer))


def test_the_summary_has_ratio_and_memory():
    setting = MapsSetting('sd3', 64, 'float32', True)
    measured = summary(setting, [{way: taken(way, setting) for way in ('maps', 'whole')}])
    assert measured['ratio']['median'] > 0 and 'peak' in measured['ways']['maps'] and 'peak' not in measured['ways']['whole']
    assert 'reckoned' not in measured  # of the published shapes only
    whole = summary(setting._replace(small=False, side=512), [{'maps': taken('maps', setting)}])
    assert whole['reckoned'] == pytest.approx(needs_of('sd3', 512)['float32'].total / 2**20)


@pytest.mark.slow
def test_the_command_prints_its_figures():
    ran = CliRunner().invoke(main, ['maps', '--model', 'sd3', '--side', '64', '--scale-down', '--json'])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)['ways'].keys() == {'maps', 'whole'}
