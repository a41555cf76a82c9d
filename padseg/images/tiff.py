"""Read TIFF files: with Pillow where it reads the layout of the samples correctly, otherwise with tifffile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import PIL.Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from padseg.images.pixels import to_bytes
from padseg.types import Array

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, INKS, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
NAMES = {WHITE_IS_ZERO: 'grey', BLACK_IS_ZERO: 'grey', RGB: 'RGB', PALETTE: 'palette', INKS: 'inks', YCBCR: 'YCbCr', LAB: 'LAB'}
PLAIN, OLD_JPEG, JPEGS = 1, 6, (6, 7)  # values of Compression; old JPEG files locate their strips by other tags
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # values of SampleFormat
ALPHAS = (1, 2)  # values of ExtraSamples: associated alpha (colours are multiplied by it) and unassociated
MOST_BANDS = 64
BEHIND_16 = ((), (0,), (1,), (2,))  # extra bands after RGB, as values of ExtraSamples
BEHIND_8 = (*BEHIND_16, (0, 0), (0, 0, 0), (1, 0), (1, 0, 0), (2, 0), (2, 0, 0), (999,))
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
RANGES = (UNSIGNED, SIGNED, FLOAT)
PROFILE = 34675


class Layout(NamedTuple):
    """How the samples of a page are stored, from its tags. kind: SampleFormat; extra: ExtraSamples; swapped: big-endian.

    parts, needed: number of strips or tiles in the file, and in a complete picture; wide_colours: whether a palette's colours have 16 bits;
    unshared: whether there are enough bytes for every pixel to have its own 8-bit samples (no chroma subsampling).
    """

    size: tuple[int, int]
    photometric: int
    bits: tuple[int, ...]
    kind: int
    planar: bool
    extra: tuple[int, ...]
    compression: int
    predictor: int
    fill: int
    swapped: bool
    parts: int
    needed: int
    wide_colours: bool
    unshared: bool

    @property
    def colours(self) -> int:
        """Number of bands that are colours."""
        return len(self.bits) - len(self.extra)

    def __str__(self) -> str:
        bands, kind = len(self.bits), {UNSIGNED: '', SIGNED: 'signed ', FLOAT: 'float '}.get(self.kind, 'unknown ')
        depth = str(self.bits[0]) if len(set(self.bits)) == 1 else ', '.join(map(str, self.bits))
        name = NAMES.get(self.photometric, f'photometric {self.photometric}')
        planes = ' in planes' if self.planar and bands > 1 else ''
        return f'{bands} band{"s" * (bands != 1)} of {depth} {kind}bits{planes} ({name}, compression {self.compression})'


def ints(tags: Mapping[int, Any], tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = tags.get(tag, default)
    values = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(number, int) for number in values):
        raise ValueError(f'tag {tag} does not hold integers')
    return values


def layout_of(tags: ImageFileDirectory_v2) -> Layout:
    """Read the layout of a page from its tags. Raises ValueError if they make no sense."""
    (width,), (height,) = (ints(tags, tag, ())[:1] or (0,) for tag in (256, 257))
    (compression,), (planar,), (predictor,), (fill,) = (ints(tags, tag, (1,))[:1] for tag in (259, 284, 317, 266))
    (photometric,) = ints(tags, 262, (WHITE_IS_ZERO,))[:1]
    (count,) = ints(tags, 277, (3 if compression == 7 and photometric in (RGB, YCBCR) else 1,))[:1]
    bits, kinds = ints(tags, 258, (1,)), ints(tags, 339, (UNSIGNED,))
    if width < 1 or height < 1 or not 1 <= count <= MOST_BANDS:
        raise ValueError(f'{width} x {height} pixels of {count} samples')
    bits = (bits * count if len(bits) == 1 else bits)[:count]
    if len(bits) < count:
        raise ValueError('the depth of some samples is missing')
    extra = ints(tags, 338, ())[:count]
    if not extra and photometric == RGB and count == 4:
        extra = (2,)  # as in Pillow: many programs leave the tag out
    colours = ints(tags, 320, ()) if photometric == PALETTE else ()
    return Layout(
        size=(width, height),
        photometric=YCBCR if compression == OLD_JPEG else photometric,
        bits=bits,
        kind=kinds[0] if len(set(kinds)) == 1 else 0,
        planar=planar == 2 and count > 1,
        extra=extra,
        compression=compression,
        predictor=predictor,
        fill=fill,
        swapped=tags.prefix == b'MM',
        parts=len(ints(tags, 273, ints(tags, 324, ()))),
        needed=parts_needed(tags, width, height) * (count if planar == 2 else 1),
        wide_colours=not colours or max(colours) > 255,
        unshared=sum(ints(tags, 279, ints(tags, 325, ()))) >= width * height * count,
    )


def parts_needed(tags: ImageFileDirectory_v2, width: int, height: int) -> int:
    """Number of strips or tiles in a complete plane."""
    if 273 in tags:
        (rows,) = ints(tags, 278, (height,))[:1]
        return -(-height // max(1, rows))
    (across,), (down,) = ints(tags, 322, (width,))[:1], ints(tags, 323, (height,))[:1]
    return -(-width // max(1, across)) * -(-height // max(1, down))


def pillow_is_right(layout: Layout) -> bool:
    """Whether Pillow reads this layout correctly, as found by comparing files of every layout with what was written to them."""
    plain, whole, kept = layout.compression == PLAIN, layout.kind == UNSIGNED, layout.extra
    if layout.planar and not any(layout.extra):
        layout = layout._replace(bits=layout.bits[: layout.colours], extra=())  # Pillow ignores extra planes without a meaning
    if layout.compression in JPEGS:
        return set(layout.bits) == {8} and not layout.extra
    if layout.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and layout.colours == 1:
        return grey_is_right(layout) and not (layout.planar and plain)
    if layout.photometric == RGB and layout.colours == 3:
        if layout.planar and plain:
            return whole and layout.bits == (8, 8, 8) and layout.fill == 1 and not kept
        if layout.fill != 1:
            return whole and layout.bits == (8, 8, 8)
        return whole and layout.extra in (BEHIND_8 if set(layout.bits) == {8} else BEHIND_16 if set(layout.bits) == {16} else ())
    if layout.photometric == PALETTE:
        straight = layout.fill == 1 or not plain or layout.bits == (8,)
        return whole and straight and layout.bits in ((1,), (2,), (4,), (8,)) and layout.wide_colours
    if layout.photometric == YCBCR:  # libtiff handles chroma subsampling; Pillow's own reader does not
        return whole and layout.bits == (8, 8, 8) and (not plain or (layout.unshared and not layout.planar))
    if layout.photometric == INKS and whole and layout.colours == 4 and layout.fill == 1:
        if set(layout.bits) == {16}:
            return not layout.extra and not (plain and layout.planar)
        return set(layout.bits) == {8} and layout.extra in ((), (0,), (0, 0)) and not (plain and layout.planar and kept)
    return layout.photometric == LAB and whole and layout.bits == (8, 8, 8) and not layout.planar


def grey_is_right(layout: Layout) -> bool:
    """The same for one grey band and its extra bands."""
    bits, whole = layout.bits[0], layout.kind == UNSIGNED
    if layout.extra:
        return (
            whole
            and layout.bits == (8, 8)
            and layout.extra in ((0,), (2,))
            and layout.photometric == BLACK_IS_ZERO
            and not layout.planar
            and layout.fill == 1
        )
    if whole and bits in (1, 2, 4, 8):
        return (layout.photometric, bits, layout.fill, layout.compression) != (WHITE_IS_ZERO, 8, 2, PLAIN)
    if layout.photometric == WHITE_IS_ZERO or layout.fill != 1:
        return False
    if whole:
        return bits == 16 or (bits == 12 and not layout.swapped)
    if layout.compression != PLAIN and layout.swapped:
        return False
    return (layout.kind, bits) in ((SIGNED, 16), (SIGNED, 32), (FLOAT, 32))


class Tiff:
    """An open TIFF, positioned at one of its pages. layout: that page's layout."""

    def __init__(self, file: IO[bytes]) -> None:
        head = file.read(8)
        self.head = head + file.read(8) if 43 in head[2:4] else head
        self.file = file
        self.starts: list[int] = [ImageFileDirectory_v2(self.head).next]
        self.page = 0
        self.pillow: TiffImageFile | None = None
        self.seek(0)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        return self.layout.size

    @property
    def is_animated(self) -> bool:
        return self.starts[1] != 0

    def tell(self) -> int:
        return self.page

    def seek(self, page: int) -> None:
        """Go to a page. Raises EOFError if it does not exist, and what Pillow raises for damaged files."""
        while True:
            at = min(page, len(self.starts) - 1)
            if not self.starts[at]:
                raise EOFError('no more pages')
            self.page = at
            self.tags = ImageFileDirectory_v2(self.head)
            self.file.seek(self.starts[at])
            self.tags.load(self.file)
            if at == len(self.starts) - 1:
                self.starts.append(0 if self.tags.next in self.starts else self.tags.next)
            if at == page:
                break
        self.layout = layout_of(self.tags)

    def picture(self, value_range: tuple[float, float] | None) -> PIL.Image.Image:
        """The page as a Pillow image, not loaded yet or converted to 8 bits. Raises UnknownRange, Unsupported, or OSError."""
        if self.layout.parts < self.layout.needed and self.layout.compression != OLD_JPEG:
            raise OSError('parts of the picture are missing')
        if not pillow_is_right(self.layout):
            return self.by_tifffile(value_range)
        if self.pillow is None:
            self.file.seek(0)
            self.pillow = TiffImageFile(self.file)
        self.pillow.seek(self.page)
        return self.pillow

    def by_tifffile(self, value_range: tuple[float, float] | None) -> PIL.Image.Image:
        layout = self.layout
        colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1}.get(layout.photometric)
        inverted_alpha = layout.photometric == WHITE_IS_ZERO and layout.extra[:1] in ((1,), (2,))  # what it means is ambiguous
        if inverted_alpha or layout.colours != colours or len(set(layout.bits)) > 1 or layout.bits[0] % 8 or layout.kind not in RANGES:
            raise Unsupported(f'not supported: {layout}')
        bounds = range_of(layout, value_range)
        samples = self.samples()
        bands = [
            to_bytes(samples[..., band], bounds) if colours == 1 else high_bytes(samples[..., band], bounds) for band in range(colours)
        ]
        if layout.photometric == WHITE_IS_ZERO:
            bands = [255 - band for band in bands]
        if layout.photometric == PALETTE:
            bands = list(np.moveaxis(palette_of(self.tags)[samples[..., 0]], -1, 0))
        if layout.extra[:1] in ((1,), (2,)):
            alpha = high_bytes(samples[..., colours], bounds)
            if layout.extra[0] == 1:  # undo the multiplication by alpha
                bands = [np.minimum(band.astype(np.uint16) * 255 // np.maximum(alpha, 1), 255).astype(np.uint8) for band in bands]
            bands.append(alpha)
        picture = PIL.Image.merge(MODES[len(bands)], [PIL.Image.fromarray(np.ascontiguousarray(band)) for band in bands])
        picture.getexif()[Base.Orientation] = self.tags.get(Base.Orientation, 1)
        if PROFILE in self.tags:
            picture.info['icc_profile'] = self.tags[PROFILE]
        return picture

    def samples(self) -> Array:
        """Read the page's samples, (H, W, bands), with tifffile. Raises Unsupported for unknown compression, OSError for damaged files."""
        import tifffile  # importing it takes longer than reading most files

        layout = self.layout
        for codecs, key in ((tifffile.TIFF.DECOMPRESSORS, layout.compression), (tifffile.TIFF.UNPREDICTORS, layout.predictor)):
            try:
                codecs[key]
            except (KeyError, ValueError) as error:
                raise Unsupported(f'not supported: {layout}') from error
        try:
            self.file.seek(0)
            with tifffile.TiffFile(self.file) as file:
                page = file.pages[self.page]
                if not all(page.databytecounts):
                    raise OSError('parts of the picture are missing')
                planes, _, height, width, bands = page.shaped
                return np.moveaxis(page.asarray(maxworkers=1).reshape(planes, height, width, bands), 0, 2).reshape(height, width, -1)
        except (tifffile.TiffFileError, RuntimeError, AssertionError, AttributeError) as error:
            raise OSError(str(error)) from error


class Unsupported(Exception):
    """A layout that padseg does not read; the message names it."""


def range_of(layout: Layout, value_range: tuple[float, float] | None) -> tuple[float, float]:
    """The sample values of black and white. Raises UnknownRange if neither their type nor the user defines them."""
    if layout.kind == UNSIGNED and layout.bits[0] <= 16:
        return 0, 2 ** layout.bits[0] - 1
    if value_range is None:
        raise UnknownRange
    return value_range


class UnknownRange(Exception):
    """Samples whose type does not define black and white."""


def high_bytes(samples: Array, bounds: tuple[float, float]) -> Array:
    """Convert samples to bytes; 16-bit samples without rounding, as Pillow does for pictures with several bands."""
    return (samples >> 8).astype(np.uint8) if samples.dtype == np.uint16 else to_bytes(samples, bounds)


def palette_of(tags: ImageFileDirectory_v2) -> Array:
    """Colours of a palette, (N, 3) uint8. If none exceeds 255, the writer took 255 for white instead of 65535."""
    colours = np.array(ints(tags, 320, ()), np.int64)
    return (colours if colours.max(initial=0) < 256 else colours >> 8).astype(np.uint8).reshape(3, -1).T
