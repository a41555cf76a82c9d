"""Fine-tuning on small random models: what gradients reach, that parts, processes and restarts change nothing, what is written."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
import socket
import sys

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from support.fine_tuning import NAMES, SMALL, fine_tune, fine_tune_and_die, in_process, put_annotated
from support.processes import start

from padseg.backbones import load
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import UsageError
from padseg.train.annotated import View, open_annotated
from padseg.train.lessons import Teacher
from padseg.train.lora import COLUMNS, losses_of, make_learner, make_optimiser
from padseg.train.lora_settings import LoraSettings
from padseg.train.lora_validation import loss_on

NAMED = dataclasses.replace(SMALL, candidates='tokens', matching='names')
WEIGHTS = 'lora/pytorch_lora_weights.safetensors'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return put_annotated(tmp_path_factory.mktemp('data') / 'folder')


@pytest.fixture(scope='module')
def straight(tmp_path_factory, sd3_folder, source):
    """Four steps without a break, a picture at a time."""
    out = tmp_path_factory.mktemp('straight')
    fine_tune(out, sd3_folder, source, save_every=2, shown=1)
    return out


def rows(out):
    with (out / 'train.csv').open(newline='') as file:
        return [[row[name] for name in ('step', *COLUMNS)] for row in csv.DictReader(file)]


def same(out, other, exact=True):
    """Whether two trainings have the same losses and weights, or nearly."""
    for one, two in zip(rows(out), rows(other), strict=True):
        assert (
            one == two if exact else [float(value) for value in one] == pytest.approx([float(value) for value in two], rel=1e-3, abs=3e-5)
        )
    states = [torch.load(path / 'train.pt', weights_only=True)['model'] for path in (out, other)]
    assert states[0].keys() == states[1].keys()
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], **({'rtol': 0, 'atol': 0} if exact else {'rtol': 1e-2, 'atol': 1e-3}))


def near(found, expected):
    """Whether rows of losses are the same but for the order of sums."""
    for one, two in zip(found, expected, strict=True):
        assert [float(value) for value in one] == pytest.approx([float(value) for value in two], rel=1e-3, abs=3e-5)


def lessons_and_losses(folder, source, settings, numbers, captions=None, with_flow=False, checkpointing=False):
    """Lessons of a fresh model with a LoRA, its losses after a backward pass, and the model."""
    backbone = load(str(folder), device='cpu', whole=True)
    learner = make_learner(backbone.transformer, settings)
    if checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    teacher = Teacher(open_annotated([source], captions), backbone, texts_of(backbone, False), settings, folder / 'latents')
    lessons = [teacher.lesson(number) for number in numbers]
    pairs = float(sum(len(lesson.masks) for lesson in lessons))
    losses = losses_of(lessons, learner, backbone, backbone.spec.layer, settings, with_flow, Accelerator(cpu=True), pairs)
    if losses['total'].requires_grad:
        losses['total'].backward()
    return lessons, losses, backbone


def reached(backbone):
    """Names of the layers whose LoRA gets a gradient. At first lora_B is zero, and with it the gradient of lora_A."""
    weights = backbone.transformer.named_parameters()
    return {name.partition('.lora_B')[0] for name, weight in weights if 'lora_B' in name and weight.grad is not None and weight.grad.any()}


def layers(*blocks, of=('to_q', 'to_k', 'to_v', 'to_out.0')):
    return {f'transformer_blocks.{block}.attn.{name}' for block in blocks for name in of}


# what is trained


def test_a_lora_for_sd3_medium_has_4718592_parameters():
    with torch.device('meta'):
        transformer = SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            in_channels=16,
            out_channels=16,
            pos_embed_max_size=192,
        ).requires_grad_(False)
    learner = make_learner(transformer, LoraSettings())
    assert sum(weight.numel() for weight in learner['lora'].parameters()) == 4718592
    assert sum(weight.numel() for weight in learner['score'].parameters()) == 38145
    assert sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad) == 4718592


def test_the_image_stream_alone_is_trained_also_in_blocks_of_two_attentions(sd35_folder):
    backbone = load(str(sd35_folder), device='cpu', whole=True)
    make_learner(backbone.transformer, LoraSettings(rank=2))
    trained = {name.partition('.lora_')[0] for name, weight in backbone.transformer.named_parameters() if weight.requires_grad}
    assert trained == layers(0, 1, 2, 3)
    assert {weight.dtype for weight in backbone.transformer.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('maps', ['scores', 'shares'])
def test_mask_losses_reach_blocks_before_the_expert_and_its_queries(sd3_folder, source, maps, checkpointing):
    """The expert is block 2. Keys of text are frozen there, so that those of the image count only in the softmax."""
    settings = dataclasses.replace(SMALL, maps=maps, candidates='tokens')
    expected = layers(0, 1) | layers(2, of=('to_q',) if maps == 'scores' else ('to_q', 'to_k'))
    _, _, backbone = lessons_and_losses(sd3_folder, source, settings, [0], checkpointing=checkpointing)
    assert reached(backbone) == expected
    _, _, backbone = lessons_and_losses(sd3_folder, source, settings, [0], with_flow=True, checkpointing=checkpointing)
    assert reached(backbone) == layers(0, 1, 2, 3)


def test_without_a_score_layer_the_lora_alone_is_trained(sd3_folder):
    backbone = load(str(sd3_folder), device='cpu', whole=True)
    learner = make_learner(backbone.transformer, dataclasses.replace(SMALL, score_layer=False))
    (group,) = make_optimiser(learner, SMALL).param_groups
    assert len(group['params']) == len(list(learner['lora'].parameters())) > 0


# parts, processes, restarts


def test_a_batch_in_four_parts_is_one_of_four_pictures(straight, sd3_folder, source, tmp_path):
    fine_tune(tmp_path, sd3_folder, source, at_once=4)
    same(tmp_path, straight, exact=False)


def test_recomputed_blocks_change_nothing(sd3_folder, source):
    kept, recomputed = (lessons_and_losses(sd3_folder, source, SMALL, [0, 1], with_flow=True, checkpointing=on) for on in (False, True))
    assert kept[1] == recomputed[1]
    gradients = [
        [weight.grad for weight in backbone.transformer.parameters() if weight.requires_grad] for *_, backbone in (kept, recomputed)
    ]
    assert all(one.equal(two) for one, two in zip(*gradients, strict=True))


@pytest.mark.slow
def test_a_killed_training_goes_on_exactly(straight, sd3_folder, source, tmp_path):
    """Killed in its fourth step, after the losses of the third, which the checkpoint after the second does not know of."""
    assert start(fine_tune_and_die, tmp_path, sd3_folder, source).wait().returncode == -signal.SIGKILL
    assert [row[0] for row in rows(tmp_path)] == ['0', '1', '2'] and (tmp_path / 'train.pt').is_file()
    fine_tune(tmp_path, sd3_folder, source)
    same(tmp_path, straight)
    assert (tmp_path / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    with pytest.raises(UsageError, match='choose another --out'):
        fine_tune(tmp_path, sd3_folder, source, dataclasses.replace(SMALL, seed=1))


def test_a_stopped_training_goes_on_exactly(straight, sd3_folder, source, tmp_path):
    fine_tune(tmp_path, sd3_folder, source, max_steps=1)
    assert len(rows(tmp_path)) == 1
    fine_tune(tmp_path, sd3_folder, source, time_limit=0.0)
    assert len(rows(tmp_path)) == 2
    assert rows(tmp_path) == rows(straight)[:2]


@pytest.mark.slow
def test_two_processes_are_one(straight, sd3_folder, source, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    started = [start(in_process, rank, 2, port, tmp_path, sd3_folder, source) for rank in range(2)]
    for process in started:
        ran = process.wait()
        assert ran.returncode == 0, ran.stderr
    near(rows(tmp_path), rows(straight)[:2])


def test_a_batch_that_cannot_be_shared_is_refused(sd3_folder, source, tmp_path):
    with pytest.raises(UsageError, match='1 processes of 3 pictures at once cannot share a batch of 4'):
        fine_tune(tmp_path, sd3_folder, source, at_once=3)


def test_missing_packages_are_named(sd3_folder, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(UsageError, match=r"training needs peft: pip install 'padseg\[train\]'"):
        fine_tune(tmp_path / 'out', sd3_folder, source)
    assert not (tmp_path / 'out').exists()


# lessons


@pytest.fixture(scope='module')
def regions(tmp_path_factory):
    """Pictures with no region, one and 40 regions without classes, and captions, one of which is far too long."""
    root = tmp_path_factory.mktemp('regions')
    (root / 'images').mkdir()
    (root / 'labels').mkdir()
    grid = np.arange(64) // 13  # five rows
    cells = np.minimum(grid[:, None] * 8 + np.arange(64)[None] // 8, 39)
    for name, labels in (('a', np.full((64, 64), 255)), ('b', np.zeros((64, 64))), ('c', cells)):
        PIL.Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / 'images' / f'{name}.png')
        PIL.Image.fromarray(labels.astype(np.uint8)).save(root / 'labels' / f'{name}.png')
    (root / 'captions.json').write_text(json.dumps({'a': 'a cat', 'b': 'a dog on grass ' * 30, 'c': 'zebra'}))
    return root


@pytest.mark.parametrize('candidates', ['tokens', 'heads'])
def test_pictures_without_masks_with_one_and_with_forty(sd3_folder, regions, candidates):
    settings = dataclasses.replace(SMALL, prompt='captions', candidates=candidates, least_area=0.0, most=40, crop='whole')
    lessons, losses, backbone = lessons_and_losses(sd3_folder, str(regions), settings, [0, 1, 2], regions / 'captions.json', with_flow=True)
    assert sorted(len(lesson.masks) for lesson in lessons) == [0, 1, 40]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(weight.grad is None or torch.isfinite(weight.grad).all() for weight in backbone.transformer.parameters())
    alone = [number for number, lesson in enumerate(lessons) if not len(lesson.masks)]
    _, losses, backbone = lessons_and_losses(sd3_folder, str(regions), settings, alone)
    assert losses['total'] == 0 and reached(backbone) == set()


def test_names_behind_the_cut_are_left_out_with_their_masks(sd3_folder, source, tmp_path):
    """Letters are tokens of the small model's tokenizer, so that a name of 80 letters fills the prompt."""
    names = ['cat', 'z' * 80, 'grass']
    copy = tmp_path / 'folder'
    put_annotated(copy)
    (copy / 'classes.txt').write_text('\n'.join(names) + '\n')
    settings = dataclasses.replace(NAMED, crop='whole', flip=False)
    for columns, kept in (('exact', [[1], [*range(2, 76)]]), ('released', [[1], [*range(2, 77)]])):
        lessons, losses, _ = lessons_and_losses(sd3_folder, str(copy), dataclasses.replace(settings, columns=columns), [0])
        assert sorted(map(list, lessons[0].columns)) == kept and len(lessons[0].masks) == 2
        assert torch.isfinite(losses['total'])
    lessons, _, _ = lessons_and_losses(sd3_folder, source, settings, [0])
    assert sorted(lessons[0].columns) == [(1,), (2,), (3,)]


