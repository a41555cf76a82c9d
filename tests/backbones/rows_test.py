"""Named models whose family is that of another: small random ones with their own blocks, normalisation and inputs."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from padseg.backbones import load
from padseg.backbones.availability import model_state
from padseg.backbones.spec import BACKBONES, CARDS
from padseg.methods.seg4diff import Options, token_maps

# of the published configurations, all that decides which code runs
ROWS = {
    'sd3.5-large': {'num_layers': 38, 'qk_norm': 'rms_norm', 'dual_attention_layers': ()},
    'sd3.5-large-turbo': {'num_layers': 38, 'qk_norm': 'rms_norm', 'dual_attention_layers': ()},
    'openflux': {'num_layers': 19, 'num_single_layers': 38, 'guidance_embeds': False},
    'flux-schnell': {'num_layers': 19, 'num_single_layers': 38, 'guidance_embeds': False},
    'flux2-klein': {'num_layers': 5, 'num_single_layers': 20, 'guidance_embeds': False},
    'flux2-klein-base': {'num_layers': 5, 'num_single_layers': 20, 'guidance_embeds': False},
}
LICENCES = {'openflux': False, 'flux-schnell': True, 'flux2-klein': False, 'flux2-klein-base': False}  # Apache-2.0: whether gated


def made(name: str, make_model, make_flux, folder: pathlib.Path) -> pathlib.Path:
    from support.flux2 import random_flux2

    make = {'sd3': make_model, 'flux': make_flux, 'flux2': random_flux2}[BACKBONES[name].family]
    make(folder, **ROWS[name])
    (folder / 'padseg.json').write_text(json.dumps({'side': 32, 'sequence': 40 if BACKBONES[name].family == 'flux2' else 77}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sd3.5-large', 'openflux', 'flux2-klein'])
def test_a_model_of_the_rows_blocks(name, make_model, make_flux, tmp_path, picture):
    """It has as many blocks as the row says; up to the row's own block the maps are those of the whole model."""
    row, folder = BACKBONES[name], made(name, make_model, make_flux, tmp_path / 'model')
    whole, part = load(str(folder), device='cpu', whole=True), load(str(folder), device='cpu', layer=row.layer)
    assert (whole.spec.family, whole.spec.layers) == (row.family, row.layers)
    assert part.layers == row.layer + 1 and not any('guidance_embedder' in tensor for tensor in whole.transformer.state_dict())
    options = Options(layer=row.layer)
    expected = token_maps(picture, whole, options).maps
    assert torch.equal(token_maps(picture, part, options).maps, expected) and expected.isfinite().all()
    assert expected.std() > 1e-5
    state, source = model_state(str(folder))
    assert state.usable and source is not None


def test_licences_and_gates():
    for name in ROWS:
        row, card = BACKBONES[name], CARDS[name]
        assert row.layer < row.layers == sum(ROWS[name].get(key, 0) for key in ('num_layers', 'num_single_layers'))
        assert card == (('Apache-2.0', LICENCES[name]) if name in LICENCES else ('Stability AI Community License', True))
