"""`padseg demo`: a page in the browser that divides pictures into regions."""

from __future__ import annotations

import os
import sys

import click

from padseg.demo.settings import LARGEST, PORT, SECONDS, WORKED, Settings, warnings_for
from padseg.system.text import say

SIGNALLED = 128  # plus the signal number, as in shells
POSITIVE = click.IntRange(min=1)


@click.command('demo')
@click.option('--model', 'models', multiple=True, help='a model to offer; may be repeated (default: all of `padseg models`)')
@click.option('--host', default='localhost', show_default=True, help='address to listen at; others than localhost ask who may use the page')
@click.option('--port', type=click.IntRange(1, 65535), default=PORT, show_default=True, help='port to listen at')
@click.option('--auth', metavar='NAME', help='ask visitors for this name and a password, from $PADSEG_DEMO_PASSWORD or typed in')
@click.option('--public', is_flag=True, help='let anybody use a page that other machines reach')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)')
@click.option('--max-pixels', type=POSITIVE, default=LARGEST, show_default=True, help='refuse larger pictures')
@click.option(
    '--shrink', type=POSITIVE, metavar='PIXELS', default=WORKED, show_default=True, help='shrink larger pictures to this many pixels'
)
@click.option(
    '--max-seconds',
    type=click.FloatRange(min=0, min_open=True),
    default=SECONDS,
    show_default=True,
    help='end a forward pass that takes longer, in seconds',
)
def command(models: tuple[str, ...], auth: str | None, **settings: object) -> int:
    """Open a page for the browser: a picture becomes regions.

    Needs padseg[demo]. The page is for this machine alone unless --host says otherwise. It loads no model that is not on this machine, asks
    no other host for anything, and keeps nothing of a picture for more than an hour.
    """
    from padseg.backbones.spec import BACKBONES

    wanted = Settings(models=models or tuple(BACKBONES), **settings)  # type: ignore[arg-type]
    if auth:
        wanted = wanted._replace(auth=(auth, password()))
    warnings_for(wanted)  # before anything large is imported
    from padseg.demo.app import serve

    number = serve(wanted, announce)
    return SIGNALLED + number if number else 0


def announce(address: str) -> None:
    say(f'padseg demo at {address} (Ctrl-C ends it)')
    if sys.stdout:
        sys.stdout.flush()  # a program that started the demo waits for this line


def password() -> str:
    return os.environ.get('PADSEG_DEMO_PASSWORD') or str(click.prompt('Password', hide_input=True, confirmation_prompt=True, err=True))