def test_a_lesson_depends_on_its_number_alone(sd3_folder, source):
    backbone = load(str(sd3_folder), device='cpu', whole=True)
    data = open_annotated([source])
    one, two = (Teacher(data, backbone, texts_of(backbone, False), SMALL, sd3_folder) for _ in range(2))
    two.lesson(3)
    first, second = one.lesson(5), two.lesson(5)
    assert first.level == second.level and first.noise.equal(second.noise) and first.image.equal(second.image)
    assert len({one.lesson(number).level for number in range(12)}) > 6
    fixed = Teacher(data, backbone, texts_of(backbone, False), dataclasses.replace(SMALL, views=1), sd3_folder)
    views = {fixed.lesson(number).place: fixed.lesson(number).image for number in range(3)}
    for number in range(3, 6):  # the next epoch, in another order
        assert views[fixed.lesson(number).place].equal(fixed.lesson(number).image)
    levels = np.array([one.lesson(number).level for number in range(60)])
    assert abs(np.median(levels) - 500) < 60
    assert backbone.scheduler.sigmas[499].item() == pytest.approx(0.75, abs=1e-3)  # of the shifted schedule, 3 / 2 / (1 + 2 / 2)


def test_captions_are_dropped_and_a_small_vocabulary_gets_names_that_it_knows(source, sd3_folder):
    backbone = load(str(sd3_folder), device='cpu', whole=True)
    knows_two = dataclasses.replace(backbone, spec=backbone.spec._replace(words=('cat', 'grass')))
    data = open_annotated([source])
    example = data.example(1, np.random.default_rng(0), View(64, 'whole', flip=False))
    assert set(example.names) == set(NAMES)
    for model, text in ((backbone, 'cat dog grass'), (knows_two, 'cat grass')):
        worded = Teacher(data, model, texts_of(model, False), NAMED, sd3_folder).worded(example)
        assert worded.text == text and sum(map(bool, worded.columns)) == len(text.split())
    dropped = Teacher(data, backbone, texts_of(backbone, False), dataclasses.replace(NAMED, caption_dropout=1.0), sd3_folder).lesson(0)
    assert len(dropped.masks) == 0 and torch.equal(dropped.embeds, backbone.null_prompt.embeds)


