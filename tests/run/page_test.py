"""`padseg show`: the page says what is in the run, and nothing in it acts on a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.runs import HAND_MADE, MAPS, put_run

from padseg.commands import main

HOSTILE = '<script>alert(1)<!-- "x" &amp;.png'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def page_of(out, *arguments):
    assert main(['show', str(out), *arguments, '-q']) == 0
    text = (out / 'show.html').read_text(encoding='utf-8')
    parser = Tags()
    parser.feed(text)
    return text, parser.tags


def test_every_region_has_an_outline_with_its_area(tmp_path, capsys):
    out = put_run(tmp_path, {**MAPS, HOSTILE: HAND_MADE})
    text, tags = page_of(out)
    assert capsys.readouterr().out.strip() == str(out / 'show.html')
    assert [tag for tag, _ in tags].count('figure') == len(MAPS) + 1
    assert {tag for tag, _ in tags} <= set('html head meta title style body h1 p main figure svg image path figcaption'.split())
    assert all(attributes['href'].startswith('data:image/jpeg;base64,') for tag, attributes in tags if tag == 'image')
    assert not any(name.startswith('on') for _, attributes in tags for name in attributes)
    assert "default-src 'none'" in text and '&lt;script&gt;' in text
    figure = text[: text.index('<figcaption>a b.png')].rpartition('<figure>')[2]
    assert re.findall(r'<title>(.*?)</title>', figure) == [
        f'region {number}: {np.count_nonzero(HAND_MADE == number)} pixels' for number in (1, 2, 3)
    ]


def test_outlines_enclose_their_pixels(tmp_path):
    labels = np.array([[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1]], np.int32).repeat(80, 0).repeat(80, 1)
    text, _ = page_of(put_run(tmp_path, {'a.png': labels}))
    outer, inner = re.findall(r'<path d="(.*?)"', text)
    assert outer.count('M') == 2 and inner.count('M') == 1  # with the hole
    points = np.array([[float(value) for value in point.split()] for point in re.findall(r'[\d.]+ [\d.]+', inner)])
    assert np.abs(points.min(0) - 80).max() <= 1 and np.abs(points.max(0) - 240).max() <= 1


def test_pictures_that_are_gone_or_changed_are_not_shown(tmp_path):
    out = put_run(tmp_path, MAPS)
    (tmp_path / 'in' / 'a b.png').unlink()
    (tmp_path / 'in' / 'void.png').write_bytes((tmp_path / 'in' / 'sub' / 'many.png').read_bytes())
    (out / 'labels' / 'sub' / 'many.png.png').write_text('no label map')
    text, tags = page_of(out)
    assert [tag for tag, _ in tags].count('image') == 1 and [tag for tag, _ in tags].count('rect') == 2
    assert 'many.png: ' in text and 'not a PNG' in text


def test_only_some(tmp_path):
    _, tags = page_of(put_run(tmp_path, MAPS), '--limit', '2')
    assert [tag for tag, _ in tags].count('figure') == 2


@pytest.mark.parametrize('name', ['missing', 'in'])
def test_a_folder_that_is_no_run(tmp_path, name, capsys):
    put_run(tmp_path, MAPS)
    assert main(['show', str(tmp_path / name)]) == 5
    assert 'no results' in capsys.readouterr().err
