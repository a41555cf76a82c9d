"""The figures of a trained model, each printed by a command of padseg, and the tables and sheets made of them: padseg train-tiny --report.

Read it top to bottom: what is measured, how it is run, what is written.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image

from padseg.errors import PadsegError, UsageError
from padseg.evaluation.words import four_decimals, listing
from padseg.images import as_image
from padseg.system.files import atomic
from padseg.system.text import warn
from padseg.train.held_out import held_out_scene, prepare_scenes
from padseg.train.scenes import CLASSES, Scene
from padseg.types import Array

SCENES = 200
FEW = 24  # scenes for a figure that takes little time to measure again
PAINTED = 24  # scenes whose captions become pictures
PAINTED_SIDE = 256  # pixels
FOUND = 0.01  # share of a picture from which on a class counts as found
SHOWN = 6  # scenes and pictures on the sheet of samples
LINE, LETTER = 18, 6.5  # height of a line of a caption, width of a letter, in pixels

UNREFINED = ('--superpixels', '0', '--no-components', '--min-area', '0')
BASELINES = {
    'felzenszwalb, scale 600': ('--method', 'felzenszwalb', '--scale', '600'),
    'slic-rag, distance 30': ('--method', 'slic-rag', '--distance', '30'),
    'kmeans, 4 clusters': ('--method', 'kmeans', '--clusters', '4'),
}
DATA = ('bsds500', 'camvid', 'regions')  # names of data sets; regions: a folder of one's own with images/ and labels/
REGIONS = {'covering': 'covering', 'pri': 'PRI', 'vi': 'VI (bits)', 'f': 'boundary F', 'regions': 'regions'}
TITLES = {'regions': 'Regions', 'classes': 'Classes', 'painted': 'Pictures for captions', 'methods': 'Beside other methods'}
MARKED = re.compile(r'<!-- figures: ([a-z]+) -->\n.*?<!-- end of figures -->', re.DOTALL)
BLOCK = '<!-- figures: {} -->\n\n{}\n\n<!-- end of figures -->'  # blank lines, or some readers of Markdown take the table for HTML


class Row(NamedTuple):
    """A line of a table: what it is of, the options of `padseg eval` behind it, and its scores."""

    name: str
    command: str
    scores: Mapping[str, float]


class Report(NamedTuple):
    """All figures. regions, classes: of the model; baselines: of other methods, by name, for each data set; painted: shares of classes
    that are found."""

    regions: list[Row]
    classes: list[Row]
    baselines: dict[str, dict[str, Mapping[str, float]]]
    painted: dict[str, float]


class Failed(PadsegError):
    """A command of the report failed."""


class Commands:
    """Runs padseg's commands on a model, and names them as a reader would type them."""

    def __init__(self, model: Path, out: Path) -> None:
        self.model, self.out = model, out

    def run(self, name: str, images: Path, *options: str) -> Path:
        """Label maps of a folder of pictures, by the model unless the options name another method."""
        own = () if '--method' in options else ('--model', self.model)
        padseg('run', '--dir', images, '--out', self.out / name, '-q', *own, *options)
        return self.out / name / 'labels'

    def label(self, name: str, images: Path, classes: Path) -> Path:
        """Label maps of classes."""
        out = self.out / name
        padseg('label', '--dir', images, '--out', out, '-q', '--model', self.model, '--classes-file', classes)
        return out / 'labels'

    def score(self, name: str, *options: str | Path) -> Row:
        """Scores of `padseg eval`."""
        found = json.loads(padseg('eval', '--json', '-q', *options))
        words = [Path(option).name if isinstance(option, Path) else option for option in options]
        return Row(name, f'padseg eval {shlex.join(words)}', found['scores'])

    def baselines(self, data: str, images: Path, *stored: str | Path) -> dict[str, Mapping[str, float]]:
        """Scores of other methods. stored: the options of `padseg eval` before the folder of label maps."""
        return {name: self.score(name, *stored, self.run(f'{data}-{how[1]}', images, *how)).scores for name, how in BASELINES.items()}


