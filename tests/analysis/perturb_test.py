"""Attention read while pictures are made, and pictures with single blocks blurred, on small random models."""

from __future__ import annotations

import contextlib
import json
import signal

import numpy as np
import pytest

from padseg.analysis import perturb
from padseg.analysis.asked import sampler_of
from padseg.analysis.blocks import every_block
from padseg.analysis.charts import perturb_figure
from padseg.analysis.perturb import arms, compared, make, pictures_of
from padseg.analysis.recording import Made, text_of
from padseg.analysis.shares import set_shares
from padseg.backbones.blur import Blur, blurred
from padseg.errors import OutputConflict, PadsegError, UsageError
from padseg.evaluation.similarity import clip_image_similarity, clip_score, dino_similarity, load_clip, load_dino
from padseg.generation.guidance import guide_of
from padseg.generation.pictures import GenerationJob
from padseg.generation.prompts import Item, items
from padseg.generation.sample import sample
from padseg.generation.settings import SamplingSettings
from padseg.images import ImageError
from padseg.run.selection import Selection
from padseg.system.progress import Silent
from padseg.types import Frame, Latent

ITEMS = [Item('cat-3', 'a cat', 3), Item('dog-4', 'a dog on grass', 4)]


def settings_of(sampler, **given) -> SamplingSettings:
    return SamplingSettings(**{'steps': 3, 'size': 32, 'scale': 3.0, **given}).resolve(sampler.backbone.spec)


@pytest.mark.parametrize(('name', 'guidance'), [('backbone', {}), ('backbone', {'guidance': 'none', 'scale': None}), ('flux', {})])
def test_what_is_read_is_the_attention_of_the_prompt(name, guidance, request):
    """The same as in a forward pass of its own on the latents of that step; and the picture stays as it is."""
    sampler = sampler_of(request.getfixturevalue(name))
    settings = settings_of(sampler, **guidance)
    found = list(Made(ITEMS[:1], sampler, settings, (1, 3), Silent())(lambda seen, sight: set_shares(seen, sight.sets)))
    assert [sight.step for sight, _ in found] == [1, 3] and all(sight.name == 'cat-3' for sight, _ in found)
    calls = []

    def around(call):
        calls.append(call)
        return contextlib.nullcontext()

    (picture,) = sample(sampler, ['a cat'], [3], settings, guide_of(sampler.backbone, settings), around)
    text = text_of(sampler.encoders, 'a cat', settings.encoders)
    for (sight, blocks), call in zip(found, (calls[2], calls[0]), strict=True):
        assert np.array_equal(sight.image, picture) and sight.frame.box == (0, 0, 32, 32)
        latent = Latent(call.z, 0.0, call.timestep, Frame((32, 32), (0, 0, 32, 32)))
        expected = every_block(latent, sampler.backbone, text.prompt, lambda seen, sets=sight.sets: set_shares(seen, sets))
        assert np.stack(blocks) == pytest.approx(np.stack(expected), abs=1e-5, nan_ok=True)


def test_steps_beyond_the_loop_are_refused(backbone):
    source = Made(ITEMS, sampler_of(backbone), settings_of(sampler_of(backbone)), (4,), Silent())
    with pytest.raises(UsageError, match=r'steps are in 1\.\.3'):
        next(source(lambda seen, sight: None))


@pytest.fixture
def job(tmp_path, sd3_folder):
    settings = SamplingSettings(steps=3, size=32, scale=3.0)
    return GenerationJob(('a cat', 'a dog on grass'), (3,), tmp_path / 'pictures', settings, model=str(sd3_folder), device='cpu')


def test_each_picture_has_one_block_blurred(backbone, job):
    sampler, item = sampler_of(backbone), items(job.prompts, job.seeds)[0]
    settings = settings_of(sampler)
    one = job._replace(selection=Selection(limit=1))
    jobs = arms(one, (0, 2), Blur(()))
    assert make(jobs, sampler, Silent()) is None
    plain, *others = pictures_of(jobs)(item)
    guide = guide_of(backbone, settings)
    text = text_of(sampler.encoders, 'a cat', settings.encoders).prompt
    assert np.array_equal(plain, sample(sampler, ['a cat'], [3], settings, guide)[0])
    for layer, picture in zip((0, 2), others, strict=True):
        around = lambda call, layer=layer: blurred(backbone, Blur((layer,)), text, 64)  # noqa: E731
        assert np.array_equal(picture, sample(sampler, ['a cat'], [3], settings, guide, around)[0])
    assert not np.array_equal(plain, others[0]) and not np.array_equal(others[0], others[1])
    for name, how, same in (('branch', {'both': False}, False), ('one tap', {'blur': Blur((), size=1)}, True)):
        jobs = arms(one._replace(out=one.out / name), (0,), **{'blur': Blur(()), **how})
        make(jobs, sampler, Silent())
        found = pictures_of(jobs)(item)
        assert np.array_equal(found[0], plain) and np.array_equal(found[1], plain) == same and not np.array_equal(found[1], others[0])


