"""Figures of the analyses in which single tokens, queries, keys and values, noise levels and text encoders are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from padseg.analysis.expert import MEASURES, Expert
from padseg.analysis.grid import Grid
from padseg.analysis.norms import Norms
from padseg.analysis.pca import FIGURES, KINDS, Components
from padseg.analysis.perturb import Perturbed
from padseg.analysis.shares import Shares
from padseg.analysis.tokens import TokenSheet
from padseg.exports.colours import voc_colours
from padseg.system.text import printable
from padseg.types import Array

WIDTH, CAPTION, COLUMNS = 104, 26, 11  # of a token's map and its two lines of text in pixels; maps per row
COLOURS = {
    'image': '#555555',
    'text': '#4477aa',
    'clip': '#66ccee',
    't5': '#ccbb44',
    'empty': '#aa3377',
    'prompt': '#228833',
    'sos': '#ee6677',
    'others': '#bbbbbb',
}
COLOUR_MAP = voc_colours()  # of regions
SIDE = 3.4  # of a panel, in inches


def panels(rows: int, columns: int, width: float = SIDE * 1.3) -> tuple[Any, Array]:
    """An empty figure with so many axes: (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure((columns * width, rows * SIDE), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False)


def shares_figure(shares: Shares) -> Any:
    """For every step: attention from the image to each set of text tokens, from each to the image, and per token against uniform."""
    figure, axes = panels(len(shares.steps), 3)
    layers, image = range(shares.mean.shape[1]), shares.sets.index('image')
    for s, step in enumerate(shares.steps):
        to_text, to_image, relative = axes[s]
        for number, name in drawn_sets(shares.sets, shares.tokens):
            colour = COLOURS[name]
            if number == image:
                continue
            for axis, i, j in ((to_text, image, number), (to_image, number, image)):
                axis.errorbar(layers, shares.mean[s, :, i, j], shares.std[s, :, i, j], fmt='o-', ms=3, lw=1, color=colour, label=name)
            to_text.axhline(shares.uniform[number], linestyle=':', lw=1, color=colour)
            relative.plot(layers, shares.enrichment[s, :, image, number], 'o-', ms=3, lw=1, color=colour, label=name)
        to_image.axhline(shares.uniform[image], linestyle=':', lw=1, color='black')
        relative.axhline(1, linestyle=':', lw=1, color='black')
        to_text.set(title=f'step {step}: image to …', xlabel='block', ylabel='share of attention')
        to_image.set(title='… to image', xlabel='block', ylabel='share of attention', ylim=(0, 1))
        relative.set(title='image to …, per token', xlabel='block', ylabel='share / uniform', yscale='log')
        to_text.legend(fontsize=7, title='dotted: uniform', title_fontsize=7)
    return figure


def drawn_sets(sets: Sequence[str], tokens: Array) -> list[tuple[int, str]]:
    """Numbers and names of the sets of tokens, without those of a tokenizer whose slots are all that there are."""
    whole = tokens[sets.index('text')]
    return [(number, name) for number, name in enumerate(sets) if name not in ('clip', 't5') or tokens[number] < whole]


def norms_figure(norms: Norms) -> Any:
    """For every step: norms of values by block, and in each head those of the text as multiples of the image's."""
    figure, axes = panels(len(norms.steps), 2)
    layers, heads = norms.mean.shape[1], norms.mean.shape[2] - 1
    image = norms.sets.index('image')
    text, said = next((norms.sets.index(name), name) for name in ('prompt', 'text') if name in norms.sets)
    ratio = np.log2(norms.mean[:, :, 1:, text] / norms.mean[:, :, 1:, image])  # (S, layers, heads)
    reach = max(float(np.nanmax(np.abs(ratio))), 1e-6)
    for s, step in enumerate(norms.steps):
        by_layer, by_head = axes[s]
        for number, name in drawn_sets(norms.sets, norms.tokens):
            mean, std = norms.mean[s, :, 0, number], norms.std[s, :, 0, number]
            by_layer.errorbar(range(layers), mean, std, fmt='o-', ms=3, lw=1, color=COLOURS[name], label=name)
        by_layer.set(title=f'step {step}: all heads together', xlabel='block', ylabel='mean norm of values')
        by_layer.legend(fontsize=7)
        drawn = by_head.imshow(ratio[s].T, cmap='RdBu_r', vmin=-reach, vmax=reach, aspect='auto', origin='lower')
        by_head.set(title=f'log₂ of {said} / image', xlabel='block', ylabel='head', xticks=ticks(layers), yticks=ticks(heads))
        figure.colorbar(drawn, ax=by_head)
    return figure


def ticks(count: int, most: int = 12) -> list[int]:
    return list(range(0, count, -(-count // most)))


def pca_figure(components: Components) -> Any:
    """The first picture's components as colours, kind by kind and block by block; below, for every step, R² by place and by region."""
    from matplotlib.figure import Figure

    kinds, layers = components.maps.shape[:2]
    height, width = components.maps.shape[2:4]
    tile = min(1.3, 16 / (layers + 1))
    figure: Any = Figure(
        ((layers + 1) * tile, kinds * tile * height / width * 1.1 + 0.4 + SIDE * len(components.steps)), layout='constrained'
    )
    above, below = figure.subfigures(2, 1, height_ratios=(kinds * tile * height / width * 1.1 + 0.4, SIDE * len(components.steps)))
    sheet = above.subplots(kinds, layers + 1, squeeze=False)
    for axis in sheet.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    if components.image is not None:
        sheet[0, 0].imshow(components.image)
    for kind in range(kinds):
        sheet[kind, 0].set_ylabel(KINDS[kind])
        for layer in range(layers):
            sheet[kind, layer + 1].imshow(components.maps[kind, layer])
            if kind == 0:
                sheet[0, layer + 1].set_title(str(layer), fontsize=8)
    axes = below.subplots(len(components.steps), kinds, squeeze=False, sharey=True)
    for s, step in enumerate(components.steps):
        for kind in range(kinds):
            axis = axes[s, kind]
            for name, colour, words in (
                ('explained', '#555555', 'variance in 3 components'),
                ('position_adjusted', '#4477aa', 'R² by place'),
                ('region_adjusted', '#ee6677', 'R² by region'),
            ):
                place = FIGURES.index(name)
                mean, std = components.mean[s, kind, :, place], components.std[s, kind, :, place]
                if not np.isnan(mean).all():
                    axis.errorbar(range(layers), mean, std, fmt='o-', ms=3, lw=1, color=colour, label=words)
            axis.set(title=f'step {step}: {KINDS[kind]}', xlabel='block', ylim=(-0.05, 1.05))
    axes[0, 0].legend(fontsize=7)
    return figure


def grid_figure(grid: Grid) -> Any:
    """A heat map of step and block for each choice of text encoders, on the pictures to choose by; the best cell has a frame."""
    arms = list(dict.fromkeys(cell.encoders for cell in grid.train))
    steps = sorted({cell.step for cell in grid.train})
    layers = sorted({cell.layer for cell in grid.train})
    figure, axes = panels(1, len(arms))
    scores = np.array([[[grid.train[type(grid.best)(arm, step, layer)] for step in steps] for layer in layers] for arm in arms])
    for arm, axis, values in zip(arms, axes[0], scores, strict=True):
        best = (steps.index(grid.best.step), layers.index(grid.best.layer)) if arm == grid.best.encoders else None
        drawn = heat_map(axis, values, steps, (float(scores.min()), float(scores.max())), best)
        axis.set(title=f'encoders {arm}')
    figure.colorbar(drawn, ax=axes[0].tolist(), label=f'mIoU on {grid.pictures[0]} pictures')
    return figure


def heat_map(axis: Any, values: Array, steps: Sequence[int], reach: tuple[float, float], best: tuple[int, int] | None) -> Any:
    """Draw values (blocks, steps) as colours, and as numbers if there is room. reach: of the colours; best: place of a frame."""
    from matplotlib.patches import Rectangle

    drawn = axis.imshow(values, cmap='viridis', vmin=reach[0], vmax=reach[1], aspect='auto', origin='lower')
    axis.set(xlabel='step from the end of the schedule', ylabel='block')
    axis.set(xticks=range(len(steps)), xticklabels=steps, yticks=ticks(len(values)))
    if best:
        axis.add_patch(Rectangle((best[0] - 0.5, best[1] - 0.5), 1, 1, fill=False, edgecolor='red', linewidth=2))
    if values.size <= 80:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = 'black' if value > sum(reach) / 2 else 'white'
                axis.text(column, row, f'{value:.2f}', ha='center', va='center', fontsize=7, color=colour)
    return drawn


def expert_figure(expert: Expert) -> Any:
    """The best score of each step and block; the measures of the best cell by threshold; below, regions of each block in a picture."""
    from matplotlib.figure import Figure

    steps = sorted({cell.step for cell in expert.figures})
    image, regions = expert.shown
    tile = max(0.7, min(1.6, 18 / (len(regions) + 1)))
    columns = min(len(regions) + 1, 13)
    lines = -(-(len(regions) + 1) // columns)
    heights = (SIDE * 1.3, lines * (tile * image.shape[0] / image.shape[1] + 0.25) + 0.2)
    figure: Any = Figure((max(10.0, columns * tile), sum(heights)), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    heat, curves = above.subplots(1, 2)
    scores = np.array(
        [
            [max(values[0].max() for cell, values in expert.figures.items() if cell[:2] == (step, layer)) for step in steps]
            for layer in range(len(regions))
        ]
    )
    drawn = heat_map(heat, scores, steps, (float(scores.min()), float(scores.max())), (steps.index(expert.best.step), expert.best.layer))
    above.colorbar(drawn, ax=heat, label=f'{"covering" if expert.labelled else "score"}, {expert.pictures} pictures')
    for name, values in zip(MEASURES, expert.figures[expert.best], strict=True):
        if name != 'groups' and not np.isnan(values).all() and not (expert.labelled and name == 'covering'):
            curves.plot(expert.thresholds, values, 'o-', ms=3, lw=1, label=name)
    curves.axvline(expert.threshold, linestyle=':', lw=1, color='red')
    best = f'block {expert.best.layer}, step {expert.best.step}, {expert.best.normalisation}'
    curves.set(title=best, xlabel='threshold', xscale='log')
    curves.legend(fontsize=7)
    axes = below.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    axes.flat[0].imshow(image)
    for layer, (axis, labels) in enumerate(zip(axes.flat[1:], regions, strict=False)):
        axis.imshow(COLOUR_MAP[labels % len(COLOUR_MAP)], extent=(0, image.shape[1], image.shape[0], 0))
        axis.set_title(f'block {layer}', fontsize=8, color='red' if layer == expert.best.layer else 'black')
    return figure


def tokens_sheet(sheet: TokenSheet) -> Array:
    """Draw a picture and the maps of all its tokens, each from its minimum to its maximum, with name and mean share: (H, W, 3) BGR."""
    height, width = sheet.maps.shape[1:]
    size = (WIDTH, max(1, round(WIDTH * height / width)))
    tiles = []
    if sheet.image is not None:
        small = cv2.resize(sheet.image[..., ::-1], size, interpolation=cv2.INTER_AREA)
        tiles.append(captioned(small, (f'step {sheet.step}', f'block {sheet.layer}')))
    for column, name, values in zip(sheet.columns, sheet.names, sheet.maps, strict=True):
        grey = (255 * (values - values.min()) / max(float(np.ptp(values)), 1e-12)).astype(np.uint8)
        coloured = cv2.applyColorMap(cv2.resize(grey, size, interpolation=cv2.INTER_NEAREST), cv2.COLORMAP_MAGMA)
        tiles.append(captioned(coloured, (f'{column} {name}', f'{100 * values.mean():.2f} %')))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % COLUMNS)
    return np.concatenate([np.concatenate(tiles[start : start + COLUMNS], axis=1) for start in range(0, len(tiles), COLUMNS)])


def captioned(tile: Array, lines: Sequence[str]) -> Array:
    """Put lines of text, in letters that OpenCV has, under a tile (H, W, 3), with a white border."""
    text = np.full((CAPTION, tile.shape[1], 3), 255, np.uint8)
    for number, line in enumerate(lines):
        plain = printable(line).encode('ascii', 'backslashreplace').decode()[:18]
        cv2.putText(text, plain, (1, 10 + 12 * number), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (0, 0, 0), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.concatenate((tile, text)), 2, 0, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def perturb_figure(perturbed: Perturbed) -> Any:
    """Likeness to the plain picture, and to the prompt, by block that is blurred; below, the pictures of the first prompts."""
    from matplotlib.figure import Figure

    layers, shown_rows = perturbed.layers, perturbed.shown
    tile = min(1.6, 18 / (len(layers) + 1))
    heights = (SIDE, tile * 1.15 * len(shown_rows) + 0.2)
    figure: Any = Figure((max(9.0, (len(layers) + 1) * tile), sum(heights)), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    alike_axis, text_axis = above.subplots(1, 2)
    for name, colour in (('clip_i', '#4477aa'), ('dino', '#ee6677')):
        mean, std = perturbed.over(name)
        alike_axis.errorbar(layers, mean, std, fmt='o-', ms=3, lw=1, color=colour, label=name.upper().replace('_', '-'))
    alike_axis.set(xlabel='block that is blurred', ylabel='cosine with the plain picture')
    alike_axis.legend(fontsize=7)
    mean, std = perturbed.over('clip_t')
    text_axis.errorbar(layers, mean, std, fmt='o-', ms=3, lw=1, color='#228833', label='blurred')
    text_axis.axhline(perturbed.plain, linestyle=':', lw=1, color='black', label='plain')
    text_axis.set(xlabel='block that is blurred', ylabel='CLIP-T: CLIPScore with the prompt')
    text_axis.legend(fontsize=7)
    axes = below.subplots(len(shown_rows), len(layers) + 1, squeeze=False)
    for row, pictures in enumerate(shown_rows):
        for column, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set(xticks=[], yticks=[])
            if row == 0:
                axes[row, column].set_title('plain' if column == 0 else f'block {layers[column - 1]}', fontsize=8)
    return figure
