"""What every method offers, and how a model's folder states settings for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from padseg.backbones.source import locate
from padseg.backbones.spec import BACKBONES
from padseg.commands import main
from padseg.errors import UsageError
from padseg.methods import DEFAULTS, METHODS, method_named, open_backbone, seg4diff
from padseg.methods.seg4diff import Options


@pytest.mark.parametrize('name', METHODS)
def test_a_method_has_a_task_and_records_all_its_options_resolved(name):
    method = METHODS[name]
    assert method.TASK in DEFAULTS
    spec = BACKBONES['sd3'] if method.FAMILIES else None
    recorded = method.recorded(method.Options(), spec)
    only_where_on = {'blanks', 'order', 'refine_layers', *seg4diff.IF_USED}
    assert recorded.keys() >= method.Options.__dataclass_fields__.keys() - only_where_on
    assert all(value is None or isinstance(value, (str, int, float, bool)) for value in recorded.values())
    assert json.loads(json.dumps(recorded)) == recorded


def test_the_defaults_are_methods_of_their_task():
    assert all(METHODS[name].TASK == task for task, name in DEFAULTS.items())


def test_unknown_methods_and_methods_of_another_task():
    assert method_named('kmeans', 'regions') is METHODS['kmeans']
    with pytest.raises(UsageError, match='^method is one of seg4diff, open-vocabulary, .*; got watershed$'):
        method_named('watershed')
    with pytest.raises(UsageError, match='^method is one of open-vocabulary, goca, concepts, diffseg-names; got seg4diff$'):
        method_named('seg4diff', 'classes')


def test_a_method_that_needs_no_model_opens_none():
    assert open_backbone(METHODS['grid'], METHODS['grid'].Options(), 'no such model') is None


def test_a_method_is_refused_by_the_name_of_the_family(backbone, monkeypatch):
    monkeypatch.setattr(seg4diff, 'FAMILIES', frozenset({'unet', 'pixart'}))
    with pytest.raises(UsageError, match='^seg4diff does not support .* of the family sd3; supported: pixart, unet$'):
        seg4diff.prepare(backbone, Options())


@pytest.fixture
def model(sd3_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3_folder, tmp_path / 'model'))


def stated(model: Path, **own: object) -> Path:
    row = json.loads((model / 'padseg.json').read_text())
    (model / 'padseg.json').write_text(json.dumps({**row, **own}))
    return model


def test_a_folder_states_settings_under_the_name_of_a_method(model, picture):
    spec = locate(str(stated(model, **{'seg4diff': {'threshold': 0.25}, 'open-vocabulary': {'layers': [0, 1]}}))).spec
    assert Options().resolve(spec).threshold == 0.25
    assert METHODS['open-vocabulary'].recorded(METHODS['open-vocabulary'].Options(), spec)['layers'] == '0, 1'
    assert not {'threshold', 'step'} & set(spec._fields)  # the row holds facts


def test_settings_beside_the_facts_are_read_as_version_0_1_wrote_them(model):
    spec = locate(str(stated(model, threshold=0.25, components=True, seg4diff={'components': False}))).spec
    resolved = Options().resolve(spec)
    assert (resolved.threshold, resolved.components) == (0.25, False)  # what stands under the method's name counts


@pytest.mark.parametrize(
    ('own', 'words'),
    [
        ({'seg4dif': {'threshold': 0.1}}, 'has settings of unknown methods: seg4dif'),
        ({'seg4diff': {'tau': 0.1}}, 'seg4diff has no settings tau'),
        ({'seg4diff': {'threshold': -1}}, 'seg4diff: threshold is a number >= 0 or inf; got -1'),
        ({'threshold': 'low'}, 'seg4diff: threshold is a number >= 0 or inf; got low'),
        ({'open-vocabulary': {'scores': 'best'}}, 'open-vocabulary: scores is one of raw, minmax'),
        ({'colour': 1}, 'has keys that are not settings of a model: colour'),
        ({'layer': 9}, 'layer is one of 0..3; got 9'),
        ({'side': 0}, r'side is one of 1..65536; got 0'),
        ({'own': 1}, 'has keys that are not settings of a model: own'),
    ],
)
def test_what_no_method_takes_is_refused_before_the_model_is_read(own, words, model, tmp_path, picture, capsys):
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / 'a.png')
    stated(model, **own)
    assert main(['run', '--dir', str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out'), '--model', str(model), '-q']) == 4
    assert words in capsys.readouterr().err
    assert main(['doctor', '--model', str(model), '--device', 'cpu']) == 4
    assert words in capsys.readouterr().out
