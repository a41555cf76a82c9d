"""`padseg labelstudio-backend`: predictions for Label Studio over HTTP."""

from __future__ import annotations

import os
from pathlib import Path

import click

from padseg.system.text import warn

TOKEN = 'LABEL_STUDIO_API_KEY'


@click.command('labelstudio-backend')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--host', default='127.0.0.1', show_default=True, help='address to listen on; anyone who reaches it can use the model')
@click.option('--port', type=click.IntRange(0, 65535), default=9090, show_default=True, help='port to listen on; 0 takes a free one')
@click.option('--root', type=click.Path(path_type=Path, file_okay=False, exists=True), help='folder of the local storage, for local files')
@click.option('--label-studio', 'server', metavar='URL', help=f'address of Label Studio, for uploaded files; its token is in ${TOKEN}')
@click.option('--allow-host', 'hosts', multiple=True, metavar='HOST[:PORT]', help='host that pictures may come from; may be repeated')
def command(model: str, device: str | None, host: str, port: int, root: Path | None, server: str | None, hosts: tuple[str, ...]) -> int:
    """Answer Label Studio's requests for predictions.

    Every task gets brush masks, without a click. If the labelling configuration has several labels, they are names to find; with one label,
    all regions get it. Pictures come from --root, from --label-studio and from each --allow-host, and from nowhere else.
    """
    import padseg
    from padseg.images import start_decoding
    from padseg.integrations.labelstudio import Backend, Server, Sources, checked_server

    sources = Sources(frozenset(name.lower() for name in hosts), root, checked_server(server), os.environ.get(TOKEN))
    start_decoding()
    backend = Backend(padseg.load(model, device=device), sources)
    try:
        listening = Server(host, port, backend)
    except OSError as error:
        raise click.UsageError(f'cannot listen on {host}:{port}: {error.strerror}') from error
    with listening:
        warn(f'listening on http://{host}:{listening.server_port}')
        listening.serve_forever()
    return 0
