"""The main job on real files with a small random model: its contract, what it survives, and how it continues."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import pytest
from support import jobs
from support.processes import start

from padseg.commands import main
from padseg.errors import NoImages, OutputConflict, ResourceExhausted, UsageError
from padseg.exports import CONVERTERS, read_label_map, read_masks
from padseg.images import Found, Reading, ignores_case, read
from padseg.methods import seg4diff
from padseg.methods.seg4diff import IF_USED, Options
from padseg.run import engine, picture as stages
from padseg.run.convert import convert
from padseg.run.job import Job, settings_from
from padseg.run.prepare import stages_of
from padseg.run.selection import Selection
from padseg.system.progress import Silent

SIZES = {'a.jpg': (48, 80), 'a.png': (48, 80), 'sub/b.png': (64, 40)}


def put_picture(path: Path, size=(32, 32), seed=0) -> None:
    """Four flat areas with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (2, 2, 3)).repeat(-(-size[0] // 2), 0).repeat(-(-size[1] // 2), 1)[: size[0], : size[1]]
    PIL.Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)).save(path)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, sd3_folder):
    """A folder with pictures in in/, and in out/ the results of a run over them."""
    folder = tmp_path_factory.mktemp('finished')
    for seed, (name, size) in enumerate(SIZES.items()):
        put_picture(folder / 'in' / name, size, seed)
    engine.run(Job(folder / 'in', folder / 'out', model=str(sd3_folder), device='cpu'))
    return folder


@pytest.fixture
def job(finished, tmp_path, sd3_folder):
    """A run over pictures of its own that has not begun."""
    return Job(shutil.copytree(finished / 'in', tmp_path / 'in'), tmp_path / 'out', model=str(sd3_folder), device='cpu')


@pytest.fixture
def done(finished, job):
    """One that has ended."""
    shutil.copytree(finished / 'out', job.out)
    return job


def records(job, name='manifest.jsonl'):
    return [json.loads(line) for line in (job.out / name).read_text().splitlines()]


def run_record(job):
    return json.loads((job.out / 'run.json').read_text())


def results(out: Path) -> dict[str, bytes]:
    """Name and bytes of every label map, mask, table and overlay."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob('*')) if path.is_file() and path.parent != out}


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / 'labels').rglob('*.png')}


class Count(Silent):
    """How many pictures were worked on."""

    pictures = 0

    def step(self, record=None):
        self.pictures += 1


class Signal(Silent):
    """Sends this process signals after its first picture."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def step(self, record=None):
        numbers, self.numbers = self.numbers, ()
        for number in numbers:
            os.kill(os.getpid(), number)


def test_what_a_run_writes(job, backbone):
    from padseg.methods.seg4diff import segment

    counts = engine.run(job)
    assert counts[:4] == (3, 3, 0, 0)
    assert counts.signal is None
    assert sorted(path.name for path in job.out.iterdir() if path.name[0] != '.') == [
        'failures.jsonl',
        'labels',
        'manifest.jsonl',
        'masks',
        'run.json',
    ]
    entries = records(job)
    assert [entry['input'] for entry in entries] == ['a.jpg', 'a.png', 'sub/b.png']
    for entry in entries:
        name = entry['input']
        expected = segment(job.source / name, backbone)
        assert entry['outputs'] == {'labels': f'labels/{name}.png', 'masks': f'masks/{name}'}
        assert np.array_equal(read_label_map(job.out / 'labels' / f'{name}.png'), expected.labels)
        assert np.array_equal(read_masks(job.out / 'masks' / name), expected.labels)
        assert (entry['status'], entry['error'], entry['reason']) == ('done', None, None)
        assert tuple(entry['size']) == SIZES[name] == expected.labels.shape
        assert entry['regions'] == len(expected.tokens) == expected.labels.max()
        assert entry['bytes'] == (job.source / name).stat().st_size
        assert len(entry['sha256']) == 64
        assert entry['seconds'] == pytest.approx(sum(entry['stages'].values()), abs=1e-3)
        assert set(entry['stages']) == {'decode', 'segment', 'labels', 'write'}
    assert records(job, 'failures.jsonl') == []
    assert counts.regions == pytest.approx(np.mean([entry['regions'] for entry in entries]))


