"""Decoding in other processes: the same pictures, within limits that really end it, whatever becomes of the processes."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support.processes import start

from padseg.commands import main
from padseg.images import Found, ImageError, Reading, count_apart, decode_apart, decode_with_notes, frames_of, size_apart
from padseg.images.apart import WORKERS, Worker
from padseg.images.messages import send

ROOT = Path(__file__).parents[2]
PICTURES = sorted(path for path in (ROOT / 'data/images').rglob('*') if path.suffix in ('.jpg', '.png'))
SOON = 20.0  # seconds, on a busy machine; what is ended would go on for longer


def encoded(picture: PIL.Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def long_jpeg(side: int, scans: int) -> bytes:
    """A JPEG that takes long: each scan changes nothing, but goes through all of its blocks."""
    data = encoded(PIL.Image.new('L', (side, side), 128), 'JPEG', progressive=True)
    last = data[data.rindex(b'\xff\xda') : -2]
    return data[:-2] + last * scans + data[-2:]


def moving(format: str, frames: int = 6) -> bytes:
    """An animation in which every frame changes a part, some of it transparent."""
    noise = np.random.default_rng(0).integers(0, 256, (frames, 24, 30, 3), dtype=np.uint8)
    pictures = [PIL.Image.fromarray(one).quantize(31) if format == 'GIF' else PIL.Image.fromarray(one) for one in noise]
    options = {'WEBP': {'lossless': True}, 'GIF': {'disposal': 2, 'transparency': 3}}.get(format, {})
    return encoded(pictures[0], format, save_all=True, append_images=pictures[1:], **options)


def hollow_gif(side: int, frames: int) -> bytes:
    """An animation of many pixels in few bytes: each frame changes one."""
    whole = encoded(PIL.Image.new('P', (1, 1)), 'GIF')
    frame = b'!\xf9\x04\0\0\0\0\0,' + struct.pack('<HHHHB', 0, 0, 1, 1, 0) + whole[whole.index(b',') + 10 : -1]
    return b'GIF89a' + struct.pack('<HHBBB', side, side, 128, 0, 0) + bytes((0, 0, 0, 255, 255, 255)) + frame * frames + b';'


def tiles(side: int) -> bytes:
    """A TIFF whose tiles are of one pixel."""
    count = side * side
    tags = (
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 4, 1, 1),
        (323, 4, 1, 1),
    )
    start = 8 + 2 + 12 * 10 + 4
    entries = [*tags, (324, 4, count, start), (325, 4, count, start + 4 * count)]
    head = b'II*\0' + struct.pack('<IH', 8, len(entries)) + b''.join(struct.pack('<HHII', *entry) for entry in entries) + bytes(4)
    return head + struct.pack('<I', 8) * count + struct.pack('<I', 1) * count


def put_comment(path: Path, size: int) -> Path:
    """A PPM that begins with a comment of so many bytes, which Pillow reads one by one; it takes no room on disk."""
    with path.open('wb') as file:
        file.write(b'P6 #')
        file.truncate(size)
    return path


def put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize('path', PICTURES, ids=lambda path: path.name)
def test_it_is_the_same_picture(path):
    told = []
    reading = Reading(void=True, shrink=50_000)
    decoded = decode_apart(path, reading, known=lambda size, digest: told.append((size, len(digest))))
    right = decode_with_notes(path.read_bytes(), reading)
    assert np.array_equal(decoded.image, right.image) and decoded[2:] == right[2:]
    assert told == [(path.stat().st_size, 64)]
    assert size_apart(path, reading) == PIL.Image.open(path).size


def test_transparency_and_readings_come_through(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 3, (7, 9, 4), dtype=np.uint8) * 127
    path = put(tmp_path, 'a.png', encoded(PIL.Image.fromarray(rgba), 'PNG'))
    reading = Reading(void=True, background=(1, 77, 3), value_range=(0.5, 2))
    decoded, right = decode_apart(path, reading), decode_with_notes(path.read_bytes(), reading)
    assert np.array_equal(decoded.image, right.image) and np.array_equal(decoded.void, right.void) and decoded.image.flags.writeable
    assert decoded.void.dtype == bool


@pytest.mark.parametrize('name', ['gone.png', 'words.png', 'empty.png', 'pipe.png', 'large.png', 'folder.png'])
def test_reasons_are_those_of_decoding_here(name, tmp_path):
    put(tmp_path, 'words.png', b'words and no picture')
    put(tmp_path, 'empty.png', b'')
    put(tmp_path, 'large.png', b'x' * 1001)
    os.mkfifo(tmp_path / 'pipe.png')
    (tmp_path / 'folder.png').mkdir()
    reasons = {
        'gone.png': (FileNotFoundError, 'No such file'),
        'words.png': (ImageError, 'not a picture that padseg reads'),
        'empty.png': (ImageError, 'empty file'),
        'large.png': (ImageError, 'file of 1001 bytes exceeds 1000'),
    }
    kind, words = reasons.get(name, (ImageError, 'not a regular file'))
    told = []
    with pytest.raises(kind, match=words):
        decode_apart(tmp_path / name, Reading(max_bytes=1000), known=lambda size, digest: told.append(size))
    assert told == {'words.png': [20], 'empty.png': [0]}.get(name, [])


@pytest.mark.parametrize('name', ['scans.jpg', 'tiles.tif', 'comment.ppm'])
def test_what_takes_too_long_is_ended(name, tmp_path):
    """Of all the decoders' loops: in C without the interpreter, in C that holds it, in Python."""
    data = {
        'scans.jpg': lambda: long_jpeg(3000, 450),
        'tiles.tif': lambda: tiles(1200),
        'comment.ppm': lambda: b'P6 #' + b'x' * 20_000_000 + b'\n1 1 255 abc',
    }[name]()
    path = put(tmp_path, name, data)
    with pytest.raises(ImageError, match='takes more than 0.2 s to decode'):
        decode_apart(path, Reading(max_seconds=0.2))
    assert decode_apart(PICTURES[0], Reading()).image.size


