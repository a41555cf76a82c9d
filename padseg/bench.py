"""Times parts of padseg on this machine: bin/bench."""

from __future__ import annotations

import click

from padseg import speed
from padseg import speed_engine


@click.group(commands=[speed.command, speed_engine.command])
def main() -> None:
    """Time parts of padseg."""


if __name__ == '__main__':
    main()
