"""bin/bench: a small run prints every measure, and its simpler ways to the counts are what they are compared with."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import Attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from padseg.backbones import load as load_backbone
from padseg.bench import engine, eval as scoring, flops, load, measure, model, reference, scale, sd3, vae
from padseg.bench.setting import BenchSetting, bench_backbone, bench_picture
from padseg.evaluation.metrics import hungarian_counts, match_regions, widened
from padseg.exports import read_label_map
from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import encode
from padseg.methods.stages.token_maps import latent_token_maps

ROOT = Path(__file__).parents[2]


def test_a_small_run(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    measured, seconds = bench('eval', '--pairs', '6', '--size', '64', '--classes', '5')
    assert (measured['pairs'], measured['size'], measured['classes']) == (6, 64, 5)
    assert list(measured['pairs_per_second']) == list(measured['with_start']) == ['1', '2']
    assert 30 / seconds < measured['with_start']['2'] < measured['with_start']['1']  # workers take longer to start than 30 pairs
    taken = measured['milliseconds']
    assert list(taken) == ['decode', 'classes', 'count', 'scikit_image', 'loop']
    assert min(taken.values()) > 0 and sum(taken.values()) * 6 * measure.REPEATS < 1000 * seconds
    assert taken['count'] < taken['loop']
    assert measured['loop_to_count'] == taken['loop'] / taken['count']
    assert measured['scikit_image_to_count'] == taken['scikit_image'] / taken['count']
    assert list(measured['memory_mib']) == ['3', '30']
    assert all(20 < value < 2000 for value in measured['memory_mib'].values())
    assert measured['memory_many_to_few'] == pytest.approx(measured['memory_mib']['30'] / measured['memory_mib']['3'])
    assert list(tmp_path.glob('padseg-*')) == []


def test_words_for_people():
    measured = {
        'size': 32,
        'classes': 27,
        **measure.surroundings(),
        'pairs_per_second': {1: 100.0, 2: None},
        'with_start': {1: 90.0, 2: 40.0},
        'two_workers_to_one': None,
        'milliseconds': {'decode': 1.0, 'classes': 0.5, 'count': 2.0, 'scikit_image': 5.0, 'loop': 30.0},
        'scikit_image_to_count': 2.5,
        'loop_to_count': 15.0,
        'memory_mib': {3: 100.0, 30: 101.0},
        'memory_many_to_few': 1.01,
    }
    lines = scoring.in_words(measured).splitlines()
    assert lines[0].startswith('pairs of 32 x 32, 27 classes; ') and f'{os.cpu_count()} processors, ' in lines[0]
    assert lines[1].split() == 'one worker 100.00 pairs/s; 90.0 with its start'.split()
    assert lines[2].split() == 'two workers too short pairs/s; 40.0 with their start'.split()
    assert lines[7].split() == 'with a loop 30.00 ms; 15.0 x'.split()
    assert lines[9].split() == 'memory of 30 pairs 101.00 MiB; 1.010 x'.split()
    measured = {**measured, 'pairs_per_second': {1: 100.0, 2: 190.0}, 'two_workers_to_one': 1.9}
    assert scoring.in_words(measured).splitlines()[2].split()[-4:] == '1.90 x one worker'.split()


def test_pairs_are_palette_pngs_with_all_that_is_asked_for(tmp_path):
    scoring.make_pairs(tmp_path, 3, 64, 27)
    for number in range(3):
        with PIL.Image.open(tmp_path / 'truth' / f'{number}.png') as truth, PIL.Image.open(tmp_path / 'pred' / f'{number}.png') as pred:
            assert truth.mode == pred.mode == 'P' and truth.size == pred.size == (64, 64)
            labels, regions = np.asarray(truth), np.asarray(pred)
        assert (labels[:2] == scoring.IGNORE).all() and labels[2:].max() < 27
        assert regions[0, 0] == 1 and set(np.unique(regions)) == set(range(1, regions.max() + 1))
        counts = scoring.matched_loop(scoring.loop_table(regions, labels, 27))
        assert 0.3 < counts.true_positive.sum() / counts.total < 1


def test_the_simpler_ways_by_hand():
    truth, pred = np.array([[0, 0, 2, 2, 255]]), np.array([[1, 2, 2, 2, 3]])
    expected = [[1, 1, 0], [0, 0, 0], [0, 2, 0]]
    assert scoring.loop_table(pred, truth, 3).tolist() == scoring.skimage_table(pred, truth, 3).tolist() == expected
    column = match_regions(widened(np.array(expected)))
    assert column.tolist() == [0, 2, 1]
    classes = np.where(truth == 255, -1, truth)
    assert scoring.same_counts(scoring.matched_loop(np.array(expected)), hungarian_counts(pred, classes, 3))
    assert not scoring.same_counts(scoring.matched_loop(np.array(expected) * 2), hungarian_counts(pred, classes, 3))


def test_runs_too_short_to_tell_have_no_rate():
    assert scoring.rate(10, 2.0) == 5.0
    assert scoring.rate(10, -0.1) is None


@pytest.mark.slow
def test_a_small_run_of_the_engine(bench, tmp_path):
    measured, seconds = bench('engine', '--pictures', '10', '--many', '40', '--folder', str(tmp_path))
    assert list(measured['milliseconds']) == ['own', 'system', 'wall']
    assert all(8 * abs(value) < 1000 * seconds for value in measured['milliseconds'].values())  # differences, which may be less than 0
    assert list(measured['steps']) == ['decode', 'labels', 'masks']
    assert min(measured['steps'].values()) > 0 and sum(measured['steps'].values()) * measure.TIMED * measure.REPEATS < 1000 * seconds
    assert list(measured['memory_mib']) == ['4', '40']
    assert measured['memory_many_to_few'] == pytest.approx(measured['memory_mib']['40'] / measured['memory_mib']['4'])
    assert list(tmp_path.iterdir()) == []
    words = engine.in_words(measured | {'memory_mib': {10: 1.0, 100: 1.5}, 'memory_many_to_few': 1.5})
    assert 'memory of 100 pictures        1.50 MiB; 1.500 x' in words


def test_the_engines_work_is_that_of_a_run(tmp_path):
    """The pictures that are timed have their label maps and masks, as after a run."""
    folder = engine.make_pictures(tmp_path / 'in', (48, 64), 30)
    began = time.perf_counter()
    cost = engine.run_stages(folder, tmp_path / 'out', 28)
    assert 0 < cost.wall < time.perf_counter() - began
    assert cost.own > 0 <= cost.system and cost.peak == measure.peak()
    expected = engine.make_labels((48, 64)).labels
    names = sorted(path.name for path in (tmp_path / 'out/labels').iterdir())
    assert names == [f'{number:06}.jpg.png' for number in range(28)]
    assert all(np.array_equal(read_label_map(tmp_path / 'out/labels' / name), expected) for name in names)
    assert len(list((tmp_path / 'out/masks').rglob('*.png'))) == 28 * expected.max()
    assert len((tmp_path / 'out/manifest.jsonl').read_text().splitlines()) == 28


@pytest.fixture(scope='module')
def architecture(tmp_path_factory):
    return model.make_model(tmp_path_factory.mktemp('bench') / 'small', 'small')


def setting_of(folder, **changes):
    return BenchSetting(folder, 128, dtype='float32', product=64)._replace(**changes)


def test_the_full_model_has_the_published_configuration():
    """Its parameters are counted without memory for them: 2028 million of the transformer, 84 of the VAE, 124 and 695 of the encoders."""
    with torch.device('meta'):
        parts = model.build_random(model.SIZES['full'])
    millions = [round(sum(weight.numel() for weight in part.parameters()) / 1e6) for part in parts]
    assert millions == [2028, 84, 124, 695]
    assert parts.transformer.config.caption_projection_dim == 1536 and parts.transformer.pos_embed.pos_embed.shape == (1, 192**2, 1536)
    assert parts.vae.config.latent_channels == 16
    assert isinstance(parts.vae.encoder.mid_block.attentions[0], Attention)


def test_a_model_is_made_once_and_always_the_same(architecture, tmp_path):
    again = model.make_model(tmp_path / 'again', 'small')
    files = sorted(path.relative_to(again) for path in again.rglob('*') if path.is_file())
    assert files == sorted(path.relative_to(architecture) for path in architecture.rglob('*') if path.is_file())
    assert all((again / name).read_bytes() == (architecture / name).read_bytes() for name in files)
    assert [path.name for path in tmp_path.iterdir()] == ['again']
    (again / 'padseg.json').write_text('{}')
    assert (model.make_model(again, 'small') / 'padseg.json').read_text() == '{}'


@pytest.mark.parametrize('side', [128, 256])
def test_the_reference_finds_what_we_find(architecture, side):
    setting = setting_of(architecture, side=side)
    a, b = sd3.ours(setting), sd3.reference(setting)
    alike = sd3.compare(a.outcome, b.outcome)
    assert np.ptp(b.outcome.maps, (1, 2)).max() > 0.1 * b.outcome.maps.max()  # maps that are flat would be alike always
    assert alike['of_greatest'] < 1e-5 and alike['of_deviation'] < 1e-5 and alike['same_pixels'] > 0.999
    assert alike['same_groups'] and 3 < alike['groups'][0] < 77
    assert a.outcome.labels.shape == (side, side) and a.outcome.labels.max() == b.outcome.labels.max() > 1
    assert all(value > 0 for value in b.seconds.values()) and a.seconds['text'] == 0 < min(list(a.seconds.values())[1:])


@pytest.mark.gpu
def test_the_reference_finds_what_we_find_on_a_gpu(architecture):
    setting = setting_of(architecture, device='cuda', batch=2, passes=3)
    a, b = sd3.ours(setting), sd3.reference(setting)
    assert sd3.compare(a.outcome, b.outcome)['of_deviation'] < 0.02  # convolutions in TF32
    assert 0 < a.loaded <= a.peak and all(value > 1e9 for value in a.ceiling.values())


def test_a_batch_gives_the_first_picture_the_same(architecture):
    one, two = (sd3.ours(setting_of(architecture, batch=batch)).outcome for batch in (1, 2))
    assert np.allclose(one.maps, two.maps, atol=1e-7) and one.groups == two.groups


def test_what_differs_is_seen():
    maps = np.zeros((2, 2, 2), np.float32)
    maps[0], maps[1] = [[0.5, 1.5], [0.5, 1.5]], [[2.5, 2.5], [1.5, 1.5]]  # standard deviations of 0.5
    one = sd3.Comparison(maps, ((0,), (1,)), np.array([[1, 2], [1, 1]]))
    other = sd3.Comparison(maps - 0.5, ((0, 1),), np.array([[1, 2], [1, 2]]))
    assert sd3.compare(one, one) == {'of_greatest': 0, 'of_deviation': 0, 'groups': [2, 2], 'same_groups': True, 'same_pixels': 1}
    assert sd3.compare(one, other) == {
        'of_greatest': 0.25,
        'of_deviation': 1.0,
        'groups': [2, 1],
        'same_groups': False,
        'same_pixels': 0.75,
    }


def test_merging_by_the_loop_is_the_release_by_hand():
    """Two maps that are alike and one that is not, with pixels of different ranges: the mean of the first two, then the third."""
    maps = torch.tensor([[[0.0, 3.0]], [[0.0, 3.0]], [[6.0, 0.0]]])
    merged, groups = reference.merge_by_loop(maps, 0.1)
    low, high = 1 / (1 + np.e), np.e / (1 + np.e)
    assert groups == ((0, 1), (2,))
    assert torch.allclose(merged, torch.tensor([[[low, high]], [[high, low]]], dtype=torch.float64))


def test_regions_are_numbered_in_reading_order():
    assert sd3.number_regions(np.array([[7, 7, 0], [3, 0, 7]])).tolist() == [[1, 1, 2], [3, 2, 1]]


def counted(function, *arguments, **options):
    """Operations by torch's own count; the plain attention is the one that it knows on every device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize(('height', 'width'), [(128, 128), (64, 256)])
