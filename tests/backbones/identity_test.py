"""Which model made results: every file that decides them is part of it, and a run that another model began is not continued."""

from __future__ import annotations

import json
import pathlib
import shutil

import PIL.Image
import pytest
from safetensors.torch import load_file, save_file

from padseg.backbones import identity, load
from padseg.backbones.source import locate
from padseg.backbones.texts import with_encoders
from padseg.errors import ModelUnavailable, OutputConflict
from padseg.methods import identity_for, open_vocabulary
from padseg.methods.open_vocabulary import LabelOptions
from padseg.run import engine
from padseg.run.job import Job

LATER = ('scheduler', 'text_encoders')  # what version 0.1 did not record


@pytest.fixture
def folder(sd3_folder, tmp_path):
    """A copy of a model, to be changed."""
    return pathlib.Path(shutil.copytree(sd3_folder, tmp_path / 'model'))


def edit(path: pathlib.Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def scale(path: pathlib.Path) -> None:
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {'format': 'pt'})


CHANGES = {
    'the schedule': ('scheduler', lambda folder: edit(folder / 'scheduler' / 'scheduler_config.json', shift=5.0)),
    'its length': ('scheduler', lambda folder: edit(folder / 'padseg.json', steps=50)),
    'an encoder': ('text_encoders', lambda folder: scale(folder / 'text_encoder_2' / 'model.safetensors')),
    'how an encoder works': ('text_encoders', lambda folder: edit(folder / 'text_encoder' / 'config.json', layer_norm_eps=1e-3)),
    'a tokenizer': ('text_encoders', lambda folder: edit(folder / 'tokenizer' / 'tokenizer_config.json', add_prefix_space=True)),
    'the transformer': ('weights', lambda folder: scale(folder / 'transformer' / 'diffusion_pytorch_model.safetensors')),
    'how the transformer works': ('weights', lambda folder: edit(folder / 'transformer' / 'config.json', sample_size=24)),
    'the scale of latents': ('weights', lambda folder: edit(folder / 'vae' / 'config.json', scaling_factor=1.1)),
    'the side': ('side', lambda folder: edit(folder / 'padseg.json', side=48)),
    'a setting of the method': ('threshold', lambda folder: edit(folder / 'padseg.json', seg4diff={'threshold': 0.2})),
}


@pytest.fixture
def pictures(tmp_path, picture) -> pathlib.Path:
    (tmp_path / 'pictures').mkdir()
    PIL.Image.fromarray(picture).save(tmp_path / 'pictures' / 'a.png')
    return tmp_path / 'pictures'


@pytest.mark.parametrize('what', CHANGES)
def test_another_model_does_not_continue_a_run(folder, pictures, tmp_path, picture, what):
    setting, change = CHANGES[what]
    job = Job(pictures, tmp_path / 'out', model=str(folder), device='cpu')
    engine.run(job)
    PIL.Image.fromarray(picture[::-1]).save(pictures / 'b.png')
    change(folder)
    with pytest.raises(OutputConflict, match=rf'\b{setting} \S+ there, \S+ now'):
        engine.run(job)


def test_a_run_that_version_0_1_began_is_continued(folder, pictures, tmp_path, picture):
    job = Job(pictures, tmp_path / 'out', model=str(folder), device='cpu')
    engine.run(job)
    path = tmp_path / 'out' / 'run.json'
    record = json.loads(path.read_text())
    for name in LATER:
        del record['settings'][name], record['model'][name]
    path.write_text(json.dumps(record))
    PIL.Image.fromarray(picture[::-1]).save(pictures / 'b.png')
    assert engine.run(job)[:3] == (2, 2, 1)
    continued = json.loads(path.read_text())
    assert all(len(continued['settings'][name]) == len(continued['model'][name]) == 64 for name in LATER)


def test_other_words_for_the_same_model_change_nothing(folder, pictures, tmp_path, picture):
    """What nobody reads, or reads the same from."""
    job = Job(pictures, tmp_path / 'out', model=str(folder), device='cpu')
    engine.run(job)
    PIL.Image.fromarray(picture[::-1]).save(pictures / 'b.png')
    path = folder / 'padseg.json'
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    (folder / 'README.md').write_text('another')
    assert engine.run(job).done == 2


def test_it_is_told_without_loading(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    before = identity(str(folder))
    assert before == load(str(folder), device='cpu').identity == identity(str(folder))
    shutil.rmtree(folder / 'text_encoder')
    with pytest.raises(ModelUnavailable, match='no file named config.json in text_encoder, model.safetensors in text_encoder'):
        identity(str(folder))


def test_of_texts_only_the_encoders_that_are_used(texts_folder, tmp_path):
    folder = pathlib.Path(shutil.copytree(texts_folder, tmp_path / 'texts'))
    first = load(str(folder), device='cpu')
    scale(folder / 'text_encoder_3' / 'model.safetensors')
    second = load(str(folder), device='cpu')
    assert first.identity._replace(folder='', model='') == second.identity._replace(folder='', model='')
    copy = load(str(texts_folder), device='cpu')
    for encoders, same in (('l+g', True), ('t5', False), ('l+g+t5', False)):
        one, other = (with_encoders(backbone, encoders).identity.text_encoders for backbone in (copy, second))
        assert (one == other) == same
        assert (one == copy.identity.text_encoders) == same
        unloaded = identity_for(open_vocabulary, LabelOptions(encoders=encoders), locate(str(folder)))
        assert unloaded.text_encoders == other


def test_label_records_all_encoders(texts_folder, pictures, tmp_path):
    """T5 too, where names go through it."""
    found = []
    for encoders in ('l+g', 'l+g+t5'):
        out = tmp_path / encoders
        options = LabelOptions(encoders=encoders)
        engine.run(Job(pictures, out, options=options, classes=('cat',), model=str(texts_folder), device='cpu', method='open-vocabulary'))
        found.append(json.loads((out / 'run.json').read_text())['settings']['text_encoders'])
    assert found[0] == load(str(texts_folder), device='cpu').identity.text_encoders != found[1]
