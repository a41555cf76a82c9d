"""A backend for Label Studio: it predicts brush masks for whole tasks, without a click. A WSGI application.

Requests are not trusted: pictures come only from hosts that are allowed or from below one folder, and are read as in a run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import tempfile
import threading
import urllib.parse
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from padseg.errors import PadsegError, UsageError
from padseg.exports.labelstudio import brush
from padseg.exports.regions import each_region
from padseg.images import ImageError, Reading, decode_apart
from padseg.system.files import inside
from padseg.version import __version__

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from padseg.backbones import Backbone
    from padseg.types import Image, LabelMap

    Lock = threading.Lock | threading.Semaphore

LONGEST_REQUEST = 16_000_000  # bytes
LARGEST_PICTURE = 100_000_000  # bytes
MOST_TASKS = 1000  # of one request
LOCAL = '/data/local-files/'  # path of Label Studio's URLs for files of a local storage
PICTURES = 2  # held at one time, by all requests together
PLAIN = "%/:=&?~#+!$,;'@()*[]"  # what stays as it is in an address; spaces and other letters are quoted
READING = Reading(max_bytes=LARGEST_PICTURE)
log = logging.getLogger(__name__)


class Sources(NamedTuple):
    """Where pictures may come from. hosts: `host` or `host:port` of allowed URLs, in lower case; root: folder of local files, or None.

    server: address of Label Studio, to which paths such as /data/upload/1/a.jpg belong, or None; token: sent to it and to nobody else.
    """

    hosts: frozenset[str] = frozenset()
    root: Path | None = None
    server: str | None = None
    token: str | None = None


class Limits(NamedTuple):
    """Times in seconds. silence: without a byte of a request or of a picture; picture: until all of a picture is here.

    turn: until other requests are done; Label Studio itself waits no longer for a prediction, by default.
    """

    silence: float = 30
    picture: float = 300
    turn: float = 100


class Interface(NamedTuple):
    """What a labelling configuration asks for. brush, image: names of its tags; field: key of a task's picture; labels: the brush's."""

    brush: str
    image: str
    field: str
    labels: tuple[str, ...]


class Refused(PadsegError):
    """A request that cannot be answered."""


class Busy(PadsegError):
    """Other requests took too long."""


class Backend:
    """The WSGI application. One request at a time is with the model; the others wait."""

    def __init__(self, backbone: Backbone, sources: Sources, limits: Limits = Limits()) -> None:
        self.backbone, self.sources, self.limits = backbone, sources, limits
        self.lock = threading.Lock()
        self.pictures = threading.BoundedSemaphore(PICTURES)
        self.version = f'padseg {__version__} {backbone.identity.model}'

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            status, answer = 200, self.answer(environ['REQUEST_METHOD'], environ.get('PATH_INFO', '/'), environ)
        except KeyError as error:
            status, answer = 404, {'error': f'there is no {error.args[0]}'}
        except Busy as error:
            status, answer = 503, {'error': str(error)}
        except PadsegError as error:
            status, answer = 400, {'error': str(error)}
        except Exception:
            log.exception('a request failed')
            status, answer = 500, {'error': 'padseg failed: see its log'}
        data = json.dumps(answer).encode('ascii')
        start_response(
            f'{status} {http.client.responses[status]}', [('Content-Type', 'application/json'), ('Content-Length', str(len(data)))]
        )
        return [data]

    def answer(self, method: str, path: str, environ: WSGIEnvironment) -> dict[str, Any]:
        routes: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
            ('GET', '/'): self.health,
            ('GET', '/health'): self.health,
            ('GET', '/metrics'): dict,
            ('POST', '/setup'): lambda: self.setup(request_of(environ)),
            ('POST', '/predict'): lambda: self.predict(request_of(environ)),
            ('POST', '/webhook'): dict,  # padseg learns nothing from annotations
            ('POST', '/train'): dict,
        }
        found = routes.get((method, path.rstrip('/') or '/'))
        if found is None:
            raise KeyError(f'{method} {path}')
        return found()

    def health(self) -> dict[str, Any]:
        return {'status': 'UP', 'model_class': 'padseg'}

    def setup(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get('schema'):
            interface_of(request['schema'])
        return {'model_version': self.version}

    def predict(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A prediction for each task. Refused if one of its pictures cannot be had or read."""
        tasks = request.get('tasks')
        if not isinstance(tasks, list) or len(tasks) > MOST_TASKS or not all(isinstance(task, dict) for task in tasks):
            raise Refused(f'tasks is a list of at most {MOST_TASKS} tasks')
        interface = interface_of(request.get('label_config'))
        return {'results': [{'model_version': self.version, 'result': self.regions(task, interface)} for task in tasks]}

    def regions(self, task: Mapping[str, Any], interface: Interface) -> list[dict[str, Any]]:
        """The brush masks of a task's picture: classes if there are several labels, regions with the one label otherwise."""
        data = task.get('data')
        url = data.get(interface.field) if isinstance(data, dict) else None
        if not isinstance(url, str):
            raise Refused(f'a task has no picture in data.{interface.field}')
        with turn(self.pictures, self.limits.turn):
            image = picture_at(url, self.sources, self.limits)
            with turn(self.lock, self.limits.turn):
                labels = self.segmented(image, interface.labels)
        names = labels.names or interface.labels
        result = []
        for region in each_region(labels.labels):
            made = brush(region, image.shape[:2], names[region.number - 1 if labels.names else 0])
            result.append({**made, 'from_name': interface.brush, 'to_name': interface.image})
        return result

    def segmented(self, image: Image, labels: tuple[str, ...]) -> LabelMap:
        import padseg

        if len(labels) > 1:
            return padseg.label(image, self.backbone, labels)
        return padseg.segment(image, self.backbone)


