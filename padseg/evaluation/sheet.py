"""A contact sheet of an evaluation's best and worst pictures: picture, ground truth, matched prediction."""

from __future__ import annotations

import heapq
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from padseg.datasets import VOID, Sample
from padseg.errors import PadsegError
from padseg.evaluation.evaluate import Task, fitting, read_picture
from padseg.evaluation.metrics import compact
from padseg.evaluation.protocols import (
    Classes,
    Protocol,
    View,
    as_counted,
    assignment,
    class_map,
    compared_view,
    nearest,
    seen,
    seen_prediction,
    table_of,
)
from padseg.evaluation.scores import PictureScores
from padseg.exports.colours import voc_colours
from padseg.exports.overlay import inner_boundaries
from padseg.exports.png import read_label_map
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array, Image

SHOWN = 4  # best pictures, and as many worst ones
WIDTH, HEIGHT = 240, 360  # maximum size of a thumbnail in pixels
GAP = 8
LETTERS = 13  # text height in pixels
QUALITY = 85
LONGEST = 300  # characters of a title, cut to this before measuring
UNMATCHED = -2
STRIPES = np.array([(255, 255, 255), (112, 112, 112)], np.uint8)  # for regions that match no class
STRIPE = 4  # pixels


def rating(picture: PictureScores) -> float | None:
    """Score for ranking pictures: mIoU, or covering without classes; None for a picture without a score."""
    return picture.regions[0].covering if picture.regions else picture.miou


class SheetRow(NamedTuple):
    """A picture on the sheet. cells: thumbnails (h, w, 3), at most HEIGHT x WIDTH."""

    title: str
    cells: list[Image]


def write_sheet(task: Task, pictures: Iterable[PictureScores], out: Path) -> None:
    """Write sheet.jpg: the best pictures, then the worst, each with its ground truth and prediction."""
    samples = {sample.name: sample for sample in task.dataset.samples}
    rows = [sheet_row(task, samples[picture.name], title, out) for title, picture in ranked(pictures)]
    save_sheet(sheet(rows, ('picture', 'ground truth', 'prediction')[0 if any(sample.image for sample in samples.values()) else 1 :]), out)


def save_sheet(drawn: PIL.Image.Image, out: Path) -> None:
    """Write sheet.jpg."""
    data = io.BytesIO()
    drawn.save(data, 'JPEG', quality=QUALITY)  # which would not say that the disk is full
    with atomic(out / 'sheet.jpg') as temporary:
        temporary.write_bytes(data.getvalue())


def ranked(pictures: Iterable[PictureScores]) -> list[tuple[str, PictureScores]]:
    """Select the best and the worst pictures, without duplicates, from best to worst, each with its title."""
    top: list[tuple[float, str, PictureScores]] = []
    bottom: list[tuple[float, str, PictureScores]] = []
    for picture in pictures:
        value = rating(picture)
        if value is not None:
            top = heapq.nlargest(SHOWN, [*top, (value, picture.name, picture)], key=lambda item: item[:2])
            bottom = heapq.nsmallest(SHOWN, [*bottom, (value, picture.name, picture)], key=lambda item: item[:2])
    names = {name for _, name, _ in top}
    chosen = [('best', item) for item in top] + [('worst', item) for item in reversed(bottom) if item[1] not in names]
    measure = {False: 'mIoU', True: 'covering'}
    return [
        (f'{end}, {measure[bool(picture.regions)]} {value:.4f}: {ascii(name)[1:-1]}', picture) for end, (value, name, picture) in chosen
    ]


class Seen(NamedTuple):
    """A picture at its compared pixels. truth: (h, w), with the protocol's classes if there are any; size: height and width of the whole.

    image: thumbnail (h, w, 3) of these pixels, or None.
    """

    truth: Array
    where: View
    size: tuple[int, int]
    image: Image | None


def sheet_row(task: Task, sample: Sample, title: str, out: Path) -> SheetRow:
    """Build a picture's row; if its files can no longer be read, the row has the reason in its title and no cells."""
    try:
        picture = seen_picture(task, sample)
        found = prediction_cell(task, sample, picture, out)
    except (PadsegError, OSError) as error:
        return SheetRow(f'{title}: {ascii(str(error))[1:-1]}', [])
    return SheetRow(title, [*first_cells(task, sample, picture), found])


def seen_picture(task: Task, sample: Sample) -> Seen:
    """Read a picture and its first ground truth. Raises PadsegError or OSError for a ground truth that cannot be read."""
    whole = task.dataset.read(sample)[0]  # (H, W)
    where = compared_view(whole.shape, task.rules.compare)
    truth = seen(whole, where)
    if task.classes.names:
        counted = as_counted(task.dataset.to_classes(truth), task.dataset.background, task.rules)
        truth = class_map(counted, task.classes, task.rules)
    return Seen(truth, where, whole.shape, cropped(task, sample, whole.shape, where))


def first_cells(task: Task, sample: Sample, picture: Seen) -> list[Image]:
    """The picture, if the data set has pictures, and its ground truth."""
    truth = drawn_labels(task, picture.truth, picture)
    return [truth] if sample.image is None else [blank() if picture.image is None else picture.image, truth]


def prediction_cell(task: Task, sample: Sample, picture: Seen, out: Path) -> Image:
    """The prediction that was scored. Raises PadsegError or OSError if it cannot be read."""
    pred = prediction(task, sample, picture.size, picture.where, out)
    if task.classes.names:
        counted = as_counted(pred, task.dataset.background, task.rules)
        pred = matched(counted, picture.truth, task.classes, task.rules)
    return drawn_labels(task, pred, picture)


