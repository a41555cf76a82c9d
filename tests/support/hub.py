"""A hub on this machine: the part of the hub's protocol that a download needs."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Hub(http.server.ThreadingHTTPServer):
    """folder: the files of org/model; asked: the paths that were requested."""

    def __init__(self, folder: Path) -> None:
        super().__init__(('127.0.0.1', 0), Answers)
        self.folder = folder
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve a model, to which T5 is added, which nobody should ask for."""
    (folder / 'text_encoder_3').mkdir()
    (folder / 'text_encoder_3' / 'model.safetensors').write_bytes(bytes(1000))
    with Hub(folder) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


class Answers(http.server.BaseHTTPRequestHandler):
    """What the hub answers about org/model; org/other, which is of another kind; and org/gated, org/narrow, org/none and org/cut, which
    cannot be had. The token hf_expired is refused."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = cast(Hub, self.server)
        path = self.path.partition('?')[0]
        hub.asked.append(path)
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token == 'hf_expired':
            self.reply(401, X_Error_Message='Invalid credentials in Authorization header')
        elif path.startswith('/api/models/org/none'):
            self.reply(*((404,) if token else (401,)), **({'X_Error_Code': 'RepoNotFound'} if token else {}))
        elif path.startswith('/api/models/org/narrow'):
            self.reply(403, X_Error_Message='Please enable access in the settings of your token')
        elif path.endswith('/revision/no-such'):
            self.reply(404, X_Error_Code='RevisionNotFound')
        elif path.startswith('/api/models/org/'):
            sizes = {'config.json': 2} if path.startswith('/api/models/org/other') else sizes_in(hub.folder)
            if '/tree/' in path:
                listing = [{'type': 'file', 'path': name, 'size': size, 'oid': 'f' * 40} for name, size in sizes.items()]
                self.reply(200, json.dumps(listing).encode())
            else:
                siblings = [{'rfilename': name, 'size': size} for name, size in sizes.items()]
                self.reply(200, json.dumps({'id': 'org/model', 'sha': COMMIT, 'siblings': siblings}).encode())
        elif path.startswith('/org/gated/'):
            self.reply(403 if token else 401, X_Error_Code='GatedRepo')
        elif path.startswith('/org/cut/'):
            self.close_connection = True
        elif path.startswith(f'/org/model/resolve/{COMMIT}/'):
            name = path.partition(f'{COMMIT}/')[2]
            body = (hub.folder / name).read_bytes()
            self.reply(200, body, X_Repo_Commit=COMMIT, ETag=f'"{stored_name(name, body)}"')
        else:
            self.reply(404)

    do_HEAD = do_GET

    def reply(self, code: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(code)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)


def sizes_in(folder: Path) -> dict[str, int]:
    """The sizes of all files below a folder, by POSIX path."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob('*')) if path.is_file()}


def stored_name(name: str, content: bytes) -> str:
    """The hash after which the hub and its client name a file's content: SHA-256 for large files, SHA-1 for others."""
    return (hashlib.sha256 if name.endswith('.safetensors') else hashlib.sha1)(content).hexdigest()


def cached(home: Path, repo: str, folder: Path) -> Path:
    """A model's files as the hub's client keeps them: links into a store of files named after their content. Returns the snapshot."""
    store = home / 'hub' / f'models--{repo.replace("/", "--")}'
    snapshot = store / 'snapshots' / COMMIT
    for path in (path for path in sorted(folder.rglob('*')) if path.is_file()):
        content = path.read_bytes()
        blob = store / 'blobs' / stored_name(path.name, content)
        link = snapshot / path.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (store / 'refs').mkdir()
    (store / 'refs' / 'main').write_text(COMMIT)
    return snapshot
