"""The report of a trained model: tables by hand, marked tables in Markdown, what counts as found, and the whole report of a small one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from padseg.commands import main
from padseg.errors import UsageError
from padseg.train.held_out import held_out_scene, prepare_scenes
from padseg.train.report import (
    LINE,
    PAINTED_SIDE,
    Failed,
    Report,
    Row,
    found,
    in_order,
    make_report,
    measure,
    padseg,
    renew,
    share,
    tables,
    write_report,
    write_samples,
)
from padseg.train.scenes import CLASSES

SCORES = {'covering': 0.61234, 'pri': 0.8, 'vi': 1.6, 'f': 0.615, 'regions': 11.126}
REPORT = Report(
    [Row('pictures', 'padseg eval bsds500', SCORES)],
    [Row('scenes', 'padseg eval folder', {'accuracy': 0.9, 'miou': 0.5})],
    {'bsds500': {'tiny': SCORES, 'kmeans': {**SCORES, 'covering': 0.4}}},
    {'scenes': 0.5, 'pictures': 0.1},
)


def test_tables_have_four_decimals_and_a_dash_for_what_is_not_measured():
    made = tables(REPORT)
    assert made['regions'].splitlines()[2] == '| pictures | 0.6123 | 0.8000 | 1.6000 | 0.6150 | 11.13 |'
    assert made['classes'].splitlines()[2] == '| scenes | – | 0.9000 | 0.5000 |'
    assert made['methods'].splitlines()[2:] == [
        '| tiny | 0.6123 | 0.8000 | 1.6000 | 0.6150 |',
        '| kmeans | 0.4000 | 0.8000 | 1.6000 | 0.6150 |',
    ]


def test_only_marked_tables_of_a_page_are_renewed(tmp_path):
    page, text = tmp_path / 'a.md', '# Ä\n\n<!-- figures: {} -->\n| old |\n<!-- end of figures -->\n\n| kept |\n'
    page.write_text(text.format('painted'), encoding='utf-8')
    assert renew(page, REPORT) == ['painted']
    new = page.read_text(encoding='utf-8')
    assert new.startswith('# Ä\n\n<!-- figures: painted -->\n\n| classes of') and new.endswith('|\n\n<!-- end of figures -->\n\n| kept |\n')
    assert '| pictures | 0.1000 |' in new and '| old |' not in new
    assert renew(page, REPORT) == ['painted'] and page.read_text(encoding='utf-8') == new
    page.write_text(text.format('methods'), encoding='utf-8')
    assert renew(page, REPORT._replace(baselines={})) == [] and page.read_text(encoding='utf-8') == text.format('methods')
    for wrong, message in ((text.format('others'), 'figures "others"; reports have'), ('no table', 'has no table between')):
        page.write_text(wrong, encoding='utf-8')
        with pytest.raises(UsageError, match=message):
            renew(page, REPORT)
        assert page.read_text(encoding='utf-8') == wrong
        with pytest.raises(UsageError, match=message):  # before anything is measured
            make_report(Path('none'), tmp_path / 'out', {}, [page])
    page.write_bytes(b'\xff')
    with pytest.raises(UsageError, match='not text in UTF-8'):
        renew(page, REPORT)
    assert not (tmp_path / 'out').exists()


def test_a_report_names_the_command_of_every_line(tmp_path):
    text = write_report(REPORT, tmp_path).read_text()
    assert 'padseg eval bsds500\n' in text and 'padseg eval folder\n' in text
    assert json.loads((tmp_path / 'report.json').read_text())['regions'][0]['scores'] == SCORES


def test_painted_pictures_are_taken_in_the_order_of_their_captions(tmp_path):
    """`padseg generate` names its files after the prompts, and alphabetical order once gave scenes the pictures of others."""
    rows = [{'prompt': 'a ring on fur', 'file': 'images/a-ring.png'}, {'prompt': 'a bar on sand', 'file': 'images/a-bar.png'}]
    (tmp_path / 'manifest.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    files = in_order(tmp_path, ['a ring on fur', 'a bar on sand', 'a ring on fur'])
    assert [path.name for path in files] == ['a-ring.png', 'a-bar.png', 'a-ring.png']
    for name, number in (('a-ring.png', 2), ('a-bar.png', 5)):
        PIL.Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f'{name}.png')
    assert found(tmp_path, [path.name for path in files]).argmax(1).tolist() == [1, 4, 1]


def test_a_class_is_found_from_a_hundredth_of_the_pixels_on(tmp_path):
    labels = np.zeros((10, 20), np.uint8)
    labels[0, :2], labels[1, :1], labels[5:] = 3, 4, 40
    PIL.Image.fromarray(labels).save(tmp_path / 'a.png')
    hits = found(tmp_path)
    assert hits.shape == (1, len(CLASSES)) and hits.nonzero()[1].tolist() == [2, 39]
    wanted = np.zeros((1, len(CLASSES)), bool)
    wanted[0, [2, 3, 39, 0]] = True
    assert share(hits, wanted) == 0.5


def test_the_sheet_of_samples_shows_captions_scenes_and_pictures(tmp_path):
    scenes = [held_out_scene(number, size=(PAINTED_SIDE, PAINTED_SIDE)) for number in range(2)]
    for number in range(2):
        PIL.Image.fromarray(scenes[number].image).save(tmp_path / f'{number}.png')
    write_samples(tmp_path / 'sheet.png', scenes, sorted(tmp_path.glob('?.png')))
    with PIL.Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.size == (2 * PAINTED_SIDE, 3 * LINE + 2 * PAINTED_SIDE)
        pixels = np.asarray(sheet)
    middle = 3 * LINE + PAINTED_SIDE
    assert np.array_equal(pixels[3 * LINE : middle, :PAINTED_SIDE], scenes[0].image) and (pixels[: 3 * LINE] < 128).any()
    assert np.array_equal(pixels[middle:, PAINTED_SIDE:], scenes[1].image)


def test_a_command_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(Failed, match=r'`padseg run --dir .*none --out .*` failed: .*none'):
        padseg('run', '--dir', tmp_path / 'none', '--out', tmp_path / 'out')
    with pytest.raises(UsageError, match='bsds500, camvid, regions; got voc'):
        measure(Path('tiny'), tmp_path, {'voc': tmp_path})
    for words in (
        ['--measure', f'regions={tmp_path}'],
        ['--report', '--measure', 'regions'],
        ['--report', '--measure', f'camvid={tmp_path}/no'],
    ):
        assert main(['train-tiny', '--out', str(tmp_path / 'out'), *words]) == 2


@pytest.mark.slow
def test_a_small_report_of_the_embedded_model(tmp_path):
    """Every figure of it from the command that it names, beside regions of one's own: two scenes."""
    own = prepare_scenes(tmp_path / 'own', 2)
    report = measure(Path('padseg/models/tiny'), tmp_path / 'report', {'regions': own}, scenes=2, painted=2)
    assert [row.name for row in report.regions] == ['own', 'held-out scenes (2), against their class maps']
    assert report.regions[0].scores == report.regions[1].scores  # the same two scenes
    assert 0.5 < report.regions[0].scores['covering'] <= 1 and len(report.classes) == 4
    assert all(0 <= part <= 1 for part in report.painted.values()) and (tmp_path / 'report/samples.jpg').stat().st_size > 10_000