# what is written


def test_what_is_written(straight):
    assert {path.name for path in straight.iterdir()} == {'lora', 'sheets', 'train.csv', 'train.png', 'train.pt'}
    assert sorted(path.name for path in (straight / 'sheets').iterdir()) == ['000000.png', '000002.png', '000004.png']
    card = (straight / 'lora/README.md').read_text()
    assert '4 of 4 steps of 4 pictures' in card and 'library_name: diffusers' in card and '- rank: 2' in card


def test_the_lora_merged_is_the_one_trained(straight, sd3_folder):
    backbone = load(str(sd3_folder), device='cpu', whole=True)
    learner = make_learner(backbone.transformer, SMALL)
    learner.load_state_dict(torch.load(straight / 'train.pt', weights_only=True)['model'])
    merged = load(str(sd3_folder), device='cpu', whole=True, lora=str(straight / 'lora'))
    plain = load(str(sd3_folder), device='cpu', whole=True)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted, other, before = (model.denoise(z, 300.0, model.null_prompt) for model in (backbone, merged, plain))
    torch.testing.assert_close(other, adapted, rtol=1e-4, atol=1e-4)
    assert (other - before).abs().max() > 100 * (other - adapted).abs().max()


def test_it_loads_into_a_pipeline_of_diffusers(straight, sd3_folder):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(straight / 'lora')
    held = {name: weight for name, weight in pipeline.transformer.state_dict().items() if 'lora_' in name}
    stored = load_file(straight / WEIGHTS)
    assert len(held) == len(stored) == 2 * 4 * 4
    for name, weight in stored.items():
        assert held[name.removeprefix('transformer.').replace('.weight', '.default_0.weight')].equal(weight)


