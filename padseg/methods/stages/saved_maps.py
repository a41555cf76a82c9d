"""Store token maps on disk, so that another threshold needs no new forward pass."""

from __future__ import annotations

import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from padseg.images import ImageError
from padseg.methods.options import MapOptions, ViewOptions
from padseg.methods.stages.geometry import seen_box
from padseg.system.files import atomic, opened
from padseg.types import Array, Frame, TokenMaps

if TYPE_CHECKING:
    from padseg.backbones import Backbone

SUFFIX = '.npz'
# The arrays in a file: kind of their values, and number of dimensions.
MEMBERS = {'maps': ('f', 3), 'names': ('U', 1), 'size': ('i', 1), 'box': ('i', 1), 'made_by': ('U', 0)}
LARGEST, LARGEST_OTHER = 2**28, 2**20  # bytes of the maps (512 tokens at 256 x 256 take 134 MB), and of any other array
HEADER = 1000  # bytes of an array's description
# The end record of a zip: signature, disks, entries here and in all, size and offset of the directory, comment length.
END = struct.Struct('<4s4H2LH')
DIRECTORY = 2**16  # bytes of the directory
SQUARES = [patch * 2**number for number in range(10) for patch in (1, 3)]  # possible sides of a token in pixels; 16 for known models
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # readers of an array's description, by version
ABOVE_ONE = 1e-3  # rounding may make a share exceed 1 by this much
# What zipfile, and NumPy's reader of descriptions, raise for damaged or crafted files.
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


def forward_settings(backbone: Backbone, options: MapOptions) -> str:
    """Describe all settings that affect token maps."""
    model = backbone.identity
    lora = f' lora {model.lora} scale {model.lora_scale}' if model.lora else ''
    kept = f' {backbone.quantize}' if backbone.quantize else ''
    tokens = '' if options.tokens == 'all' else f' tokens {options.tokens}'
    windows: Any = options  # of a method that may have them
    tiles = f' tiles {windows.tiles} overlap {windows.overlap}' if getattr(options, 'tiles', 0) else ''
    return (
        f'weights {model.weights}{lora}{kept} dtype {backbone.dtype} layer {options.layer} step {options.step} '
        f'geometry {options.geometry} side {options.side} seed {options.seed}{tokens}{tiles}'
    )


def write_maps(maps: TokenMaps, path: Path, made_by: str = '') -> None:
    """Write token maps (T, h, w) float32 with their tokens' words, their frame and the settings that made them.

    The maps may be an array too, which is written without torch.
    """
    values: Any = maps.maps
    with atomic(path) as temporary, temporary.open('wb') as file:
        np.savez_compressed(
            file,
            maps=values if isinstance(values, np.ndarray) else values.cpu().numpy(),
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


def maps_of_picture(path: Path, size: tuple[int, int], options: ViewOptions, shares: bool = True, halved: bool = False) -> TokenMaps:
    """Read the token maps of a picture of a size (H, W), made with these view options.

    shares: whether they are shares of attention; halved: whether their grid may be of a U-Net, which rounds up where it halves.
    Raises ImageError with the reason if there are none, or if they are damaged, of another size, or not shares of attention.
    """
    try:
        maps = unpacked(path)
    except FileNotFoundError as error:
        raise ImageError('there are no token maps for this picture: run the model with --save-maps') from error
    if maps is None or maps.frame != Frame(size, seen_box(size, options.geometry)):
        raise ImageError('its token maps belong to another picture, or were not kept by a run')
    if not is_view(maps.maps.shape[1:], size, options, halved):
        raise ImageError(f'its token maps are {maps.maps.shape[2]}x{maps.maps.shape[1]}, which no model makes for a picture of this size')
    if shares and not (maps.maps.min() >= 0 and maps.maps.max() <= 1 + ABOVE_ONE):  # written so that NaN is refused too
        raise ImageError('its token maps are not shares of attention: some values are outside 0..1')
    return maps


def is_view(shape: tuple[int, ...], size: tuple[int, int], options: ViewOptions, halved: bool = False) -> bool:
    """Whether some model could have tokens (h, w) for its view of a picture: one per square of pixels, up to a limit per side."""
    if options.geometry != 'whole':
        return shape[0] == shape[1] and options.side % shape[0] == 0
    scale = options.side / math.sqrt(size[0] * size[1])
    lengths = [length * scale for length in size]
    further = 1 if halved else 0
    return any(
        all(fits(tokens, length / pixels, max(shape), further) for tokens, length in zip(shape, lengths, strict=True)) for pixels in SQUARES
    )


def fits(tokens: int, length: float, limit: int, further: int = 0) -> bool:
    """Whether a number of tokens is `length` rounded, or that much more, or the limit."""
    return tokens in {min(limit, max(1, round(length) + more)) for more in range(further + 1)}


def unpacked(path: Path, made_by: str = '') -> TokenMaps | None:
    """Read token maps; None if other settings made them. Raises FileNotFoundError if there is no file, ImageError if it is damaged."""
    try:
        with opened(path) as file:
            arrays = unzipped(file)
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        raise ImageError(f'its token maps are damaged: {type(error).__name__}: {error}') from error
    if str(arrays['made_by']) != made_by:
        return None
    import torch  # here, because writing needs none

    size, box = tuple(arrays['size'].tolist()), tuple(arrays['box'].tolist())
    return TokenMaps(torch.from_numpy(arrays['maps']), tuple(arrays['names'].tolist()), Frame(size, box))


def unzipped(file: BinaryIO) -> dict[str, Array]:
    """Read the arrays of a file by `write_maps`. Checks sizes and descriptions before unpacking anything. Raises one of DAMAGE."""
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
        raise ValueError(f'its arrays have the shapes {shapes}')
    if not np.isfinite(arrays['maps']).all():
        raise ValueError('some values are not finite')
    return arrays


def member_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    """Read an array of a file. It is unpacked only after its description has been checked."""
    kind, dimensions = MEMBERS[name]
    largest = LARGEST if name == 'maps' else LARGEST_OTHER
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.file_size > largest + HEADER:
        raise ValueError(f'{name} is encrypted, compressed in an unknown way, or too large')
    with archive.open(info) as member:
        shape, by_columns, dtype = described(member)
        length = math.prod(shape) * dtype.itemsize
        good = dtype.kind == kind and len(shape) == dimensions and (kind != 'f' or dtype == np.float32)
        if not good or min(shape, default=1) < 0 or length != info.file_size - member.tell():
            raise ValueError(f'{name} is {dtype} of shape {shape}')
        data = bytearray(member.read(length + 1))  # up to its end, where the checksum is compared
    if len(data) != length:
        raise ValueError(f'{name} is cut off')
    return np.frombuffer(data, dtype).reshape(shape, order='F' if by_columns else 'C')


def described(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the description of an array: shape, whether it is in column order, and type."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # NumPy's advice to the writers of such files
        return READERS[npy.read_magic(member)](member, max_header_size=HEADER)
