"""Names from records as paths: inside their folder, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies

from padseg.errors import OutputConflict
from padseg.system.files import inside, is_plain

PLAIN = ('a', 'a/b.png', '..a', 'a..', '...', 'a b ', ' ', '-', '~', '~root', '$HOME', 'C:', 'C:\\x', '..\\x', 'a\\..\\b', '\\\\host\\x')
PLAIN += ('\r', 'a\nb', '\x1b[2J', 'é', 'e\u0301', '\udcff.png', 'a' * 4000, '.hidden', 'con', 'nul.txt', '%2e%2e/x', '．．/x')
OUTSIDE = (
    '',
    '.',
    '..',
    '/',
    '//',
    '/etc/passwd',
    '//host/x',
    '../x',
    'a/../b',
    'a/..',
    './a',
    'a/.',
    'a/./b',
    'a//b',
    'a/',
    '/a/',
    '../' * 9,
)
OUTSIDE += ('\0', 'a\0b', 'labels/../../x', '\ud800', 'a\udbff/b', '\udcc3\udca9.png', '\ue000/../x')


@pytest.mark.parametrize('name', PLAIN)
def test_a_plain_name_is_a_path_below_the_folder(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name
    assert os.path.abspath(inside(tmp_path, name)) == f'{tmp_path}/{name}'


@pytest.mark.parametrize('name', OUTSIDE)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(OutputConflict, match='is no name of a file in') as raised:
        inside(tmp_path, name)
    assert str(raised.value).isprintable()


@given(strategies.lists(strategies.sampled_from(['a', '.', '..', '', '/', '\\', '\0', 'C:', ' ', 'é', '\udcff'])).map('/'.join))
def test_what_is_plain_stays_below_the_folder_and_is_written_in_one_way(name):
    folder = Path('/some/folder')
    if is_plain(name):
        assert os.path.abspath(folder / name) == f'/some/folder/{name}' == str(folder / name)


def test_links_are_not_followed(tmp_path):
    out, elsewhere = tmp_path / 'out', tmp_path / 'elsewhere'
    (out / 'labels/sub').mkdir(parents=True)
    elsewhere.mkdir()
    (out / 'linked').symlink_to(elsewhere)
    (out / 'labels/linked').symlink_to(elsewhere)
    (out / 'labels/a.png').symlink_to('b.png')  # to a place in the folder, where nothing is
    for name in ('linked', 'linked/a', 'linked/b/c', 'labels/linked/a', 'labels/a.png'):
        with pytest.raises(OutputConflict, match='is a link, which is not followed'):
            inside(out, name)
    for name in ('linked/a', 'labels/linked/a'):
        with pytest.raises(OutputConflict, match='is a link'):
            inside(out, name, linked=True)
    assert inside(out, 'labels/a.png', linked=True) == out / 'labels/a.png'
    assert inside(out, 'labels/sub/new/c.png') == out / 'labels/sub/new/c.png'
    (tmp_path / 'door').symlink_to(out)
    assert inside(tmp_path / 'door', 'labels/sub') == tmp_path / 'door/labels/sub'


def test_what_is_no_folder_on_the_way_is_left_to_who_opens_it(tmp_path):
    (tmp_path / 'file').write_text('')
    assert inside(tmp_path, 'file/a') == tmp_path / 'file/a'
    assert inside(tmp_path, 'n' * 300) == tmp_path / ('n' * 300)