def test_operations_of_the_whole_are_those_that_torch_counts(architecture, height, width):
    whole = reference.load_models(architecture, torch.device('cpu'), torch.float32)
    transformer, vae = whole['transformer'], whole['vae']
    assert counted(vae.encode, torch.zeros(1, 3, height, width)) == flops.encoder(vae.config, height, width)
    inputs = {
        'hidden_states': torch.zeros(1, 16, height // 8, width // 8),
        'encoder_hidden_states': torch.zeros(1, 154, 64),
        'pooled_projections': torch.zeros(1, 40),
        'timestep': torch.zeros(1),
    }
    expected = flops.transformer(transformer.config, height * width // 256, 154)
    assert counted(transformer, **inputs) == expected
    transformer.transformer_blocks[2].attn.processor = reference.WholeAttention()
    assert counted(transformer, **inputs) == expected
    smaller = AutoencoderTiny.from_pretrained(architecture / model.TINY_VAE)
    assert counted(smaller.encode, torch.zeros(1, 3, height, width)) == flops.tiny_encoder(smaller.config, height, width)


def test_we_run_no_more_than_is_needed(architecture):
    """But for the expert block's queries of the text, and the modulation of what comes after its attention."""
    setting = setting_of(architecture)
    backbone = bench_backbone(setting)
    options = Options(side=setting.side).resolve(backbone.spec)
    image = bench_picture(setting.side, 0)
    needed = sd3.operations(setting)['ours']
    assert counted(encode, image, backbone, options) == needed['vae']
    latent = encode(image, backbone, options)
    more = flops.linear(154, 32, 32) + flops.linear(1, 32, 8 * 32)
    assert needed['transformer'] <= counted(latent_token_maps, [latent], backbone, options) <= needed['transformer'] + more


def test_operations_of_the_full_model():
    """Of a picture of 1024 x 1024, in units of 10^12: the encoder, its small rival, all blocks, and what the ninth block's maps need."""
    settings = model.SIZES['full']
    with torch.device('meta'):
        parts = model.build_random(settings)
        smaller = AutoencoderTiny(latent_channels=16, **settings.tiny_vae)
    config = parts.transformer.config
    operations = (
        flops.encoder(parts.vae.config, 1024, 1024),
        flops.tiny_encoder(smaller.config, 1024, 1024),
        flops.transformer(config, 4096, 154),
        flops.proposals(config, 4096, 154, 9),
    )
    assert [round(each / 1e12, 1) for each in operations] == [4.9, 0.5, 8.4, 3.3]


@pytest.mark.slow
def test_a_small_run_of_sd3(bench, architecture):
    arguments = ('--size', 'small', '--dtype', 'float32', '--repeats', '1', '--batch', '2', '--folder', str(architecture.parent))
    measured, seconds = bench('sd3', *arguments)
    assert [measured[name] for name in ('size', 'side', 'batch', 'vae', 'dtype')] == ['small', 128, 2, 'exact', 'float32']
    assert measured['device'] == 'cpu' and measured['threads'] == 1 and measured['versions']['torch'] == str(torch.__version__)
    assert set(measured['ceiling']) == {'bfloat16', 'float32'} and all(1e8 < value < 1e14 for value in measured['ceiling'].values())
    assert set(measured['seconds']) == set(measured['operations']) == {'ours', 'reference'}
    assert all(tuple(stages) == sd3.STAGES for stages in measured['seconds'].values())
    taken = [*measured['total'].values(), *measured['loading'].values()]
    assert min(map(min, taken)) > 0 and sum(map(sum, taken)) < seconds
    for name in ('ours', 'reference'):
        (loaded,), (most,) = measured['loaded_mib'][name], measured['peak_mib'][name]
        assert 200 < loaded <= most < 4000
        assert all(0 < share < 2 for share in measured['ceiling_share'][name].values())
    assert 0.5 < measured['memory_ours_to_reference']['median'] < 1.5  # libraries are most of it
    assert 0 < measured['rest_share'] < 1
    assert measured['alike']['of_greatest'] < 1e-5 and measured['alike']['same_groups']


def test_a_summary_of_two_turns(architecture):
    """With the other VAE nothing is compared, and the VAE's share is that of its own operations."""
    setting = setting_of(architecture, vae=architecture / model.TINY_VAE, passes=2)
    side = sd3.ours(setting)
    slower = side._replace(seconds=dict(zip(sd3.STAGES, (1.0, 2.0, 3.0, 0.5, 1.5), strict=True)), peak=600.0, ceiling={'float32': 4e9})
    quicker = side._replace(seconds=dict(zip(sd3.STAGES, (0.0, 1.0, 2.5, 0.25, 0.25), strict=True)), peak=300.0, ceiling={'float32': 2e9})
    middle = slower._replace(seconds=dict(zip(sd3.STAGES, (0.0, 2.0, 1.5, 0.25, 0.25), strict=True)), peak=450.0)
    measured = sd3.summarise(setting, 'small', [(quicker, slower), (middle, slower)])
    assert measured['total'] == {'ours': [4.0, 4.0], 'reference': [8.0, 8.0]}
    assert measured['reference_to_ours'] == {'median': 2.0, 'least': 2.0, 'most': 2.0}
    assert measured['memory_ours_to_reference'] == {'median': 0.625, 'least': 0.5, 'most': 0.75}
    assert measured['ceiling'] == {'float32': 4e9} and measured['rest_share'] == 0.125
    operations = measured['operations']
    assert operations['ours']['vae'] < operations['reference']['vae'] and measured['vae'] == 'tiny'
    assert measured['ceiling_share']['ours'] == {
        'vae': operations['ours']['vae'] / 1.5 / 4e9,
        'transformer': operations['ours']['transformer'] / 8e9,
    }
    assert measured['alike'] is None
    lines = sd3.in_words(measured).splitlines()
    assert lines[0].startswith('small model, 128 x 128, float32, tiny VAE, batches of 1; ')
    assert lines[3].split() == 'text, s 0.000 (0.000..0.000) 1.000 (1.000..1.000)'.split()
    assert lines[4].split() == 'vae, s 1.500 (1.000..2.000) 2.000 (2.000..2.000)'.split()
    assert lines[-1] == (
        'speed 2.00 (2.00..2.00) x the reference; memory 0.62 (0.50..0.75) x; 12.5% of the time outside VAE and transformer'
    )
    alike = sd3.compare(side.outcome, side.outcome)
    assert sd3.in_words(measured | {'alike': alike}).splitlines()[-1].endswith('100.00% of the pixels labelled the same')


@pytest.mark.slow
def test_a_small_run_of_load(bench, tmp_path):
    measured, seconds = bench('load', '--size', 'small', '--repeats', '1', '--folder', str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['small']
    taken = list(measured['seconds'].values())
    assert min(map(min, taken)) > 0 and sum(map(sum, taken)) < seconds and set(map(len, taken)) == {1}
    for name in measured['peak_mib']:
        assert 200 < measured['before_mib'][name][0] <= measured['peak_mib'][name][0] < 4000
    assert set(measured['seconds']) == set(measured['peak_mib']) == {'ours', 'whole', 'pipeline'}
    ours, whole, pipeline = (measured['peak_mib'][name] for name in ('ours', 'whole', 'pipeline'))
    for name, others in (('whole', whole), ('pipeline', pipeline)):
        assert measured[f'memory_ours_to_{name}'] == pytest.approx(measure.spread([a / b for a, b in zip(ours, others, strict=True)]))
    words = load.in_words(measured).splitlines()
    assert words[-2].startswith('the whole takes ') and words[-1].startswith("diffusers' pipeline without text encoders takes ")


def test_records_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, 'RECORDS', tmp_path / 'benchmarks')
    measured = {'processor': 'Some CPU (R) 7', 'processors': 2, 'device': 'cpu', 'dtype': 'float32'}
    measure.finish_bench('sd3', 'full-exact', measured, True, True, str)
    measure.finish_bench('eval', '', measured | {'device': 'Some GPU'}, True, False, lambda each: each['dtype'])
    names = ['some-cpu-r-7-2-sd3-full-exact.json', 'some-gpu-2-eval.json']
    assert sorted(path.name for path in (tmp_path / 'benchmarks').iterdir()) == names
    assert json.loads((tmp_path / 'benchmarks' / names[0]).read_text()) == measured
    printed, words = capsys.readouterr().out.splitlines()
    assert json.loads(printed) == measured and words == 'float32'
    measure.finish_bench('merge', '', measured, False, True, str)
    assert len(list((tmp_path / 'benchmarks').iterdir())) == 2


def test_every_record_says_where_it_was_measured():
    records = {path.name: json.loads(path.read_text()) for path in (ROOT / 'data/benchmarks').glob('*.json')}
    for kind in ('sd3', 'load', 'scale', 'vae', 'engine', 'merge', 'eval'):
        assert any(f'-{kind}-' in name for name in records), kind
    for name, record in records.items():
        assert record.keys() >= measure.surroundings().keys(), name
        assert record['versions']['torch'] and record['processor'] and record['revision'], name


@pytest.mark.parametrize('difference', [2e-4, float('nan')])
def test_other_maps_are_refused(difference):
    measured = {'dtype': 'float32', 'alike': {'of_deviation': difference}}
    with pytest.raises(click.ClickException, match=f'the maps differ by {difference} standard deviations'):
        sd3.require_same_maps(measured)
    sd3.require_same_maps({'dtype': 'bfloat16', 'alike': {'of_deviation': 0.02}})
    sd3.require_same_maps({'dtype': 'float32', 'alike': None})


@pytest.mark.slow
def test_a_small_run_of_scale(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, 'PICTURE', (40, 60))
    small = ('--size', 'small', '--dtype', 'float32', '--repeats', '1', '--pictures', '6', '--no-compile')
    sizes = ('--quarters', '1', '--quarters', '4', '--batches', '2')
    measured, seconds = bench('scale', *small, *sizes, '--folder', str(tmp_path))
    assert list(measured['sides']) == ['32', '128']
    assert list(measured['pictures']) == ['1', '6'] and list(measured['batches']) == ['2'] and measured['batched'] == 2
    taken = [each[part] for each in measured['sides'].values() for part in ('vae', 'transformer')]
    taken += [each['seconds'] for each in (measured['pictures'] | measured['batches']).values()]
    assert min(map(min, taken)) > 0 and sum(map(sum, taken)) < seconds
    assert all(200 < min(each['peak']) < 4000 for each in measured['sides'].values())
    assert set(measured['law']) == {'vae', 'transformer'} and measured['compiling'] is None
    assert len(scale.in_words(measured).splitlines()) == 1 + (1 + 2 + 2) + (1 + 2) + (1 + 1)


def test_the_law_of_the_side_by_hand():
    """Exact for costs that follow it: 2 ms for each of n tokens and 3 us for each pair."""
    sides = [64, 128, 256]  # 16, 64 and 256 tokens
    found = scale.law(sides, [2e-3 * n + 3e-6 * n**2 for n in (16, 64, 256)])
    assert found == pytest.approx({'linear': 2e-3, 'square': 3e-6, 'error': 0}, abs=1e-12)
    level = scale.law(sides, [1.0, 1.0, 1.0])
    assert level['linear'] > 0 == level['square'] and 0.5 < level['error'] <= 1


def test_compiling_pays_when_what_it_saves_is_what_it_cost():
    plain = scale.Forwards(3.0, 2.0)
    assert scale.pays_after(plain, scale.Forwards(13.0, 1.0)) == 11  # 10 s more at first, then 1 s less
    assert scale.pays_after(plain, scale.Forwards(13.0, 2.0)) is None
    assert scale.pays_after(plain, scale.Forwards(2.0, 1.0)) == 1


def test_words_for_what_compiling_costs():
    sides = {32: {'vae': [1.0], 'transformer': [2.0], 'peak': [500.0]}}
    columns = {
        'plain': {'first': [3.0], 'later': [2.0]},
        'compiled': {'first': [13.0], 'later': [1.0]},
        'again': {'first': [1], 'later': [3]},
    }
    measured = {
        'size': 'small',
        'dtype': 'float32',
        **measure.surroundings(),
        'sides': sides,
        'law': {'vae': {'linear': 2e-3, 'square': 3e-6, 'error': 0.01}},
        'pictures': {},
        'batched': 2,
        'batches': {},
        'compiling': {**columns, 'gain': 0.5, 'pays': {'compiled': 11, 'again': None}},
    }
    lines = scale.in_words(measured).splitlines()
    assert lines[3] == 'vae: 2 ms n + 3 us n^2 for n image tokens, within 1%'
    assert lines[-4].split() == 'not compiled 3.00 (3.00..3.00) 2.00 (2.00..2.00)'.split()
    assert lines[-1] == 'compiling saves 50.0% of a later forward pass and pays off from picture 11 on; from disk cache, never'


@pytest.mark.slow
def test_a_run_of_vae(bench, tmp_path):
    """The more the latents are off, the less the maps are alike; a random encoder's have nothing to do with them."""
    shutil.copy(ROOT / 'data/images/scene-22.png', tmp_path)
    measured, _ = bench('vae', '--dir', str(tmp_path))
    *noisy, untrained = measured['cases'].values()
    correlations = [case['correlation'] for case in noisy[1:]]
    assert len(noisy) == 1 + len(vae.ERRORS) and measured['pictures'] == 1
    assert 1 > correlations[0] > 0.9 and correlations == sorted(correlations, reverse=True) and untrained['correlation'] < 0.5
    assert all(0 < case['covering'] <= 1 for case in noisy)
    assert len(vae.in_words(measured).splitlines()) == 2 + len(measured['cases'])


def test_how_alike_maps_are_by_hand():
    maps = np.array([[[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    labels, halves = np.array([[1, 1], [1, 1]]), np.array([[1, 1], [2, 2]])
    assert vae.correlation(maps[0], 5 - 2 * maps[0]) == pytest.approx(-1) and vae.correlation(maps[0], maps[1]) == 0
    same = vae.similarity([(maps, labels)], [(maps * 3 + 1, labels)])
    assert same == pytest.approx({'correlation': 0.5, 'covering': 1})  # the second map is flat
    assert vae.similarity([(maps, labels)], [(maps, halves)])['covering'] == 0.5


def test_latents_are_off_by_as_much_as_is_asked_for(architecture):
    backbone = load_backbone(str(architecture), device='cpu', dtype='float32')
    pixels = torch.rand(1, 3, 256, 256) * 2 - 1
    exact = backbone.vae.encode(pixels).latent_dist.mean
    found = vae.Inexact(backbone.vae, 0.5).encode(pixels).latents
    assert float((found - exact).std() / exact.std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(vae.Inexact(backbone.vae, 0.0).encode(pixels).latents, exact)
