"""CLIPScore, CLIP-I and DINO similarity, against transformers itself and by hand."""

from __future__ import annotations

import json
import os
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import torch

from padseg.errors import ModelUnavailable, UsageError
from padseg.evaluation import model_folder, similarity
from padseg.evaluation.similarity import (
    clip_image_features,
    clip_image_similarity,
    clip_score,
    dino_features,
    dino_similarity,
    load_clip,
    load_dino,
    scores_of,
    texts_cut,
)

TEXTS = ['a cat', 'a dog on grass', 'grass']
LONG = 'a cat on a dog on a cat on a dog'  # more than the 8 tokens that the small CLIP reads


@pytest.fixture(scope='module')
def clip(clip_folder):
    return load_clip(str(clip_folder), device='cpu')


@pytest.fixture(scope='module')
def dino(dino_folder):
    return load_dino(str(dino_folder), device='cpu')


@pytest.fixture(scope='module')
def pictures():
    """Pictures of several sizes, one so low that its height could be taken for channels."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 48), (3, 30), (64, 64))]


def test_clip_score_is_what_transformers_computes_at_its_scale(clip, clip_folder, pictures):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    network = CLIPModel.from_pretrained(clip_folder)
    pixels = [AutoImageProcessor.from_pretrained(clip_folder)(images=picture, input_data_format='channels_last') for picture in pictures]
    tokens = AutoTokenizer.from_pretrained(clip_folder)(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        out = network(pixel_values=torch.tensor(np.concatenate([one['pixel_values'] for one in pixels])), **tokens)
    expected = 100 * (out.logits_per_image.diagonal() / network.logit_scale.exp()).detach()
    assert clip_score(clip, pictures, TEXTS) == pytest.approx(expected.numpy(), abs=1e-4)
    assert np.ptp(expected.numpy()) > 1  # a model to which all is alike would show nothing


def test_clip_score_is_a_hundred_cosines_and_not_cut_at_zero():
    one = torch.tensor([[1.0, 0.0]])
    texts = [torch.tensor([[x, (1 - x * x) ** 0.5]]) for x in (1.0, 0.3, 0.0, -0.3)]
    assert [float(scores_of(one, text)[0]) for text in texts] == pytest.approx([100, 30, 0, -30])


def test_a_picture_is_like_itself_and_less_like_others(clip, dino, pictures):
    others = [255 - picture for picture in pictures]
    for compare, model in ((clip_image_similarity, clip), (dino_similarity, dino)):
        assert compare(model, pictures, pictures) == pytest.approx(np.ones(3), abs=1e-5)
        values = compare(model, pictures, others)
        assert values == pytest.approx(compare(model, others, pictures))
        assert (values < 0.9999).all()


def test_dino_similarity_is_the_cosine_of_class_tokens(dino, dino_folder, pictures):
    from transformers import AutoImageProcessor, ViTModel

    network, prepare = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False), AutoImageProcessor.from_pretrained(dino_folder)
    pixels = [prepare(images=picture, input_data_format='channels_last', return_tensors='pt')['pixel_values'] for picture in pictures]
    with torch.no_grad():
        one, other, _ = (network(values).last_hidden_state[0, 0] for values in pixels)
    assert dino_similarity(dino, pictures[:1], pictures[1:2])[0] == pytest.approx(float(torch.cosine_similarity(one, other, 0)), abs=1e-5)


def test_features_do_not_depend_on_the_batch(clip, pictures, monkeypatch):
    together = clip_image_features(clip, pictures)
    monkeypatch.setattr(similarity, 'BATCH', 1)
    assert clip_image_features(clip, pictures).numpy() == pytest.approx(together.numpy(), abs=1e-5)
    assert len(clip_image_features(clip, [])) == 0


def test_the_end_of_a_long_text_is_cut_and_told(clip, pictures):
    assert texts_cut(clip, ['a cat', LONG]) == [False, True]
    assert clip_score(clip, pictures[:1], [LONG]) == pytest.approx(clip_score(clip, pictures[:1], [LONG + ' on grass']))


def test_as_many_partners_as_pictures(clip, dino, pictures):
    with pytest.raises(ValueError, match='as many pictures as partners'):
        clip_score(clip, pictures, TEXTS[:2])
    with pytest.raises(ValueError, match='as many pictures as partners'):
        dino_similarity(dino, pictures, pictures[:1])


def copied(folder, place, **settings):
    shutil.copytree(folder, place)
    config = json.loads((place / 'config.json').read_text())
    (place / 'config.json').write_text(json.dumps({**config, **settings}))
    return str(place)


def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(clip_folder, tmp_path / 'clip')
    tensors = load_file(f'{folder}/model.safetensors')
    save_file({name: tensor for name, tensor in tensors.items() if name != 'text_projection.weight'}, f'{folder}/model.safetensors')
    with pytest.raises(ModelUnavailable, match=r'lack text_projection\.weight'):
        load_clip(folder, device='cpu')
    tensors['text_projection.weight'][0, 0] = float('nan')
    save_file(tensors, f'{folder}/model.safetensors')
    with pytest.raises(ModelUnavailable, match='not finite'):
        load_clip(folder, device='cpu')


def test_what_is_no_such_model_is_refused_in_one_line(clip_folder, dino_folder, tmp_path):
    with pytest.raises(ModelUnavailable, match='describes a vit; expected clip'):
        load_clip(str(dino_folder))
    with pytest.raises(ModelUnavailable, match='expected vit or dinov2'):
        load_dino(str(clip_folder))
    with pytest.raises(ModelUnavailable, match=r'has no config\.json'):
        load_clip(str(tmp_path))
    with pytest.raises(ModelUnavailable, match='num_hidden_layers is 1000000'):
        load_dino(copied(dino_folder, tmp_path / 'deep', num_hidden_layers=1_000_000))
    (tmp_path / 'deep' / 'model.safetensors').write_bytes(b'nothing')
    with pytest.raises(ModelUnavailable, match='is damaged'):
        load_dino(str(tmp_path / 'deep'))
    with pytest.raises(UsageError, match='use a hub id such as openai/'):
        load_clip('no such folder')
    with pytest.raises(UsageError, match='has no revisions'):
        load_clip(str(clip_folder), revision='main')


def settings_changed(folder, place, **settings):
    """A copy of a folder with other settings of what resizes pictures."""
    shutil.copytree(folder, place)
    path = place / 'preprocessor_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(place)


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'crop_size': {'height': 10**9, 'width': 10**9}}, r'crop_size\.(width|height) is 1000000000; a model sees at most 1024 pixels'),
        ({'size': {'shortest_edge': 1e300}}, r'size\.shortest_edge is 1e\+300'),
        ({'crop_size': {'height': 512, 'width': 512}}, 'cannot be used'),  # not what the network was made for
        ({'do_center_crop': False}, 'cannot be loaded'),  # pictures of several sizes
        ({'image_std': [0, 0, 0]}, 'features that are not finite'),
    ],
)
@pytest.mark.filterwarnings('ignore:divide by zero')
def test_sizes_of_what_a_model_sees_are_not_trusted(settings, words, clip_folder, tmp_path):
    with pytest.raises(ModelUnavailable, match=words) as caught:
        load_clip(settings_changed(clip_folder, tmp_path / 'clip', **settings), device='cpu')
    assert '\n' not in str(caught.value)


def test_patches_are_counted_before_they_are_made(dino_folder, monkeypatch):
    monkeypatch.setattr(model_folder, 'MOST_PATCHES', 15)
    with pytest.raises(ModelUnavailable, match='32x32 pixels in patches of 8: at most 15 patches'):
        load_dino(str(dino_folder), device='cpu')


@pytest.mark.parametrize('name', ['config.json', 'preprocessor_config.json', 'special_tokens_map.json', 'model.safetensors', 'any'])
def test_what_is_no_file_is_refused_not_waited_for(name, clip_folder, tmp_path):
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        shutil.copytree(clip_folder, tmp_path / str(number))
        path = tmp_path / str(number) / name
        path.unlink(missing_ok=True)
        make(path)
        if make is os.mkdir and name == 'any':
            load_clip(str(path.parent), device='cpu')
        else:
            with pytest.raises(ModelUnavailable, match=f'{name} is not a regular file'):
                load_clip(str(path.parent), device='cpu')


def test_pickled_weights_are_read_and_measured_first(clip, clip_folder, pictures, tmp_path):
    folder = tmp_path / 'clip'
    shutil.copytree(clip_folder, folder)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ModelUnavailable, match=r'it has no model\.safetensors'):
        load_clip(str(folder), device='cpu')
    weights, path = clip.network.state_dict(), folder / 'pytorch_model.bin'
    torch.save(weights, path)
    found = clip_image_features(load_clip(str(folder), device='cpu'), pictures).numpy()
    assert found == pytest.approx(clip_image_features(clip, pictures).numpy(), abs=1e-5)
    name = 'text_model.embeddings.token_embedding.weight'
    torch.save({**weights, name: torch.zeros(1).expand(2**20, 2**20)}, path)  # says that it has 4 TB
    with pytest.raises(ModelUnavailable, match='describes more weights than it holds'):
        load_clip(str(folder), device='cpu')
    torch.save({**weights, name: torch.zeros(2, 2).to_sparse()}, path)
    with pytest.raises(ModelUnavailable, match='other tensors than weights'):
        load_clip(str(folder), device='cpu')
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelUnavailable, match='not a checkpoint as torch writes it since version 1.6'):
        load_clip(str(folder), device='cpu')
    path.write_bytes(b'nothing')
    with pytest.raises(ModelUnavailable, match='not a checkpoint as torch writes it since version 1.6'):
        load_clip(str(folder), device='cpu')


def test_a_network_larger_than_its_weights_is_not_built(dino_folder, tmp_path):
    with pytest.raises(ModelUnavailable, match='holds .* weights, and config.json describes'):
        load_dino(copied(dino_folder, tmp_path / 'dino', hidden_size=32768, intermediate_size=65536), device='cpu')
    (tmp_path / 'dino' / 'adapter_config.json').write_text('{}')
    with pytest.raises(ModelUnavailable, match='has an adapter'):
        load_dino(str(tmp_path / 'dino'), device='cpu')


def test_features_that_are_not_finite_are_no_scores(clip, dino, pictures):
    for model, features in ((clip, clip_image_features), (dino, dino_features)):
        broken = model._replace(pictures=lambda *_, **__: {'pixel_values': torch.full((1, 3, 32, 32), torch.nan)})
        with pytest.raises(ModelUnavailable, match='features that are not finite'):
            features(broken, pictures[:1])


def test_without_a_network_the_message_names_the_remedy(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ModelUnavailable, match=r'^CLIP: org/clip is not in the cache.*; name a folder with --clip PATH$') as caught:
        load_clip('org/clip', remedy='name a folder with --clip PATH')
    assert '--model tiny' not in str(caught.value)