def drawn_labels(task: Task, labels: Array, picture: Seen) -> Image:
    return painted_labels(labels, len(task.classes.names)) if task.classes.names else outlined(labels, picture.image)


def prediction(task: Task, sample: Sample, size: tuple[int, int], where: View, out: Path) -> Array:
    """Load the prediction that was scored, at the compared pixels: (h, w)."""
    path = task.preds.get(sample.name)
    if path:
        return seen_prediction(fitting(read_label_map(path), size, path, task.resize), where)
    path = out / 'labels' / f'{sample.name}.png'
    return fitting(read_label_map(path), where.size, path, False)


def cropped(task: Task, sample: Sample, size: tuple[int, int], where: View) -> Image | None:
    """Thumbnail of the compared part of the picture; None if no picture can be read or fits."""
    try:
        image = read_picture(task.dataset, sample, size)
    except (PadsegError, OSError):
        return None
    top, left, height, width = where.box
    rows, columns = fitted(height, width)
    part = image[top : top + height, left : left + width]
    return cv2.resize(part, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.uint8)


def matched(pred: Array, truth: Array, classes: Classes, rules: Protocol) -> Array:
    """Class that each pixel's region is matched with, or UNMATCHED: (H, W) each; truth as given by `class_map`."""
    if rules.matching == 'row':
        lines = zip(pred[:, None], truth[:, None], strict=True)
        return np.concatenate([matched_block(*line, classes, rules) for line in lines])
    return matched_block(pred, truth, classes, rules)


def matched_block(pred: Array, truth: Array, classes: Classes, rules: Protocol) -> Array:
    table = table_of(pred, truth, classes, rules)  # (classes, regions)
    class_of = np.full(table.shape[1], UNMATCHED)
    class_of[assignment(table, classes, rules)] = np.arange(len(table))
    regions = compact(pred) if rules.ids == 'compact' else pred.astype(np.int64)
    of_region = class_of[: int(regions.max()) + 1]
    if rules.background == 'many-to-one' and classes.background is not None:
        # the column after the regions holds the merged ones, whose own columns are empty
        merged = ~table[:, : len(of_region)].any(0)
        of_region = np.where(merged, class_of[len(of_region)], of_region)
    return of_region[regions]


def painted_labels(labels: Array, count: int) -> Image:
    """Thumbnail of classes 0..count-1 in their colours, VOID black, UNMATCHED striped."""
    labels = small(labels)
    colours = voc_colours(count + 1)[1:]
    drawn = np.where((labels == VOID)[..., None], 0, colours[labels.clip(0)])
    across, down = np.arange(labels.shape[1]), np.arange(labels.shape[0])[:, None]
    stripes = STRIPES[(across + down) // STRIPE % 2]  # (h, w, 3)
    return np.where((labels == UNMATCHED)[..., None], stripes, drawn).astype(np.uint8)


def outlined(labels: Array, image: Image | None) -> Image:
    """Thumbnail of the picture, or of coloured regions, with region boundaries in white."""
    labels = small(labels)
    drawn = voc_colours()[compact(labels) % 255 + 1] if image is None else image.copy()
    drawn[inner_boundaries(labels)] = 255
    return drawn


def blank() -> Image:
    """Placeholder thumbnail for a picture that cannot be shown."""
    return np.full((WIDTH, WIDTH, 3), 224, np.uint8)


def fitted(height: int, width: int) -> tuple[int, int]:
    """Size (h, w) of a thumbnail."""
    scale = min(WIDTH / width, HEIGHT / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def small(labels: Array) -> Array:
    """Resize labels (H, W) to thumbnail size by nearest neighbour."""
    height, width = fitted(*labels.shape)
    return labels[nearest(labels.shape[0], height)[:, None], nearest(labels.shape[1], width)]


def sheet(rows: list[SheetRow], heads: Sequence[str]) -> PIL.Image.Image:
    """Stack the rows vertically, each under its title. heads: of the columns."""
    line = LETTERS + GAP
    width = GAP + len(heads) * (WIDTH + GAP)
    places = np.cumsum([line, *(line + max((len(cell) for cell in row.cells), default=0) + GAP for row in rows)]).tolist()
    drawn = PIL.Image.new('RGB', (width, places[-1]), 'white')
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(LETTERS)
    for column, head in enumerate(heads):
        pen.text((GAP + column * (WIDTH + GAP), GAP // 2), within(head, font, WIDTH), 'black', font)
    for top, row in zip(places, rows, strict=False):
        pen.text((GAP, top), within(row.title, font, width - 2 * GAP), 'black', font)
        for column, cell in enumerate(row.cells):
            drawn.paste(PIL.Image.fromarray(cell), (GAP + column * (WIDTH + GAP), top + line))
    return drawn


def within(text: str, font: Any, width: int) -> str:
    """Shorten the text as needed to fit into `width` pixels."""
    text = shortened(text, LONGEST)
    length = len(text)
    while font.getlength(shortened(text, length)) > width:
        length -= 1
    return shortened(text, length)


def shortened(text: str, length: int) -> str:
    """Shorten the text to `length` characters by replacing its middle with an ellipsis."""
    if len(text) <= length:
        return text
    start = (length - 3) // 2
    return f'{text[:start]}...{text[len(text) - (length - 3 - start) :]}'
