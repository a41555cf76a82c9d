"""A picture that fails is recorded and leaves no results, and the other pictures are as they would be without it."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path

import pytest
from support.runs import entries, files, put_picture

from padseg.errors import ModelUnavailable, OutputConflict
from padseg.images import Found
from padseg.methods import seg4diff
from padseg.methods.classical import GridOptions
from padseg.methods.seg4diff import Options
from padseg.run import engine, picture as stages
from padseg.run.prepare import stages_of


def put_long(path: Path, width: int) -> None:
    """A black picture of one row, in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, 1, 1, 0, 0, 0, 0)
    row = zlib.compress(b'\0' * ((width + 7) // 8 + 1), 9)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', row) + chunk(b'IEND', b''))


@pytest.mark.parametrize('refine', ['masks', 'overlay', 'regions'])
def test_a_picture_that_cannot_be_written_fails_alone(job, refine):
    """A side longer than PNG or JPEG encoders take, or more regions than a label map can have. The next picture is done."""
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
    """In a batch of three, only the picture at fault fails, with class and message on one line; the maps of the others do not change."""
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
    """The label map of x.png and the folder for those in x.png.png have the same name: one picture fails, the other keeps its results."""
    put_picture(job.source / 'x.png')
    put_picture(job.source / 'x.png.png' / 'y.png')
    counts = engine.run(job)
    assert (counts.done, counts.failed) == (4, 1)
    done = [name for name, entry in entries(job.out).items() if entry['status'] == 'done']
    assert all((job.out / f'labels/{name}.png').is_file() for name in done)
    assert engine.run(job)[:4] == (5, 4, 4, 1)
