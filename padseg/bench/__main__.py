"""Entry point of the benchmarks: bin/bench."""

from __future__ import annotations

import click

from padseg.bench import (
    cards,
    encoder,
    engine,
    eval,
    generate,
    goca,
    label,
    load,
    maps,
    merge,
    neighbours,
    quantize,
    scale,
    sd3,
    seams,
    sizes,
    tiles,
    train,
    vae,
)

COMMANDS = (
    sd3.command,
    load.command,
    scale.command,
    vae.command,
    encoder.command,
    merge.command,
    engine.command,
    eval.command,
    label.command,
    goca.command,
    generate.command,
    neighbours.command,
    train.command,
    sizes.command,
    cards.command,
    maps.command,
    quantize.command,
    tiles.command,
    seams.command,
)


@click.group(commands=COMMANDS)
def main() -> None:
    """Benchmark parts of padseg on this machine."""


if __name__ == '__main__':
    main()
