"""One fork server for all workers of pytest-xdist: it imports the libraries once, which takes seconds.

Python's own is one for each process that asks for it, and the addresses of others are not public; newer versions of Python also want a key.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import forkserver
from typing import Any

IMPORTED = (
    'pytest',
    'diffusers.models.autoencoders',
    'diffusers.models.transformers.transformer_sd3',
    'padseg.backbones.loading',
    'padseg.backbones.sd3',
    'padseg.commands.eval',
    'padseg.commands.export',
    'padseg.commands.label',
    'padseg.commands.run',
    'padseg.evaluation.engine',
    'padseg.evaluation.reports',
    'padseg.evaluation.sheet',
    'padseg.exports.coco',
    'padseg.generation.pictures',
    'padseg.methods.open_vocabulary',
    'padseg.methods.seg4diff',
    'padseg.run.collect',
    'padseg.run.engine',
    'skimage.segmentation',
)
SHARED = sys.version_info < (3, 14)


def prepare() -> Any:
    """Python's fork server, which starts when it is first used."""
    for library in ('TRANSFORMERS', 'DIFFUSERS'):  # silences them while the server imports them
        os.environ.setdefault(f'{library}_VERBOSITY', 'error')
    forkserver.set_forkserver_preload(list(IMPORTED))
    return forkserver._forkserver


def serve() -> str | None:
    """Start the server in the process that starts the workers, and return its address; None where it cannot be shared."""
    if not SHARED:
        return None
    server = prepare()
    server.ensure_running()
    return str(server._forkserver_address)


def use(address: str | None) -> None:
    """Let processes that are started from now on be forked by the server there."""
    server = prepare()
    if address:
        server._forkserver_address = address
        server._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)  # it ends with the process that started it
        server.ensure_running = lambda: None
