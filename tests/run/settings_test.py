"""Results of other settings, or of another model, do not count as results of a run."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from support.runs import entries

from padseg.commands import main
from padseg.errors import ModelUnavailable, OutputConflict
from padseg.methods.classical import GridOptions
from padseg.methods.seg4diff import Options
from padseg.run import engine
from padseg.run.locks import all_records, joinable
from padseg.run.records import read_run
from padseg.run.selection import Selection


def test_results_of_other_settings_do_not_count(job):
    """An overlay of earlier settings is removed, and made again when it is asked for."""
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
    """Such shards are left over from a killed run with --overwrite of an earlier version."""
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
    """Nothing is left to do, and yet the change is noticed: by size and times first, and by content where these differ."""
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