def test_pictures_are_compared_with_the_plain_one(clip_folder, dino_folder):
    clip, dino = load_clip(str(clip_folder), 'cpu'), load_dino(str(dino_folder), 'cpu')
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]
    scores, plain = compared([pictures[0], pictures[1], pictures[0], pictures[2]], 'a cat', clip, dino)
    assert scores[1, :2] == pytest.approx(1, abs=1e-6) and scores[1, 2] == pytest.approx(plain)
    for row, other in ((0, pictures[1]), (2, pictures[2])):
        assert scores[row, 0] == pytest.approx(clip_image_similarity(clip, [other], pictures[:1])[0], abs=1e-5)
        assert scores[row, 1] == pytest.approx(dino_similarity(dino, [other], pictures[:1])[0], abs=1e-5)
        assert scores[row, 2] == pytest.approx(clip_score(clip, [other], ['a cat'])[0], abs=1e-3)


class Interrupt(Silent):
    """Sends this process a signal after the third picture."""

    pictures = 0

    def step(self, record=None):
        self.pictures += 1
        if self.pictures == 3:
            signal.raise_signal(signal.SIGINT)


def test_pictures_are_kept_continued_and_measured_by_layer(backbone, job, clip_folder, dino_folder):
    sampler = sampler_of(backbone)
    clip, dino = load_clip(str(clip_folder), 'cpu'), load_dino(str(dino_folder), 'cpu')
    jobs = arms(job, (1, 3), Blur(()))
    assert make(jobs, sampler, Interrupt()) == signal.SIGINT
    made = {path: path.stat().st_mtime_ns for path in job.out.glob('*/images/*.png')}
    assert len(made) == 3
    assert make(jobs, sampler, Silent()) is None
    assert len(list(job.out.glob('*/images/*.png'))) == 6 and all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert sorted(path.name for path in job.out.iterdir()) == ['block-1', 'block-3', 'plain']
    with pytest.raises(OutputConflict, match='blur_sigma 9.0 there, 2.0 now'):
        make(arms(job, (1,), Blur((), sigma=2.0)), sampler, Silent())
    found = perturb.measure(items(job.prompts, job.seeds), jobs, clip, dino)
    assert found.scores.shape == (2, 2, 3) and len(found.shown) == 2 and len(found.shown[0]) == 3
    rows = perturb.rows(found)
    assert [(row['prompt'], row['seed'], row['layer']) for row in rows[:4]] == [
        ('a cat', 3, None), ('a cat', 3, 1), ('a cat', 3, 3), ('a dog on grass', 3, None)
    ]  # fmt: skip
    plain, first, _ = perturb.summary(found)
    assert first['dino'] == pytest.approx((rows[1]['dino'] + rows[4]['dino']) / 2) and first['layer'] == 1
    assert plain == {'layer': None, 'clip_i': 1.0, 'dino': 1.0, 'clip_t': pytest.approx((rows[0]['clip_t'] + rows[3]['clip_t']) / 2)}
    left, right = perturb_figure(found).subfigs[0].axes
    assert left.lines[0].get_ydata() == pytest.approx(found.over('clip_i')[0])
    assert right.lines[-1].get_ydata() == pytest.approx([found.plain] * 2)
    ((name, lost),) = [(path.stem, path) for path in (job.out / 'block-3' / 'images').iterdir() if path.name.startswith('a-dog')]
    lost.write_bytes(b'nothing')
    with pytest.raises(ImageError, match=f'{name}.png: '):
        perturb.measure(items(job.prompts, job.seeds), jobs, clip, dino)
    manifest = job.out / 'block-3' / 'manifest.jsonl'
    failed = {
        'name': name,
        'status': 'failed',
        'prompt': 'a dog on grass',
        'seed': 3,
        'guidance': 'cfg',
        'model': '',
        'reason': 'too large',
    }
    manifest.write_text(manifest.read_text() + json.dumps(failed) + '\n')
    with pytest.raises(PadsegError, match=f'{name} could not be made: too large'):
        perturb.measure(items(job.prompts, job.seeds), jobs, clip, dino)
