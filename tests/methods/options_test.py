"""Options: what is refused and with which words, and how a backbone's row fills what is left open."""

from __future__ import annotations

import dataclasses
import math

import pytest

from padseg.backbones.spec import BACKBONES, Spec
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import METHODS
from padseg.methods.options import GEOMETRIES, NORMALISATIONS
from padseg.methods.seg4diff import Options, recorded

SETTINGS = {'step': 3, 'normalisation': 'share', 'threshold': 0.5, 'superpixels': 20.0, 'components': True}
ROW = Spec(repo='a row', layers=6, layer=4, steps=10, side=256, own={'seg4diff': SETTINGS})


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'layer': -1}, 'layer is counted from 0; got -1'),
        ({'step': 0}, 'step is counted from the end of the schedule, from 1; got 0'),
        ({'step': -8}, 'step is counted from the end of the schedule, from 1; got -8'),
        ({'normalisation': 'softmax'}, 'normalisation is one of released, minmax-softmax, sum, share; got softmax'),
        ({'normalisation': ''}, 'normalisation is one of released, minmax-softmax, sum, share; got '),
        ({'threshold': -1.0}, 'threshold is a number >= 0 or inf; got -1.0'),
        ({'threshold': math.nan}, 'threshold is a number >= 0 or inf; got nan'),
        ({'geometry': 'square'}, f'geometry is one of {", ".join(GEOMETRIES)}; got square'),
        ({'side': 0}, 'side is a number of pixels in 1..65536; got 0'),
        ({'side': -64}, 'side is a number of pixels in 1..65536; got -64'),
        ({'superpixels': -1.0}, 'superpixels is a scale from 0 to below 1e9; got -1.0'),
        ({'superpixels': math.inf}, 'superpixels is a scale from 0 to below 1e9; got inf'),
        ({'superpixels': math.nan}, 'superpixels is a scale from 0 to below 1e9; got nan'),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(given, message):
    with pytest.raises(UsageError) as caught:
        Options(**given)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'layer': 6}, 'layer is one of 0..5 for a row; got 6'),
        ({'layer': 24}, 'layer is one of 0..5 for a row; got 24'),
        ({'step': 11}, 'step is one of 1..10 for a row; got 11'),
    ],
)
def test_a_value_that_the_backbone_has_not_is_refused_with_its_range(given, message):
    with pytest.raises(UsageError) as caught:
        Options(**given).resolve(ROW)
    assert str(caught.value) == message


def test_the_published_schedule_has_28_steps():
    row = BACKBONES['sd3']
    assert Options(step=28).resolve(row).step == 28
    with pytest.raises(UsageError, match=r'step is one of 1\.\.28 for .*; got 29'):
        Options(step=29).resolve(row)


def test_what_is_left_open_comes_from_the_row():
    assert Options().resolve(ROW) == Options(
        layer=4,
        step=3,
        tokens='all',
        normalisation='share',
        threshold=0.5,
        geometry='whole',
        side=256,
        refine='none',
        superpixels=20.0,
        join=0.0,
        components=True,
        min_area=0.0,
        regroup=0.0,
        levels=(),
        seed=0,
    )


def test_a_papers_preset_leaves_refinements_off_unless_they_are_given():
    refined = {'refine': 'guided', 'superpixels': 20.0, 'join': 0.1, 'components': True, 'min_area': 0.1, 'regroup': 0.5}
    row = ROW._replace(own={'seg4diff': {**SETTINGS, **refined}})
    for geometry in GEOMETRIES[1:]:
        resolved = Options(geometry=geometry).resolve(row)
        refinements = [getattr(resolved, name) for name in refined]
        assert refinements == ['none', 0.0, 0.0, False, 0.0, 0.0]
    kept = Options(geometry='diffseg', superpixels=9.0, min_area=0.2).resolve(row)
    assert (kept.superpixels, kept.components, kept.min_area) == (9.0, False, 0.2)


