"""The number of threads of a run that continues another."""

from __future__ import annotations

import json

import pytest

from padseg.run import engine
from padseg.run.records import read_run
from padseg.run.selection import Selection


@pytest.mark.parametrize('threads_recorded', [True, False])
def test_a_run_whose_maps_are_kept_goes_on_with_as_many_threads(kept, caplog, threads_recorded):
    """The last digits of kept maps depend on the number; label maps from float32 do not."""
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
    assert 'using 2 threads instead of 1' in caplog.text
    assert read_run(kept.out / 'run.json').settings['threads'] == read_run(kept.out / 'run.json').threads == 2


def test_label_maps_of_float32_do_not_hold_the_threads(kept):
    engine.run(kept)
    assert 'threads' not in read_run(kept.out / 'run.json').settings
