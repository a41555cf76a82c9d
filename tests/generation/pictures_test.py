"""`padseg generate` on a small random model: what it writes, how it continues, and that pictures depend on nothing else."""

from __future__ import annotations

import csv
import hashlib
import json
import signal
from pathlib import Path

import cv2
import filelock
import numpy as np
import pytest
from support import jobs
from support.processes import start

from padseg.commands import main
from padseg.errors import OutputConflict, UsageError
from padseg.generation import pictures
from padseg.generation.pictures import GenerationJob, generate, moments_of
from padseg.generation.prompts import items
from padseg.generation.settings import GUIDANCES, SamplingSettings
from padseg.run.selection import Selection
from padseg.system.progress import Silent

PROMPTS = ('a cat on grass', 'a dog')
SETTINGS = SamplingSettings(steps=2, size=32)


@pytest.fixture
def job(tmp_path, sd3_folder):
    return GenerationJob(PROMPTS, (0, 1), tmp_path / 'out', SETTINGS, model=str(sd3_folder), device='cpu')


@pytest.fixture(scope='module')
def whole(tmp_path_factory, sd3_folder):
    """The pictures of a run, by name."""
    out = tmp_path_factory.mktemp('whole') / 'out'
    counts = generate(GenerationJob(PROMPTS, (0, 1), out, SETTINGS, model=str(sd3_folder), device='cpu'))
    assert counts[:4] == (4, 4, 0, 0)
    return out


def made(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / 'images').iterdir()}


def records(out: Path) -> list[dict[str, object]]:
    return [json.loads(text) for text in (out / 'manifest.jsonl').read_text().splitlines()]


def alike(out: Path) -> list[dict[str, object]]:
    return [{**record, 'seconds': 0} for record in records(out)]


def test_what_a_run_writes(whole, sd3_folder):
    lines, header = records(whole), json.loads((whole / 'run.json').read_text())
    assert sorted((line['prompt'], line['seed']) for line in lines) == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    assert [line['name'] for line in lines] == sorted(item.name for item in items(PROMPTS, (0, 1)))
    for line in lines:
        data = (whole / line['file']).read_bytes()
        assert line['file'] == f'images/{line["name"]}.png' and line['sha256'] == hashlib.sha256(data).hexdigest()
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).shape == (*line['size'], 3) == (32, 32, 3)
        assert (line['status'], line['guidance'], line['model']) == ('done', 'cfg', header['model']['weights'])
    assert len(set(made(whole).values())) == 4
    assert (header['command'], header['status'], header['counts']['done']) == ('generate', 'finished', 4)
    settings = header['settings']
    assert (settings['steps'], settings['scale'], settings['encoders'], settings['dtype']) == (2, 7.5, 'l+g', 'float32')
    assert 'perturb_scale' not in settings and not (whole / 'previews').exists()
    sheet = cv2.imread(str(whole / 'sheet.png'))
    assert sheet.shape == (8 + 2 * (13 + 8 + 32 + 8), 8 + 2 * 40, 3)


def test_the_same_pictures_in_any_order_and_from_shards(whole, job):
    turned = job._replace(prompts=PROMPTS[::-1], seeds=(1, 0))
    for number in (2, 1):
        counts = generate(turned._replace(selection=Selection(shard=(number, 2))))
        assert counts.done == counts.images
    assert not (job.out / 'manifest.jsonl').exists() and len(list((job.out / 'shards').iterdir())) == 2
    counts = generate(job)  # joins them
    assert counts[:4] == (4, 4, 4, 0) and not (job.out / 'shards').exists()
    assert made(job.out) == made(whole) and alike(job.out) == alike(whole)
    assert (job.out / 'sheet.png').read_bytes() == (whole / 'sheet.png').read_bytes()


def test_a_killed_run_is_continued(whole, job):
    assert start(jobs.generation_killed, job, 2).wait().returncode == -signal.SIGKILL
    assert [line['status'] for line in records(job.out)] == ['done'] * 2
    half = job.out / 'images' / '.padseg-half'
    half.write_bytes(b'half')
    with (job.out / 'manifest.jsonl').open('a') as manifest:
        manifest.write('{"name": "a-')
    assert json.loads((job.out / 'run.json').read_text())['status'] == 'running'
    counts = generate(job)
    assert (counts.done, counts.skipped) == (4, 2)
    assert made(job.out) == made(whole) and alike(job.out) == alike(whole)


