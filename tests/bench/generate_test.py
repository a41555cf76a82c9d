"""The benchmark of guidances: small runs of both families, and its figures by hand."""

from __future__ import annotations

import pytest

from padseg.bench import generate


@pytest.mark.slow
@pytest.mark.parametrize('model', ['sd1.5', 'sd3'])
def test_a_small_run(bench, model):
    measured, seconds = bench('generate', '--model', model, '--scale-down', '--repeats', '1', '--steps', '1')
    taken = measured['seconds']
    assert list(taken) == ['cfg', 'perturbed', 's-cfg', 'goca-s-cfg'] and min(map(min, taken.values())) > 0
    assert sum(map(sum, taken.values())) < seconds and (measured['model'], measured['side']) == (model, 64)
    own = measured['processor_seconds']
    assert measured['to_plain']['perturbed']['median'] > 0 and min(map(min, own.values())) > 0
    lines = generate.in_words(measured).splitlines()
    assert len(lines) == 9 and lines[6].startswith('perturbed takes ') and '1.55 x' in lines[6]


def test_figures_by_hand():
    setting = generate.GenerateSetting('sd3', False, 1024, 1, 'cpu', 'float32', 1)
    turn = {
        'cfg': generate.Taken(9.0, 2.0, 1.0, 1000.0),
        'perturbed': generate.Taken(9.0, 3.0, 1.5, 1100.0),
        's-cfg': generate.Taken(9.0, 2.2, 1.1, 1000.0),
        'goca-s-cfg': generate.Taken(9.0, 2.2, 1.1, 1600.0),
    }
    measured = generate.summary(setting, [turn])
    assert measured['to_plain']['perturbed']['median'] == 1.5 and measured['beyond_plain_mib']['goca-s-cfg'] == [600.0]
    assert measured['held'] == {'perturbed': True, 's-cfg': False, 'goca-s-cfg': False}
    assert generate.in_words(measured).count('NOT within') == 2
