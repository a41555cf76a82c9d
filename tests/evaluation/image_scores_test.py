"""padseg score-images: figures from the command are those of the functions, and what cannot be scored is said."""

from __future__ import annotations

import csv
import json

import numpy as np
import PIL.Image
import pytest

from padseg.commands import main
from padseg.evaluation.fid import fid, inception_features, load_inception
from padseg.evaluation.similarity import clip_image_similarity, clip_score, dino_similarity, load_clip, load_dino

PROMPTS = ('a cat', 'a dog on grass', 'a cat on a dog on a cat on a dog')  # the last is too long for the small CLIP
SEEDS = 2
NAMES = [f'{prompt}-{seed}' for prompt in range(len(PROMPTS)) for seed in range(SEEDS)]


def picture(seed, dark=1.0):
    return (np.random.default_rng(seed).integers(0, 256, (40, 48, 3)) * dark).astype(np.uint8)


def made(root, dark, order=1):
    """A folder as `padseg generate` leaves it."""
    lines = []
    for name in NAMES[::order]:
        prompt, seed = map(int, name.split('-'))
        path = root / 'images' / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture(NAMES.index(name), dark)).save(path)
        record = {'name': name, 'status': 'done', 'prompt': PROMPTS[prompt], 'seed': seed, 'guidance': 'cfg', 'file': f'images/{name}.png'}
        lines.append(json.dumps(record) + '\n')
    (root / 'manifest.jsonl').write_text(''.join(lines))
    return root


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('made')
    (root / 'real').mkdir()
    for number in range(5):
        PIL.Image.fromarray(picture(100 + number)).save(root / 'real' / f'{number}.png')
    (root / 'one' / 'images').mkdir(parents=True)
    PIL.Image.fromarray(picture(0)).save(root / 'one' / '0-0.png')
    (root / 'c.csv').write_text('file,prompt\n0-0.png,a cat\n')
    return made(root / 'a', 1.0).parent, made(root / 'b', 0.5, order=-1).parent


@pytest.fixture
def run(clip_folder, dino_folder, inception_file, capsys):
    def score(*arguments):
        models = '--clip', clip_folder, '--dino', dino_folder, '--inception', inception_file, '--device', 'cpu', '-q'
        code = main(['score-images', *map(str, (*models, *arguments))])
        return code, capsys.readouterr()

    return score


@pytest.fixture(scope='module')
def root(folders):
    return folders[0]


def record_in(out):
    return json.loads((out / 'image-scores.json').read_text())


