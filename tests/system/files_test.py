"""Names from records as paths: inside their folder, or refused. And writing where something else is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies

from padseg.errors import OutputConflict, ResourceExhausted
from padseg.system.files import atomic, full_disk, inside, is_plain, opened, remove, sweep, together

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
    with pytest.raises(OutputConflict, match='is not the name of a file in') as raised:
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


def put_file(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text('new')


def put_folder(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.mkdir()
        (temporary / '0.png').write_text('new')


@pytest.mark.parametrize('put', [put_file, put_folder])
@pytest.mark.parametrize('to', ['folder', 'file', 'nothing', 'itself'])
def test_a_link_where_results_go_is_replaced(tmp_path, put, to):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder/kept').write_text('kept')
    (tmp_path / 'file').write_text('kept')
    path = tmp_path / 'out/masks'
    path.symlink_to(path if to == 'itself' else tmp_path / to)
    put(path)
    assert not path.is_symlink() and (path / '0.png' if put is put_folder else path).read_text() == 'new'
    assert os.listdir(tmp_path / 'out') == ['masks']
    assert os.listdir(tmp_path / 'folder') == ['kept'] and (tmp_path / 'file').read_text() == 'kept'
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder', 'out']


def test_a_folder_where_a_file_goes_is_refused_and_the_other_way_round(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder/kept').write_text('kept')
    (tmp_path / 'file').write_text('kept')
    with pytest.raises(IsADirectoryError):
        put_file(tmp_path / 'folder')
    with pytest.raises(NotADirectoryError):
        put_folder(tmp_path / 'file')
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder'] and os.listdir(tmp_path / 'folder') == ['kept']
    with pytest.raises(OutputConflict, match=f'cannot write to {tmp_path}/folder: Is a directory'), full_disk(tmp_path):
        put_file(tmp_path / 'folder')


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EPERM, errno.EEXIST])
def test_a_place_that_cannot_be_written_to_is_a_conflict(number):
    with pytest.raises(OutputConflict, match='^cannot write to out/a: '), full_disk(Path('out')):
        raise OSError(number, os.strerror(number), 'out/a')


def test_a_full_disk_and_other_trouble():
    with pytest.raises(ResourceExhausted, match='No space left'), full_disk(Path('out')):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'out/a')
    with pytest.raises(ConnectionResetError), full_disk(Path('out')):
        raise OSError(errno.ECONNRESET, 'reset')


def test_what_was_planted_with_a_temporary_name_is_removed_and_not_followed(tmp_path):
    out, elsewhere = tmp_path / 'out', tmp_path / 'elsewhere'
    for folder in (out / '.padseg-folder/inside', elsewhere):
        folder.mkdir(parents=True)
        (folder / 'file').write_text('kept')
    (out / '.padseg-file').write_text('')
    (out / '.padseg-folder/linked').symlink_to(elsewhere)
    (out / '.padseg-linked').symlink_to(elsewhere)
    (out / '.padseg-linked-file').symlink_to(elsewhere / 'file')
    (out / '.padseg-dangling').symlink_to('nowhere')
    os.mkfifo(out / '.padseg-pipe')
    (out / 'kept').write_text('')
    sweep(out)
    assert os.listdir(out) == ['kept'] and (elsewhere / 'file').read_text() == 'kept'


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to('folder')
    remove(tmp_path / 'link')
    remove(tmp_path / 'link')  # which is not there
    assert os.listdir(tmp_path) == ['folder']


def test_only_files_are_opened(tmp_path):
    (tmp_path / 'file').write_text('text')
    with opened(tmp_path / 'file') as file:
        assert file.read() == b'text'
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('file')
    for path, words in ((tmp_path / 'folder', 'not a regular file'), (tmp_path / 'pipe', 'not a regular'), (tmp_path / 'link', 'a link')):
        before = os.listdir('/dev/fd') if os.path.isdir('/dev/fd') else []
        with pytest.raises(OSError, match=words):
            opened(path)
        assert before == (os.listdir('/dev/fd') if before else [])
    with pytest.raises(OSError, match='not a regular file'):
        opened(Path('/dev/zero'))


def test_writers_that_work_together_do_not_remove_what_the_other_has_begun(tmp_path):
    folder, cleaned = tmp_path / 'folder', tmp_path / 'cleaned'
    clean: Callable[[], None] = cleaned.touch
    with together(folder, clean):
        assert cleaned.exists()
        cleaned.unlink()
        with together(folder, clean), together(folder, clean):  # a lock is of what is opened, not of a process
            pass
        with together(folder, clean):  # although one has ended
            pass
        assert not cleaned.exists() and not list(folder.iterdir())
    with together(folder, clean):
        assert cleaned.exists()
