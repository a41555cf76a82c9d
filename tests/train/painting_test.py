"""Learning to paint: what is drawn for it, the two teachers, and a begin half-way that leaves low noise as it was."""

from __future__ import annotations

import copy
import csv
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.processes import start
from support.training import SMALL, TRANSFORMER, VAE, train_small

from padseg.train import painting, tiny_model as tiny
from padseg.train.data import VIEW_SHARES, VIEWS, batch
from padseg.train.losses import divergence_of_maps
from padseg.train.scenes import CLASSES, scene, surfaces
from padseg.train.settings import Mixture, TrainingSettings
from padseg.train.shapes import SHAPES
from padseg.train.vocabulary import WORDS

LOW = TrainingSettings.noise


def transformer(seed: int):
    """A small random transformer whose biases and norms are random too, as after training."""
    torch.manual_seed(seed)
    built = tiny.build_tiny(WORDS, TRANSFORMER, VAE).transformer.eval().requires_grad_(False)
    for weight in built.parameters():
        weight.add_(0.05 * torch.randn(weight.shape))
    return built


def given(levels: list[float]) -> painting.Noised:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn((2, len(levels), 16, 8, 8), generator=generator)
    sigma = torch.tensor(levels)
    embeds, pooled = (torch.randn((len(levels), *shape), generator=generator) for shape in ((154, 160), (160,)))
    return painting.Noised(z, noise, z + sigma[:, None, None, None] * (noise - z), sigma, embeds, pooled)


def test_surfaces_are_one_or_two_and_have_no_objects():
    drawn = [surfaces(np.random.default_rng(seed), 64, 80) for seed in range(60)]
    assert all(each.image.shape == (64, 80, 3) and not set(each.names) & set(SHAPES) for each in drawn)
    counts = np.bincount([len(each.names) for each in drawn])
    assert len(counts) == 3 and counts[1] > counts[2] > 0
    assert all(each.caption == ' and '.join(dict.fromkeys(each.names)) for each in drawn)


def test_a_batch_of_surfaces_names_no_shape():
    alone = batch(0, 0, 6, (), Mixture(synthetic=1.0, surfaces=1.0, named=1.0))
    words = set(' '.join(alone.captions).replace(',', '').split()) & set(CLASSES)
    assert words and not words & set(SHAPES)


def test_without_surfaces_batches_take_no_other_random_numbers():
    rng = np.random.default_rng((3, 1))
    view = VIEWS[rng.choice(len(VIEWS), p=VIEW_SHARES)]
    drawn = []
    for _ in range(2):
        drawn.append(scene(rng, *view))
        rng.random()  # whether its classes are named
    made = batch(3, 1, 2, (), Mixture(synthetic=1.0))
    assert made.captions == [each.caption for each in drawn]
    np.testing.assert_array_equal(made.images.numpy(), np.stack([each.image for each in drawn]))


def test_the_divergence_of_maps_is_that_of_the_shares_of_tokens():
    were, are = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 3.0])  # of two tokens at one pixel
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    layer, same = (were[None, :, None, None], are[None, :, None, None]), (were[None, :, None, None],) * 2
    assert float(divergence_of_maps([layer[0]], [layer[1]])) == pytest.approx(expected, rel=1e-5)
    assert float(divergence_of_maps([layer[0], same[0]], [layer[1], same[1]])) == pytest.approx(expected / 2, rel=1e-5)
    assert float(divergence_of_maps([same[0]], [same[1]])) == 0


def test_the_painter_is_followed_at_high_noise_and_the_model_as_it_was_below():
    painter, before = transformer(0), transformer(1)
    seen = given([0.05, 0.29, 0.3, 0.9])
    goal = painting.followed(painter, before, seen)
    for place, teacher in enumerate((before, before, painter, painter)):
        one = [each[place : place + 1] for each in (seen.seen, seen.embeds, seen.pooled)]
        with torch.no_grad(), painting.autocast(goal.device):
            expected = teacher(*one, seen.sigma[place : place + 1] * 1000, return_dict=False)[0].float()
        torch.testing.assert_close(goal[place : place + 1], expected, rtol=0.02, atol=0.02)


def test_half_way_low_noise_is_embedded_as_before_and_high_noise_by_the_means():
    before, painter = transformer(0), transformer(1)
    model, means = copy.deepcopy(before), copy.deepcopy(before)
    painting.begin_between(model, before, painter, LOW)
    for own, one, other in zip(means.parameters(), before.parameters(), painter.parameters(), strict=True):
        own.copy_((one + other) / 2)

    def embedded(network, levels):
        embedding = network.time_text_embed
        return embedding.timestep_embedder(embedding.time_proj(levels * 1000))

    for levels, like in ((torch.linspace(0, LOW, 99), before), (torch.linspace(painting.PAINTS, 1, 99), means)):
        close = (embedded(model, levels) - embedded(like, levels)).square().mean()
        apart = (embedded(means, levels) - embedded(before, levels)).square().mean()
        assert close < 0.01 * apart
    torch.testing.assert_close(model.proj_out.weight, means.proj_out.weight)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_two_steps_change_the_transformer_alone_and_a_second_call_does_nothing(tmp_path):
    first = start(train_small, tmp_path / 'first').wait()
    assert first.returncode == 0, first.stderr
    settings = dataclasses.replace(
        SMALL,
        transformer=dataclasses.replace(SMALL.transformer, steps=0),
        painter=dataclasses.replace(SMALL.painter, steps=2),
        painting=dataclasses.replace(SMALL.painting, steps=2),
    )
    out, written = tmp_path / 'second', []
    for _ in range(2):
        ran = start(train_small, out, tmp_path / 'first/model', 0, settings).wait()
        assert ran.returncode == 0, ran.stderr
        written.append({path.name: path.stat().st_mtime_ns for path in out.glob('*.pt')})
        assert sorted(written[-1]) == ['painter.pt', 'painting.pt']
        maps = [float(row['maps']) for row in csv.DictReader((out / 'painting.csv').open(newline=''))]
        assert len(maps) == 2 and all(np.isfinite(maps)) and maps[0] > 0
        name = 'diffusion_pytorch_model.safetensors'
        one, other = (load_file(folder / 'model/transformer' / name) for folder in (tmp_path / 'first', out))
        assert any(not one[key].equal(other[key]) for key in one)
        for part, file in (('vae', name), ('text_encoder', 'model.safetensors'), ('text_encoder_2', 'model.safetensors')):
            one, other = (load_file(folder / 'model' / part / file) for folder in (tmp_path / 'first', out))
            assert all(one[key].equal(other[key]) for key in one)
    assert written[0] == written[1]
