"""Which pictures a run is about."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies

from padseg.errors import UsageError
from padseg.images import Found
from padseg.run.selection import Selection, parse_shard, select


def found(*names):
    return [Found(Path(name), name) for name in names]


def chosen(selection, *names):
    return [picture.name for picture in select(found(*names), selection)]


def test_patterns():
    names = ('a.jpg', 'a.png', 'cats/b.jpg', 'cats/old/c.jpg')
    assert chosen(Selection(), *names) == list(names)
    assert chosen(Selection(include=('*.jpg',)), *names) == ['a.jpg', 'cats/b.jpg', 'cats/old/c.jpg']
    assert chosen(Selection(include=('*.png', 'cats/*'), exclude=('*/old/*',)), *names) == ['a.png', 'cats/b.jpg']
    assert chosen(Selection(include=('*.JPG',)), *names) == []


def test_limit_counts_what_is_left():
    assert chosen(Selection(exclude=('a*',), limit=2), 'a1', 'b1', 'b2', 'b3') == ['b1', 'b2']


@given(strategies.sets(strategies.text(min_size=1)), strategies.integers(1, 9))
def test_shards_are_a_partition(names, number):
    parts = [chosen(Selection(shard=(part + 1, number)), *sorted(names)) for part in range(number)]
    assert sorted(name for part in parts for name in part) == sorted(names)


def test_a_shard_does_not_depend_on_other_pictures():
    names = [f'{number}.jpg' for number in range(100)]
    part = chosen(Selection(shard=(2, 3)), *names)
    assert 15 < len(part) < 55
    assert chosen(Selection(shard=(2, 3)), *names[50:]) == [name for name in part if name in names[50:]]


def test_names_that_are_no_utf8_have_a_shard():
    assert chosen(Selection(shard=(1, 1)), 'caf\udce9') == ['caf\udce9']


def test_shards_as_text():
    assert parse_shard('2/4') == (2, 4) and parse_shard(None) is None
    for text in ('0/4', '5/4', '2', 'a/b', '1/0', '-1/2', '1/2/3'):
        with pytest.raises(UsageError, match='i/N with 1 <= i <= N'):
            parse_shard(text)