def padseg(*words: str | Path) -> str:
    """What a command prints. Failed, with its last words, if it fails."""
    done = subprocess.run([sys.executable, '-m', 'padseg', *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['nothing was said'])[-1]
        raise Failed(f'`padseg {shlex.join(map(str, words))}` failed: {last}')
    return done.stdout


# ---- what is measured


def measure(model: Path, out: Path, data: Mapping[str, Path], scenes: int = SCENES, painted: int = PAINTED) -> Report:
    """Measure a model on scenes and on the data sets at hand. data: roots by the names of DATA. UsageError for other names.

    Results of commands stay in `out`, so that a report that was stopped goes on.
    """
    if strange := sorted(data.keys() - set(DATA)):
        raise UsageError(f'data sets of a report are {", ".join(DATA)}; got {strange[0]}')
    commands = Commands(model, out)
    held = prepare_scenes(out / 'scenes', scenes)
    regions, classes, baselines = [], [], {}
    if 'bsds500' in data:
        root, images = data['bsds500'], data['bsds500'] / 'images' / 'val'
        stored = ('bsds500', '--root', root, '--pred')
        regions.append(commands.score('BSDS500, validation split', *stored, commands.run('bsds500', images)))
        plain = commands.run('bsds500-unrefined', images, *UNREFINED)
        regions.append(commands.score(f'the same with {" ".join(UNREFINED)}', *stored, plain))
        baselines['bsds500'] = {model.name: regions[0].scores, **commands.baselines('bsds500', images, *stored)}
    if 'regions' in data:
        root = data['regions']
        truth = ('--labels', root / 'labels', '--regions', '--pred')
        regions.append(commands.score(root.name, *truth, commands.run('regions', root / 'images')))
    labels = commands.run('scenes-regions', held / 'images')
    truth = ('--labels', held / 'labels', '--regions', '--pred')
    regions.append(commands.score(f'held-out scenes ({scenes}), against their class maps', *truth, labels))
    if 'camvid' in data:
        root, images = data['camvid'], data['camvid'] / 'images' / 'val'
        stored = ('camvid', '--root', root, '--pred')
        classes.append(commands.score('CamVid, validation split', *stored, commands.run('camvid', images)))
        baselines['camvid'] = {model.name: classes[0].scores, **commands.baselines('camvid', images, *stored)}
    own = ('folder', '--root', held, '--model', model, '--geometry', 'whole')
    diffseg = (*own, '--protocol', 'diffseg', '--compare', 'native')
    classes.append(commands.score(f'held-out scenes ({scenes})', *diffseg))
    classes.append(commands.score('the same, classes named', *own, '--protocol', 'seg4diff-ovss'))
    classes.append(commands.score('the same, all 40 names', *own, '--protocol', 'seg4diff-ovss', '--names', 'all'))
    few = ('folder', '--root', prepare_scenes(out / 'few-scenes', FEW), '--model', model, '--geometry', 'whole')
    classes.append(commands.score(f'held-out scenes ({FEW}), classes named', *few, '--protocol', 'seg4diff-ovss'))
    return Report(regions, classes, baselines, paint(commands, painted))


def paint(commands: Commands, count: int) -> dict[str, float]:
    """Make pictures for the captions of scenes, and look for the captions' classes, among all names, in the scenes and in the pictures.

    Returns the shares of classes found in the scenes, in the pictures, and in the pictures if their captions are exchanged, which is what
    chance finds. Writes samples.jpg.
    """
    size = (PAINTED_SIDE, PAINTED_SIDE)
    drawn = [held_out_scene(number, size=size) for number in range(count)]
    folder, painted = prepare_scenes(commands.out / 'captions', count, size=size), commands.out / 'painted'
    captions, classes = folder / 'captions.txt', folder / 'classes.txt'
    captions.write_text(''.join(f'{each.caption}\n' for each in drawn), encoding='utf-8')
    padseg('generate', '--model', commands.model, '--prompts', captions, '--out', painted, '--size', str(PAINTED_SIDE), '-q')
    wanted = np.array([[name in each.names for name in CLASSES] for each in drawn])  # (N, 40)
    real = found(commands.label('captions-labelled', folder / 'images', classes))
    pictures = in_order(painted, [each.caption for each in drawn])
    made = found(commands.label('painted-labelled', painted / 'images', classes), [path.name for path in pictures])
    others = [np.roll(wanted, shift, 0) for shift in range(1, count)]
    write_samples(commands.out / 'samples.jpg', drawn[:SHOWN], pictures[:SHOWN])
    return {
        'scenes': share(real, wanted),
        'pictures': share(made, wanted),
        'pictures, with captions exchanged': float(np.mean([share(made, other) for other in others])),
    }


def in_order(painted: Path, captions: Sequence[str]) -> list[Path]:
    """The pictures that `padseg generate` made, in the order of their captions: its files are named after their captions."""
    rows = [json.loads(line) for line in (painted / 'manifest.jsonl').read_text(encoding='utf-8').splitlines()]
    files = {row['prompt']: painted / row['file'] for row in rows if row['file']}
    return [files[caption] for caption in captions]


def found(labels: Path, pictures: Sequence[str] = ()) -> Array:
    """Which classes have at least FOUND of the pixels of each label map in a folder: (N, classes) bool.

    pictures: names of the files that were labelled, in the order of the rows; by name if there are none.
    """
    files = [labels / f'{name}.png' for name in pictures] or sorted(labels.rglob('*.png'))
    maps = [np.asarray(PIL.Image.open(path)) for path in files]
    areas = np.array([np.bincount(each.ravel(), minlength=len(CLASSES) + 1)[: len(CLASSES) + 1] / each.size for each in maps])
    return areas[:, 1:] >= FOUND


def share(hits: Array, wanted: Array) -> float:
    """Which part of the classes that are wanted is found: (N, classes) bool each."""
    return float((hits & wanted).sum() / wanted.sum())


def write_samples(file: Path, scenes: Sequence[Scene], pictures: Sequence[Path]) -> None:
    """Write a sheet: captions, scenes, and the pictures made for the captions."""
    columns = [
        np.concatenate([caption_box(above.caption, PAINTED_SIDE), above.image, as_image(str(below))])
        for above, below in zip(scenes, pictures, strict=True)
    ]
    cv2.imwrite(str(file), np.concatenate(columns, 1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


def caption_box(text: str, width: int) -> Array:
    """The text in black on white, in three lines: (3 LINE, width, 3)."""
    box = np.full((3 * LINE, width, 3), 255, np.uint8)
    for number, line in enumerate(textwrap.wrap(text, int(width / LETTER))[:3]):
        cv2.putText(box, line, (2, LINE * number + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)
    return box


# ---- what is written


def tables(report: Report) -> dict[str, str]:
    """The tables of the report as Markdown, by name."""
    heads = ('pictures', *REGIONS.values())
    regions = listing(heads, ((row.name, *(digits(row.scores.get(name), name) for name in REGIONS)) for row in report.regions))
    classes = listing(
        ('pictures', 'mIoU order-free', 'accuracy', 'mIoU'),
        ((row.name, *(four_decimals(row.scores.get(name)) for name in ('miou_order_free', 'accuracy', 'miou'))) for row in report.classes),
    )
    painted = listing(
        ('classes of the caption that are found in', 'share'), ((name, four_decimals(part)) for name, part in report.painted.items())
    )
    found = {'regions': regions, 'classes': classes, 'painted': painted}
    if report.baselines:
        found['methods'] = methods_table(report.baselines)
    return found


def methods_table(baselines: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A line a method, and columns of both data sets."""
    columns = {
        'bsds500': {'covering': 'BSDS500: covering', 'pri': 'PRI', 'vi': 'VI', 'f': 'boundary F'},
        'camvid': {
            'accuracy': 'CamVid: accuracy',
            'mean_accuracy': 'mean accuracy',
            'miou': 'mIoU',
            'miou_order_free': 'mIoU order-free',
        },
    }
    sets = {name: columns[name] for name in columns if name in baselines}
    heads = ('label maps', *(title for titles in sets.values() for title in titles.values()))
    methods = next(iter(baselines.values()))
    lines = (
        (method, *(four_decimals(baselines[name][method].get(key)) for name, keys in sets.items() for key in keys)) for method in methods
    )
    return listing(heads, lines)


def digits(value: float | None, name: str) -> str:
    """A score with four decimals, a number of regions with two."""
    return four_decimals(value) if value is None or name != 'regions' else f'{value:.2f}'


def write_report(report: Report, out: Path) -> Path:
    """Write OUT/report.md, with the command of every line, and OUT/report.json."""
    parts = ['# Figures of the model\n']
    for name, table in tables(report).items():
        parts.append(f'## {TITLES[name]}\n\n{table}\n')
        commands = {'regions': report.regions, 'classes': report.classes}.get(name, [])
        parts += [f'```text\n{"".join(f"{row.command}{chr(10)}" for row in commands)}```\n'] if commands else []
    for path, text in ((out / 'report.md', '\n'.join(parts)), (out / 'report.json', json.dumps(as_plain(report), indent=2) + '\n')):
        with atomic(path) as temporary:
            temporary.write_text(text, encoding='utf-8')
    return out / 'report.md'


def as_plain(report: Report) -> dict[str, Any]:
    return {**report._asdict(), 'regions': [row._asdict() for row in report.regions], 'classes': [row._asdict() for row in report.classes]}


def marked(file: Path) -> str:
    """The text of a Markdown file, in which tables stand between `<!-- figures: NAME -->` and `<!-- end of figures -->`.

    UsageError if it has none, or one of a name that no report has, or is not UTF-8.
    """
    try:
        text = file.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UsageError(f'{file} is not text in UTF-8') from error
    names = [match[1] for match in MARKED.finditer(text)]
    if not names:
        raise UsageError(f'{file} has no table between <!-- figures: NAME --> and <!-- end of figures -->')
    if strange := sorted(set(names) - TITLES.keys()):
        raise UsageError(f'{file} has a table of figures "{strange[0]}"; reports have {", ".join(TITLES)}')
    return text


def renew(file: Path, report: Report) -> list[str]:
    """Replace the marked tables of a Markdown file by those that the report has; returns their names. UsageError as of `marked`."""
    new, done = tables(report), []

    def replaced(match: re.Match[str]) -> str:
        if match[1] not in new:
            return match[0]
        done.append(match[1])
        return BLOCK.format(match[1], new[match[1]])

    renewed = MARKED.sub(replaced, marked(file))
    with atomic(file) as temporary:
        temporary.write_text(renewed, encoding='utf-8')
    return done


def make_report(model: Path, out: Path, data: Mapping[str, Path], files: Sequence[Path] = ()) -> Path:
    """Measure a model, write OUT/report.md, OUT/report.json and OUT/samples.jpg, and renew the tables of these files."""
    for file in files:
        marked(file)  # before hours of measuring
    out.mkdir(parents=True, exist_ok=True)
    report = measure(model, out, data)
    written = write_report(report, out)
    for file in files:
        warn(f'{file}: renewed {", ".join(renew(file, report)) or "nothing"}')
    return written
