"""The analysis of a model as text tables and figures, and a sheet with the token maps of a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from padseg.analysis.blocks import Cell
from padseg.analysis.measure import Analysis, as_object
from padseg.analysis.report import as_csv
from padseg.backbones import Backbone
from padseg.methods.seg4diff import Options, token_maps
from padseg.system.files import BEGINS_ANEW, atomic, full_disk
from padseg.types import Array, Image

FILES = ('analysis.json', 'analysis.csv', 'maps.png', 'grouping.png', 'anatomy.png')
COLUMNS = 11  # maps per row of the sheet
WIDTH = 96  # of a map, in pixels
SIZE = (11, 4)  # of a figure, in inches
DOTS = 110  # per inch


def write_analysis(analysis: Analysis, sheet: Array, out: Path) -> None:
    """Write the files of FILES to OUT; the sheet, (H, W, 3) BGR, is maps.png. Raises ResourceExhausted, OutputConflict."""
    with full_disk(out, BEGINS_ANEW):
        write_files(analysis, sheet, out)


def write_files(analysis: Analysis, sheet: Array, out: Path) -> None:
    with atomic(out / 'analysis.json') as temporary:
        temporary.write_text(json.dumps(as_object(analysis), indent=1) + '\n')
    with atomic(out / 'analysis.csv') as temporary:
        temporary.write_text(
            as_csv(
                [
                    {**cell._asdict(), 'covering': covering, 'words_miou': analysis.words.get(cell)}
                    for cell, covering in analysis.coverings.items()
                ]
            )
        )
    with atomic(out / 'maps.png') as temporary:
        temporary.write_bytes(cv2.imencode('.png', sheet)[1].tobytes())
    for name, figure in (('grouping', grouping_figure(analysis)), ('anatomy', anatomy_figure(analysis))):
        with atomic(out / f'{name}.png') as temporary:
            figure.savefig(temporary, format='png', dpi=DOTS)


def tables(analysis: Analysis) -> Iterator[str]:
    """Yield the lines of all tables: covering by head, covering by step, mIoU of words, attention shares, norms of values."""
    step, layers, heads = analysis.step, layers_of(analysis), heads_of(analysis)
    measured, one = f'{analysis.model}, {analysis.pictures} pictures, {analysis.normalisation}', f'{analysis.one_region:.4f}'
    yield f'{measured}; one region for all: {one}'
    yield f'\ncovering at step {step}, each at its best threshold'
    yield from by_head({(cell.layer, cell.head): value for cell, value in analysis.coverings.items() if cell.step == step}, layers, heads)
    yield '\ncovering by step, mean of heads'
    yield 'block ' + ' '.join(f'{step:6}' for step in analysis.steps)
    for layer in layers:
        yield f'{layer:5} ' + ' '.join(f'{analysis.coverings[Cell(step, layer, None)]:.4f}' for step in analysis.steps)
    if analysis.words:
        yield '\nmIoU of the words of classes in the picture'
        yield from by_head({(cell.layer, cell.head): value for cell, value in analysis.words.items()}, layers, heads)
    yield f'\nattention from rows to columns: {", ".join(analysis.groups)}'
    for layer in layers:
        for name, row in zip(analysis.groups, analysis.shares[layer], strict=True):
            yield f'{layer:5} {name:6} ' + ' '.join(f'{value:.4f}' for value in row)
    yield f'\nnorms of values: {", ".join(analysis.groups)}'
    for layer in layers:
        yield f'{layer:5} ' + ' '.join(f'{value:7.2f}' for value in analysis.norms[layer])


def by_head(values: Mapping[tuple[int, int | None], float], layers: Sequence[int], heads: Sequence[int]) -> Iterator[str]:
    """Yield one line per block: the mean of heads, then every head, values in 0..1."""
    yield 'block   mean  ' + ' '.join(f'head {head:<2}' for head in heads)
    for layer in layers:
        yield f'{layer:5}  ' + '  '.join(f'{values[layer, head]:.4f}'[:6].ljust(5) for head in (None, *heads))


def layers_of(analysis: Analysis) -> list[int]:
    return sorted({cell.layer for cell in analysis.coverings})


def heads_of(analysis: Analysis) -> list[int]:
    return sorted({cell.head for cell in analysis.coverings if cell.head is not None})


def map_sheet(image: Image, backbone: Backbone, options: Options) -> Array:
    """Draw the picture (H, W, 3) and all its token maps, each scaled from its minimum to its maximum: (H', W', 3) uint8 BGR."""
    maps = token_maps(image, backbone, options).maps.cpu().numpy()  # (T, h, w)
    size = (WIDTH, round(WIDTH * image.shape[0] / image.shape[1]))
    tiles = [cv2.resize(image[..., ::-1], size, interpolation=cv2.INTER_AREA)]
    for values in maps:
        grey = (255 * (values - values.min()) / max(float(np.ptp(values)), 1e-12)).astype(np.uint8)
        tiles.append(cv2.applyColorMap(cv2.resize(grey, size, interpolation=cv2.INTER_NEAREST), cv2.COLORMAP_MAGMA))
    tiles = [cv2.copyMakeBorder(tile, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for tile in tiles]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    return np.concatenate([np.concatenate(tiles[start : start + COLUMNS], axis=1) for start in range(0, len(tiles), COLUMNS)])


def grouping_figure(analysis: Analysis) -> Any:
    """Plot covering by block, for heads and their mean, and by step, for the mean of heads."""
    from matplotlib.figure import Figure

    layers, coverings = layers_of(analysis), analysis.coverings
    figure = Figure(SIZE, layout='constrained')
    left, right = figure.subplots(1, 2)
    for head in heads_of(analysis):
        heights = [coverings[Cell(analysis.step, layer, head)] for layer in layers]
        left.plot(layers, heights, '.', color='grey', label='a head' if head == 0 else None)
    left.plot(layers, [coverings[Cell(analysis.step, layer, None)] for layer in layers], 'o-', label='mean of heads')
    left.axhline(analysis.one_region, linestyle=':', color='black', label='one region for all')
    left.set(xlabel='block', ylabel='covering')
    left.legend()
    for layer in layers:
        right.plot(analysis.steps, [coverings[Cell(step, layer, None)] for step in analysis.steps], 'o-', label=f'block {layer}')
    right.set(xlabel='step from the end of the schedule', ylabel='covering')
    right.legend()
    return figure


def anatomy_figure(analysis: Analysis) -> Any:
    """Plot, by block, the attention that each kind of token pays to text, and the norms of values."""
    from matplotlib.figure import Figure

    layers = layers_of(analysis)
    figure = Figure(SIZE, layout='constrained')
    left, right = figure.subplots(1, 2)
    to_text = analysis.shares[:, :, 1:].sum(2)  # (layers, G)
    for number, name in enumerate(analysis.groups):
        left.plot(layers, to_text[:, number], 'o-', label=f'{name} to text')
        right.plot(layers, analysis.norms[:, number], 'o-', label=name)
    left.set(xlabel='block', ylabel='share of attention')
    right.set(xlabel='block', ylabel='mean norm of values')
    left.legend()
    right.legend()
    return figure
