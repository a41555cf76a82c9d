"""Store token maps on disk, so that another threshold needs no forward pass."""

from __future__ import annotations

import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy

from padseg.backbones import Backbone
from padseg.images import ImageError
from padseg.methods.options import ForwardOptions, ViewOptions
from padseg.methods.stages.geometry import seen_box
from padseg.system.files import atomic, opened
from padseg.types import Array, Frame, TokenMaps

SUFFIX = '.npz'
# The arrays of a file: the kind of their values, and how many dimensions they have.
MEMBERS = {'maps': ('f', 3), 'names': ('U', 1), 'size': ('i', 1), 'box': ('i', 1), 'made_by': ('U', 0)}
LARGEST, LARGEST_OTHER = 2**28, 2**20  # bytes of the maps, which take 134 MB for 512 tokens on 256 x 256, and of any other array
HEADER = 1000  # bytes of an array's description
END = struct.Struct('<4s4H2LH')  # how a zip ends: a mark, disks, entries here and in all, size and place of their list, length of a comment
DIRECTORY = 2**16  # bytes of the list of entries
SQUARES = [patch * 2**number for number in range(10) for patch in (1, 3)]  # pixels along the side of a token: 16 with known models
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # of descriptions, by version
ABOVE_ONE = 1e-3  # by which rounding may take a share above 1
# What reading a damaged or crafted file raises, in zipfile and in numpy's reading of a description.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    OverflowError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def forward_settings(backbone: Backbone, options: ForwardOptions) -> str:
    """Describe all settings that affect token maps."""
    return (
        f'weights {backbone.identity.weights} dtype {backbone.dtype} layer {options.layer} step {options.step} '
        f'geometry {options.geometry} side {options.side} seed {options.seed}'
    )


def write_maps(maps: TokenMaps, path: Path, made_by: str = '') -> None:
    """Write token maps (T, h, w) float32 with their tokens' words, their frame and the settings that made them."""
    with atomic(path) as temporary, temporary.open('wb') as file:
        np.savez_compressed(
            file,
            maps=maps.maps.cpu().numpy(),
            names=np.array(maps.names),
            size=np.array(maps.frame.size),
            box=np.array(maps.frame.box),
            made_by=np.array(made_by),
        )


def read_maps(path: Path, made_by: str = '') -> TokenMaps | None:
    """Read token maps from a file; None if it is missing, damaged, or made with other settings."""
    try:
        return unpacked(path, made_by)
    except (ImageError, FileNotFoundError):
        return None


def maps_of_picture(path: Path, size: tuple[int, int], options: ViewOptions) -> TokenMaps:
    """The token maps in a file, for a picture of a size (H, W) of which the model saw what these options say.

    ImageError with the reason if there are none, or they are damaged, of another size, or no shares of attention.
    """
    try:
        maps = unpacked(path)
    except FileNotFoundError as error:
        raise ImageError('there are no token maps for this picture: run the model with --save-maps') from error
    if maps is None or maps.frame != Frame(size, seen_box(size, options.geometry)):
        raise ImageError('its token maps are of another picture, or were not kept by a run')
    if not is_view(maps.maps.shape[1:], size, options):
        raise ImageError(f'its token maps are {maps.maps.shape[2]}x{maps.maps.shape[1]}, which no model makes of it')
    if not (maps.maps.min() >= 0 and maps.maps.max() <= 1 + ABOVE_ONE):  # so NaN is refused too
        raise ImageError('its token maps are no shares of attention: there are values outside of 0..1')
    return maps


def is_view(shape: tuple[int, ...], size: tuple[int, int], options: ViewOptions) -> bool:
    """Whether tokens (h, w) are what some model has for its view of a picture: one for a square of pixels, with as many as its limit."""
    if options.geometry != 'whole':
        return shape[0] == shape[1] and options.side % shape[0] == 0
    scale = options.side / math.sqrt(size[0] * size[1])
    lengths = [length * scale for length in size]
    return any(all(fits(tokens, length / pixels, max(shape)) for tokens, length in zip(shape, lengths, strict=True)) for pixels in SQUARES)


def fits(tokens: int, length: float, limit: int) -> bool:
    """Whether a side of so many tokens is this length, rounded, or the most that there can be."""
    return tokens == min(limit, max(1, round(length)))


def unpacked(path: Path, made_by: str = '') -> TokenMaps | None:
    """The token maps in a file; None if other settings made it. FileNotFoundError if there is none, ImageError if it is damaged."""
    try:
        with opened(path) as file:
            arrays = unzipped(file)
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ImageError(f'its token maps are damaged: {type(error).__name__}: {error}') from error
    if str(arrays['made_by']) != made_by:
        return None
    size, box = tuple(arrays['size'].tolist()), tuple(arrays['box'].tolist())
    return TokenMaps(torch.from_numpy(arrays['maps']), tuple(arrays['names'].tolist()), Frame(size, box))


def unzipped(file: BinaryIO) -> dict[str, Array]:
    """The arrays of a file that `write_maps` wrote. Sizes and descriptions are looked at before anything is unpacked. One of DAMAGE."""
    file.seek(-END.size, os.SEEK_END)
    mark, _, _, _, entries, directory, _, comment = END.unpack(file.read())
    if (mark, entries, comment) != (b'PK\5\6', len(MEMBERS), 0) or directory > DIRECTORY:
        raise ValueError('not a file of token maps')
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
        if infos.keys() != MEMBERS.keys():
            raise ValueError(f'it holds {", ".join(sorted(infos))}')
        arrays = {name: member_array(archive, infos[name], name) for name in MEMBERS}
    shapes = {name: array.shape for name, array in arrays.items()}
    if not (0 < shapes['maps'][0] == shapes['names'][0] and min(shapes['maps']) > 0 and shapes['size'] == (2,) and shapes['box'] == (4,)):
        raise ValueError(f'its arrays are of the shapes {shapes}')
    if not np.isfinite(arrays['maps']).all():
        raise ValueError('values that are not finite')
    return arrays


def member_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    """An array of a file; it is unpacked once its description is known to be right."""
    kind, dimensions = MEMBERS[name]
    largest = LARGEST if name == 'maps' else LARGEST_OTHER
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.file_size > largest + HEADER:
        raise ValueError(f'{name} is encrypted, packed in a strange way or too large')
    with archive.open(info) as member:
        shape, by_columns, dtype = described(member)
        length = math.prod(shape) * dtype.itemsize
        good = dtype.kind == kind and len(shape) == dimensions and (kind != 'f' or dtype == np.float32)
        if not good or min(shape, default=1) < 0 or length != info.file_size - member.tell():
            raise ValueError(f'{name} is {dtype} of shape {shape}')
        data = bytearray(member.read(length + 1))  # to its end, where the check sum is compared
    if len(data) != length:
        raise ValueError(f'{name} is cut off')
    return np.frombuffer(data, dtype).reshape(shape, order='F' if by_columns else 'C')


def described(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of the array that begins here."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # numpy advises those who wrote such files
        return READERS[npy.read_magic(member)](member, max_header_size=HEADER)