@pytest.mark.slow
def test_the_command_validates_and_keeps_the_best(sd3_folder, source, tmp_path, capsys):
    flags = ['--batch', '2', '--steps', '3', '--rank', '2', '--side', '32', '--rate', '1e-2', '--candidates', 'tokens', '--prompt', 'none']
    where = ['--model', str(sd3_folder), '--data', source, '--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(['train', *where, '--check']) == 0
    assert '3 pictures' in capsys.readouterr().out
    toml = tmp_path / 'truth/padseg.toml'
    put_annotated(toml.parent)
    toml.write_text(f'num_classes = {len(NAMES)}\n')
    checks = [
        '--eval',
        'folder',
        '--eval-root',
        str(toml.parent),
        '--eval-every',
        '2',
        '--eval-plain',
        '--eval-limit',
        '2',
        '--held',
        source,
    ]
    assert main(['train', *where, *flags, *checks]) == 0
    with (tmp_path / 'out/validation.csv').open(newline='') as file:
        validated = {int(row['step']): row for row in csv.DictReader(file)}
    found = {step: float(row['miou']) for step, row in validated.items()}
    assert len({row['flow'] for row in validated.values()}) == 3
    assert list(found) == [0, 2, 3] and all(0 <= value <= 1 for value in found.values())
    height, width = cv2.imread(str(tmp_path / 'out/validation.png')).shape[:2]
    assert width == 840 and height % 240 == 0  # a part for each measure
    best = max((2, 3), key=lambda step: found[step])
    assert (tmp_path / 'out/best/README.md').read_text().split(' of 3 steps')[0].endswith(f' {best}')
    assert main(['train', *where, *flags, '--seed', '1']) == 2
    assert 'was made with seed=0, but this run has seed=1: choose another --out' in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(source, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'taken' / 'train.png').mkdir(parents=True)
    for name, code in (('file', 2), ('taken', 6)):  # the model is looked for later
        assert main(['train', '-q', '--data', source, '--model', 'no such model', '--out', str(tmp_path / name)]) == code
        said = capsys.readouterr().err
        assert str(tmp_path / name) in said and said.count('\n') == 1


def test_the_loss_on_held_out_pictures_is_their_mean_over_even_noise(sd3_folder, source, tmp_path):
    backbone, data = load(str(sd3_folder), device='cpu', whole=True), open_annotated([source])
    found = loss_on(data, dataclasses.replace(SMALL, seed=5, flip=True), at_once=2)(backbone, tmp_path, 0)
    teacher = Teacher(data, backbone, texts_of(backbone), dataclasses.replace(SMALL, seed=0, flip=False), tmp_path)
    losses = []
    for number, level in enumerate([166, 500, 833]):  # of 1000, in the middle of a third each
        lesson = teacher.lesson(number)
        sigma, vae = backbone.scheduler.sigmas[level], backbone.vae
        with torch.no_grad():
            mean = vae.encode(lesson.image[None] * 2 - 1).latent_dist.mode()
            clean = (mean - vae.config.shift_factor) * vae.config.scaling_factor
            prompt = backbone.null_prompt._replace(embeds=lesson.embeds, pooled=lesson.pooled)
            seen = backbone.denoise((1 - sigma) * clean + sigma * lesson.noise, float(backbone.scheduler.timesteps[level]), prompt)
        losses.append((seen - (lesson.noise - clean)).square().mean().item())
    assert found == {'flow': pytest.approx(np.mean(losses), rel=1e-5)}
