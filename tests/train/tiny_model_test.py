"""The embedded model's building blocks, and the model that the package ships."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies
from support.processes import program

from padseg.backbones.spec import TINY
from padseg.commands import main
from padseg.train import tiny_model as tiny
from padseg.train.vocabulary import END, START, WORDS as TRAINED, vocabulary_and_merges

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ['a', 'cat', 'on', 'grass', 'striped']


def test_known_words_are_one_token_and_any_text_can_be_written():
    first, second = tiny.make_tokenizers(WORDS)
    assert first.convert_ids_to_tokens(first('a striped cat').input_ids) == [START, 'a</w>', 'striped</w>', 'cat</w>', END]
    assert len(first('zebra').input_ids) > 3 and first.unk_token_id not in first('zebra').input_ids[1:-1]
    assert first('A CAT').input_ids == first('a cat').input_ids


@given(strategies.lists(strategies.text('abc', min_size=1, max_size=7), min_size=1, max_size=20))
def test_any_words_are_one_token_each(words):
    for tokenizer in tiny.make_tokenizers(words):
        assert [tokenizer.tokenize(word) for word in words] == [[f'{word}</w>'] for word in words]


def test_the_vocabulary_is_the_same_in_every_process():
    """A trained one was not: of pairs that are equally frequent, another came first in about one process of ten."""
    program = f'from padseg.train.vocabulary import vocabulary_and_merges; print(vocabulary_and_merges({TRAINED!r}))'
    command = [sys.executable, '-c', program]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': '1'}, capture_output=True, text=True, check=True)
    assert ran.stdout == f'{vocabulary_and_merges(TRAINED)}\n'
    vocabulary, merges = vocabulary_and_merges(['star', 'tar', 'at'])
    assert merges == [('a', 't</w>'), ('s', 't'), ('st', 'a'), ('sta', 'r</w>'), ('t', 'a'), ('ta', 'r</w>')]
    assert list(vocabulary)[188:] == ['at</w>', 'st', 'sta', 'star</w>', 'ta', 'tar</w>', START, END]


def test_the_tokenizers_pad_as_sd3s_do():
    first, second = tiny.make_tokenizers(WORDS)
    rows = [tokenizer('', padding='max_length', max_length=5).input_ids for tokenizer in (first, second)]
    end = first.eos_token_id
    assert rows == [[first.bos_token_id, end, end, end, end], [first.bos_token_id, end, 0, 0, 0]]


def test_the_clear_path_carries_colours_from_the_start():
    torch.manual_seed(0)
    vae = tiny.build_tiny(WORDS).vae
    colours = torch.tensor([[0.8, -0.5, -0.5], [-0.5, 0.8, -0.5], [-0.5, -0.5, 0.8]])
    with torch.no_grad():
        means = vae.encode(colours[:, :, None, None].expand(3, 3, 64, 64)).latent_dist.mean.mean((2, 3))
    assert torch.pdist(means).min() > 0.3


@pytest.fixture(scope='module')
def shipped() -> pathlib.Path:
    return TINY


def test_a_newly_trained_model_would_be_as_small():
    with torch.device('meta'):
        parts = tiny.build_tiny(TRAINED)
    assert sum(2 * weight.numel() for part in parts for weight in part.parameters()) < 31_000_000  # two bytes, and tokenizers beside them


def test_the_shipped_model_is_small_and_complete(shipped):
    files = [path for path in shipped.rglob('*') if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000
    names = {path.relative_to(shipped).parts[0] for path in files}
    assert names >= {'transformer', 'vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2', 'scheduler', 'model_index.json'}
    assert names >= {'padseg.json', 'README.md'}
    assert {path.suffix for path in files} <= {'.json', '.safetensors', '.md'}


def test_diffusers_own_pipeline_loads_it_and_generates(shipped):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(shipped, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline('a disk', height=64, width=64, num_inference_steps=2, max_sequence_length=77, output_type='np').images[0]
    assert image.shape == (64, 64, 3) and image.std() > 0


def test_the_shipped_model_finds_the_objects_of_a_plain_scene(shipped, picture):
    """Three flat areas of different colours: most pairs of pixels are put together or apart as they should be."""
    import numpy as np
    from skimage.metrics import contingency_table

    from padseg import load, segment

    truth = np.zeros((192, 320), int)
    truth[:, 120:] = 1
    truth[80:, 120:] = 2
    image = picture.repeat(4, 0).repeat(4, 1)
    labels = segment(image, load('tiny', device='cpu')).labels
    table = contingency_table(truth, labels).toarray()
    assert table.max(1).sum() / truth.size > 0.9  # nearly every area lies in one region


def test_class_words_find_their_classes_as_the_card_says(tmp_path, capsys, shipped):
    """The two commands of the model card on its first scenes, and the figure beside them."""
    card = (shipped / 'README.md').read_text(encoding='utf-8')
    row = re.search(r'^\| held-out scenes \((\d+)\), classes named \|.* ([\d.]+) \| ([\d.]+) \|$', card, re.MULTILINE)
    count, accuracy, miou = row.groups()
    assert program('bin/prepare-scenes', tmp_path, '--count', count).returncode == 0
    options = '--protocol seg4diff-ovss --geometry whole --device cpu --json -q'.split()
    assert main(['eval', 'folder', '--root', str(tmp_path), *options]) == 0
    scores = json.loads(capsys.readouterr().out)['scores']
    assert scores['accuracy'] == pytest.approx(float(accuracy), abs=0.003) and scores['miou'] == pytest.approx(float(miou), abs=0.01)


def test_pictures_have_the_surface_that_their_prompt_names(tmp_path):
    """Four textures, which the model recognises among all its names."""
    import numpy as np
    import PIL.Image

    from padseg.train.scenes import CLASSES

    wanted = ('bricks', 'grass', 'speckle', 'water')
    names, out = tmp_path / 'names.txt', tmp_path / 'out'
    names.write_text('\n'.join(CLASSES), encoding='utf-8')
    made = ['generate', *(word for name in wanted for word in ('--prompt', name)), '--size', '256', '--steps', '10', '--out', str(out)]
    assert main([*made, '--device', 'cpu', '-q']) == 0
    labelled = tmp_path / 'labelled'
    label = ['label', '--dir', str(out / 'images'), '--out', str(labelled), '--classes-file', str(names), '--device', 'cpu', '-q']
    assert main(label) == 0
    for name in wanted:
        (file,) = (labelled / 'labels').glob(f'{name}-*.png')
        seen = np.asarray(PIL.Image.open(file)) == CLASSES.index(name) + 1
        assert seen.mean() > 0.5, name
