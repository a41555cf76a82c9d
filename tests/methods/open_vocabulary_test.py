"""Names for masks: against the whole softmax formed the obvious way, the read-outs by hand, and the command on real files."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from support.explicit_attention import ExplicitAttention

from padseg.backbones import load
from padseg.backbones.sd3_text import CLIPS
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import UsageError
from padseg.exports import CONVERTERS, read_label_map, read_masks
from padseg.exports.colours import voc_colours
from padseg.exports.overlay import overlay, write as write_overlay
from padseg.images import read
from padseg.methods import open_vocabulary, seg4diff
from padseg.methods.open_vocabulary import NAMED, PROMPTS, LabelOptions, label, mean_scores, name_regions, score_maps
from padseg.methods.seg4diff import Options, segment, token_maps
from padseg.methods.stages.latents import encode, encode_steps
from padseg.methods.stages.saved_maps import read_maps
from padseg.methods.stages.scores import means, scale_scores
from padseg.methods.stages.token_maps import attention_maps, maps_of_layers
from padseg.run import engine
from padseg.run.convert import convert
from padseg.run.job import Job
from padseg.types import Frame, LabelMap, Prompt, TokenMaps

FAMILIES = ['speller', 'speller35']
ARMS = [(encoders, 'zeros') for encoders in CLIPS] + [(encoders, 'dropped') for encoders in CLIPS if 't5' not in encoders]
NAMES = ('cat', 'traffic light', 'tra')
PLAIN = {'refine': 'none', 'superpixels': 0.0, 'min_area': 0.0}


def whole_attention(backbone, z, timestep, prompt):
    """Every block's whole attention matrix, by layer: (B, heads, N + L, N + L) each."""
    before = dict(backbone.transformer.attn_processors)
    processors = {name: ExplicitAttention() for name in before}
    backbone.transformer.set_attn_processor(dict(processors))
    try:
        with torch.no_grad():
            backbone.denoise(z, timestep, prompt)
    finally:
        backbone.transformer.set_attn_processor(before)
    return [processors[f'transformer_blocks.{layer}.attn.processor'].probabilities for layer in range(backbone.spec.layers)]


# one mechanism


@pytest.mark.parametrize('family', [*FAMILIES, 'flux'])
def test_the_null_prompt_through_this_path_gives_the_maps_of_run(family, picture, request):
    backbone = request.getfixturevalue(family)
    options = LabelOptions().resolve(backbone.spec)
    embeds, pooled = texts_of(backbone).encode('', options.encoders, options.unused)
    null = Prompt(embeds, pooled, tuple(range(77)), backbone.null_prompt.names)
    expected = token_maps(picture, backbone)
    (found,) = maps_of_layers(encode_steps(picture, backbone, options, options.steps), backbone, null, options.layers)
    assert torch.equal(found.maps, expected.maps) and found.names == expected.names


@pytest.mark.parametrize('family', [*FAMILIES, 'flux'])
def test_proposals_are_those_of_run(family, picture, request):
    """Many of them, of several names: nothing is merged, and every name scores high somewhere."""
    backbone = request.getfixturevalue(family)
    backbone = dataclasses.replace(backbone, spec=backbone.spec._replace(own={'seg4diff': {'threshold': 0.0}}))
    prepared = open_vocabulary.prepare(backbone, LabelOptions(on='proposals', layers=(1,), steps=(3,)), NAMES)
    (maps,) = open_vocabulary.maps([picture], prepared)
    assert torch.equal(maps.maps[len(NAMES) :], token_maps(picture, backbone).maps)
    found = label(picture, backbone, NAMES, naming_options := LabelOptions(on='proposals', scores='minmax'))
    regions = segment(picture, backbone)
    assert regions.labels.max() > 9 and len(np.unique(found.labels)) > 1
    for number in range(1, regions.labels.max() + 1):  # no proposal has two names
        assert len(np.unique(found.labels[regions.labels == number])) == 1
    scores = score_maps(picture, backbone, NAMES, dataclasses.replace(naming_options, on='words'))
    assert np.array_equal(name_regions(regions, scores, NAMES).labels, found.labels)