def test_the_run_record_holds_what_is_needed_to_repeat_it(job, backbone):
    engine.run(job._replace(options=Options(threshold=float('inf'))))
    record = run_record(job)
    assert record['status'] == 'finished'
    assert record['settings'] == {
        'weights': backbone.identity.weights,
        'scheduler': backbone.identity.scheduler,
        'text_encoders': backbone.identity.text_encoders,
        'dtype': 'float32',
        'compile': False,
        **{name: value for name, value in vars(Options(threshold=1.0).resolve(backbone.spec)).items() if name not in IF_USED},
        'threshold': 'inf',
        'exif': 'apply',
        'frames': 'first',
        'value_range': None,
        'background': '#ffffff',
        'void': False,
        'shrink': None,
    }
    assert record['requested']['layer'] is None
    assert record['model'] == backbone.identity.recorded()
    assert {'python', 'torch', 'diffusers', 'transformers', 'numpy', 'pillow'} <= set(record['versions'])
    assert (record['device'], record['dtype']) == ('cpu', 'float32')
    assert record['counts'] == {'images': 3, 'done': 3, 'skipped': 0, 'failed': 0, 'regions': 1.0}
    assert record['started'] <= record['ended']
    assert record['threads'] >= 1


def test_overlays_are_added_to_a_finished_run_when_asked_for(done):
    before = results(done.out)
    engine.run(done._replace(overlay=True))
    after = results(done.out)
    assert after.keys() - before.keys() == {f'overlays/{name}.jpg' for name in SIZES}
    assert {name: after[name] for name in before} == before


def test_coco_is_written_at_the_end_and_brought_up_to_date(job):
    assert engine.run(job._replace(coco=True)).done == 3
    first = json.loads((job.out / 'coco/instances.json').read_text())
    assert [image['file_name'] for image in first['images']] == sorted(SIZES)
    assert len(first['annotations']) == sum(entry['regions'] for entry in records(job))
    put_picture(job.source / 'new.png')
    engine.run(job._replace(coco=True))
    assert len(json.loads((job.out / 'coco/instances.json').read_text())['images']) == 4


def test_a_single_picture(job):
    counts = engine.run(job._replace(source=job.source / 'sub' / 'b.png'))
    assert counts.done == 1
    assert (job.out / 'labels' / 'b.png.png').is_file()


@pytest.mark.parametrize('batch', [2, 3, 8])
def test_results_do_not_depend_on_the_batch(done, tmp_path, batch):
    engine.run(done._replace(out=tmp_path / 'batched', batch=batch))
    assert results(tmp_path / 'batched') == results(done.out)


