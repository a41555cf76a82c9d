"""Times parts of padseg on this machine: bin/bench."""

from __future__ import annotations

import click

from padseg.bench import engine
from padseg.bench import eval
from padseg.bench import label
from padseg.bench import load
from padseg.bench import merge
from padseg.bench import scale
from padseg.bench import sd3
from padseg.bench import vae

COMMANDS = (sd3.command, load.command, scale.command, vae.command, merge.command, engine.command, eval.command, label.command)


@click.group(commands=COMMANDS)
def main() -> None:
    """Time parts of padseg."""


if __name__ == '__main__':
    main()