# maps


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(('encoders', 'unused'), ARMS)
def test_scores_equal_the_explicit_softmax(family, encoders, unused, picture, request):
    """Rows of the softmax over all keys, columns found by the tokens of each name, means over heads and tokens."""
    backbone = request.getfixturevalue(family)
    options = LabelOptions(encoders=encoders, unused=unused, geometry='stretch')
    prepared = open_vocabulary.prepare(backbone, options, NAMES)
    (prompt,) = prepared.prompts
    latent = encode(picture, backbone, Options(geometry='stretch').resolve(backbone.spec))
    attention = whole_attention(backbone, latent.z, latent.timestep, prompt)[2].mean(1)[0]  # (N + L, N + L)
    count, columns = 64, 77 if unused == 'dropped' else 154  # of 32 x 32 pixels; T5's are not there if dropped
    assert attention.shape[0] == count + columns and torch.allclose(attention.sum(1), torch.ones(count + columns))
    clip = {'cat': [1], 'traffic light': range(2, 8), 'tra': range(8, 10)}  # tra ff i c</w>, li ght</w>; tr a</w>
    t5 = {'cat': [77], 'traffic light': range(78, 82), 'tra': [82]}
    read = [half for half, used in ((clip, encoders != 't5'), (t5, 't5' in encoders)) if used]
    expected = []
    for name in NAMES:
        maps = [attention[:count, [count + column for column in half[name]]].mean(1) for half in read]
        expected.append(torch.stack(maps).mean(0).reshape(8, 8))
    scores = score_maps(picture, backbone, NAMES, options)
    torch.testing.assert_close(scores.maps, torch.stack(expected), atol=1e-6, rtol=1e-4)
    assert scores.names == NAMES and scores.maps.flatten(1).std(1).min() > 1e-6


@pytest.mark.parametrize('family', FAMILIES)
def test_layers_steps_and_heads(family, picture, request):
    """Means over the layers and steps of one head, from the whole matrices."""
    backbone = request.getfixturevalue(family)
    options = LabelOptions(layers=(0, 3), steps=(2, 9), head=1)
    (prompt,) = open_vocabulary.prepare(backbone, options, NAMES).prompts
    expected = []
    for step in (2, 9):
        latent = encode(picture, backbone, Options(step=step).resolve(backbone.spec))
        h, w = (length // 2 for length in latent.z.shape[2:])
        attention = whole_attention(backbone, latent.z, latent.timestep, prompt)
        expected += [attention[layer][0, 1, : h * w, h * w + 1].reshape(h, w) for layer in (0, 3)]
    found = score_maps(picture, backbone, NAMES, options).maps[0]
    torch.testing.assert_close(found, torch.stack(expected).mean(0), atol=1e-6, rtol=1e-4)


def test_several_layers_come_from_one_forward(speller, picture):
    calls = []
    family = speller.family

    class Counted:
        def __getattr__(self, name):
            return getattr(family, name)

        def denoise(self, *arguments):
            calls.append(arguments)
            return family.denoise(*arguments)

    counted = dataclasses.replace(speller, family=Counted())
    score_maps(picture, counted, NAMES, LabelOptions(layers=(0, 1, 2, 3)))
    assert len(calls) == 1
    score_maps(picture, counted, NAMES, LabelOptions(steps=(1, 2), prompt='per-class'))
    assert len(calls) == 1 + 2 * 3


def test_scores_before_the_softmax(speller, picture):
    options = LabelOptions(softmax=False)
    z = encode(picture, speller, Options().resolve(speller.spec)).z
    (prompt,) = open_vocabulary.prepare(speller, options, NAMES).prompts
    raw = attention_maps(z, 100.0, speller, prompt, 2, head=0, softmax=False)[0]
    shares = attention_maps(z, 100.0, speller, prompt, 2, head=0)[0]
    ratio = shares.log() - raw  # minus the logarithm of a pixel's sum over all keys, the same for all columns
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-4, rtol=0)
    assert score_maps(picture, speller, NAMES, options).maps.max() > 1