def test_bad_files_are_recorded_and_the_rest_goes_on(job):
    good = (job.source / 'a.png').read_bytes()
    (job.source / 'cut.png').write_bytes(good[: len(good) // 2])
    (job.source / 'empty.jpg').write_bytes(b'')
    (job.source / 'words.gif').write_text('words')
    (job.source / 'gone.png').symlink_to('nowhere')
    counts = engine.run(job._replace(batch=2))
    assert (counts.images, counts.done, counts.failed) == (7, 3, 4)
    failures = {entry['input']: (entry['error'], entry['reason']) for entry in records(job, 'failures.jsonl')}
    assert failures['empty.jpg'] == ('ImageError', 'empty file')
    assert failures['words.gif'][1].startswith('not a picture')
    assert failures['cut.png'][1].startswith('truncated')
    assert failures['gone.png'] == ('FileNotFoundError', 'No such file or directory')
    assert [entry['input'] for entry in records(job)] == sorted([*SIZES, *failures])
    assert not [name for name in results(job.out) if any(bad in name for bad in failures)]


def test_a_second_run_does_nothing_and_needs_no_model(job, tmp_path):
    model = shutil.copytree(job.model, tmp_path / 'model')
    job = job._replace(model=str(model))
    engine.run(job)
    before, record, written = results(job.out), run_record(job), times(job.out)
    shutil.rmtree(model)
    counts = engine.run(job)
    assert counts[:4] == (3, 3, 3, 0)
    assert (results(job.out), times(job.out)) == (before, written)
    assert run_record(job) == {**record, 'counts': {**record['counts'], 'skipped': 3}}


@pytest.mark.parametrize('change', ['new', 'picture', 'labels', 'masks'])
def test_only_what_is_missing_or_changed_is_done_again(done, change):
    before = times(done.out)
    if change == 'new':
        put_picture(done.source / 'sub' / 'new.png')
    elif change == 'picture':
        put_picture(done.source / 'a.png', seed=9)
    elif change == 'labels':
        (done.out / 'labels' / 'a.png.png').unlink()
    else:
        shutil.rmtree(done.out / 'masks' / 'a.png')
    counted = Count()
    counts = engine.run(done, counted)
    assert counted.pictures == 1
    assert counts.done - counts.skipped == 1
    redone = 'new.png.png' if change == 'new' else 'a.png.png'
    assert {name for name, at in times(done.out).items() if at != before.get(name)} == {redone}
    assert len(records(done)) == counts.done


def test_failed_pictures_are_tried_again_and_forgotten_when_they_are_gone(job):
    (job.source / 'x.png').write_bytes(b'')
    (job.source / 'y.png').write_bytes(b'')
    assert engine.run(job).failed == 2
    put_picture(job.source / 'x.png')
    (job.source / 'y.png').unlink()
    counts = engine.run(job)
    assert (counts.done, counts.skipped, counts.failed) == (4, 3, 0)
    assert records(job, 'failures.jsonl') == []
    assert [entry['input'] for entry in records(job)] == sorted([*SIZES, 'x.png'])


def test_other_settings_in_the_same_output_are_refused(done, sd35_folder):
    before = results(done.out)
    record = run_record(done)
    with pytest.raises(OutputConflict, match=r'\(threshold 0\.1 there, 0\.3 now\): choose another --out, or --overwrite'):
        engine.run(done._replace(options=Options(threshold=0.3)))
    with pytest.raises(OutputConflict, match='dtype float32 there, bfloat16 now'):
        engine.run(done._replace(dtype='bfloat16'))
    with pytest.raises(OutputConflict, match=f'weights {record["settings"]["weights"]} there'):
        engine.run(done._replace(model=str(sd35_folder)))
    assert (results(done.out), run_record(done)) == (before, record)


def test_the_same_settings_in_other_words_continue(done):
    assert engine.run(done._replace(options=Options(threshold=0.1))).skipped == 3


def test_overwrite_does_everything_again(done):
    (done.out / 'run.json').write_text('nonsense')
    with pytest.raises(OutputConflict, match='is not a record of a padseg run'):
        engine.run(done)
    counts = engine.run(done._replace(options=Options(threshold=float('inf')), overwrite=True))
    assert (counts.done, counts.skipped, counts.regions) == (3, 0, 1.0)
    assert read_label_map(done.out / 'labels' / 'a.png.png').max() == 1
    assert sorted(path.name for path in (done.out / 'masks' / 'a.png').iterdir()) == ['0.png', 'metadata.csv']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_next_run_continues(job, tmp_path, number):
    for seed in range(12):
        put_picture(job.source / 'more' / f'{seed}.png', (40, 48), seed)
    engine.run(job._replace(out=tmp_path / 'whole'))
    counts = engine.run(job, Signal(number))
    assert (counts.signal, counts.images, counts.failed) == (number, 15, 0) and 1 <= counts.done < 8
    assert run_record(job)['status'] == 'interrupted'
    assert len(records(job)) == counts.done == len(list((job.out / 'labels').rglob('*.png')))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = engine.run(job)
    assert (again.done, again.skipped) == (15, counts.done)
    assert run_record(job)['status'] == 'finished'
    assert results(job.out) == results(tmp_path / 'whole')


def test_a_second_signal_stops_at_once(job):
    with pytest.raises(KeyboardInterrupt):
        engine.run(job, Signal(signal.SIGINT, signal.SIGINT))
    assert run_record(job)['status'] == 'running'
    assert engine.run(job).skipped == 1


def test_a_killed_run_leaves_readable_records_and_is_continued(job, tmp_path):
    assert start(jobs.killed, job, 1).wait().returncode == -signal.SIGKILL
    assert [entry['status'] for entry in records(job)] == ['done']
    half = job.out / 'masks' / '.padseg-half'
    half.mkdir()
    (half / '0.png').write_bytes(b'half')
    with (job.out / 'manifest.jsonl').open('a') as manifest:
        manifest.write('{"input": "a.png", "stat')
    counts = engine.run(job)
    assert (counts.done, counts.skipped) == (3, 1)
    engine.run(job._replace(out=tmp_path / 'whole'))
    assert results(job.out) == results(tmp_path / 'whole')
    assert [entry['input'] for entry in records(job)] == sorted(SIZES)


def test_a_damaged_manifest_is_not_guessed_at(done):
    lines = (done.out / 'manifest.jsonl').read_text().splitlines(keepends=True)
    (done.out / 'manifest.jsonl').write_text('{}\n' + ''.join(lines))
    with pytest.raises(OutputConflict, match='manifest.jsonl, line 1'):
        engine.run(done)


def test_an_output_inside_the_input_is_not_an_input(job):
    job = job._replace(out=job.source / 'out')
    engine.run(job)
    assert engine.run(job).images == 3
    with pytest.raises(UsageError, match='cannot be the folder of pictures'):
        engine.run(job._replace(out=job.source))


def test_outputs_that_cannot_be_used(job, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match='cannot create the output folder'):
        engine.run(job._replace(out=tmp_path / 'file'))
    job.out.mkdir()
    with filelock.FileLock(job.out / '.lock'), pytest.raises(OutputConflict, match='another run is writing'):
        engine.run(job)


def test_no_pictures(job, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(NoImages, match='no pictures in'):
        engine.run(job._replace(source=tmp_path / 'empty'))
    assert not job.out.exists()


def test_names_that_are_hard_to_write(job):
    for name in (b'\xe9.png', 'é 漢.png'.encode(), b'new\nline.png', b'-x.png', b'n' * 251 + b'.png'):
        shutil.copy(job.source / 'a.png', os.fsencode(job.source) + b'/' + name)
    counts = engine.run(job)
    assert (counts.done, counts.failed) == (7, 1)
    assert records(job, 'failures.jsonl')[0]['reason'] == 'File name too long'
    assert os.fsdecode(b'\xe9.png') in [entry['input'] for entry in records(job)]
    assert Path(os.fsdecode(os.fsencode(job.out) + b'/labels/\xe9.png.png')).is_file()
    assert engine.run(job).skipped == 7


@pytest.mark.parametrize('size', [(1, 1), (1, 3000), (3000, 1), (2, 3)])
def test_extreme_sizes(job, size):
    put_picture(job.source / 'extreme.png', size)
    assert read(job.source / 'extreme.png').shape == (*size, 3)
    assert engine.run(job._replace(source=job.source / 'extreme.png')).done == 1
    assert read_label_map(job.out / 'labels' / 'extreme.png.png').shape == size


def test_an_overlay_that_jpeg_cannot_hold_fails_that_picture_alone(job):
    put_picture(job.source / 'long.png', (1, 66000))
    counts = engine.run(job._replace(overlay=True))
    assert (counts.done, counts.failed) == (3, 1)
    assert '66000x1' in records(job, 'failures.jsonl')[0]['reason']


def test_a_run_in_a_thread(job):
    done = []
    thread = threading.Thread(target=lambda: done.append(engine.run(job)))
    thread.start()
    thread.join()
    assert done[0].done == 3


def alike(job):
    """The manifest but for times."""
    return [{name: value for name, value in entry.items() if name not in ('seconds', 'stages')} for entry in records(job)]


def test_killed_at_many_moments_nothing_is_lost_or_half_written(job, tmp_path):
    """Runs are killed one after the other at random moments; then one goes to the end."""
    for seed in range(12):
        put_picture(job.source / 'more' / f'{seed}.png', (40, 48), seed)
    engine.run(job._replace(out=tmp_path / 'whole'))
    ran = start(jobs.killed_often, job, int(os.environ.get('PADSEG_TEST_KILLS', '8'))).wait()
    assert ran.returncode == 0, ran.stderr
    engine.run(job)
    assert results(job.out) == results(tmp_path / 'whole')
    assert alike(job) == alike(job._replace(out=tmp_path / 'whole'))
    assert not list(job.out.rglob('.padseg-*'))


def test_a_full_disk_stops_with_what_is_finished(job, tmp_path):
    """A limit on the size of files stands for a full disk: the large picture's overlay cannot be written."""
    put_picture(job.source / 'sub' / 'c.png', (900, 900))
    arguments = ['run', '--dir', job.source, '--out', job.out, '--model', job.model, '--device', 'cpu', '--overlay']
    ran = start(jobs.with_small_files, list(map(str, arguments)), 60_000).wait()
    assert ran.returncode == 7, ran.stderr
    assert 'finished results are kept, and the same command continues' in ran.stderr
    assert not list(job.out.rglob('.padseg-*'))
    assert not (job.out / 'overlays/sub/c.png.jpg').exists()
    overlaid = job._replace(overlay=True)
    assert engine.run(overlaid).skipped >= 1
    engine.run(overlaid._replace(out=tmp_path / 'whole'))
    assert results(job.out) == results(tmp_path / 'whole')


def test_pictures_are_told_unchanged_by_size_and_time(done):
    path = done.source / 'a.png'
    before = path.stat()
    data = bytearray(path.read_bytes())
    path.touch()
    assert engine.run(done).skipped == 3  # touched, but of the same content
    data[-1] ^= 1  # a check sum at the end, which Pillow does not look at
    path.write_bytes(data)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert engine.run(done).skipped == 3
    assert engine.run(done._replace(checksum=True)).skipped == 2


def test_a_run_over_some_pictures_keeps_the_records_of_others(job):
    (job.source / 'sub' / 'bad.png').write_bytes(b'bad')
    engine.run(job)
    counts = engine.run(job._replace(selection=Selection(include=('a.*',)), options=job.options))
    assert (counts.images, counts.skipped, counts.failed) == (2, 2, 0)
    assert {entry['input']: entry['status'] for entry in records(job)} == {
        'a.jpg': 'done',
        'a.png': 'done',
        'sub/b.png': 'done',
        'sub/bad.png': 'failed',
    }
    with pytest.raises(NoImages, match='none of the 4 pictures in .* is selected'):
        engine.run(job._replace(selection=Selection(include=('z*',))))


def test_failed_pictures_may_be_left_alone(job):
    (job.source / 'x.png').write_bytes(b'bad')
    (job.source / 'y.png').write_bytes(b'bad')
    assert engine.run(job).failed == 2
    put_picture(job.source / 'x.png')
    counted = Count()
    counts = engine.run(job._replace(retry_failed=False), counted)
    assert (counts.done, counts.skipped, counts.failed, counted.pictures) == (4, 4, 1, 1)  # the changed one is tried
    assert engine.run(job._replace(retry_failed=False)).failed == 1
    assert engine.run(job, counted).failed == 1 and counted.pictures == 2


def test_too_many_failures_end_the_run(job):
    for number in range(9):
        (job.source / f'a{number}.png').write_bytes(b'bad')
    counts = engine.run(job._replace(max_failures=2))
    assert 3 <= counts.failed < 9 and counts.done < 3
    assert run_record(job)['status'] == 'interrupted'
    assert engine.run(job).failed == 9


def test_pictures_with_too_many_pixels_fail(job):
    counts = engine.run(job._replace(reading=Reading(max_pixels=48 * 80 - 1)))
    assert (counts.done, counts.failed) == (1, 2)
    assert 'size 80x48 exceeds 3839 pixels' in records(job, 'failures.jsonl')[0]['reason']


@pytest.mark.parametrize('workers', [1, 3])
def test_threads_change_nothing(job, tmp_path, workers):
    for seed in range(6):
        put_picture(job.source / 'more' / f'{seed}.png', (40, 48), seed)
    engine.run(job._replace(workers=workers, batch=2))
    engine.run(job._replace(out=tmp_path / 'whole'))
    assert results(job.out) == results(tmp_path / 'whole')


def test_where_memory_runs_out_batches_are_halved(job, backbone):
    import torch

    def read_all():
        return [stages.take(job, Found(job.source / name, name)) for name in SIZES]

    options = Options()
    expected = stages_of(seg4diff, seg4diff.prepare(backbone, options)).maps(read_all())
    family = backbone.family

    class Small:
        calls = 0

        def __getattr__(self, name):
            return getattr(family, name)

        def denoise(self, *arguments, **options):
            self.calls += 1
            if self.calls <= 2:  # the first tries at three pictures and at one
                raise torch.OutOfMemoryError
            return family.denoise(*arguments, **options)

    small = dataclasses.replace(backbone, family=Small())
    found = stages_of(seg4diff, seg4diff.prepare(small, options)).maps(read_all())
    assert found[0].maps is None and 'out of memory' in found[0].entry.reason
    assert all(torch.equal(one.maps.maps, two.maps.maps) for one, two in zip(found[1:], expected[1:], strict=True))


def test_a_stop_reads_no_more_pictures(job):
    """Asked to stop while the first pictures are worked on: those far behind are not even opened."""
    for number in range(60):
        put_picture(job.source / 'more' / f'{number:02}.png', (40, 48), number)
    opened = job.source / 'more' / '59.png'

    class Watched(Signal):
        def start(self, total):  # headers have been looked at before; from here on a picture is opened to be worked on
            os.utime(opened, ns=(1, opened.stat().st_mtime_ns))

    counts = engine.run(job, Watched(signal.SIGTERM))
    assert counts.done + counts.failed < 20  # access times may be off, so the count of done pictures tells too
    assert opened.stat().st_atime_ns == 1


def only(job, name, **reading):
    """The job on one of its pictures, read in such a way; its record."""
    job = job._replace(source=job.source / name, reading=Reading(**reading))
    engine.run(job)
    return records(job)[0]


def test_reduced_pictures_are_recorded_and_leave_the_formats_that_need_the_file(job, caplog):
    put_picture(job.source / 'large.png', (300, 500))
    entry = only(job, 'large.png', shrink=10_000)
    assert entry['reduced_from'] == [300, 500] and entry['notes'] == ['reduced from 500x300']
    height, width = entry['size']
    assert height * width <= 10_000 and read_label_map(job.out / 'labels/large.png.png').shape == (height, width)
    assert convert(job.out, 'labelme').failed == {'large.png': 'it was reduced: its label map is smaller than its file'}
    assert convert(job.out, 'coco').failed == {}
    assert convert(job.out, 'hf-imagefolder').failed == {}
    assert PIL.Image.open(job.out / 'hf-imagefolder/images/large.png.png').size == (width, height)
    with pytest.raises(OutputConflict, match='shrink 10000 there, None now'):
        only(job, 'large.png')


def test_orientation_can_be_ignored(job, tmp_path):
    picture = PIL.Image.open(job.source / 'sub/b.png')
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(job.source / 'turned.png', exif=exif)
    assert only(job, 'turned.png')['size'] == [40, 64]
    ignoring = job._replace(out=tmp_path / 'ignored')
    assert only(ignoring, 'turned.png', exif='ignore')['size'] == [64, 40]
    assert convert(job.out, 'cvat').failed == {} != convert(ignoring.out, 'cvat').failed


def test_frames(job, tmp_path, caplog):
    job = job._replace(options=Options(threshold=0.001, normalisation='minmax-softmax'))  # with which frames differ
    frames = []
    for seed in range(3):
        put_picture(tmp_path / 'frame.png', (40, 40), seed)
        frames.append(PIL.Image.open(tmp_path / 'frame.png').copy())
    frames[0].save(job.source / 'pages.tif', save_all=True, append_images=frames[1:])
    assert only(job, 'pages.tif')['notes'] == ['first of 3 frames']
    assert 'pages.tif: first of 3 frames' in caplog.text
    all_frames = job._replace(out=tmp_path / 'all', reading=Reading(frames='all'))
    assert engine.run(all_frames).done == 6
    names = [entry['input'] for entry in records(all_frames)]
    assert names == sorted([*SIZES, 'pages.tif.f0000', 'pages.tif.f0001', 'pages.tif.f0002'])
    first = (job.out / 'labels/pages.tif.png').read_bytes()
    assert (
        (all_frames.out / 'labels/pages.tif.f0000.png').read_bytes()
        == first
        != (all_frames.out / 'labels/pages.tif.f0001.png').read_bytes()
    )
    assert engine.run(all_frames).skipped == 6
    assert convert(all_frames.out, 'hf-imagefolder').pictures == 6
    assert np.array_equal(np.asarray(PIL.Image.open(all_frames.out / 'hf-imagefolder/images/pages.tif.f0002.png')), np.asarray(frames[2]))
    assert convert(all_frames.out, 'labelme').failed == {name: 'it is a frame of a file' for name in names if '.tif' in name}


def test_equal_frames_of_one_file_have_equal_label_maps(job):
    """The noise comes from a picture's content, not from its place or name."""
    frame = PIL.Image.open(job.source / 'a.png')
    frame.save(job.source / 'same.tif', save_all=True, append_images=[frame])
    engine.run(job._replace(source=job.source / 'same.tif', reading=Reading(frames='all')))
    first, second = (job.out / f'labels/same.tif.f000{number}.png' for number in (0, 1))
    assert first.read_bytes() == second.read_bytes()


def test_transparent_pixels_can_be_left_unassigned(job):
    picture = PIL.Image.open(job.source / 'a.png').convert('RGBA')
    picture.putalpha(255)
    picture.paste((0, 0, 0, 0), (0, 0, 30, 20))
    picture.save(job.source / 'clear.png')
    only(job, 'clear.png', void=True)
    labels = read_label_map(job.out / 'labels/clear.png.png')
    assert np.array_equal(labels == 0, np.asarray(picture)[..., 3] == 0)
    assert sorted(np.unique(labels)) == list(range(labels.max() + 1))


def test_files_that_are_too_large_are_not_read(job):
    entry = only(job, 'a.png', max_bytes=100)
    assert entry['reason'].endswith('bytes exceeds 100') and entry['sha256'] is None


def test_maps_are_merged_as_the_pictures_were_read(job, tmp_path):
    put_picture(job.source / 'large.png', (300, 500))
    job = job._replace(save_maps=True, reading=Reading(shrink=10_000, background=(1, 2, 3)))
    engine.run(job)
    assert main(['merge', str(job.out), '--out', str(tmp_path / 'merged'), '-q']) == 0
    assert (tmp_path / 'merged/labels/large.png.png').read_bytes() == (job.out / 'labels/large.png.png').read_bytes()


def test_names_that_differ_in_case_alone(job):
    """Where the file system tells them apart both are done; where it does not, they are refused before anything is lost."""
    put_picture(job.source / 'A.JPG', seed=5)
    if ignores_case(job.source):
        assert engine.run(job).images == 3
    else:
        assert engine.run(job).done == 4
        assert (job.out / 'labels/A.JPG.png').read_bytes() != (job.out / 'labels/a.jpg.png').read_bytes()


def test_flags_of_reading(job, capsys):
    arguments = ['run', '--dir', str(job.source), '--out', str(job.out), '--model', job.model, '--device', 'cpu', '-q']
    for wrong, words in {
        '--background no-colour': 'no-colour is not a colour',
        '--value-range 2 1': 'LOW < HIGH',
        '--shrink 0': 'x>=1',
    }.items():
        assert main([*arguments, *wrong.split()]) == 2
        assert words in capsys.readouterr().err
    flags = '--background #102030 --value-range 0 2.5 --shrink 900 --exif ignore --frames all --void-transparent --max-file-size 1000000'
    assert main([*arguments, *flags.split()]) == 0
    settings = run_record(job)['settings']
    expected = {'background': '#102030', 'value_range': '0.0 2.5', 'shrink': 900, 'exif': 'ignore', 'frames': 'all', 'void': True}
    assert {name: settings[name] for name in expected} == expected
    again = settings_from(settings).reading
    assert again._replace(max_pixels=1, max_bytes=1) == Reading(1, 1, 'ignore', 'all', (0.0, 2.5), (16, 32, 48), True, 900)


def test_where_nothing_fits_into_memory(job, backbone, monkeypatch):
    """A device without memory for even one picture: every failure is recorded, and the run says so by its exit code."""
    import torch

    from padseg.backbones import sd3

    def full(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sd3.SD3Transformer2DModel, 'forward', full)
    with pytest.raises(ResourceExhausted, match='no picture fits in memory'):
        engine.run(job._replace(batch=2))
    assert [entry['error'] for entry in records(job, 'failures.jsonl')] == ['OutOfMemory'] * 3


@pytest.mark.parametrize('batch', [1, 3])
def test_attention_that_is_not_finite_fails_its_picture_alone(job, batch):
    """Samples that overflow, by weights that are finite but as large as float32 allows."""
    model = shutil.copytree(job.model, job.out.parent / 'broken')
    from safetensors.numpy import load_file, save_file

    (path,) = (model / 'transformer').glob('*.safetensors')
    weights = load_file(path)
    weights['transformer_blocks.2.attn.to_q.weight'][:] = 3e38
    save_file(weights, path, {'format': 'pt'})
    counts = engine.run(job._replace(model=str(model), batch=batch))
    assert (counts.done, counts.failed) == (0, 3)
    assert 'not finite in layer 2' in records(job, 'failures.jsonl')[0]['reason']


def test_nothing_written_tells_where_a_picture_was_taken(job):
    picture = PIL.Image.open(job.source / 'a.jpg')
    exif = picture.getexif()
    exif[0x010E] = 'the secret garden'
    exif.get_ifd(0x8825)[1] = 'N'
    exif.get_ifd(0x8825)[2] = (52.0, 22.0, 12.0)
    picture.save(job.source / 'a.jpg', exif=exif, comment=b'the secret garden', icc_profile=b'the secret garden')
    assert (job.source / 'a.jpg').read_bytes().count(b'the secret garden') == 3
    engine.run(job._replace(overlay=True, coco=True, save_maps=True))
    for format in CONVERTERS:
        convert(job.out, format)
    for path in job.out.rglob('*'):
        if path.is_file():
            assert b'secret' not in path.read_bytes(), path
        if path.suffix in ('.png', '.jpg') and path.is_file():
            written = PIL.Image.open(path)
            assert not written.getexif() and not {'comment', 'icc_profile', 'exif'} & written.info.keys(), path