@pytest.mark.parametrize(('after', 'words'), [(0.0, 'its decoder crashed'), (0.25, 'takes more than 0.3 s')])
def test_a_worker_that_ends_just_before_its_limit_has_taken_too_long(after, words):
    """Its time began when it answered, and that may be noticed late: of a limit of 0.3 s, 0.25 may be left to see."""
    ours, theirs = socket.socketpair()
    send(theirs, {'process': 1})
    worker = Worker(ours, lambda: False)
    threading.Timer(after, theirs.close).start()
    with ours, pytest.raises(ImageError, match=words):
        worker.last_answer(Reading(max_seconds=0.3), lambda: False)


def test_looking_at_a_header_is_limited_too(tmp_path):
    path = put_comment(tmp_path / 'a.ppm', 50_000_000)
    for look in (size_apart, count_apart):
        with pytest.raises(ImageError, match='takes more than'):
            look(path, Reading(max_seconds=0.2))


needs_proc = pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='the system does not say how much memory a process has')


@needs_proc
@pytest.mark.parametrize('format', ['PNG', 'WEBP', 'GIF', 'TIFF', 'JPEG'])
def test_what_takes_too_much_memory_fails(format, tmp_path):
    path = put(tmp_path, 'a', encoded(PIL.Image.new('RGB', (3000, 3000)), format))
    with pytest.raises(ImageError):
        decode_apart(path, Reading(max_memory=30_000_000))
    small = put(tmp_path, 'b', encoded(PIL.Image.new('RGB', (500, 500)), format))
    assert decode_apart(small, Reading(max_memory=30_000_000)).image.shape == (500, 500, 3)


def test_a_picture_that_is_no_longer_wanted_is_given_up(tmp_path):
    path = put_comment(tmp_path / 'a.ppm', 300_000_000)
    began = time.monotonic()
    with pytest.raises(ImageError, match='the run was stopped'):
        decode_apart(path, Reading(max_seconds=1000), stopped=lambda: True)
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize('killed', ['server', 'workers', 'both'])
def test_processes_that_are_killed_are_made_anew(killed, tmp_path):
    right = decode_apart(PICTURES[0], Reading())
    if killed != 'workers':
        WORKERS.process.kill()
        WORKERS.process.wait()
    if killed != 'server':
        for worker in WORKERS.idle:
            os.kill(worker.process, signal.SIGKILL)
    with ThreadPoolExecutor(3) as pool:  # none of the idle ones is enough for all
        seen = list(pool.map(lambda number: attempt(PICTURES[0]), range(6)))
    lost = [one for one in seen if isinstance(one, str)]
    assert len(lost) <= (len(seen) if killed != 'server' else 0)
    assert np.array_equal(decode_apart(PICTURES[0], Reading()).image, right.image)
    assert all(isinstance(one, str) or np.array_equal(one, right.image) for one in seen)


def attempt(path):
    try:
        return decode_apart(path, Reading()).image
    except ImageError as error:
        return str(error)


def test_a_fork_has_processes_of_its_own():
    decode_apart(PICTURES[0], Reading())
    before = {worker.process for worker in WORKERS.idle}
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        image = decode_apart(PICTURES[0], Reading()).image
        os.write(writes, json.dumps([int(image.sum()), [worker.process for worker in WORKERS.idle]]).encode())
        os._exit(0)
    total, processes = json.loads(os.read(reads, 10_000))
    assert os.waitpid(child, 0)[1] == 0
    assert total == decode_apart(PICTURES[0], Reading()).image.sum() and not before & set(processes)


def test_a_relative_path_is_of_this_process(tmp_path, monkeypatch):
    put(tmp_path, 'only-here.png', encoded(PIL.Image.new('RGB', (3, 2)), 'PNG'))
    decode_apart(PICTURES[0], Reading())
    monkeypatch.chdir(tmp_path)
    assert decode_apart(Path('only-here.png'), Reading()).image.shape == (2, 3, 3)