def test_regions_are_grouped_only_where_superpixels_are_joined():
    row = ROW._replace(own={'seg4diff': {**SETTINGS, 'superpixels': 20.0, 'join': 0.1, 'regroup': 0.5}})
    assert [Options(**given).resolve(row).regroup for given in ({}, {'join': 0.0}, {'superpixels': 0.0}, {'regroup': 0.0})] == [
        0.5,
        0,
        0,
        0,
    ]
    assert recorded(Options(), row)['regroup'] == 0.5 and 'regroup' not in recorded(Options(join=0.0), row)
    for given in ({'join': 0.0}, {'superpixels': 0.0}, {'geometry': 'diffseg'}):
        with pytest.raises(UsageError, match='regroup compares regions of joined superpixels'):
            Options(regroup=0.5, **given).resolve(row)
    assert Options(join=0.0).resolve(row).resolve(row).regroup == 0


def test_what_is_given_stands_even_where_it_is_false():
    given = Options(
        layer=0,
        step=1,
        tokens='pads',
        normalisation='sum',
        threshold=0.0,
        geometry='diffcut',
        side=1,
        refine='none',
        superpixels=0.0,
        join=0.0,
        components=False,
        min_area=0.0,
        regroup=0.0,
        levels=(),
        seed=7,
    )
    assert dataclasses.asdict(given.resolve(ROW)) == dataclasses.asdict(given)


def test_the_ends_of_the_ranges_are_allowed():
    assert Options(layer=5, step=10, threshold=math.inf).resolve(ROW).threshold == math.inf
    for normalisation in NORMALISATIONS:
        assert Options(normalisation=normalisation).resolve(ROW).normalisation == normalisation
    for geometry in GEOMETRIES:
        assert Options(geometry=geometry).resolve(ROW).geometry == geometry


@pytest.mark.parametrize(
    ('stated', 'message'),
    [
        ({'step': 0}, 'step is counted from the end of the schedule, from 1; got 0'),
        ({'normalisation': 'none'}, 'normalisation is one of released, minmax-softmax, sum, share; got none'),
        ({'threshold': -0.1}, 'threshold is a number >= 0 or inf; got -0.1'),
        ({'side': 0}, 'side is a number of pixels in 1..65536; got 0'),
        ({'superpixels': -1.0}, 'superpixels is a scale from 0 to below 1e9; got -1.0'),
        ({'join': -1.0}, 'join is finite odds >= 0; got -1.0'),
        ({'min_area': 1.0}, 'min_area is a share of the picture in 0..1; got 1.0'),
        ({'refine': 'sharp'}, 'refine is one of none, guided; got sharp'),
        ({'threshold': 'low'}, 'threshold is a number >= 0 or inf; got low'),
        ({'components': 1}, 'components is true or false; got 1'),
    ],
)
def test_what_a_model_states_is_held_to_the_same_ranges(stated, message):
    with pytest.raises(ModelUnavailable) as caught:
        Options().resolve(ROW._replace(own={'seg4diff': stated}))
    assert str(caught.value) == f'padseg.json of a row: seg4diff: {message}'


def test_a_setting_that_the_method_does_not_have():
    with pytest.raises(ModelUnavailable, match='^padseg.json of a row: seg4diff has no settings colour, tau$'):
        Options().resolve(ROW._replace(own={'seg4diff': {'colour': 1, 'tau': 2, 'step': 3}}))


def test_a_step_of_the_model_beyond_its_schedule():
    with pytest.raises(UsageError, match=r'^step is one of 1\.\.10 for a row; got 11$'):
        Options().resolve(ROW._replace(own={'seg4diff': {'step': 11}}))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'layer': 1.5}, 'layer is counted from 0; got 1.5'),
        ({'layer': True}, 'layer is counted from 0; got True'),
        ({'seed': None}, 'seed is a whole number; got None'),
        ({'seed': 'one'}, "seed is a whole number; got 'one'"),
        ({'components': 'yes'}, "components is true or false; got 'yes'"),
        ({'min_area': '0.1'}, 'min_area is a share of the picture in 0..1; got 0.1'),
    ],
)
def test_a_value_of_another_kind_is_refused(given, message):
    with pytest.raises(UsageError) as caught:
        Options(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize('options', [Options(), Options().resolve(ROW)])
def test_options_are_changed_by_replace_only(options):
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1
    assert dataclasses.replace(options, seed=1).seed == 1
    with pytest.raises(TypeError):
        dataclasses.replace(options, colour=1)


def test_replace_checks_again():
    with pytest.raises(UsageError, match='step'):
        dataclasses.replace(Options(), step=0)


def test_every_option_says_what_it_is():
    for method in METHODS.values():
        for field in dataclasses.fields(method.Options):
            assert len(field.metadata['help']) > 10
