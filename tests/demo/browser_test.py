"""The demo in a real browser. container_test.py makes an environment with all that it needs and runs it there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest

pytest.importorskip('gradio', reason='Gradio is not installed: see tests/demo/container_test.py')
playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed: see tests/demo/container_test.py')

from padseg.commands import main  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--no-first-run']
WAIT = 120_000  # milliseconds; a busy machine is slow


class Server(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    port: int


def started(folder: Path, port: int = 0, *flags: str) -> Server:
    """Start `padseg demo` in a process, with its temporary files in a folder, and wait until it can be opened."""
    if not port:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
    process = subprocess.Popen(
        (sys.executable, '-m', 'padseg', 'demo', '--model', 'tiny', '--port', str(port), '--max-pixels', '1000000', *flags),
        cwd=folder,  # not the checkout, so that what is installed runs
        env={**os.environ, 'TMPDIR': str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    said = process.stdout.readline()
    match = re.search(r'http://\S+', said)
    assert match, said
    return Server(process, match[0], port)


def ended(server: Server, number: int = signal.SIGTERM) -> int:
    server.process.send_signal(number)
    return server.process.wait(120)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('files')


@pytest.fixture(scope='module')
def server(folder) -> Iterator[Server]:
    server = started(folder)
    yield server
    assert ended(server) == 128 + signal.SIGTERM
    assert list(folder.glob('padseg-demo-*')) == []


@pytest.fixture(scope='module')
def browser():
    if not shutil.which('chromium'):
        if not (shutil.which('apt-get') and os.getuid() == 0):
            pytest.skip('there is no chromium, and no apt-get to install it')
        subprocess.run(['apt-get', 'update', '-q'], check=True)
        subprocess.run(['apt-get', 'install', '-qy', '--no-install-recommends', 'chromium'], check=True)
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=shutil.which('chromium'), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={'width': 1280, 'height': 1000})
    hosts = set()
    page.on('request', lambda request: hosts.add(request.url.split('/')[2] if request.url.startswith('http') else ''))
    page.goto(server.address)
    yield page
    page.close()
    assert hosts - {''} == {f'127.0.0.1:{server.port}'} or hosts - {''} == {f'localhost:{server.port}'}


@pytest.fixture(scope='module')
def turned(tmp_path_factory) -> Path:
    """A photograph that EXIF turns by 90 degrees."""
    path = tmp_path_factory.mktemp('turned') / 'turned.jpg'
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.open(ROOT / 'data/images/coffee.jpg').save(path, exif=exif)
    return path


def upload(page, path: Path) -> str:
    """Upload a picture and return the words about its regions."""
    page.wait_for_selector('#count')  # the page is there, and listens
    page.set_input_files('#picture input[type=file]', path)
    return regions(page)


def regions(page) -> str:
    page.wait_for_function("document.querySelector('#count')?.innerText.includes('made in')", timeout=WAIT)
    page.wait_for_selector('#coco:not([disabled])', timeout=WAIT)
    return str(page.inner_text('#count'))


def words_of_error(page) -> str:
    return str(page.locator('.toast-body').first.inner_text(timeout=WAIT))


def slide(page, place: str, value: float) -> None:
    field = page.locator(f'{place} input[type=number]')
    field.fill(str(value))
    field.press('Enter')
    field.blur()


def downloaded(page, place: str) -> Path:
    with page.expect_download(timeout=WAIT) as waiting:
        page.click(place)
    return Path(waiting.value.path())


# the red of each pixel of what is drawn over the picture: white where it is lit, black where not
LIT = """(() => {
    const {width, height} = document.querySelector('#under-cursor');
    const {data} = document.querySelector('#under-cursor').getContext('2d').getImageData(0, 0, width, height);
    return Array.from({length: width * height}, (_, at) => data[4 * at]);
})()"""


def within(page, across: float, down: float) -> dict[str, float]:
    """A place of the picture shown, from shares of its width and height, in pixels of its element, which has margins around it."""
    box = page.locator('#result img').bounding_box()
    wide, high = page.evaluate("(({naturalWidth: w, naturalHeight: h}) => [w, h])(document.querySelector('#result img'))")
    scale = min(1, box['width'] / wide, box['height'] / high)
    return {'x': box['width'] / 2 + (across - 0.5) * wide * scale, 'y': box['height'] / 2 + (down - 0.5) * high * scale}


def hovered(page, across: float, down: float) -> int:
    """Move the mouse over a place of the picture shown; the region that lights up."""
    page.locator('#result img').hover(position=within(page, across, down))
    return int(page.get_attribute('#under-cursor', 'data-region', timeout=WAIT))


def test_upload_slide_click_download(page, turned, tmp_path):
    first = upload(page, turned)
    assert int(first.split()[0]) > 3
    assert '400 × 600 pixels' in page.inner_text('#note')
    shown = page.evaluate("(({naturalWidth: w, naturalHeight: h}) => [w, h])(document.querySelector('#result img'))")
    assert shown == [400, 600]
    slide(page, '#coarser', -2)
    page.wait_for_function("document.querySelector('#command textarea, #command input').value.includes('--join')", timeout=WAIT)
    page.wait_for_selector('#coco:not([disabled])', timeout=WAIT)
    finer = page.inner_text('#count')
    assert int(finer.split()[0]) > int(first.split()[0])
    assert float(re.search(r'in ([\d.]+) s', finer)[1]) < 5  # 0.1 s on a machine that does nothing else
    page.wait_for_timeout(500)

    line = page.locator('#command textarea, #command input').first.input_value().split()
    assert main([*line[1:3], str(turned), *line[4:], '--out', str(tmp_path), '-q']) == 0
    ours = json.loads(downloaded(page, '#coco').read_text())
    assert ours == json.loads((tmp_path / 'coco/instances.json').read_text())
    assert downloaded(page, '#labels').read_bytes() == (tmp_path / 'labels/turned.jpg.png').read_bytes()
    with zipfile.ZipFile(downloaded(page, '#masks')) as archive:
        assert len(archive.namelist()) == len(ours['annotations']) + 1

    box = page.locator('#result img').bounding_box()
    page.locator('#result img').click(position={'x': box['width'] / 2, 'y': box['height'] / 2})
    page.wait_for_function("document.querySelector('#about').innerText.includes('pixels')", timeout=WAIT)
    labels = np.asarray(PIL.Image.open(tmp_path / 'labels/turned.jpg.png'))
    number, area = re.search(r'Region (\d+) of \d+: ([\d,]+) pixels', page.inner_text('#about')).groups()
    assert int(number) == labels[300, 200] and int(area.replace(',', '')) == np.count_nonzero(labels == labels[300, 200])
    page.wait_for_selector('#mask:not([disabled])', timeout=WAIT)
    mask = np.asarray(PIL.Image.open(downloaded(page, '#mask')))
    np.testing.assert_array_equal(mask > 0, labels == int(number))


def test_region_under_the_cursor_lights_up_without_a_request(page, turned, tmp_path):
    upload(page, turned)
    line = page.locator('#command textarea, #command input').first.input_value().split()
    assert main([*line[1:3], str(turned), *line[4:], '--out', str(tmp_path), '-q']) == 0
    labels = np.asarray(PIL.Image.open(tmp_path / 'labels/turned.jpg.png'))
    page.wait_for_selector('#masks:not([disabled])', timeout=WAIT)
    page.wait_for_timeout(500)
    requests = []
    page.on('request', lambda request: requests.append(request.url))
    seen = set()
    for place in ((0.5, 0.5), (0.1, 0.1), (0.9, 0.2), (0.3, 0.9), (0.01, 0.99)):
        assert hovered(page, *place) == labels[int(place[1] * 600), int(place[0] * 400)]
        lit = np.array(page.evaluate(LIT)).reshape(600, 400)
        np.testing.assert_array_equal(lit > 0, labels == int(page.get_attribute('#under-cursor', 'data-region')))
        seen.add(lit.tobytes())
    assert len(seen) > 1 and requests == []
    page.mouse.move(5, 5)
    assert page.locator('#under-cursor').count() == 0

    slide(page, '#coarser', 3)  # another label map, and what was lit is not
    page.wait_for_function("document.querySelector('#command textarea, #command input').value.includes('--join')", timeout=WAIT)
    page.wait_for_selector('#coco:not([disabled])', timeout=WAIT)
    number = hovered(page, 0.5, 0.5)
    page.locator('#result img').click(position=within(page, 0.5, 0.5))
    page.wait_for_function("document.querySelector('#about').innerText.includes('pixels')", timeout=WAIT)
    number_clicked, area = re.search(r'Region (\d+) of \d+: ([\d,]+) pixels', page.inner_text('#about')).groups()
    assert int(number_clicked) == number
    assert np.count_nonzero(page.evaluate(LIT)) == int(area.replace(',', ''))


def test_other_tabs(page, turned):
    upload(page, turned)
    page.get_by_role('tab', name='Maps').click()
    page.wait_for_selector('text=77 maps', timeout=WAIT)
    page.get_by_role('tab', name='Names').click()
    page.click('#find-names')
    page.wait_for_selector('#legend li', timeout=WAIT)
    assert set(re.findall(r'(\w+) –', page.inner_text('#legend'))) <= {'animal', 'person', 'tree', 'water'}
    page.get_by_role('tab', name='Compare').click()
    page.click('#compare')
    page.wait_for_function("document.querySelector('#verdict').innerText.includes('agree')", timeout=WAIT)


def test_sample(page):
    page.locator('.gallery-item, .gallery button').first.click()
    page.wait_for_selector('#picture img', timeout=WAIT)
    page.click('#segment')
    assert regions(page)


def test_wrong_file_and_huge_picture(page, tmp_path, turned):
    (tmp_path / 'text.png').write_text('no picture')
    page.set_input_files('#picture input[type=file]', tmp_path / 'text.png')
    assert 'not a picture that padseg reads' in words_of_error(page)
    page.reload()
    PIL.Image.new('L', (2000, 501)).save(tmp_path / 'huge.png')
    page.set_input_files('#picture input[type=file]', tmp_path / 'huge.png')
    assert '2000x501' in words_of_error(page)
    page.reload()
    assert upload(page, turned)


def test_two_tabs_at_once(browser, server, page, turned, tmp_path):
    other = browser.new_page()
    other.goto(server.address)
    plain = tmp_path / 'plain.png'
    PIL.Image.new('RGB', (90, 60), 'red').save(plain)
    for tab, path in ((page, turned), (other, plain)):
        tab.set_input_files('#picture input[type=file]', path)
    assert [regions(tab).split()[0] for tab in (other, page)][0] == '1'
    assert 'turned.jpg' in page.locator('#command textarea, #command input').first.input_value()
    assert int(regions(page).split()[0]) > 3
    other.close()


def test_narrow_screen(browser, server, turned):
    page = browser.new_page(viewport={'width': 400, 'height': 900})
    page.goto(server.address)
    upload(page, turned)
    assert page.evaluate('document.documentElement.scrollWidth') <= 400
    number = hovered(page, 0.7, 0.3)
    page.locator('#result img').click(position=within(page, 0.7, 0.3))
    page.wait_for_function("document.querySelector('#about').innerText.includes('pixels')", timeout=WAIT)
    assert page.inner_text('#about').startswith(f'Region {number} of')
    page.close()


def test_files_of_the_server_are_not_handed_out(page, server):
    for path in ('/etc/passwd', str(ROOT / 'setup.cfg')):
        assert page.request.get(f'{server.address.rstrip("/")}/gradio_api/file={path}').status == 403


def test_killed_and_started_again(browser, tmp_path, turned):
    server = started(tmp_path)
    page = browser.new_page()
    page.goto(server.address)
    upload(page, turned)
    ended(server, signal.SIGKILL)
    assert len(list(tmp_path.glob('padseg-demo-*'))) == 1
    again = started(tmp_path, server.port)
    assert len(list(tmp_path.glob('padseg-demo-*'))) == 1  # what the killed one left is gone
    page.goto(again.address)
    assert upload(page, turned)
    page.close()
    assert ended(again, signal.SIGINT) == 128 + signal.SIGINT
