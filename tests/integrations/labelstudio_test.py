"""The backend asked over HTTP as Label Studio asks, with pictures from its local storage, its uploads and an allowed host."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

import padseg
from padseg.integrations.labelstudio import Backend, Limits, Refused, Server, Sources, interface_of

ONE = '<View><Image name="image" value="$picture"/><BrushLabels name="tag" toName="image"><Label value="thing"/></BrushLabels></View>'
TWO = ONE.replace('<Label value="thing"/>', '<Label value="animal"/><Label value="water"/>')
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


class Files(http.server.BaseHTTPRequestHandler):
    """A host with one picture, a way to another host, and pictures that never end; it notes the tokens that it is sent."""

    tokens: list[str | None] = []
    closing = threading.Event()

    def do_GET(self):
        self.tokens.append(self.headers.get('Authorization'))
        if self.path == '/away':
            self.send_response(302)
            self.send_header('Location', '/data/upload/1/a.png')
            self.end_headers()
            return
        if self.path == '/gone':
            self.send_error(404)
            return
        if self.path == '/silent':
            self.closing.wait(20)
            return
        if self.path == '/slow-headers':
            self.trickle(b'HTTP/1.1 200 OK\r\nX: ')
            return
        self.send_response(200)
        self.end_headers()
        if self.path == '/slow':
            self.trickle(as_png()[:10])
            return
        self.wfile.write(as_png())

    def trickle(self, start):
        """Send a beginning, and then a byte each moment."""
        with contextlib.suppress(ConnectionError):
            self.wfile.write(start)
            while not self.closing.wait(0.05):
                self.wfile.write(b'x')

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
        Files.closing.set()


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
    with serving(Server('127.0.0.1', 0, Backend(tiny, sources))) as address:
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
    with serving(Server('127.0.0.1', 0, Backend(tiny, Sources(frozenset({host}), token='sesame')))) as address:
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


@contextlib.contextmanager
def hooked(backbone, before, after):
    """Inside the block, functions are called before and after each forward pass of the model."""
    hooks = [
        backbone.transformer.register_forward_pre_hook(lambda *_: before()),
        backbone.transformer.register_forward_hook(lambda *_: after(), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_one_forward_pass_at_a_time(backend, tiny):
    running, most, passes = 0, 0, 0

    def before():
        nonlocal running, most, passes
        running, passes = running + 1, passes + 1
        most = max(most, running)
        time.sleep(0.05)

    def after():
        nonlocal running
        running -= 1

    with hooked(tiny, before, after), ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: predict(backend, '/data/local-files/?d=images/a%20b.png'), range(5)))
    assert passes >= 5 and most == 1
    assert [status for status, _ in answers] == [200] * 5 and all(answer == answers[0][1] for _, answer in answers)


@pytest.mark.parametrize('others', [1, 3])  # one is with the model; of three, one waits with its picture, and one for its picture
def test_while_the_model_works_checks_are_answered_and_requests_are_told_to_come_again(tiny, host, others):
    begun, go_on = threading.Event(), threading.Event()

    def before():
        begun.set()
        assert go_on.wait(60)

    backend = Backend(tiny, Sources(frozenset({host})), Limits(turn=0.3))
    with serving(Server('127.0.0.1', 0, backend)) as address, hooked(tiny, before, lambda: None), ThreadPoolExecutor(4) as pool:
        first = pool.submit(predict, address, f'http://{host}/a.png')
        try:
            assert begun.wait(60)
            assert ask(address, '/health')[0] == 200
            for answer in pool.map(lambda _: predict(address, f'http://{host}/a.png'), range(others)):
                assert answer == (503, {'error': 'the model has been busy with other requests for 0.3 s: ask again later'})
        finally:
            go_on.set()
        assert first.result()[0] == 200
        assert predict(address, f'http://{host}/a.png')[0] == 200  # nothing is held that should be free


@pytest.mark.parametrize(
    ('path', 'words'),
    [
        ('/silent', 'no answer for 0.5 s'),
        ('/slow', 'takes more than 1 s'),
        ('/slow-headers', 'takes more than 1 s'),
        ('/gone', 'the answer is 404 Not Found'),
        ('/away', 'the answer is 302 Found'),
    ],
)
def test_a_host_that_takes_too_long_or_has_no_picture(tiny, host, path, words):
    backend = Backend(tiny, Sources(frozenset({host})), Limits(silence=0.5, picture=1))
    with serving(Server('127.0.0.1', 0, backend)) as address:
        began = time.monotonic()
        status, answer = predict(address, f'http://{host}{path}')
        assert status == 400 and answer['error'].startswith(f'http://{host}{path}') and words in answer['error']
        assert time.monotonic() - began < 10
        assert predict(address, f'http://{host}/a.png')[0] == 200


def test_a_client_that_goes_silent_is_let_go(tiny, capsys):
    with serving(Server('127.0.0.1', 0, Backend(tiny, Sources(), Limits(silence=0.5)))) as address:
        host, port = address.split(':')
        for sent, answered in (
            (b'', b''),
            (b'POST /predict HT', b''),
            (b'POST /predict HTTP/1.0\r\nContent-Length: 9\r\n\r\n{', b'did not arrive'),
        ):
            with socket.create_connection((host, int(port)), timeout=20) as client:
                client.sendall(sent)
                said = b''
                while part := client.recv(1000):
                    said += part
            assert answered in said and (said == b'' or b' 400 ' in said)
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b'GET /hea')
        assert ask(address, '/health')[0] == 200
    assert 'no request for 0.5 s' in (said := capsys.readouterr().err) and 'Traceback' not in said
