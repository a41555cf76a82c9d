"""Files of a label map as `padseg run` and `padseg export` write them, and the folder where files of the demo live for an hour."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

from padseg.demo.picture import Picture
from padseg.demo.regions import Found
from padseg.demo.settings import HOUR
from padseg.exports import coco, write_label_map, write_masks
from padseg.exports.png import encoded
from padseg.exports.regions import LabelledPicture, Place
from padseg.images import Reading
from padseg.system.files import remove

PREFIX = 'padseg-demo-'
LOCK = 'lock'
OURS = 'files'  # folder of what the demo writes; Gradio has one of its own, and deletes from that
EVERY = 60  # seconds between looks for old files


class Files(NamedTuple):
    labels: Path
    masks: Path
    coco: Path


def write_files(picture: Picture, found: Found, folder: Path) -> Files:
    """Write the label map as PNG, the masks with their table as zip, and COCO's JSON, into a new folder in `folder`."""
    labels, here = found.labels, fresh(folder)
    paths = Files(here / 'labels.png', here / 'masks.zip', here / coco.FILE)
    write_label_map(labels, paths.labels)
    write_masks(labels, here / 'masks')
    with zipfile.ZipFile(paths.masks, 'w') as archive:  # of files that are compressed
        for path in sorted((here / 'masks').iterdir()):
            archive.write(path, f'masks/{path.name}')
    remove(here / 'masks')
    pixels = picture.size[0] * picture.size[1]
    place = Place(here, False, here, Reading(), (picture.name,), found.made_by, labels.names)
    with coco.writer(place) as add:
        add(LabelledPicture(1, picture.name, picture.sha256, labels.labels, pixels))
    return paths


def write_region(found: Found, folder: Path) -> Path:
    """Write the mask of the region that is lit, 0 or 255, as PNG, into a new folder in `folder`."""
    path = fresh(folder) / f'region-{found.lit}.png'
    path.write_bytes(encoded('.png', (found.labels.labels == found.lit).astype('uint8') * 255))
    return path


def fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder for all files of a demo. What a demo that was killed has left behind is removed first."""
    for old in Path(tempfile.gettempdir()).glob(f'{PREFIX}*'):
        if old.is_dir() and not old.is_symlink() and old.stat().st_uid == os.getuid():
            remove_if_left(old)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = filelock.FileLock(folder / LOCK)
    lock.acquire()
    (folder / OURS).mkdir()
    stop = threading.Event()
    threading.Thread(target=keep_young, args=(folder / OURS, stop), daemon=True).start()
    try:
        yield folder
    finally:
        stop.set()
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_if_left(folder: Path) -> None:
    """Remove a demo's folder unless the demo still runs, which holds its lock."""
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except (filelock.Timeout, OSError):
        return
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def keep_young(folder: Path, stop: threading.Event) -> None:
    """Remove files in time until stopped."""
    while not stop.wait(EVERY):
        sweep(folder, HOUR - 2 * EVERY)


def sweep(folder: Path, age: float) -> None:
    """Remove what was written into a folder longer than so many seconds ago."""
    for path in folder.iterdir():
        if path.stat().st_mtime < time.time() - age:
            remove(path)
