"""The backend asked over HTTP as Label Studio asks, with pictures from its local storage, its uploads and an allowed host."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import threading
import urllib.error
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

import numpy as np
import PIL.Image
import pytest

import padseg
from padseg.integrations.labelstudio import Backend, Refused, Sources, interface_of

ONE = '<View><Image name="image" value="$picture"/><BrushLabels name="tag" toName="image"><Label value="thing"/></BrushLabels></View>'
TWO = ONE.replace('<Label value="thing"/>', '<Label value="animal"/><Label value="water"/>')
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


class Quiet(WSGIRequestHandler):
    def log_message(self, *arguments):
        pass


class Files(http.server.BaseHTTPRequestHandler):
    """A host with one picture, and a way to another host; it notes the tokens that it is sent."""

    tokens: list[str | None] = []

    def do_GET(self):
        self.tokens.append(self.headers.get('Authorization'))
        if self.path == '/away':
            self.send_response(302)
            self.send_header('Location', '/data/upload/1/a.png')
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(as_png())

    def log_message(self, *arguments):
        pass


def as_png() -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(PICTURE).save(file, 'PNG')
    return file.getvalue()


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope='module')
def tiny():
    return padseg.load('tiny', device='cpu')


@pytest.fixture(scope='module')
def host():
    with serving(http.server.ThreadingHTTPServer(('127.0.0.1', 0), Files)) as address:
        yield address


@pytest.fixture(scope='module')
def backend(tiny, host, tmp_path_factory):
    """The backend's address."""
    root = tmp_path_factory.mktemp('storage')
    (root / 'images').mkdir()
    (root / 'images' / 'a b.png').write_bytes(as_png())
    (root / 'images' / 'text.png').write_text('no picture')
    (root.parent / 'secret.png').write_bytes(as_png())
    (root / 'link.png').symlink_to(root.parent / 'secret.png')
    (root / 'folder').symlink_to(root.parent)
    sources = Sources(frozenset({host}), root, f'http://{host}', 'sesame')
    with serving(make_server('127.0.0.1', 0, Backend(tiny, sources), handler_class=Quiet)) as address:
        yield address


def ask(address, path, body=None):
    """Status and answer of a GET, or of a POST with a body."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f'http://{address}{path}', data, {'Content-Type': 'application/json'})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def predict(address, *urls, config=ONE):
    """As Label Studio's `api_connector` sends it."""
    tasks = [{'id': number, 'data': {'picture': url}} for number, url in enumerate(urls)]
    params = {'context': None, 'login': None, 'password': None}
    return ask(
        address, '/predict', {'tasks': tasks, 'model_version': None, 'project': '1.1700000000', 'label_config': config, 'params': params}
    )


def decoded(result, shape):
    """The brush masks (H, W) of a prediction, decoded by Label Studio's converter."""
    brush = pytest.importorskip('label_studio_converter.brush', reason='label-studio-converter is not installed')
    return [brush.decode_rle(each['value']['rle']).reshape(*shape, 4)[..., 3] == 255 for each in result]


def test_health_and_setup(backend):
    assert ask(backend, '/health') == (200, {'status': 'UP', 'model_class': 'padseg'}) == ask(backend, '/')
    setup = {'project': '1.1700000000', 'schema': ONE, 'hostname': 'http://localhost:8080', 'access_token': 'x', 'extra_params': {}}
    status, answer = ask(backend, '/setup', setup)
    assert status == 200 and answer['model_version'].startswith('padseg ')
    assert ask(backend, '/webhook', {'action': 'ANNOTATION_CREATED'})[0] == 200
    assert ask(backend, '/unknown') == (404, {'error': 'there is no GET /unknown'})


def test_regions_of_a_local_file_are_those_of_segment(backend, tiny):
    status, answer = predict(backend, '/data/local-files/?d=images/a%20b.png')
    (prediction,) = answer['results']
    assert status == 200 and prediction['model_version'].startswith('padseg ')
    expected = padseg.segment(PICTURE, tiny).labels
    for number, mask in enumerate(decoded(prediction['result'], expected.shape), start=1):
        np.testing.assert_array_equal(mask, expected == number)
    assert len(prediction['result']) == expected.max()
    assert {(each['from_name'], each['to_name'], each['type'], *each['value']['brushlabels']) for each in prediction['result']} == {
        ('tag', 'image', 'brushlabels', 'thing')
    }
    assert {(each['original_width'], each['original_height']) for each in prediction['result']} == {(128, 96)}


def test_several_labels_are_names_to_find(backend, tiny):
    status, answer = predict(backend, '/data/local-files/?d=images/a%20b.png', config=TWO)
    expected = padseg.label(PICTURE, tiny, ['animal', 'water']).labels
    result = answer['results'][0]['result']
    assert status == 200 and [each['value']['brushlabels'] for each in result] == [
        [['animal', 'water'][number - 1]] for number in np.unique(expected[expected > 0])
    ]


def test_only_label_studio_gets_the_token(backend, host):
    Files.tokens.clear()
    assert predict(backend, '/data/upload/1/a.png')[0] == 200
    assert Files.tokens == ['Token sesame']


def test_an_allowed_host_is_asked(tiny, host):
    Files.tokens.clear()
    with serving(make_server('127.0.0.1', 0, Backend(tiny, Sources(frozenset({host}), token='sesame')), handler_class=Quiet)) as address:
        assert predict(address, f'http://{host}/a.png')[0] == 200
        assert Files.tokens == [None]
        for name in ('a b', 'straße'):
            assert predict(address, f'http://{host}/{name}.png')[0] == 200
        assert predict(address, '/data/upload/1/a.png')[1]['error'].endswith('--label-studio URL')
        assert predict(address, '/data/local-files/?d=a.png')[1]['error'].endswith('--root FOLDER')


@pytest.mark.parametrize(
    'url',
    [
        '/data/local-files/?d=../secret.png',
        '/data/local-files/?d=/etc/passwd',
        '/data/local-files/?d=link.png',
        '/data/local-files/?d=folder/secret.png',
        '/data/local-files/?d=images/text.png',
        '/data/local-files/?d=images/missing.png',
        '/data/local-files/?d=images',
        'http://169.254.169.254/latest/meta-data',
        'http://user@HOST/a.png',
        'http://HOST@127.0.0.1:1/a.png',
        'http://HOST/away',
        'file:///etc/passwd',
        'ftp://HOST/a.png',
        '//HOST.example/a.png',
        'http://[broken/a.png',
        's3://bucket/a.png',
        'a.png',
        '',
    ],
)
def test_pictures_from_elsewhere_are_refused(backend, host, url):
    status, answer = predict(backend, url.replace('HOST', host))
    assert status == 400 and answer['error'] and 'results' not in answer


@pytest.mark.parametrize(
    'body', [b'', b'{', b'[]', {}, {'tasks': 1}, {'tasks': [1]}, {'tasks': [], 'label_config': 1}, {'tasks': [{}], 'label_config': ONE}]
)
def test_requests_that_are_none_are_refused(backend, body):
    assert ask(backend, '/predict', body)[0] == 400


@pytest.mark.parametrize(
    'config', [None, 'text', '<View/>', '<!DOCTYPE a [<!ENTITY b "c">]>' + ONE, ONE.replace('toName="image"', ''), ONE[:40]]
)
def test_configurations_without_a_brush_for_a_picture_are_refused(config):
    with pytest.raises(Refused):
        interface_of(config)