def test_only_the_blocks_asked_for_are_read(texts_folder, speller, picture):
    part = load(str(texts_folder), device='cpu', layer=1)
    options = LabelOptions(layers=(0, 1))
    assert torch.equal(score_maps(picture, part, NAMES, options).maps, score_maps(picture, speller, NAMES, options).maps)
    for wrong in (LabelOptions(), LabelOptions(layers=(1,), on='proposals')):
        with pytest.raises(UsageError, match='was loaded up to block 1'):
            label(picture, part, NAMES, wrong)
    for wrong, words in ({'layers': (4,)}, r'layers are in 0\.\.3'), ({'steps': (29,)}, r'steps are in 1\.\.28'), ({'head': 2}, r'0\.\.1'):
        with pytest.raises(UsageError, match=words):
            label(picture, speller, NAMES, LabelOptions(**wrong))


# scores by hand

MAPS = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]]])
OF_TWO = Prompt(torch.zeros(1), torch.zeros(1), (1, 2, 3), ('a', 'a', 'b'), (0.25, 0.75, 1.0))


def test_maps_of_names_are_weighted_sums():
    assert torch.equal(means(MAPS, OF_TWO, 'raw'), torch.stack([0.25 * MAPS[0] + 0.75 * MAPS[1], MAPS[2]]))
    by_token = means(MAPS, OF_TWO, 'minmax-token')  # the flat token is 0 everywhere
    torch.testing.assert_close(by_token, torch.stack([0.25 * MAPS[0] / 4.000001, MAPS[2] / 3.000001]), rtol=1e-7, atol=0)


def test_scores_of_every_kind():
    assert torch.equal(scale_scores(MAPS, 3, 'raw'), MAPS)
    unit = torch.stack([MAPS[0] / 4.000001, torch.zeros(2, 2), MAPS[2] / 3.000001])
    torch.testing.assert_close(scale_scores(MAPS, 3, 'minmax'), unit, rtol=1e-7, atol=0)
    # as in Seg4Diff's released code, which shows where maps are as weak as attention is: 2e-6 / (2e-6 + 1e-6)
    torch.testing.assert_close(scale_scores(torch.tensor([[[1e-6, 3e-6]]]), 1, 'minmax'), torch.tensor([[[0.0, 2 / 3]]]))
    torch.testing.assert_close(scale_scores(MAPS, 3, 'share').sum(0), torch.ones(2, 2))
    assert torch.equal(
        scale_scores(MAPS, 1, 'raw'), torch.stack([MAPS[0], torch.tensor([[3.0, 1.0], [1.0, 1.0]])])
    )  # the best background word


def image_of(pixels: int):
    return np.zeros((pixels, pixels, 3), np.uint8)


def decided(maps, classes, **options):
    frame = Frame((2, 2), (0, 0, 2, 2))
    chosen = LabelOptions(geometry='stretch', **options).resolve(load_spec())
    return open_vocabulary.labels(image_of(2), TokenMaps(maps, ('',) * len(maps), frame), without_model(chosen, classes))


def without_model(options, classes=('a', 'b')):
    return open_vocabulary.Prepared(options, classes, (), None, None)


def load_spec():
    from padseg.backbones.spec import Spec

    return Spec('x')


def test_the_best_class_wins_and_keeps_its_number():
    found = decided(MAPS, ('a', 'b', 'c'))
    assert found.labels.tolist() == [[3, 1], [1, 1]]  # the first of equals
    assert (found.names, found.tokens) == (('a', 'b', 'c'), ())
    assert decided(MAPS[1:], ('b', 'c')).labels.tolist() == [[2, 1], [1, 1]]


