"""A page of a run's pictures with their regions: one static HTML file, without scripts."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from padseg.errors import NoImages, UnreadableLabels
from padseg.exports.colours import voc_colours
from padseg.exports.png import encoded
from padseg.images import ImageError, decode_apart, file_and_frame
from padseg.run.convert import stored_label_map
from padseg.run.job import settings_from
from padseg.run.locks import all_records
from padseg.run.records import Entry, Run, entry_of, read_run
from padseg.run.source import folder_of
from padseg.system.files import atomic, full_disk, inside
from padseg.system.text import printable

if TYPE_CHECKING:
    from padseg.types import Array

SIDE = 320  # pixels of the longer side of a thumbnail
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 1em; }}
main {{ display: flex; flex-wrap: wrap; gap: 1em; }}
figure {{ margin: 0; max-width: 100%; width: 320px; }}
figcaption {{ overflow-wrap: anywhere; }}
svg {{ display: block; max-width: 100%; height: auto; }}
path {{ fill-opacity: 0; stroke: #fff; stroke-width: 1; fill-rule: evenodd; }}
path:hover {{ fill-opacity: 0.6; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{words}</p>
<main>
"""
TAIL = '</main>\n</body>\n</html>\n'


def write_page(out: Path, path: Path, most: int) -> tuple[int, int]:
    """Write the page of the run in `out`, of its first `most` done pictures. Returns how many are on it, and how many are done.

    Raises NoImages if there is no done picture.
    """
    run = read_run(out / 'run.json')
    if run is None:
        raise NoImages(f'there are no results of `padseg run` in {out}')
    done = [record for _, record in sorted(all_records(out).items()) if record.status == 'done']
    if not done:
        raise NoImages(f'no picture is done in {out}: see failures.jsonl there')
    names = settings_from(run.settings).classes
    shown = done[:most]
    title = f'{len(done)} {"picture" if len(done) == 1 else "pictures"} in {printable(str(out))}'
    words = 'Move over a picture to see its regions.' + (f' The first {len(shown)} are shown.' if len(shown) < len(done) else '')
    with full_disk(path.parent), atomic(path) as temporary, temporary.open('w', encoding='utf-8', errors='backslashreplace') as file:
        file.write(HEAD.format(title=html.escape(title), words=html.escape(words)))
        for record in shown:
            file.write(figure(out, run, entry_of(record), names))
        file.write(TAIL)
    return len(shown), len(done)


def figure(out: Path, run: Run, entry: Entry, names: tuple[str, ...]) -> str:
    """A picture with an outline for each of its regions; only words if its label map cannot be read."""
    name = html.escape(printable(entry.input))
    try:
        labels = stored_label_map(out, entry, len(names))
    except (UnreadableLabels, ImageError) as error:
        return f'<figure><figcaption>{name}: {html.escape(printable(str(error)))}</figcaption></figure>\n'
    scale = SIDE / max(labels.shape)
    height, width = (max(1, round(length * scale)) for length in labels.shape)
    small = cv2.resize(labels.astype(np.int32).astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST).astype(np.int32)
    paths = ''.join(outline(small, labels, number, names) for number in np.unique(small[small > 0]).tolist())
    picture = thumbnail(run, entry, (height, width))
    regions = f'{entry.regions} regions' if not names else f'{entry.regions} classes'
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'{picture}{paths}</svg><figcaption>{name}: {regions}</figcaption></figure>\n'
    )


def thumbnail(run: Run, entry: Entry, size: tuple[int, int]) -> str:
    """The picture as an SVG image; a grey field if it is gone, has changed, or cannot be read."""
    height, width = size
    file, frame = file_and_frame(entry.input)
    reading = settings_from(run.settings).reading._replace(shrink=4 * SIDE * SIDE)

    def refuse_another(size: int, digest: str) -> None:
        if digest != entry.sha256:
            raise ImageError('it has changed')

    try:
        image = decode_apart(inside(folder_of(Path(run.source)), file, linked=True), reading, frame, refuse_another).image
    except (ImageError, OSError):
        return f'<rect width="{width}" height="{height}" fill="#999"/>'
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    data = base64.b64encode(encoded('.jpg', cv2.cvtColor(small, cv2.COLOR_RGB2BGR))).decode('ascii')
    return f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/>'


def outline(small: Array, labels: Array, number: int, names: tuple[str, ...]) -> str:
    """A region's outlines, holes included, with its name, number and area to show. small: the label map (h, w) at the thumbnail's size."""
    mask = np.kron((small == number).astype(np.uint8), np.ones((2, 2), np.uint8))  # so that single pixels have an area
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    moves = ''.join(f'M{" ".join(f"{x / 2:g} {y / 2:g}" for x, y in points)}Z' for points in polygons(contours))
    red, green, blue = voc_colours()[(number - 1) % 255 + 1].tolist()
    called = names[number - 1] if names else f'region {number}'
    words = html.escape(printable(f'{called}: {np.count_nonzero(labels == number)} pixels'))
    return f'<path d="{moves}" fill="#{red:02x}{green:02x}{blue:02x}"><title>{words}</title></path>'


def polygons(contours: object) -> Iterator[list[tuple[int, int]]]:
    for contour in contours:  # type: ignore[attr-defined]
        yield [(int(x), int(y)) for x, y in contour.reshape(-1, 2)]