def table_in(out):
    with (out / 'per_image.csv').open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_two_folders_are_compared_by_all_scores(root, run, tmp_path, clip_folder, dino_folder, inception_file):
    (tmp_path / 'lists.json').write_text(json.dumps({'color': ['A cat.'], 'non_spatial': [PROMPTS[1]], 'mine': [PROMPTS[1]]}))
    code, printed = run(
        *('--dir', root / 'a', '--against', root / 'b', '--reference', root / 'real', '--categories', tmp_path / 'lists.json'),
        *('--out', tmp_path / 'out', '--resamples', 500),
    )
    assert (code, printed.err) == (0, '')
    record, table = record_in(tmp_path / 'out'), table_in(tmp_path / 'out')
    ours, theirs = ([picture(number, dark) for number in range(len(NAMES))] for dark in (1.0, 0.5))
    texts = [PROMPTS[int(name[0])] for name in NAMES]
    clip, dino, inception = load_clip(str(clip_folder)), load_dino(str(dino_folder)), load_inception(inception_file)
    expected = {'clip': clip_score(clip, ours, texts), 'against': clip_score(clip, theirs, texts)}
    expected |= {'difference': expected['clip'] - expected['against']}
    expected |= {'clip_i': clip_image_similarity(clip, ours, theirs), 'dino': dino_similarity(dino, ours, theirs)}
    assert [row['name'] for row in table] == NAMES
    for name, values in expected.items():
        assert [float(row[name]) for row in table] == pytest.approx(values, abs=1e-4)
        assert record[name]['mean'] == pytest.approx(values.mean(), abs=1e-4)
        assert record[name]['pictures'] == len(NAMES)
        assert record[name]['intervals'].keys() == {'prompts', 'seeds'}
    # of two seeds one, the other or both are drawn: the interval is from one to the other
    by_seed = [expected['difference'][seed::SEEDS].mean() for seed in range(SEEDS)]
    assert record['difference']['intervals']['seeds'] == pytest.approx(sorted(by_seed), abs=1e-4)
    real = inception_features(inception, [picture(100 + number) for number in range(5)])
    for name, pictures in (('fid', ours), ('fid_against', theirs)):
        features = inception_features(inception, pictures)
        assert record[name]['all'] == pytest.approx(fid(features, real), rel=1e-4)
        assert record[name]['by_seed'] == pytest.approx({str(seed): fid(features[seed::SEEDS], real) for seed in range(SEEDS)}, rel=1e-4)
    gaps = [record['fid']['by_seed'][seed] - record['fid_against']['by_seed'][seed] for seed in ('0', '1')]
    assert record['fid_difference']['mean'] == pytest.approx(np.mean(gaps))
    assert record['fid_difference']['intervals']['seeds'] == pytest.approx(sorted(gaps))
    color, own = record['categories']['color'], record['categories']['mine']
    assert color['difference']['mean'] == pytest.approx(expected['difference'][:2].mean(), abs=1e-4)
    assert (color['measure'], color['computed'], own['measure'], own['computed']) == ('BLIP-VQA', False, None, False)
    assert record['categories']['non_spatial']['computed']
    assert [row['categories'] for row in table[::2]] == ['color', 'non_spatial;mine', '']
    assert record['counts'] == {'pictures': 6, 'pairs': 6, 'without a category': 2, 'real pictures': 5}
    assert record['models']['clip'] == {'name': str(clip_folder), 'commit': None, 'weights': clip.weights}
    for words in ('CLIPScore is 100 x cosine', 'need other models: BLIP-VQA', 'end of 1 of 3 prompts', 'FID of 6 pictures is too high'):
        assert words in printed.out
    assert 'CLIPScore, non_spatial' in printed.out


def test_the_order_of_records_does_not_matter(root, run, tmp_path):
    for name, folder in (('x', root / 'b'), ('y', made(tmp_path / 'b', 0.5))):
        assert run('--dir', folder, '--out', tmp_path / name)[0] == 0
    assert record_in(tmp_path / 'x')['clip'] == record_in(tmp_path / 'y')['clip']
    assert (tmp_path / 'x' / 'per_image.csv').read_bytes() == (tmp_path / 'y' / 'per_image.csv').read_bytes()


def test_any_folder_is_scored_with_a_table_of_captions(root, run, tmp_path):
    (tmp_path / 'captions.csv').write_text('file,caption,seed\n0,a cat,5\n"4.png","=a dog,\non grass",6\n9,x,7\n')
    code, printed = run('--dir', root / 'real', '--captions', tmp_path / 'captions.csv', '--out', tmp_path / 'out', '--json')
    assert code == 0
    assert json.loads(printed.out) == record_in(tmp_path / 'out')
    assert json.loads(printed.out)['counts'] == {'pictures': 5, 'without a prompt': 3, 'captions without a picture': 1}
    rows = table_in(tmp_path / 'out')
    assert [bool(row['clip']) for row in rows] == [True, False, False, False, True]
    assert rows[4]['prompt'] == r"'=a dog,\non grass"  # no formula, on one line


def test_pictures_alone_are_compared_by_features(root, run, tmp_path):
    code, printed = run('--dir', root / 'real', '--against', root / 'real', '--out', tmp_path)
    assert code == 0
    record = record_in(tmp_path)
    assert (record['clip'], record['fid']) == (None, None)
    for name in ('clip_i', 'dino'):
        assert record[name]['mean'] == pytest.approx(1, abs=1e-5)
    assert 'CLIPScore' not in printed.out