def test_background_by_threshold_and_by_words():
    assert decided(MAPS, ('a', 'b', 'c'), background_below=2.5).labels.tolist() == [[3, 0], [0, 1]]
    assert decided(MAPS, ('a', 'b', 'c'), background_below=9.0).labels.tolist() == [[0, 0], [0, 0]]
    assert decided(MAPS, ('a', 'b'), background_words=('c',)).labels.tolist() == [[0, 1], [1, 1]]


def test_classes_follow_edges_and_superpixels_and_lose_specks():
    """Scores of 2 x 2 cells over a picture whose edge lies elsewhere than between the cells."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 20:] = 255
    maps = TokenMaps(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]), ('a', 'b'), Frame((64, 64), (0, 0, 64, 64)))

    def found(**options):
        return open_vocabulary.labels(image, maps, without_model(LabelOptions(geometry='stretch', **options).resolve(load_spec()))).labels

    assert np.array_equal(found(), np.repeat([[1] * 32 + [2] * 32], 64, 0))
    for options in ({'refine': 'guided'}, {'superpixels': 50.0}):
        first = (found(**options) == 1).sum(1)  # pixels of every row that are of the first class
        assert abs(first - 20).max() <= 3, options
    speck = maps._replace(maps=torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]]))
    plain, cleaned = (
        open_vocabulary.labels(image, speck, without_model(LabelOptions(geometry='stretch', min_area=share).resolve(load_spec()))).labels
        for share in (0.0, 0.4)
    )
    assert set(np.unique(plain)) == {1, 2} and (cleaned == 1).all()


def test_regions_are_named_by_their_mean_score():
    regions = LabelMap(np.array([[1, 1, 2], [1, 0, 2]], np.int32), ((0,), (1,)))
    frame = Frame((2, 3), (0, 0, 2, 3))
    scores = TokenMaps(torch.tensor([[[6.0, 0.0, 1.0], [0.0, 50.0, 2.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 4.0]]]), ('a', 'b'), frame)
    assert np.allclose(mean_scores(regions, scores), [[2, 1], [1.5, 2.5]])
    assert name_regions(regions, scores, ('a', 'b')).labels.tolist() == [[1, 1, 2], [1, 0, 2]]
    assert name_regions(regions, scores, ('a', 'b'), below=2.2).labels.tolist() == [[0, 0, 2], [0, 0, 2]]
    assert name_regions(regions, scores, ('a',)).labels.tolist() == [[1, 1, 0], [1, 0, 0]]  # b is background


def test_scores_count_only_where_the_model_looked():
    regions = LabelMap(np.array([[0, 1, 2, 0], [0, 1, 1, 0]], np.int32), ((0,), (1,)))
    scores = TokenMaps(torch.tensor([[[2.0, 7.0], [4.0, 3.0]]]), ('a',), Frame((2, 4), (0, 1, 2, 2)))
    assert np.allclose(mean_scores(regions, scores), [[3], [7]])


# whole pictures


@pytest.mark.parametrize('mode', PROMPTS)
@pytest.mark.parametrize('on', NAMED)
def test_a_batch_gives_what_single_pictures_give(mode, on, speller, picture):
    prepared = open_vocabulary.prepare(speller, LabelOptions(prompt=mode, on=on, background_words=('photo',)), NAMES)
    images = [picture, picture[:, ::-1].copy(), picture[:40, :40].copy()]
    for image, maps in zip(images, open_vocabulary.maps(images, prepared), strict=True):
        alone = label(image, speller, NAMES, LabelOptions(prompt=mode, on=on, background_words=('photo',)))
        assert np.array_equal(open_vocabulary.labels(image, maps, prepared).labels, alone.labels)
        assert alone.labels.shape == image.shape[:2] and alone.labels.dtype == np.int32
        assert 0 <= alone.labels.min() and alone.labels.max() <= len(NAMES)


@pytest.mark.slow
def test_two_hundred_classes(speller, picture):
    names = [f'thing{number}' for number in range(200)]
    scores = score_maps(picture, speller, names)
    assert scores.names == tuple(names) and torch.isfinite(scores.maps).all()
    found = label(picture, speller, names, LabelOptions(geometry='stretch'))
    assert found.names == tuple(names) and found.labels.min() >= 1


def test_no_names_and_names_twice(speller, picture):
    with pytest.raises(UsageError, match='there are no class names'):
        label(picture, speller, [])
    with pytest.raises(UsageError, match='two classes have the same name: cat and cat'):
        label(picture, speller, ['cat', 'cat'])
    with pytest.raises(UsageError, match='two classes have the same name: cat and Cat'):
        label(picture, speller, ['cat'], LabelOptions(background_words=('Cat',)))


@pytest.mark.parametrize(
    ('classes', 'kind'),
    [
        ('star', 'str'),
        (b'star', 'bytes'),
        ({'cat', 'dog'}, 'set'),
        (frozenset({'cat'}), 'frozenset'),
        ({'cat': 1}, 'dict'),
        ({'cat': 1}.keys(), 'dict_keys'),
        ((name for name in ('cat', 'dog')), 'generator'),
        (None, 'NoneType'),
        (3, 'int'),
        (np.array(['cat']), 'ndarray'),
        (['cat', 3], r"\['cat', 3\]"),
        ([['cat']], r"\[\['cat'\]\]"),
        ([b'cat'], r"\[b'cat'\]"),
    ],
)
def test_classes_are_names_in_order(speller, picture, classes, kind):
    """A text would be taken for its letters, and a set has another order in every process."""
    for face in (label, score_maps):
        with pytest.raises(UsageError, match=f'^classes must be a list of names in order, such as .*; got {kind}$'):
            face(picture, speller, classes)
    with pytest.raises(UsageError, match='classes must be a list of names in order'):
        open_vocabulary.prepare(speller, LabelOptions(), classes)


@pytest.mark.parametrize('words', ['sky', {'sky', 'sea'}, iter(['sky'])])
def test_words_of_the_background_are_a_list_too(words):
    with pytest.raises(UsageError, match='^background_words is a list or a tuple; got '):
        LabelOptions(background_words=words)
    with pytest.raises(UsageError, match='^layers is a list or a tuple; got 3$'):
        LabelOptions(layers=3)


def test_names_that_a_model_was_not_trained_on(picture, caplog, monkeypatch):
    """One warning for each in a process, and only of a model that lists its words."""
    open_vocabulary.warn_once.cache_clear()
    tiny = load(device='cpu')
    for _ in range(2):
        label(picture, tiny, ['zebra', 'star', 'Car', 'red car'], LabelOptions(background_words=('grass', 'sky')))
    said = [record.getMessage() for record in caplog.records if record.name.startswith('padseg')]
    assert [message.partition(':')[0] for message in said] == [
        f'tiny was not trained on the name {name!r}' for name in ('zebra', 'red car', 'sky')
    ]


def test_a_model_without_a_list_of_words_says_nothing(speller, picture, caplog):
    label(picture, speller, ['zebra', 'giraffe'])
    assert not [record for record in caplog.records if record.name.startswith('padseg')]


def test_the_order_of_names_only_numbers_them_with_per_class(speller, picture):
    """Each name has a prompt of its own, so the scores do not depend on the others."""
    options = LabelOptions(prompt='per-class')
    first, second = (score_maps(picture, speller, names, options) for names in (NAMES, NAMES[::-1]))
    assert torch.equal(first.maps, second.maps.flip(0))
    assert first.maps.amin((1, 2)).eq(0).all() and (1 - first.maps.amax((1, 2))).abs().max() < 2e-3  # less what is added to the range


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'layers': (1, 1)}, 'layers are distinct numbers >= 0; got 1, 1'),
        ({'layers': ()}, 'layers are distinct numbers >= 0; got '),
        ({'steps': (0,)}, 'steps are distinct numbers >= 1; got 0'),
        ({'head': -1}, 'head is counted from 0; got -1'),
        ({'prompt': 'poem'}, 'prompt is one of joined, template, per-class; got poem'),
        ({'encoders': 'l+t5'}, 'encoders is one of l, g, l\\+g, t5, l\\+g\\+t5, qwen3; got l\\+t5'),
        ({'unused': 'mean'}, 'unused is one of zeros, dropped; got mean'),
        ({'columns': 'l'}, 'columns is one of clip, t5, both, qwen3; got l'),
        ({'scores': 'softmax'}, 'scores is one of raw, minmax, minmax-token, share; got softmax'),
        ({'on': 'pixels'}, 'on is one of words, proposals; got pixels'),
        ({'softmax': False, 'scores': 'share'}, 'raw attention scores have no shares'),
        ({'background_below': float('nan')}, 'background_below is a finite number; got nan'),
        ({'geometry': 'round'}, 'geometry is one of'),
        ({'min_area': 1.0}, r'min_area is a share of the picture in 0\.\.1; got 1.0'),
    ],
)
def test_values_out_of_range(values, words):
    with pytest.raises(UsageError, match=f'^{words}'):
        LabelOptions(**values)


def test_none_is_what_the_model_names():
    regions = {'step': 2, 'superpixels': 30.0, 'min_area': 0.1, 'refine': 'guided', 'threshold': 0.3}
    spec = load_spec()._replace(layer=4, side=64, own={'seg4diff': regions})
    found = LabelOptions().resolve(spec)
    assert (found.layers, found.steps, found.side, found.encoders, found.columns, found.scores) == ((4,), (2,), 64, 'l+g', 'clip', 'raw')
    assert (found.refine, found.superpixels, found.min_area) == ('guided', 30.0, 0.1)
    paper = LabelOptions(geometry='stretch', prompt='per-class', on='proposals').resolve(spec)
    assert (paper.refine, paper.superpixels, paper.min_area, paper.scores) == ('none', 0.0, 0.0, 'minmax')
    proposals = {f'proposals_{name}': value for name, value in seg4diff.recorded(Options(geometry='stretch'), spec).items()}
    recorded = open_vocabulary.recorded(LabelOptions(geometry='stretch', prompt='per-class', on='proposals'), spec)
    assert proposals.items() <= recorded.items() and 'proposals' not in recorded
    assert open_vocabulary.recorded(LabelOptions(), spec)['proposals'] is None
    spec = spec._replace(own={'seg4diff': regions, 'open-vocabulary': {'steps': [3, 5], 'min_area': 0.2}})
    stated = LabelOptions().resolve(spec)
    assert (stated.steps, stated.min_area, stated.superpixels) == ((3, 5), 0.2, 30.0)


# the command


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    PIL.Image.fromarray(picture).save(tmp_path / 'in' / 'a.png')
    PIL.Image.fromarray(picture[::-1, ::-1].copy()).save(tmp_path / 'in' / 'sub' / 'b.png')
    return tmp_path / 'in'


@pytest.fixture
def job(folder, tmp_path, texts_folder):
    return Job(folder, tmp_path / 'out', LabelOptions(), NAMES, model=str(texts_folder), device='cpu', method='open-vocabulary')


def test_what_the_command_writes(folder, tmp_path, texts_folder, speller, capsys):
    out = tmp_path / 'out'
    model = ['--model', str(texts_folder), '--device', 'cpu']
    arguments = [
        'label',
        '--dir',
        str(folder),
        '--out',
        str(out),
        *model,
        '--classes',
        'cat, traffic light,tra',
        '--save-maps',
        '--overlay',
        '--coco',
        '-q',
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ''
    legend = json.loads((out / 'classes.json').read_text())
    assert legend == [{'id': number, 'name': name, 'color': voc_colours()[number].tolist()} for number, name in enumerate(NAMES, start=1)]
    for line in (out / 'manifest.jsonl').read_text().splitlines():
        entry = json.loads(line)
        name = entry['input']
        image = read(folder / name)
        expected = label(image, speller, NAMES)
        stored = read_label_map(out / 'labels' / f'{name}.png')
        assert np.array_equal(stored, expected.labels) and np.array_equal(read_masks(out / 'masks' / name), expected.labels)
        assert entry['regions'] == len(np.unique(expected.labels))
        rows = list(csv.DictReader((out / 'masks' / name / 'metadata.csv').open()))
        assert [(row['id'], row['name']) for row in rows] == [(str(number - 1), NAMES[number - 1]) for number in np.unique(stored)]
        maps = read_maps(out / 'maps' / f'{name}.npz')
        assert maps.names == NAMES and torch.equal(maps.maps, score_maps(image, speller, NAMES).maps)
        assert (out / 'overlays' / f'{name}.jpg').exists()
    settings = json.loads((out / 'run.json').read_text())['settings']
    assert json.loads(settings['classes']) == list(NAMES) and (settings['layers'], settings['encoders']) == ('2', 'l+g')
    for file in ('instances', 'panoptic'):
        categories = json.loads((out / 'coco' / f'{file}.json').read_text())['categories']
        assert [(each['id'], each['name']) for each in categories] == list(enumerate(NAMES, start=1))
    before = (out / 'labels' / 'a.png.png').stat().st_mtime_ns
    assert main([*arguments, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['skipped'] == 2
    assert (out / 'labels' / 'a.png.png').stat().st_mtime_ns == before
    assert main([*arguments, '--classes', 'cat,dog']) == 6  # results of other classes
    assert 'classes ["cat", "traffic light", "tra"] there, ["cat", "dog"] now' in capsys.readouterr().err
    assert main(['merge', str(out), '--out', str(tmp_path / 'merged'), '-q']) == 2
    assert 'holds maps of classes' in capsys.readouterr().err


def test_a_file_of_classes(folder, tmp_path, texts_folder, capsys):
    (tmp_path / 'names.txt').write_text('cat\n\n traffic light, red \n日本\n', encoding='utf-8')
    common = ['label', '--dir', str(folder), '--out', str(tmp_path / 'out'), '--model', str(texts_folder), '--device', 'cpu', '-q']
    assert main([*common, '--classes-file', str(tmp_path / 'names.txt'), '--limit', '1']) == 0
    assert [row['name'] for row in json.loads((tmp_path / 'out' / 'classes.json').read_text())] == ['cat', 'traffic light, red', '日本']
    (tmp_path / 'names.txt').write_text('\ufeffcat\r\ntraffic light, red\r\n日本\r\n', encoding='utf-8')  # as Windows writes it
    assert main([*common, '--classes-file', str(tmp_path / 'names.txt'), '--limit', '1']) == 0  # the same classes
    (tmp_path / 'names.txt').write_text('\n \n')
    for wrong, words in (
        (['--classes-file', str(tmp_path / 'names.txt')], 'there are no class names'),
        (['--classes-file', str(tmp_path / 'nothing.txt')], 'cannot be read as text'),
        (['--classes', ' , '], 'there are no class names'),
        (['--classes', 'cat,cat'], 'two classes have the same name'),
        ([], 'Give either --classes or --classes-file'),
        (['--classes', 'cat', '--classes-file', 'x'], 'Give either --classes or --classes-file'),
        (['--classes', 'cat', '--layers', 'one'], 'is not a list such as 8,9'),
        (['--classes', 'cat', '--layers', '9'], 'layer is one of 0..3; got 9'),
        (['--classes', 'cat', '--layers', '1,1'], 'layers are distinct numbers >= 0; got 1, 1'),
    ):
        assert main([*common, '--out', str(tmp_path / 'other'), *wrong]) == 2
        assert words in capsys.readouterr().err


def test_proposals_are_named_by_the_command(job, texts_folder, speller, tmp_path):
    model = shutil.copytree(texts_folder, tmp_path / 'model')
    row = json.loads((model / 'padseg.json').read_text())
    (model / 'padseg.json').write_text(json.dumps({**row, 'threshold': 0.0}))  # many proposals
    options = LabelOptions(on='proposals', layers=(0, 1), scores='minmax')
    engine.run(job._replace(options=options, model=str(model)))
    many = dataclasses.replace(speller, spec=speller.spec._replace(own={'seg4diff': {'threshold': 0.0}}))
    expected = label(job.source / 'a.png', many, NAMES, options)
    assert len(np.unique(expected.labels)) > 1
    assert np.array_equal(read_label_map(job.out / 'labels' / 'a.png.png'), expected.labels)
    settings = json.loads((job.out / 'run.json').read_text())['settings']
    assert (settings['layers'], settings['proposals_layer'], settings['proposals_threshold']) == ('0, 1', 2, 0.0)


def test_shards_and_batches_give_the_same(job, tmp_path):
    engine.run(job)
    for number in (1, 2):
        shared = job._replace(out=tmp_path / 'shared', selection=job.selection._replace(shard=(number, 2)), batch=number)
        engine.run(shared)
    for path in sorted((job.out / 'labels').rglob('*.png')):
        assert (tmp_path / 'shared' / path.relative_to(job.out)).read_bytes() == path.read_bytes()
    assert (tmp_path / 'shared' / 'classes.json').read_bytes() == (job.out / 'classes.json').read_bytes()


def test_a_broken_picture_fails_alone(job):
    (job.source / 'c.png').write_bytes(b'none')
    counts = engine.run(job)
    assert (counts.done, counts.failed) == (2, 1)


AWKWARD = ('cat', 'a <b> "c"')


@pytest.mark.parametrize('format', CONVERTERS)
def test_every_form_has_the_names(job, format, tmp_path):
    engine.run(job._replace(classes=AWKWARD))
    made = convert(job.out, format, tmp_path / format)
    assert (made.pictures, made.failed) == (2, {})
    texts = [path.read_text() for path in sorted((tmp_path / format).rglob('*')) if path.suffix in ('.json', '.xml')]
    shown = {int(value) for path in (job.out / 'labels').rglob('*.png') for value in np.unique(read_label_map(path))}
    assert shown and not any('"region"' in text or '>region<' in text for text in texts)
    for number in shown:
        name = AWKWARD[number - 1]
        assert any(name in text or json.dumps(name)[1:-1] in text or 'a &lt;b&gt; ' in text for text in texts)


LOAD = """
import sys, datasets, numpy
rows = datasets.load_dataset(sys.argv[1])['train']
assert rows.column_names == ['image', 'mask'], rows.column_names
numpy.savez(sys.argv[2], *(row['mask'] for row in rows))
"""


@pytest.mark.slow
def test_an_image_folder_has_names_beside_what_the_datasets_library_loads(job, folder, tmp_path):
    pytest.importorskip('datasets')
    shutil.rmtree(folder / 'sub')  # of few files a single one of another kind is the more
    engine.run(job._replace(classes=AWKWARD))
    convert(job.out, 'hf-imagefolder')
    names = json.loads((job.out / 'hf-imagefolder' / 'id2label.json').read_text())
    assert names == {'0': 'unlabeled', '1': 'cat', '2': 'a <b> "c"'}
    home = {'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}
    command = [sys.executable, '-c', LOAD, job.out / 'hf-imagefolder', tmp_path / 'masks.npz']
    ran = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / 'masks.npz') as masks:
        assert list(masks) == ['arr_0'] and np.array_equal(masks['arr_0'], read_label_map(job.out / 'labels' / 'a.png.png'))


def test_an_overlay_has_a_legend(tmp_path):
    image = np.full((200, 300, 3), 60, np.uint8)
    labels = np.full((200, 300), 2, np.int32)
    plain, legend = tmp_path / 'plain.jpg', tmp_path / 'legend.jpg'
    write_overlay(image, LabelMap(labels, ()), plain)
    write_overlay(image, LabelMap(labels, (), ('cat', 'traffic light')), legend)
    difference = np.abs(read(plain).astype(int) - read(legend).astype(int)).max(2) > 60
    assert difference[:20, :60].mean() > 0.5 and not difference[40:].any() and not difference[:, 200:].any()
    assert np.array_equal(overlay(image, labels)[100, 100], overlay(image, labels)[50, 250])