def test_many_threads_at_once():
    right = [decode_with_notes(path.read_bytes()).image for path in PICTURES]
    with ThreadPoolExecutor(4) as pool:
        for image, expected in zip(pool.map(attempt, PICTURES * 3), right * 3, strict=True):
            assert np.array_equal(image, expected)
    assert threading.active_count() < 50


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('order', [(0, 1, 2, 3, 4, 5), (3, 5, 1, 1, 4)], ids=['in order', 'not in order'])
def test_frames_are_those_of_a_file_opened_anew(format, order, tmp_path):
    path = put(tmp_path, 'a', moving(format))
    reading = Reading(frames='all', void=True)
    assert count_apart(path, reading) == 6
    for frame in order:
        decoded, right = decode_apart(path, reading, frame), decode_with_notes(path.read_bytes(), reading, frame)
        assert np.array_equal(decoded.image, right.image) and decoded.notes == right.notes
        assert decoded.void is right.void is None or np.array_equal(decoded.void, right.void)
    other = put(tmp_path, 'a', moving(format)[::-1])
    with pytest.raises(ImageError):
        decode_apart(other, reading, 5)


def test_frames_of_a_file_take_one_pass(tmp_path):
    """Twice as many frames take about twice as long: in a pass for each frame it would be four times."""
    seconds = []
    for frames in (100, 200):
        path = put(tmp_path, 'a.gif', hollow_gif(600, frames))  # large: the processor's time is counted in hundredths of a second
        began = worked(path)
        for frame in range(frames):
            decode_apart(path, Reading(frames='all'), frame)
        seconds.append(worked(path) - began)
    assert seconds[1] < 3 * seconds[0]


def worked(path: Path) -> float:
    """Seconds of the processor that the one idle worker has taken."""
    decode_apart(PICTURES[0], Reading())
    while len(WORKERS.idle) > 1:
        WORKERS.idle.pop().end()
    fields = Path(f'/proc/{WORKERS.idle[0].process}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def test_an_animation_of_too_many_pixels_is_refused(tmp_path):
    path = put(tmp_path, 'a.gif', hollow_gif(2000, 1000))
    found = Found(path, 'a.gif')
    assert decode_apart(path, Reading()).notes == ('first of 1000 frames',)
    reading = Reading(frames='all', max_pixels=4_000_000)
    assert frames_of(found, reading) == [found]
    with pytest.raises(ImageError, match='1000 frames of 2000x2000 have more than 400000000 pixels together'):
        decode_apart(path, reading)
    assert len(frames_of(found, reading._replace(max_pixels=40_000_000))) == 1000


def test_a_gif_of_millions_of_frames(tmp_path):
    path = put(tmp_path, 'a.gif', hollow_gif(1, 2_000_000))
    assert decode_apart(path, Reading(max_seconds=5)).notes == ('first of more than 1000 frames',)
    assert count_apart(path, Reading(frames='all', max_seconds=5)) == 1001


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_decodes_a_bomb(number, tmp_path):
    (tmp_path / 'in').mkdir()
    put(tmp_path, 'in/a.png', encoded(PIL.Image.new('RGB', (32, 32)), 'PNG'))
    put_comment(tmp_path / 'in/b.ppm', 300_000_000)
    os.mkfifo(tmp_path / 'events')
    arguments = ['run', '--dir', 'in', '--out', 'out', '--method', 'grid', '--log-json', '--max-seconds', '1000']
    run = start(main, arguments, folder=tmp_path, stderr=tmp_path / 'events', group=True)
    with open(tmp_path / 'events', encoding='utf-8') as events:
        for line in events:
            if '"start"' in line:
                os.killpg(run.process.pid, number)
                began = time.monotonic()
    run.process.join(60)
    assert time.monotonic() - began < SOON
    assert run.process.exitcode == 128 + number
    assert 'b.ppm' not in (tmp_path / 'out/manifest.jsonl').read_text()


def test_a_process_that_is_killed_leaves_none_that_decode(tmp_path):
    path = put_comment(tmp_path / 'a.ppm', 300_000_000)
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        WORKERS.server = None  # one of its own, as a process has that was not forked
        decode_apart(PICTURES[0], Reading())
        os.write(writes, str(WORKERS.idle[0].process).encode())
        decode_apart(path, Reading(max_seconds=1000), known=lambda size, digest: os.kill(os.getpid(), signal.SIGKILL))
    worker = os.pidfd_open(int(os.read(reads, 100)))
    os.waitpid(child, 0)
    assert select.select([worker], [], [], SOON)[0]
    os.close(worker)


def test_nothing_of_libtiff_reaches_stderr(tmp_path, capfd):
    pixels = zlib.compress(bytes(100))
    tags = ((256, 10), (257, 10), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, 10), (279, len(pixels)))
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    broken = b'II*\0' + struct.pack('<I', 8 + len(pixels)) + b'\xff' * len(pixels) + struct.pack('<H', len(tags)) + entries + bytes(4)
    with pytest.raises(ImageError, match='truncated or damaged'):
        decode_apart(put(tmp_path, 'a.tif', broken), Reading())
    assert capfd.readouterr().err == ''