class Interrupt(Silent):
    """Sends this process a signal after the first picture."""

    def step(self, record=None):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupted_run_ends_in_order_and_more_can_be_asked_for(whole, job):
    counts = generate(job, Interrupt())
    assert (counts.done, counts.signal) == (1, signal.SIGINT)
    assert json.loads((job.out / 'run.json').read_text())['status'] == 'interrupted'
    more = job._replace(prompts=('grass', *PROMPTS), selection=Selection(limit=4))
    assert generate(more)[:4] == (4, 4, 1, 0)
    assert len(records(job.out)) == 4
    assert generate(more._replace(selection=Selection()))[:4] == (6, 6, 4, 0)
    assert made(whole).items() <= made(job.out).items()


def test_what_is_there_is_not_made_again_and_what_is_lost_is(whole, job, monkeypatch):
    generate(job)
    times = {path: path.stat().st_mtime_ns for path in (job.out / 'images').iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(pictures, 'start', lambda *_: pytest.fail('the model was loaded'))
        assert generate(job)[:4] == (4, 4, 4, 0)
    lost = sorted(times)[2]
    lost.unlink()
    assert generate(job)[:4] == (4, 4, 3, 0)
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == [lost] and made(job.out) == made(whole)


def test_other_settings_need_another_folder(job, whole, tmp_path, monkeypatch):
    generate(job)
    for other in (job._replace(settings=SamplingSettings(steps=2, size=32, scale=2.0)), job._replace(seeds=(0, 2), dtype='bfloat16')):
        with pytest.raises(OutputConflict, match='made with other settings'):
            generate(other)
    assert made(job.out) == made(whole)
    changed = job._replace(settings=SamplingSettings(steps=2, size=32, guidance='perturbed'), overwrite=True)
    assert generate(changed)[:4] == (4, 4, 0, 0)
    assert {line['guidance'] for line in records(job.out)} == {'perturbed'} and made(job.out) != made(whole)
    header = json.loads((job.out / 'run.json').read_text())
    assert header['settings']['perturb_layer'] == '2' and header['settings']['scale'] == 0

    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'run.json').write_text('{"settings": {}, "source": "/"}')
    for overwrite in (False, True):
        with pytest.raises(OutputConflict, match='not a record of padseg generate|results of another command'):
            generate(job._replace(out=tmp_path / 'other', overwrite=overwrite))
    (tmp_path / 'more' / 'sheet.png').mkdir(parents=True)
    with pytest.raises(OutputConflict, match='sheet.png is not a regular file'):
        generate(job._replace(out=tmp_path / 'more'))
    with filelock.FileLock(job.out / '.lock'), pytest.raises(OutputConflict, match='another run is writing'):
        generate(job)
    for flags in ([], ['--overwrite']):
        assert main(['run', '--dir', str(job.out / 'images'), '--out', str(job.out), '--model', job.model, '-q', *flags]) == 6
    assert len(records(job.out)) == 4


def test_a_picture_that_fails_is_recorded_and_tried_again(job, monkeypatch):
    from padseg.generation import sample

    plain, fault = sample.sample, UsageError('no tokens')

    def sampled(sampler, prompts, *others, **named):
        if prompts[0] == 'a dog':
            raise fault
        return plain(sampler, prompts, *others, **named)

    with monkeypatch.context() as patch:
        patch.setattr(sample, 'sample', sampled)
        assert generate(job)[:4] == (4, 2, 0, 2)
        assert [json.loads(text)['reason'] for text in (job.out / 'failures.jsonl').read_text().splitlines()] == ['no tokens'] * 2
        assert generate(job._replace(retry_failed=False))[:4] == (4, 2, 4, 2)
        assert generate(job._replace(overwrite=True, prompts=PROMPTS[::-1], max_failures=0))[:4] == (4, 0, 0, 1)
        fault = MemoryError()
        assert generate(job)[:4] == (4, 2, 0, 2)
        assert 'out of memory: try a smaller --size' in (job.out / 'failures.jsonl').read_text()
    assert generate(job)[:4] == (4, 4, 2, 0) and not (job.out / 'failures.jsonl').read_text()