@contextlib.contextmanager
def turn(lock: Lock, seconds: float) -> Iterator[None]:
    """Hold a lock. Raises Busy if it is not free within so many seconds."""
    if not lock.acquire(timeout=seconds):
        raise Busy(f'the model has been busy with other requests for {seconds:g} s: ask again later')
    try:
        yield
    finally:
        lock.release()


def request_of(environ: WSGIEnvironment) -> dict[str, Any]:
    """The JSON object in a request. Raises Refused for anything else."""
    try:
        length = int(environ.get('CONTENT_LENGTH') or 0)
    except ValueError as error:
        raise Refused('the length of the request is missing') from error
    if not 0 < length <= LONGEST_REQUEST:
        raise Refused(f'a request has 1 to {LONGEST_REQUEST} bytes')
    try:
        request = json.loads(environ['wsgi.input'].read(length))
    except OSError as error:
        raise Refused('the request did not arrive') from error
    except (ValueError, RecursionError) as error:
        raise Refused('the request is not JSON') from error
    if not isinstance(request, dict):
        raise Refused('the request is not a JSON object')
    return request


def interface_of(config: Any) -> Interface:
    """Read a labelling configuration. Refused without a brush for a picture, or with a document type, which could hold entities."""
    if not isinstance(config, str) or '<!DOCTYPE' in config:
        raise Refused('the labelling configuration is missing, or not one of Label Studio')
    try:
        root = xml.etree.ElementTree.fromstring(config)
    except (xml.etree.ElementTree.ParseError, ValueError, RecursionError) as error:
        raise Refused('the labelling configuration is not XML') from error
    images = {tag.get('name'): tag for tag in root.iter('Image')}
    for tag in root.iter('BrushLabels'):
        image = images.get(tag.get('toName'))
        name, value = tag.get('name'), '' if image is None else image.get('value', '')
        labels = tuple(dict.fromkeys(label.get('value', '') for label in tag.iter('Label') if label.get('value', '').strip()))
        if image is not None and name and value.startswith('$') and labels:
            return Interface(name, str(image.get('name')), value[1:], labels)
    raise Refused('the labelling configuration has no BrushLabels with labels for an Image')


def picture_at(url: str, sources: Sources, limits: Limits) -> Image:
    """The picture at a task's URL. Raises Refused for a place that is not allowed, and if there is no picture."""
    parts = parsed(url)
    try:
        if not parts.scheme and not parts.netloc and parts.path == LOCAL:
            return decode_apart(local_file(parts, sources.root), READING).image
        address, token = remote(url, parts, sources)
        with tempfile.NamedTemporaryFile(prefix='padseg-') as file:
            for chunk in fetched(address, token, limits):
                file.write(chunk)
            file.flush()
            return decode_apart(Path(file.name), READING).image
    except ImageError as error:
        raise Refused(f'{url}: {error}') from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused(f'{url}: {getattr(error, "strerror", None) or error}') from error


