"""Find the pictures in a folder, and the files that look like pictures but are not read."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple, NoReturn

import PIL.features

from padseg.errors import NoImages
from padseg.system.text import printable

AVIF, HEIC = '.avif', '.heic'
SUFFIXES = frozenset(
    [
        *'.jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm'.split(),
        *([AVIF] if PIL.features.check('avif') else []),  # if Pillow was built with it
        *([HEIC, '.heif', '.hif'] if importlib.util.find_spec('pillow_heif') else []),
    ]
)
OTHERS = frozenset(  # suffixes of pictures that padseg does not read
    '.heic .heif .hif .avif .jp2 .j2k .jpx .jxl .jxr .tga .psd .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .raf .svg .ico .pcx .qoi'.split()
)
NEARLY = re.compile(  # a picture's name with something after its suffix
    rf'(?:{"|".join(map(re.escape, sorted(SUFFIXES, key=len, reverse=True)))})(?:[ ~_(-].*|\.(?:bak|old|orig|tmp|part|download|\d+))',
    re.IGNORECASE,
)
RECORDS = {'run.json', 'manifest.jsonl'}  # mark a folder as the results of a run
NO_SUFFIX, HIDDEN, LINKED, SPECIAL = 'no suffix', 'hidden', 'linked folder', 'special file'
STARTS = re.compile(
    rb'\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|BM....\0\0\0\0|II[*+]\0|MM\0[*+]|GIF8[79]a|....ftyp(?:heic|heix|mif1|avif)|P[1-6]\s', re.DOTALL
)


class Found(NamedTuple):
    """A picture's file. name: its POSIX path relative to the folder that was searched; frame: index of its frame, from 0."""

    path: Path
    name: str
    frame: int = 0


class Listing(NamedTuple):
    """What a folder holds. left_out: number of other files by kind; like_pictures: those among them that look like pictures.

    runs: folders that hold the results of a run; unreadable: folders that cannot be listed, with the reason. None of these is entered.
    """

    pictures: list[Found]
    left_out: dict[str, int]
    like_pictures: dict[str, int]
    runs: list[str]
    unreadable: dict[str, str]


def find(source: Path, skip: Path | None = None) -> list[Found]:
    """The pictures of `listing`."""
    return listing(source, skip).pictures


def listing(source: Path, skip: Path | None = None) -> Listing:
    """List the picture files in a folder and below, sorted by name, and count the other files; `source` may also be a single file.

    Hidden files, special files, linked folders, folders with the results of a run and the folder `skip` are left out. Raises NoImages if
    `source` does not exist or cannot be listed.
    """
    if source.is_file():
        return Listing([Found(source, source.name)], {}, {}, [], {})
    if not source.is_dir():
        raise NoImages(f'there is no folder or picture {source}')
    hidden = skip.resolve() if skip else None
    pictures: list[Found] = []
    left_out, like = Counter[str](), Counter[str]()
    runs: list[str] = []
    unreadable: dict[str, str] = {}

    def note(error: OSError) -> None:
        if Path(error.filename) == source:
            refuse(error)
        unreadable[Path(error.filename).relative_to(source).as_posix()] = error.strerror or str(error)

    for place, folders, files in os.walk(source, onerror=note):
        folder = Path(place)
        if folder != source and RECORDS <= set(files):
            runs.append(folder.relative_to(source).as_posix())
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != '.' and (folder / name).resolve() != hidden]
        for name in folders:
            if (folder / name).is_symlink():
                left_out[LINKED] += 1
                like[LINKED] += 1
        for name in files:
            path = folder / name
            kind = kind_of(path)
            if kind is None:
                pictures.append(Found(path, path.relative_to(source).as_posix()))
            else:
                left_out[kind] += 1
                like[kind] += seems_a_picture(path, kind)
    seeming = {kind: number for kind, number in sorted(like.items()) if number}
    return Listing(sorted(pictures, key=lambda picture: picture.name), dict(sorted(left_out.items())), seeming, sorted(runs), unreadable)


def refuse(error: OSError) -> NoReturn:
    raise NoImages(f'cannot list {error.filename}: {error.strerror}') from error


def kind_of(path: Path) -> str | None:
    """None for a picture file; otherwise the file's suffix, or the other reason why it is left out."""
    if path.name[0] == '.':
        return HIDDEN
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return suffix or NO_SUFFIX
    return SPECIAL if is_special(path) else None


def seems_a_picture(path: Path, kind: str) -> bool:
    """Whether a file that is left out may be a picture: its name resembles a picture's, or it has no suffix and begins like a picture."""
    if kind == HIDDEN:
        return path.suffix.lower() in SUFFIXES and not path.name.startswith('._')  # macOS puts a ._ file beside every file
    if kind == NO_SUFFIX:
        return begins_like_a_picture(path)
    return kind in OTHERS - SUFFIXES or kind == SPECIAL or NEARLY.search(path.name) is not None


def begins_like_a_picture(path: Path) -> bool:
    try:
        if is_special(path):
            return False
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), 'rb') as file:
            return STARTS.match(file.read(16)) is not None
    except OSError:
        return False


def is_special(path: Path) -> bool:
    """Whether this is a pipe, a socket or a device. A dangling link is not special, so that it is reported."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def in_words(kinds: dict[str, int]) -> str:
    """Kinds and their numbers as text, such as `3 .heic, 1 linked folder`."""
    return ', '.join(f'{number} {printable(kind)}' for kind, number in kinds.items())