def test_a_picture_that_cannot_be_read_fails_alone(run, tmp_path):
    folder = made(tmp_path / 'a', 1.0)
    (folder / 'images' / '1-0.png').write_bytes(b'nothing')
    (folder / 'images' / '1-1.png').unlink()
    PIL.Image.new('RGB', (2000, 2)).save(folder / 'images' / '0-0.png')  # a model would see millions of pixels
    code, printed = run('--dir', folder, '--out', tmp_path / 'out')
    assert code == 3
    assert printed.err.count('\n') == 3
    assert '1-0: not a picture' in printed.err and 'more than 64 times as long as wide' in printed.err
    record = record_in(tmp_path / 'out')
    assert (record['clip']['pictures'], record['counts']) == (3, {'pictures': 6, 'unread': 3})
    assert [row['name'] for row in table_in(tmp_path / 'out') if row['reason']] == ['0-0', '1-0', '1-1']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('--dir', 'real'), 'nothing to score: clip needs prompts'),
        (('--dir', 'a', '--scores', 'fid'), 'fid needs --reference'),
        (('--dir', 'a', '--scores', 'clip,dino'), 'dino needs --against'),
        (('--dir', 'a', '--scores', 'blip'), '--scores takes clip, fid, clip-i, dino; got blip'),
        (('--dir', 'a', '--reference', 'one'), 'FID needs at least 2 pictures on both sides; got 6 pictures and 1 real ones'),
        (('--dir', 'a', '--against', 'one', '--captions', 'c.csv', '--reference', 'real'), 'got 1 pairs and 5 real ones'),
        (('--dir', 'a', '--against', 'b', '--scores', 'dino', '--categories', 'real'), '--categories divides CLIPScores'),
    ],
)
def test_scores_without_their_input_are_refused(arguments, words, root, run, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    code, printed = run(*arguments, '--out', tmp_path / 'out')
    assert (code, printed.out) == (2, '')
    assert words in printed.err
    assert not (tmp_path / 'out').exists()


def test_without_weights_the_option_that_names_them_is_told(root, tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    asked = 'score-images', '--dir', str(root / 'a'), '--out', str(tmp_path / 'out'), '-q'
    for more, code, option in (
        (('--scores', 'clip'), 4, '--clip PATH'),
        (('--scores', 'dino', '--against', str(root / 'b')), 4, '--dino PATH'),
        (('--scores', 'fid', '--reference', str(root / 'real')), 2, '--inception PATH'),
        (('--scores', 'fid', '--reference', str(root / 'real'), '--inception', 'none.pt'), 4, '--inception takes inception-2015-12-05.pt'),
    ):
        assert main([*asked, *more]) == code
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count('\n')) == ('', 1)
        assert option in printed.err
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['.lock']


def test_without_enough_pictures_that_can_be_read_the_other_scores_are_kept(root, run, tmp_path):
    folder = made(tmp_path / 'a', 1.0)
    for name in NAMES[1:]:
        (folder / 'images' / f'{name}.png').write_bytes(b'nothing')
    code, printed = run('--dir', folder, '--reference', root / 'real', '--out', tmp_path / 'out')
    record = record_in(tmp_path / 'out')
    assert (code, record['fid'], record['clip']['pictures']) == (3, None, 1)
    assert 'note: not computed: FID, for which too few pictures could be read' in printed.out


@pytest.mark.parametrize('spoil', ['file', 'table'])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(spoil, root, tmp_path, capsys):
    out = tmp_path / 'out'
    out.write_text('') if spoil == 'file' else (out / 'per_image.csv').mkdir(parents=True)
    code = main(
        ['score-images', '--dir', str(root / 'a'), '--clip', str(root / 'a'), '--out', str(out), '-q']
    )  # no CLIP, which comes later
    told = capsys.readouterr().err
    assert code == (2 if spoil == 'file' else 6) and told.count('\n') == 1 and str(out) in told


def test_results_of_another_command_are_kept(root, run, tmp_path):
    for name in ('run.json', 'scores.json'):
        (tmp_path / name).write_text('{}')
        code, printed = run('--dir', root / 'a', '--out', tmp_path)
        assert (code, name in printed.err) == (6, True)
        (tmp_path / name).unlink()
    assert {path.name for path in tmp_path.iterdir()} <= {'.lock'}