def test_a_bad_record_is_not_guessed_at(job):
    generate(job._replace(seeds=(0,)))
    lines = (job.out / 'manifest.jsonl').read_text()
    for name, value in (('name', '../a'), ('file', 'images/b.png'), ('seed', -1)):
        record = {**json.loads(lines.splitlines()[0]), name: value}
        (job.out / 'manifest.jsonl').write_text(json.dumps(record) + '\n' + lines)
        with pytest.raises(OutputConflict, match='manifest.jsonl, line 1'):
            generate(job)
    first, *others = lines.splitlines()
    (job.out / 'manifest.jsonl').write_text('\n'.join([json.dumps({**json.loads(first), 'prompt': 'a mouse'}), *others]) + '\n')
    assert generate(job._replace(seeds=(0,)))[:4] == (2, 2, 1, 0)  # what is not of its prompt is made again
    assert (job.out / 'manifest.jsonl').read_text().count('mouse') == 0


def test_strips_of_the_way(job):
    generate(job._replace(preview=2, seeds=(0,), prompts=('a cat',)))
    (line,) = records(job.out)
    shown, image = cv2.imread(str(job.out / line['preview'])), cv2.imread(str(job.out / line['file']))
    assert shown.shape == (32, 64, 3) and np.array_equal(shown[:, 32:], image) and not np.array_equal(shown[:, :32], image)
    assert generate(job._replace(preview=2, seeds=(0,), prompts=('a cat',))).skipped == 1
    assert generate(job._replace(seeds=(0,), prompts=('a cat',))).skipped == 1  # which leaves the strip as it is
    assert generate(job._replace(preview=1, seeds=(0,), prompts=('a cat',))).skipped == 0
    assert cv2.imread(str(job.out / line['preview'])).shape == (32, 32, 3) and records(job.out)[0]['moments'] == 1
    assert moments_of(28, 4) == {6, 13, 20, 27} and moments_of(2, 9) == {0, 1}


def test_the_command(tmp_path, sd3_folder, capsys):
    table, out = tmp_path / 'a.csv', tmp_path / 'out'
    with table.open('w', newline='') as file:
        csv.writer(file).writerows([('image_id', 'text'), (1, 'a cat\non grass'), (2, 'a dog')])
    common = ['--model', str(sd3_folder), '--device', 'cpu', '--steps', '1', '--size', '32', '--out', str(out)]
    arguments = ['generate', '--prompts', str(table), '--prompt', 'grass ' * 99, '--seeds', '0..1', *common]
    assert main([*arguments, '--dry-run', '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)['pending']) == 6 and not out.exists()
    assert main([*arguments, '--guidance', 'none', '--json', '-q']) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer['images'], answer['done'], answer['skipped']) == (6, 6, 0)
    assert {line['cut'] for line in records(out) if str(line['prompt']).startswith('grass')} == {True}
    assert {line['cut'] for line in records(out) if not str(line['prompt']).startswith('grass')} == {False}
    assert main([*arguments, '--guidance', 'none']) == 0
    assert '6 done (6 by an earlier run), 0 failed; pictures in' in capsys.readouterr().err


def test_every_guidance(job, unet_folders):
    """Each makes another picture from the same noise, in a folder of its own."""
    found = {}
    for guidance in GUIDANCES:
        out = job.out / guidance
        settings = SamplingSettings(guidance=guidance, steps=2, size=32)
        alone = job._replace(out=out, prompts=('a cat on grass',), seeds=(3,), settings=settings, model=str(unet_folders['sd15']))
        assert generate(alone)[:4] == (1, 1, 0, 0)
        ((name, found[guidance]),) = made(out).items()
        assert name.endswith('-3.png')
    assert len(set(found.values())) == len(GUIDANCES)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ((), 'say what to show'),
        (('--prompt', 'a', '--seeds', '4..0'), 'seeds are numbers and ranges'),
        (('--prompt', 'a', '--guidance', 'cfg', '--perturb-scale', '2'), '--perturb-scale: no option of --guidance cfg'),
        (('--prompt', 'a', '--guidance', 'none', '--scale', '2'), '--scale: no option of --guidance none'),
        (('--prompt', 'a', '--steps', '0'), 'steps is a number of steps'),
        (('--prompt', 'a', '--size', '40', '--steps', '1'), 'makes pictures of a multiple of'),
        (('--prompt', 'a', '--shard', '3/2'), 'a shard is i/N'),
        (('--prompt', 'a', '--lora-scale', '2'), 'strength of a LoRA'),
        (('--prompt', 'a\x1b[2J'), 'which is not text'),
        (('--prompts', 'nothing.txt'), 'cannot be read'),
    ],
)
def test_commands_that_are_refused(tmp_path, arguments, words, capsys):
    assert main(['generate', *arguments, '--out', str(tmp_path / 'out')]) == 2
    told = capsys.readouterr()
    assert words in told.err and len(told.err.splitlines()) <= 5 and '\x1b' not in told.err
