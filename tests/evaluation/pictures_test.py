"""Folders of pictures with their prompts, and lists of prompts with categories, as people have them and as strangers may write them."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

from padseg.errors import NoImages, OutputConflict, PadsegError, UsageError
from padseg.evaluation.pictures import Folder, Shown, categories_of, folder_of, paired, plain

HEAD = 'file,caption\n'


def picture_at(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


def line(name, **fields):
    made = {'name': name, 'status': 'done', 'prompt': 'a cat', 'seed': 0, 'guidance': 'cfg', 'file': f'images/{name}.png'}
    return json.dumps({**made, **fields}) + '\n'


def manifest(root, *lines):
    root.mkdir(exist_ok=True)
    (root / 'manifest.jsonl').write_text(''.join(lines))
    return root


def test_a_generated_folder_tells_prompts_and_seeds(tmp_path):
    records = line('b', seed=3), line('a', prompt='two,\nlines'), line('c', status='failed', file=None), line('d', prompt='')
    folder = folder_of(manifest(tmp_path, *records, line('b', seed=4)))
    assert folder.pictures == [
        Shown('a', tmp_path / 'images' / 'a.png', 'two,\nlines', 0),
        Shown('b', tmp_path / 'images' / 'b.png', 'a cat', 4),  # the later line counts
        Shown('d', tmp_path / 'images' / 'd.png', None, 0),
    ]
    assert folder.failed == 1


@pytest.mark.parametrize('name', ['../secret.png', '/etc/passwd', 'images/../../a.png', 'images//a.png', 'a\0.png'])
def test_a_record_leads_nowhere_else(name, tmp_path):
    with pytest.raises(OutputConflict, match='is not the name of a file in'):
        folder_of(manifest(tmp_path, line('a', file=name)))


def test_links_in_a_generated_folder_are_not_followed(tmp_path):
    picture_at(tmp_path / 'secret' / 'a.png')
    root = manifest(tmp_path / 'out', line('a'))
    (root / 'images').symlink_to(tmp_path / 'secret')
    with pytest.raises(OutputConflict, match='is a link'):
        folder_of(root)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (line('a', seed=-1), 'line 1 is not a record'),
        (line('a', seed=1e300), 'line 1 is not a record'),
        (line('a', prompt=5), 'line 1 is not a record'),
        ('[' * 100_000 + '\n', 'line 1 is not a record'),
        (line('a', prompt=None), 'no prompt or no file of a'),
        (line('a', prompt='x' * 20_000), 'a text of 20000 letters'),
        (line('a', prompt='\ud800'), 'not text in UTF-8'),
        (line('a', status='failed'), 'no pictures'),
    ],
)
def test_records_that_are_none_are_refused(text, words, tmp_path):
    with pytest.raises(PadsegError, match=words) as caught:
        folder_of(manifest(tmp_path, text, line('b') if 'line 1' in words else ''))
    assert 'overwrite' not in str(caught.value)


def test_shards_must_be_joined_first(tmp_path):
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'run.json').write_text('{}')
    with pytest.raises(NoImages, match='without --shard'):
        folder_of(tmp_path)


def test_captions_have_newlines_commas_and_quotes(tmp_path):
    for name in ('1.png', 'below/2.jpg', '3.png'):
        picture_at(tmp_path / name)
    table = tmp_path / 'captions.csv'
    table.write_bytes('\ufefffile,Caption,seed\r\n1.png,"a cat,\non ""grass""",7\r\n2,été,\r\n99,none,\r\n'.encode())
    folder = folder_of(tmp_path, table)
    assert [(picture.name, picture.prompt, picture.seed) for picture in folder.pictures] == [
        ('1.png', 'a cat,\non "grass"', 7),
        ('3.png', None, None),
        ('below/2.jpg', 'été', None),
    ]
    assert folder.unused == 1


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (b'', 'is named in'),
        (b'name,words\na.png,x\n', 'must name a column prompt or caption or text'),
        (b'which,caption\na.png,x\n', 'must name a column file or'),
        (b'file,caption\na.png\n', 'line 2: 1 columns, where the first line names 2'),
        (b'file,caption\na.png,x\na,y\n', r'line 3: a second text for a\.png'),
        (b'file,caption\na.png,\n', 'a text is expected'),
        (b'file,caption\na.png,' + b'x' * 20_000, 'a text of 20000 letters'),
        (b'file,caption\na.png,' + b'x' * 200_000, 'line 2: field larger'),
        (b'file,caption,seed\na.png,x,-1\n', 'a seed is a whole number; got -1'),
        (b'file,caption\na.png,"x', 'line 2: unexpected end'),
        (b'file,caption\na.png,\xff\n', 'not text in UTF-8'),
        (b'file,caption\n../a.png,x\n', 'is named in'),
    ],
)
def test_captions_that_cannot_be_meant_are_refused(text, words, tmp_path):
    picture_at(tmp_path / 'folder' / 'a.png')
    (tmp_path / 'captions.csv').write_bytes(text)
    with pytest.raises(PadsegError, match=words):
        folder_of(tmp_path / 'folder', tmp_path / 'captions.csv')


