"""What a run does with pictures, folders and records that are not what they should be: it says so, and nothing is wrong in silence."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support import jobs
from support.processes import start

from padseg.commands import main
from padseg.errors import ModelUnavailable, OutputConflict, UsageError
from padseg.images import Found
from padseg.methods import seg4diff
from padseg.methods.classical import GridOptions
from padseg.methods.seg4diff import Options
from padseg.run import engine, picture as stages
from padseg.run.collect import collect
from padseg.run.convert import convert
from padseg.run.job import Job
from padseg.run.locks import all_records, joinable, shard_homes
from padseg.run.prepare import stages_of
from padseg.run.records import read_run
from padseg.run.selection import Selection


def put_picture(path: Path, size: tuple[int, int] = (4, 6), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)


def put_long(path: Path, width: int) -> None:
    """A black picture of one row, in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, 1, 1, 0, 0, 0, 0)
    row = zlib.compress(b'\0' * ((width + 7) // 8 + 1), 9)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', row) + chunk(b'IEND', b''))


@pytest.fixture
def job(tmp_path):
    """A run that needs no model, over three pictures."""
    for seed, name in enumerate(('a.png', 'b.png', 'sub/e.png')):
        put_picture(tmp_path / 'in' / name, seed=seed)
    return Job(tmp_path / 'in', tmp_path / 'out', GridOptions(2), method='grid')


@pytest.fixture
def kept(tmp_path, sd3_folder):
    """One with a model, over two pictures, which can keep maps."""
    for seed, name in enumerate(('a.png', 'b.png')):
        put_picture(tmp_path / 'in' / name, (40, 56), seed)
    return Job(tmp_path / 'in', tmp_path / 'out', model=str(sd3_folder), device='cpu')


def entries(out: Path) -> dict[str, dict]:
    return {entry['input']: entry for entry in map(json.loads, (out / 'manifest.jsonl').read_text().splitlines())}


def edit(out: Path, name: str, **changes: object) -> None:
    """Change the record of a picture."""
    recorded = entries(out)
    recorded[name] |= changes
    (out / 'manifest.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in recorded.values()))


def files(out: Path) -> dict[str, bytes]:
    """All that was written but for records."""
    paths = [path for path in out.rglob('*') if path.is_file() and path.parent != out and 'shards' not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


# one picture


@pytest.mark.parametrize('refine', ['masks', 'overlay', 'regions'])
def test_a_picture_that_cannot_be_written_fails_alone(job, refine):
    """More pixels a side than PNG or JPEG encoders take, or more regions than a label map can have; the next picture is done."""
    options = GridOptions(2)
    if refine == 'masks':
        put_long(job.source / 'a.png', 1_000_001)
    elif refine == 'overlay':
        put_long(job.source / 'a.png', 70_000)
    else:
        put_picture(job.source / 'a.png', (260, 260))
        options = GridOptions(260)
    counts = engine.run(job._replace(options=options, overlay=refine == 'overlay'))
    assert (counts.done, counts.failed) == (2, 1)
    failed = entries(job.out)['a.png']
    assert failed['error'] and failed['reason'] and failed['outputs'] == {}
    assert not [name for name in files(job.out) if 'a.png' in name]


def test_an_error_in_the_forward_is_of_its_picture_alone(kept, backbone):
    """Of a batch of three the one at fault fails, with class and message in one line; the label maps of the others are as without it."""
    import torch

    put_picture(kept.source / 'c.png', (40, 56), 2)

    def read_all():
        return [stages.take(kept, Found(kept.source / name, name)) for name in ('a.png', 'b.png', 'c.png')]

    family = backbone.family
    inputs = []

    class Watching:
        def __getattr__(self, name):
            return getattr(family, name)

        def denoise(self, transformer, z, *arguments, **options):
            inputs.append(z)
            return family.denoise(transformer, z, *arguments, **options)

    class Faulty(Watching):
        def denoise(self, transformer, z, *arguments, **options):
            if any(torch.equal(one, at_fault) for one in z):
                raise ZeroDivisionError('no such\n  thing')
            return family.denoise(transformer, z, *arguments, **options)

    expected = stages_of(seg4diff, seg4diff.prepare(dataclasses.replace(backbone, family=Watching()), Options())).maps(read_all())
    at_fault = inputs[1][0]
    made = stages_of(seg4diff, seg4diff.prepare(dataclasses.replace(backbone, family=Faulty()), Options())).maps(read_all())
    assert (made[1].image, made[1].entry.status) == (None, 'failed')
    assert (made[1].entry.error, made[1].entry.reason) == ('ZeroDivisionError', 'no such thing')
    assert all(torch.equal(made[number].maps.maps, expected[number].maps.maps) for number in (0, 2))


def test_an_error_in_the_label_map_is_of_its_picture_alone(kept):
    def labels(image, maps):
        raise MemoryError

    taken = stages.take(kept, Found(kept.source / 'a.png', 'a.png'))
    entry = stages.save(kept, stages.labelled(stages.Stages(lambda some: some, labels), taken))
    assert (entry.status, entry.error) == ('failed', 'OutOfMemory') and 'memory' in entry.reason
    for error in (OutputConflict('x'), ModelUnavailable('x'), OSError(28, 'No space left on device')):
        with pytest.raises(type(error)):
            stages.fail(entry, error)


def test_what_failed_leaves_no_earlier_result(job):
    engine.run(job._replace(overlay=True))
    (job.source / 'a.png').write_bytes(b'')
    assert engine.run(job).failed == 1
    assert not [name for name in files(job.out) if 'a.png' in name] and len(files(job.out)) == 14


def test_what_failed_takes_nothing_of_others_with_it(job):
    """The label map of x.png and the folder for those in x.png.png have one name: one picture fails, and the other keeps its results."""
    put_picture(job.source / 'x.png')
    put_picture(job.source / 'x.png.png' / 'y.png')
    counts = engine.run(job)
    assert (counts.done, counts.failed) == (4, 1)
    done = [name for name, entry in entries(job.out).items() if entry['status'] == 'done']
    assert all((job.out / f'labels/{name}.png').is_file() for name in done)
    assert engine.run(job)[:4] == (5, 4, 4, 1)


# settings


def test_results_of_other_settings_do_not_count(job):
    """An overlay that an earlier run left is not of these settings: it goes, and is made anew when it is asked for."""
    engine.run(job._replace(overlay=True))
    before = (job.out / 'overlays/a.png.jpg').read_bytes()
    other = job._replace(options=GridOptions(1), overwrite=True)
    engine.run(other)
    assert not list((job.out / 'overlays').rglob('*.jpg'))
    assert engine.run(other._replace(overlay=True, overwrite=False)).skipped == 0
    assert (job.out / 'overlays/a.png.jpg').read_bytes() != before


def test_results_of_the_same_settings_stay_recorded(job):
    engine.run(job._replace(overlay=True))
    shutil.rmtree(job.out / 'labels')
    engine.run(job)
    assert entries(job.out)['a.png']['outputs'].keys() == {'labels', 'masks', 'overlays'}
    assert engine.run(job._replace(overlay=True)).skipped == 3


def test_maps_of_other_settings_are_not_merged(kept, tmp_path):
    engine.run(kept._replace(save_maps=True))
    maps = shutil.copytree(kept.out / 'maps', tmp_path / 'maps')
    engine.run(kept._replace(options=Options(step=3), overwrite=True))
    shutil.copytree(maps, kept.out / 'maps', dirs_exist_ok=True)
    assert main(['merge', str(kept.out), '--out', str(tmp_path / 'merged'), '-q']) == 3
    assert 'no token maps' in entries(tmp_path / 'merged')['a.png']['reason']


def test_shards_of_other_settings_do_not_count(job):
    """As a killed run with --overwrite of an earlier version left them."""
    engine.run(job._replace(selection=Selection(shard=(1, 2))))
    engine.run(job._replace(selection=Selection(shard=(2, 2))))
    assert len(joinable(job.out)) == 2 and len(all_records(job.out)) == 3
    shards = shutil.copytree(job.out / 'shards', job.out.parent / 'shards')
    other = job._replace(options=GridOptions(1))
    engine.run(other._replace(overwrite=True))
    shutil.copytree(shards, job.out / 'shards')
    (job.out / 'manifest.jsonl').write_text('')
    assert joinable(job.out) == {} and all_records(job.out) == {}
    assert (engine.run(other).skipped, (job.out / 'shards').exists()) == (0, False)


@pytest.mark.parametrize('change', ['weights', 'settings', 'damage'])
def test_another_model_is_no_model_that_is_done(kept, tmp_path, change):
    """Nothing is left to do, and yet it is seen: by size and times first, by content where these differ."""
    model = shutil.copytree(kept.model, tmp_path / 'model')
    job = kept._replace(model=str(model))
    engine.run(job)
    record = read_run(job.out / 'run.json')
    weights = next((model / 'transformer').glob('*.safetensors'))
    weights.touch()
    assert engine.run(job).skipped == 2  # touched, but the same: read once more, and not again
    touched = read_run(job.out / 'run.json')
    assert touched.settings == record.settings and touched.stamp != record.stamp
    if change == 'weights':
        data, before = bytearray(weights.read_bytes()), weights.stat()
        data[-1] ^= 1
        with weights.open('r+b') as file:  # the same file, of the same size and time
            file.write(data)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        words = 'weights'
    elif change == 'settings':
        (model / 'padseg.json').write_text(json.dumps({'layer': 1, 'side': 32}))
        words = 'layer 2 there, 1 now'
    else:
        (model / 'padseg.json').write_text('{')
        with pytest.raises(ModelUnavailable):
            engine.run(job)
        return
    with pytest.raises(OutputConflict, match=words):
        engine.run(job)
    assert read_run(job.out / 'run.json').settings == record.settings


def test_an_earlier_version_recorded_no_stamp(kept):
    engine.run(kept)
    record = json.loads((kept.out / 'run.json').read_text())
    stamp = record.pop('stamp')
    (kept.out / 'run.json').write_text(json.dumps(record))
    assert engine.run(kept).skipped == 2
    assert json.loads((kept.out / 'run.json').read_text())['stamp'] == stamp


@pytest.mark.parametrize('threads_recorded', [True, False])
def test_a_run_whose_maps_are_kept_goes_on_with_as_many_threads(kept, caplog, threads_recorded):
    """Their last digits depend on it; label maps from float32 do not."""
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine.run(kept._replace(save_maps=True, selection=Selection(limit=1)))
    finally:
        torch.set_num_threads(own)
    record = json.loads((kept.out / 'run.json').read_text())
    assert record['settings']['threads'] == record['threads'] == 2
    if not threads_recorded:  # as an earlier version
        del record['settings']['threads']
        (kept.out / 'run.json').write_text(json.dumps(record))
    torch.set_num_threads(1)
    try:
        assert engine.run(kept._replace(save_maps=True)).skipped == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(own)
    assert 'using 2 threads in place of 1' in caplog.text
    assert read_run(kept.out / 'run.json').settings['threads'] == read_run(kept.out / 'run.json').threads == 2


def test_label_maps_of_float32_do_not_hold_the_threads(kept):
    engine.run(kept)
    assert 'threads' not in read_run(kept.out / 'run.json').settings


# sources


def test_results_belong_to_the_pictures_of_one_folder(job, tmp_path):
    engine.run(job)
    before = files(job.out), (job.out / 'manifest.jsonl').read_bytes()
    for name, seed in (('a.png', 7), ('other.png', 8)):
        put_picture(tmp_path / 'others' / name, seed=seed)
    other = job._replace(source=tmp_path / 'others')
    for changed in (other, other._replace(selection=Selection(shard=(1, 1))), other._replace(source=job.source / 'sub')):
        with pytest.raises(OutputConflict, match='of which .* has 0 of 3 unchanged'):
            engine.run(changed)
    assert main(['run', '--dir', str(other.source), '--out', str(job.out), '--method', 'grid', '--cells', '2', '--dry-run']) == 6
    assert before == (files(job.out), (job.out / 'manifest.jsonl').read_bytes())
    engine.run(other._replace(overwrite=True))
    assert entries(job.out).keys() == {'a.png', 'other.png'}


def test_a_folder_that_has_moved_is_the_same(job, tmp_path):
    engine.run(job._replace(source=job.source / 'a.png'))
    assert engine.run(job).skipped == 1  # one of its pictures before
    moved = job.source.rename(tmp_path / 'moved')
    put_picture(moved / 'b.png', seed=9)
    counts = engine.run(job._replace(source=moved))
    assert (counts.done, counts.skipped) == (3, 2)
    assert read_run(job.out / 'run.json').source == str(moved)
    (tmp_path / 'link').symlink_to(moved)
    assert engine.run(job._replace(source=tmp_path / 'link')).skipped == 3


@pytest.mark.parametrize('spelling', ['plain', 'link', 'below', 'file', 'linked results', 'export', 'shard'])
def test_a_place_of_results_is_no_source(job, tmp_path, spelling):
    engine.run(job)
    source, changed = job.out / 'labels', job
    if spelling == 'link':
        (tmp_path / 'link').symlink_to(source)
        source = tmp_path / 'link'
    elif spelling == 'below':
        source = source / 'sub'
    elif spelling == 'file':
        source = source / 'a.png.png'
    elif spelling == 'linked results':
        source.rename(tmp_path / 'elsewhere')
        source.symlink_to(tmp_path / 'elsewhere')
        source = tmp_path / 'elsewhere'
    elif spelling == 'export':
        convert(job.out, 'hf-imagefolder')
        source = job.out / 'hf-imagefolder' / 'images'
    elif spelling == 'shard':
        changed = job._replace(selection=Selection(shard=(1, 1)))
    before = files(job.out)
    with pytest.raises(UsageError, match='lies where results go'):
        engine.run(changed._replace(source=source))
    assert files(job.out) == before


def test_pictures_beside_results_are_a_source(job):
    put_picture(job.out / 'mine' / 'a.png')
    assert engine.run(job._replace(source=job.out / 'mine')).done == 1


def test_merge_refuses_such_a_source_too(kept, tmp_path, capsys):
    engine.run(kept._replace(save_maps=True))
    out = tmp_path / 'merged'
    assert main(['merge', str(kept.out), '--out', str(out), '-q']) == 0
    assert main(['merge', str(kept.out), '--out', str(out), '--dir', str(out / 'labels'), '-q']) == 2
    assert 'lies where results go' in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_frame(job):
    """Its results would lie among the masks of that frame."""
    frames = [PIL.Image.new('L', (4, 4), shade) for shade in (0, 255)]
    frames[0].save(job.source / 'x.gif', save_all=True, append_images=frames[1:])
    put_picture(job.source / 'x.gif.f0000' / 'y.png')
    assert engine.run(job).done == 5
    reading = job.reading._replace(frames='all')
    with pytest.raises(UsageError, match=r'x\.gif\.f0000 is a frame of a file, and the folder of x\.gif\.f0000/y\.png'):
        engine.run(job._replace(reading=reading, overwrite=True))
    selection = Selection(exclude=('x.gif.f0000/*',))
    assert engine.run(job._replace(reading=reading, overwrite=True, selection=selection)).done == 5


# folders of others


@pytest.fixture
def bundle(job, tmp_path):
    """A folder of results from elsewhere, and files beside the folder that it is to be joined with."""
    engine.run(job._replace(out=tmp_path / 'theirs' / 'out'))
    home = tmp_path / 'home'
    (home / '.ssh').mkdir(parents=True)
    (home / '.ssh' / 'id').write_text('mine')
    (tmp_path / 'theirs' / '.ssh').mkdir()
    (tmp_path / 'theirs' / '.ssh' / 'id').write_text('theirs')
    return tmp_path / 'theirs' / 'out', home / 'all'


@pytest.mark.parametrize(
    'outputs',
    [
        {'masks': '../.ssh'},
        {'labels': '../.ssh/id'},
        {'labels': '/etc/passwd'},
        {'labels': 'labels/b.png.png'},
        {'.ssh': '.ssh'},
        {'labels': 'labels/../../.ssh/id'},
        {},
    ],
)
def test_records_that_lead_elsewhere_are_not_joined(bundle, outputs):
    theirs, ours = bundle
    edit(theirs, 'a.png', outputs={'labels': 'labels/a.png.png', **outputs} if outputs else {})
    with pytest.raises(OutputConflict, match='manifest.jsonl, line 1 is not a record'):
        collect([theirs], ours)
    assert (ours.parent / '.ssh' / 'id').read_text() == 'mine' and not (ours / 'labels').exists()


@pytest.mark.parametrize('place', ['labels/a.png.png', 'masks/a.png/0.png', 'masks/a.png', 'labels', 'labels/sub'])
@pytest.mark.parametrize('side', ['theirs', 'ours'])
def test_links_are_not_followed_when_results_are_joined(bundle, tmp_path, place, side):
    theirs, ours = bundle
    path = (theirs if side == 'theirs' else ours) / place
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    secret = tmp_path / 'secret'
    secret.mkdir()
    (secret / '0.png').write_text('secret')
    path.symlink_to(secret / '0.png' if path.suffix == '.png' and place.count('.') > 1 else secret)
    if side == 'ours' and place == 'masks/a.png/0.png':
        collect([theirs], ours)  # a whole folder takes the place of the one with the link
    else:
        with pytest.raises(OutputConflict):
            collect([theirs], ours)
    assert {path.name: path.read_text() for path in secret.iterdir()} == {'0.png': 'secret'}
    assert not [name for name, data in files(ours).items() if data == b'secret' and not (ours / name).is_symlink() and side == 'theirs']


def test_results_of_pictures_of_another_folder_are_not_joined(job, tmp_path, caplog):
    engine.run(job)
    put_picture(tmp_path / 'others' / 'other.png', seed=5)
    other = job._replace(source=tmp_path / 'others', out=tmp_path / 'two')
    engine.run(other)
    with pytest.raises(OutputConflict, match=r'two holds results of the pictures in .*others, of which .*in has 0 of 1 unchanged'):
        collect([job.out, other.out], tmp_path / 'all')
    shutil.move(job.source, tmp_path / 'away')
    assert collect([job.out, other.out], tmp_path / 'all').counts.done == 4  # which cannot be told any more
    assert 'joined with those of' in caplog.text


def test_a_collection_that_was_killed_does_not_lend_its_results_to_another(job, tmp_path):
    """Results were brought, but no header says of which settings: they do not count."""
    engine.run(job)
    collect([job.out], tmp_path / 'all')
    (tmp_path / 'all' / 'run.json').unlink()
    other = job._replace(options=GridOptions(1), out=tmp_path / 'two')
    engine.run(other)
    collect([other.out], tmp_path / 'all')
    assert files(tmp_path / 'all') == files(other.out)


@pytest.mark.parametrize('links', [False, True])
def test_strange_folders_of_shards(job, links):
    engine.run(job._replace(selection=Selection(shard=(1, 1))))
    for name in ('0-of-2', '3-of-2', '1-of-99999999999', '²-of-3', '01-of-2'):
        shutil.copytree(job.out / 'shards' / '1-of-1', job.out / 'shards' / name)
    (job.out / 'shards' / '2-of-2').symlink_to(job.source)
    assert shard_homes(job.out).keys() == {(1, 1)}
    if links:
        (job.out / 'shards').rename(job.out / 'theirs')
        (job.out / 'shards').symlink_to('theirs')
        with pytest.raises(OutputConflict, match='link'):
            engine.run(job)
    else:
        assert engine.run(job).skipped == 3


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'link'])
@pytest.mark.parametrize('record', ['run.json', 'manifest.jsonl', 'failures.jsonl'])
def test_records_that_are_no_files(job, tmp_path, kind, record):
    engine.run(job)
    (job.out / record).unlink()
    if kind == 'folder':
        (job.out / record).mkdir()
    elif kind == 'pipe':
        os.mkfifo(job.out / record)
    else:
        (tmp_path / 'precious').write_text('precious')
        (job.out / record).symlink_to(tmp_path / 'precious')
    put_picture(job.source / 'new.png')
    for attempt in (job, job._replace(overwrite=True), job._replace(selection=Selection(shard=(1, 2)))):
        with pytest.raises(OutputConflict, match=record):
            engine.run(attempt)
    with pytest.raises(OutputConflict, match=record):
        collect([job.out], job.out)
    if record != 'failures.jsonl':
        with pytest.raises(OutputConflict, match=record):
            convert(job.out, 'coco')
    assert kind != 'link' or (tmp_path / 'precious').read_text() == 'precious'


@pytest.mark.parametrize('place', ['labels', 'masks', 'labels/sub'])
def test_results_are_not_written_through_links(job, tmp_path, place):
    (tmp_path / 'elsewhere').mkdir()
    (job.out / place).parent.mkdir(parents=True)
    (job.out / place).symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(OutputConflict, match='is a link'):
        engine.run(job)
    assert not list((tmp_path / 'elsewhere').iterdir())


@pytest.fixture
def for_all():
    """A folder that others may look into, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_an_output_folder_that_is_read_only(job, for_all):
    job = job._replace(source=shutil.copytree(job.source, for_all / 'in'), out=for_all / 'out')
    engine.run(job)
    job.out.chmod(0o555)
    grid = ('--dir', str(job.source), '--out', str(job.out), '--method', 'grid', '--cells', '2')
    for arguments in (('run', *grid), ('run', *grid, '--overwrite'), ('run', '--collect', str(job.out)), ('run', *grid, '--shard', '1/2')):
        ran = start(jobs.as_nobody, arguments).wait()
        assert (ran.returncode, len(ran.stderr.splitlines())) == (6, 1), ran.stderr
        assert ran.stderr.startswith('padseg: cannot write to ')
    job.out.chmod(0o755)


def test_a_full_disk_while_results_are_joined(bundle):
    theirs, ours = bundle
    ran = start(jobs.with_full_disk, ['run', '--collect', str(theirs), '--out', str(ours)], '/all/masks/').wait()
    assert (ran.returncode, len(ran.stderr.splitlines())) == (7, 1), ran.stderr
    assert collect([theirs], ours).counts.done == 3
