"""Files of prompts, lists of seeds, and the names of pictures."""

from __future__ import annotations

import os

import pytest

from padseg.errors import UsageError
from padseg.generation.prompts import LONGEST, Item, checked, items, parse_seeds, read_prompts, stem

READ = {
    'a.txt': ('\ufeffa cat\n\n  a dog, on grass \r\nß é 猫\n', ['a cat', 'a dog, on grass', 'ß é 猫']),
    'a.csv': ('image_id,text\n7,"a cat\non grass"\n8,"a ""dog"""\n9,\n', ['a cat\non grass', 'a "dog"']),
    'b.csv': ('caption,prompt\none,two\n', ['two']),
    'a.tsv': ('id\tcaption\n1\ta, b\n', ['a, b']),
    'a.json': ('["a cat", {"caption": "a dog"}]', ['a cat', 'a dog']),
    'b.JSON': ('{"1": "a cat", "2": {"prompt": "a dog"}}', ['a cat', 'a dog']),
    'a.jsonl': ('"a cat"\n\n{"prompt": "a dog", "category": "color"}\n', ['a cat', 'a dog']),
}
REFUSED = {
    'a.doc': (b'a cat', r'must be one of \.txt, \.csv'),
    'empty.txt': (b'\n \n', 'has no prompts'),
    'empty.json': (b'[]', 'has no prompts'),
    'latin.txt': (b'a caf\xe9', 'not UTF-8: byte 5 is 0xe9'),
    'zero.txt': (b'a cat\na\x00dog\n', r"line 2 holds the character '\\x00'"),
    'escape.json': (b'["a \\u001b[2J"]', r"entry 1 holds the character '\\x1b'"),
    'half.json': (b'["\\ud800"]', r"entry 1 holds the character '\\ud800'"),
    'long.txt': (b'a cat\n' + b'a' * (LONGEST + 1), f'line 2 has {LONGEST + 1} characters'),
    'torn.json': (b'["a cat"', 'cannot be read as JSON'),
    'deep.json': (b'[' * 100_000, 'cannot be read as JSON'),
    'twice.json': (b'{"a": "a cat", "a": "a dog"}', 'cannot be read as JSON: a repeated key'),
    'number.json': (b'["a cat", 3]', 'entry 2 is not a prompt'),
    'text.json': (b'"a cat"', 'must hold a list'),
    'other.jsonl': (b'{"prompt": "a cat"}\n{"name": "a dog"}\n', 'line 2 is not a prompt'),
    'bad.jsonl': (b'a cat\n', 'cannot be read as JSONL'),
    'no.csv': (b'id,words\n1,a cat\n', "no column prompt or text or caption; its first line is 'id, words'"),
    'short.csv': (b'id,text\n1\n', 'line 2 has no text'),
    'quote.csv': (b'text\n"a cat\n', 'cannot be read as CSV'),
    'none.csv': (b'', 'no column'),
}


@pytest.mark.parametrize('name', READ)
def test_prompts_of_a_file(tmp_path, name):
    text, expected = READ[name]
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize('name', REFUSED)
def test_files_that_are_refused(tmp_path, name):
    data, words = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=words) as told:
        read_prompts(tmp_path / name)
    assert name in str(told.value) and len(str(told.value)) < 400


def test_what_is_no_file(tmp_path):
    (tmp_path / 'folder.txt').mkdir()
    os.mkfifo(tmp_path / 'pipe.txt')
    (tmp_path / 'large.txt').write_bytes(b'')
    os.truncate(tmp_path / 'large.txt', 2**40)
    for name in ('folder.txt', 'missing.txt', 'pipe.txt', 'large.txt'):
        with pytest.raises(UsageError, match='cannot be read'):
            read_prompts(tmp_path / name)
    with pytest.raises(UsageError, match='the prompt holds'):
        checked('a\x1b[31mcat')
    assert checked(' a cat\n') == 'a cat' and checked('') == ''


@pytest.mark.parametrize(('text', 'expected'), [('7', (7,)), ('0..4', (0, 1, 2, 3, 4)), ('3..3', (3,)), ('5, 0..2', (5, 0, 1, 2))])
def test_seeds(text, expected):
    assert parse_seeds(text) == expected


@pytest.mark.parametrize(
    'text', ['', '-1', '4..0', '0..', '1,,2', '1.5', '0..4..8', '1,0..2', '9223372036854775808', '0..99999999999', '٣']
)
def test_seeds_that_are_refused(text):
    with pytest.raises(UsageError, match='seed'):
        parse_seeds(text)


def test_names_depend_on_prompt_and_seed_alone():
    made = items(['A red Square, on grass!', 'a cat', 'A red Square, on grass!'], (0, 12))
    assert made == [Item(f'{stem(text)}-{seed}', text, seed) for text in ('A red Square, on grass!', 'a cat') for seed in (0, 12)]
    assert made[0].name.startswith('a-red-square-on-grass-') and len(made[0].name) == len('a-red-square-on-grass-') + 12 + 2
    assert made[2].name == items(['a cat'], (0,))[0].name
    names = {stem(text) for text in ('a cat', 'A cat', 'a  cat', '猫', '犬', '', '../../a cat', 'a' * 300)}
    assert len(names) == 8 and all(len(name) < 60 and '/' not in name and not name.startswith(('.', '-')) for name in names)
    with pytest.raises(UsageError, match='more than 10000000 pictures'):
        items(['a', 'b'], range(6_000_000))