def test_a_name_that_two_pictures_share_must_be_whole(tmp_path):
    for name in ('x/a.png', 'y/a.png'):
        picture_at(tmp_path / name)
    (tmp_path / 'captions.tsv').write_text('file\tprompt\ny/a.png\tyes\na.png\tno\n')
    assert [picture.prompt for picture in folder_of(tmp_path, tmp_path / 'captions.tsv').pictures] == [None, 'yes']


def test_files_that_are_not_there_or_no_files_are_refused(tmp_path):
    picture_at(tmp_path / 'a.png')
    for place in (tmp_path / 'none.csv', tmp_path):
        with pytest.raises(UsageError, match='No such file|regular file'):
            folder_of(tmp_path, place)
    with pytest.raises(NoImages):
        folder_of(tmp_path / 'none')


def test_categories_from_every_kind_of_list(tmp_path):
    lists = tmp_path / 'lists'
    lists.mkdir()
    (lists / 'color_val.txt').write_text('A red cat.\n\na blue dog\n')
    (lists / 'non_spatial_val.txt').write_text('a blue dog\n')
    (lists / 'color.txt').write_text('unseen\n')
    (tmp_path / 'a.json').write_text(json.dumps({'color': ['A red cat.', 'a blue dog'], 'non_spatial': ['a blue dog']}))
    rows = [('A red cat.', 'color'), ('a blue dog', 'color'), ('a blue dog', 'non_spatial')]
    (tmp_path / 'b.json').write_text(json.dumps([{'prompt': prompt, 'category': category} for prompt, category in rows]))
    (tmp_path / 'c.csv').write_text('category,prompt\n' + ''.join(f'{category},{prompt}\n' for prompt, category in rows))
    expected = {'a red cat': ('color',), 'a blue dog': ('color', 'non_spatial')}
    for place in (lists, tmp_path / 'a.json', tmp_path / 'b.json', tmp_path / 'c.csv'):
        assert categories_of(place) == expected
    for path in lists.glob('*_val.txt'):
        path.unlink()
    assert categories_of(lists) == {'unseen': ('color',)}


def test_prompts_are_compared_without_case_and_full_stop():
    assert plain(' A  red\ncat. ') == plain('a red cat') != plain('a red. cat')


@pytest.mark.parametrize(
    'text', ['', '{"a": "b"}', '[1]', '{"a": [5]}', '[{"prompt": "x"}]', '{}', '{"a": ["x"], "a": ["y"]}', '[' * 100_000]
)
def test_lists_that_are_none_are_refused(text, tmp_path):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(UsageError):
        categories_of(tmp_path / 'a.json')


def folder(root, *pictures):
    return Folder(root, [Shown(name, root / name, *rest) for name, *rest in pictures])


def test_pairs_have_one_name_whatever_the_suffix(tmp_path):
    ours = folder(tmp_path / 'a', ('1', 'x', 0), ('2', 'y', 0), ('4.5', 'z'))
    theirs = folder(tmp_path / 'b', ('2.png', 'y', 0), ('3.png', 'z', 0), ('4.5', 'z', 1))
    assert [(one.name, other.name) for one, other in paired(ours, theirs)] == [('2', '2.png'), ('4.5', '4.5')]
    twice = folder(tmp_path / 'c', ('1.png',), ('1.jpg',))
    assert [(one.name, other.name) for one, other in paired(twice, folder(tmp_path / 'd', ('1.jpg',)))] == [('1.jpg', '1.jpg')]


def test_what_was_made_for_different_prompts_or_seeds_is_no_pair(tmp_path):
    ours = folder(tmp_path / 'a', ('1', 'x', 0))
    for other in (('1', 'y', 0), ('1', 'x', 1)):
        with pytest.raises(PadsegError, match='these are no pairs'):
            paired(ours, folder(tmp_path / 'b', other))
    with pytest.raises(NoImages, match='no picture in'):
        paired(ours, folder(tmp_path / 'b', ('2', 'x', 0)))