def parsed(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  raises ValueError for one that is not a number
    except ValueError as error:
        raise Refused(f'not a URL: {url}') from error
    return parts


def local_file(parts: urllib.parse.SplitResult, root: Path | None) -> Path:
    """The file below `root` that a URL of a local storage names; no part of it may be a link."""
    if root is None:
        raise Refused('local files are not allowed: start the backend with --root FOLDER')
    name = dict(urllib.parse.parse_qsl(parts.query)).get('d', '')
    return inside(root, name)


def remote(url: str, parts: urllib.parse.SplitResult, sources: Sources) -> tuple[str, str | None]:
    """The address to fetch, and the token to send there."""
    if not parts.scheme and not parts.netloc and parts.path.startswith('/'):
        if sources.server is None:
            raise Refused(f'{url} is a file of Label Studio: start the backend with --label-studio URL')
        url = urllib.parse.urljoin(sources.server, url)
        parts = parsed(url)
    elif parts.netloc.lower() not in sources.hosts or '@' in parts.netloc:
        raise Refused(f'{parts.netloc or url} is not allowed: start the backend with --allow-host {parts.netloc or "HOST"}')
    if parts.scheme not in ('http', 'https'):
        raise Refused(f'{url} is not a web address')
    own = sources.server and parts[:2] == urllib.parse.urlsplit(sources.server)[:2]
    return url, sources.token if own else None


def fetched(url: str, token: str | None, limits: Limits) -> Iterator[bytes]:
    """The bytes at a web address, in pieces, without following a redirection, which could lead to a host that is not allowed.

    Raises Refused if there are too many or they take too long, OSError and HTTPException.
    """
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe=PLAIN))
    kind = http.client.HTTPSConnection if parts.scheme == 'https' else http.client.HTTPConnection
    connection = kind(parts.hostname or '', parts.port, timeout=limits.silence)
    with contextlib.closing(connection), ended_after(limits.picture, connection) as late:
        try:
            target = (parts.path or '/') + (f'?{parts.query}' if parts.query else '')
            connection.request('GET', target, headers={'Authorization': f'Token {token}'} if token else {})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise Refused(f'{url}: the answer is {answer.status} {answer.reason}')
            size = 0
            while chunk := answer.read1(1 << 16):
                size += len(chunk)
                if size > LARGEST_PICTURE:
                    raise Refused(f'{url} has more than {LARGEST_PICTURE} bytes')
                yield chunk
        except TimeoutError as error:
            raise Refused(f'{url}: no answer for {limits.silence:g} s') from error
        except (OSError, http.client.HTTPException):
            if not late.is_set():
                raise
        if late.is_set():
            raise Refused(f'{url} takes more than {limits.picture:g} s')


@contextlib.contextmanager
def ended_after(seconds: float, connection: http.client.HTTPConnection) -> Iterator[threading.Event]:
    """Inside the block, end a connection after so many seconds, whatever it waits for, and set the event."""
    late = threading.Event()
    connection.connect()
    channel = connection.sock

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


class Server(ThreadingMixIn, WSGIServer):
    """A server for a backend. Requests have threads of their own, or Label Studio's checks would wait for predictions."""

    daemon_threads = True

    def __init__(self, host: str, port: int, backend: Backend) -> None:
        self.silence = backend.limits.silence
        super().__init__((host, port), Handler)
        self.set_app(backend)


class Handler(WSGIRequestHandler):
    server: Server

    def setup(self) -> None:
        self.timeout = self.server.silence  # type: ignore[misc]
        super().setup()

    def handle(self) -> None:
        try:
            super().handle()
        except TimeoutError:
            self.log_error('no request for %g s', self.server.silence)
        except ConnectionError:
            self.log_error('the other side ended the connection')


def checked_server(url: str | None) -> str | None:
    """Label Studio's address. UsageError for anything that is not a web address."""
    if url is not None and urllib.parse.urlsplit(url).scheme not in ('http', 'https'):
        raise UsageError(f'--label-studio is an address such as http://localhost:8080; got {url}')
    return url
