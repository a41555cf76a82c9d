"""Annotated pictures on disk: which a source holds, and the regions of one of them.

A source is one of these, with options behind commas, as in `coco:/data/coco,split=val2017`:

- `FOLDER` with images/ and labels/ (PNG label maps of 8 or 16 bit), or images/train and labels/train, or those of `split=`. Line k of its
  classes.txt names the value k, from 0 (`first=1`: from 1). Without classes.txt, values are region numbers, and x_0.png, x_1.png are label
  maps of x by several annotators. `void=` is the value that counts as nothing: 255, another one, or `none`. Values of padseg.toml, if there
  is one, come first.
- `coco:FOLDER` with train2017/ or images/train2017/ (or those of `split=`), and the first of these that is there, or that of `labels=`:
  `stuff`, the 171 classes of COCO-Stuff, as stuffthingmaps/train2017/ or wherever else `padseg eval` reads them; `panoptic`, as
  annotations/panoptic_train2017.json with panoptic_train2017/ or annotations/panoptic_train2017/; `instances`, as
  annotations/instances_train2017.json. Captions are in annotations/captions_train2017.json. The JSON files may also lie in FOLDER itself.
- `sa1b:FOLDER` with sa_1.jpg and sa_1.json side by side, in folders below too.
- the output folder of a finished `padseg label` or `padseg run`; `images=` is where the pictures are now.

`pictures=` takes so many pictures of a source, spread evenly.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from padseg.datasets.base import VOID, Layout, LayoutError, LayoutShown, Split
from padseg.datasets.layouts import ALLOW, FoundLayout, files_below, find_place, samples, unique
from padseg.datasets.own import FILE, FolderSettings, open_folder, read_settings
from padseg.datasets.readers import NO_RECORD, number, read_annotations, refuse_labels, segment_places, whole_counts
from padseg.datasets.rows import COCO_HOMES, COCO_IMAGES, COCO_LAYOUTS, COCO_OBJECT_LAYOUTS
from padseg.datasets.tables import DENSE, Table, expanded, facts, look_up
from padseg.errors import NoImages, UsageError
from padseg.exports import read_label_map
from padseg.images import MAX_BYTES, MAX_PIXELS, SUFFIXES, ImageError, Reading, contents, decode_apart, file_and_frame
from padseg.run.convert import stored_path
from padseg.run.job import settings_from
from padseg.run.locks import all_records
from padseg.run.records import entry_of, read_run
from padseg.run.source import folder_of
from padseg.system.files import inside

if TYPE_CHECKING:
    from padseg.types import Array, Image

NAMES = 'classes.txt'
RUN = 'run.json'
DEFAULT_SPLIT = {'coco': 'train2017', 'folder': 'train'}
OPTIONS = {
    'folder': ('split', 'void', 'first', 'pictures'),
    'coco': ('split', 'labels', 'pictures'),
    'sa1b': ('pictures',),
    'label': ('images', 'pictures'),
}
OPTION = re.compile(r'(.*),(split|void|first|labels|images|pictures)=([^,]*)', re.DOTALL)
LONGEST = 1 << 28  # bytes of the annotations of one picture
PANOPTIC = tuple(layout for layout in COCO_OBJECT_LAYOUTS if layout.reader == 'panoptic')
INSTANCES, CAPTIONS = (
    Layout(name, COCO_HOMES, COCO_IMAGES, (), annotations=(f'annotations/{name}_{{split}}.json', f'{name}_{{split}}.json'))
    for name in ('instances', 'captions')
)

Runs = dict[str, Any]  # a mask as pycocotools takes it: size (H, W) and counts
Size = tuple[int, int]  # height, width in pixels


class Picture(NamedTuple):
    """An annotated picture. name: its POSIX path in the source, without suffix; image: its file, and frame: of that file.

    truths: its label files, one per annotator; regions: JSON of what a file for many pictures says of this one; captions: descriptions.
    """

    name: str
    image: Path
    truths: tuple[Path, ...] = ()
    regions: bytes = b''
    frame: int = 0
    captions: tuple[str, ...] = ()


class Source(NamedTuple):
    """Pictures annotated in one way. title: as the user gave it; kind: key of REGIONS; layout: what was found, in words.

    names: of the classes by number, empty for regions without classes; table: the class of each value of a label map, or None if values are
    region numbers; void: a region number that counts as nothing; annotations: the file that holds the regions of all pictures; reading: how
    files become pictures; left_out: what is not used, in words.
    """

    title: str
    kind: str
    layout: str
    pictures: tuple[Picture, ...]
    names: tuple[str, ...] = ()
    table: Table | None = None
    void: int | None = None
    annotations: Path | None = None
    reading: Reading = Reading()
    left_out: tuple[str, ...] = ()


class Regions(NamedTuple):
    """The regions of a picture, either as a label map or as masks, which may overlap.

    labels: (H, W) int32, the region of each pixel, or VOID; masks: run lengths of each region; classes: number of each region's class,
    empty if regions have none. size: (H, W).
    """

    size: Size
    labels: Array | None
    masks: tuple[Runs, ...]
    classes: tuple[int, ...]


def open_source(title: str) -> Source:
    """Find what a source holds, without reading pictures. Raises NoImages, UsageError, UnreadableLabels or OutputConflict, in one line."""
    kind, folder, options = parse(title)
    if not folder.is_dir():
        raise NoImages(f'there is no folder {folder}')
    if kind == 'folder' and (folder / RUN).is_file():
        kind = 'label'
    strange = [name for name in options if name not in OPTIONS[kind]]
    if strange:
        raise UsageError(f'{title}: {strange[0]}= is not an option of this source; its options are {", ".join(OPTIONS[kind])}')
    try:
        source = OPENERS[kind](title, folder, options)
    except LayoutShown as error:  # which shows all layouts, on many lines
        raise LayoutError(f'{folder} has no images/ with labels/ of the same names in it') from error
    except LayoutError as error:
        raise LayoutError(str(error).removesuffix(f' ({ALLOW})')) from error
    if 'pictures' in options:
        source = source._replace(pictures=spread_over(source.pictures, whole(title, 'pictures', options['pictures'], 1)))
    return source


def parse(title: str) -> tuple[str, Path, dict[str, str]]:
    """Split a source into its kind, folder and options."""
    options: dict[str, str] = {}
    rest = title
    while match := OPTION.fullmatch(rest):
        rest, name, value = match.groups()
        if name in options:
            raise UsageError(f'{title}: {name}= is given twice')
        options[name] = value
    kind, colon, folder = rest.partition(':')
    return (kind, Path(folder), options) if colon and kind in ('coco', 'sa1b') else ('folder', Path(rest), options)


def whole(title: str, name: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text[:12]) < 1 << 31):
        raise UsageError(f'{title}: {name}= is a whole number from {least}; got {text}')
    return int(text)


def spread_over(pictures: tuple[Picture, ...], count: int) -> tuple[Picture, ...]:
    return tuple(pictures[i * len(pictures) // count] for i in range(count)) if count < len(pictures) else pictures


def open_label_maps(title: str, folder: Path, options: Mapping[str, str]) -> Source:
    """A folder of pictures and label maps."""
    split = options.get('split')
    if split is None and (folder / 'images' / DEFAULT_SPLIT['folder']).is_dir():
        split = DEFAULT_SPLIT['folder']
    if (folder / FILE).is_file():
        settings = read_settings(folder)
    else:
        settings = FolderSettings(classes=names_in(folder / NAMES))
    if 'void' in options:
        void = None if options['void'] == 'none' else whole(title, 'void', options['void'], 0)
        if void is not None and void >= DENSE:
            raise UsageError(f'{title}: void= is a value below {DENSE}, or none; got {void}')
        settings = settings.model_copy(update={'ignore_index': void})
    if 'first' in options:
        if options['first'] not in ('0', '1'):
            raise UsageError(f'{title}: first= is 0 or 1; got {options["first"]}')
        settings = settings.model_copy(update={'reduce_zero_label': options['first'] == '1'})
    data = open_folder(folder, split or '', settings, allow_missing=True)
    pictures = tuple(Picture(sample.name, sample.image, sample.truths) for sample in data.samples if sample.image)
    return Source(
        title,
        'label map',
        f'{data.layout} ({data.split})',
        pictures,
        data.classes,
        data.table,
        None if data.table else settings.ignore_index,
        left_out=unmatched(data.missing),
    )


def unmatched(count: int) -> tuple[str, ...]:
    return (f'{count} without picture or labels',) if count else ()


def names_in(path: Path) -> list[str] | None:
    """Class names, one a line; None if there is no file."""
    if not path.exists():
        return None
    try:
        lines = contents(path).decode('utf-8-sig').splitlines()
    except (ImageError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f'{path} cannot be read as text: {error}') from error
    names = [' '.join(line.split()) for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UsageError(f'{path} has an empty line: line k names the value k')
    return names


def open_coco(title: str, root: Path, options: Mapping[str, str]) -> Source:
    """COCO in one of its forms. Raises LayoutError with what is missing."""
    split = options.get('split', DEFAULT_SPLIT['coco'])
    chosen = options.get('labels')
    if chosen is not None and chosen not in FORMS:
        raise UsageError(f'{title}: labels= is one of {", ".join(FORMS)}; got {chosen}')
    for form in (chosen,) if chosen else FORMS:
        place = placed(root, FORMS[form].layouts, split)
        if place:
            source = FORMS[form].open(title, place, split)
            break
    else:
        if placed(root, (Layout('pictures', COCO_HOMES, COCO_IMAGES, ()),), split) is None:
            raise LayoutError(f'{root} lacks the pictures of COCO: {split}/*.jpg or images/{split}/*.jpg')
        wanted = ', or '.join(FORMS[form].wanted for form in ((chosen,) if chosen else FORMS))
        raise LayoutError(f'{root} has pictures but lacks annotations of COCO: {wanted.replace("*", split)}')
    if not source.pictures:
        raise LayoutError(f'{root}: no picture of {split} is in its annotations')
    described = placed(root, (CAPTIONS,), split)
    return with_captions(source, coco_captions(described.annotations)) if described and described.annotations else source


def placed(root: Path, layouts: Iterable[Layout], split: str) -> FoundLayout | None:
    try:
        return find_place(root, layouts, 'COCO', 'train', split)
    except LayoutShown:
        return None


def open_stuff(title: str, place: FoundLayout, split: str) -> Source:
    """COCO-Stuff's label maps, of 171 classes."""
    known = facts('coco_stuff171')
    table = expanded(known['values'][place.layout.values], 0, None)
    complete, missing = samples(place, Split(split), True)
    pictures = tuple(Picture(sample.name, sample.image, sample.truths) for sample in complete if sample.image)
    return Source(title, 'label map', f'stuff maps, {split}', pictures, tuple(known['names']), table, left_out=unmatched(missing))


def open_panoptic(title: str, place: FoundLayout, split: str) -> Source:
    """COCO's panoptic annotations: a PNG per picture, and a file that tells the category of each segment."""
    assert place.labels and place.annotations
    pictures, pngs = pictures_below(place.images), unique(files_below(place.labels, ('.png',)))
    content = read_annotations(place.annotations)
    chosen = []
    missing = 0
    try:
        names, classes = categories(content)
        for annotation in content['annotations']:
            name = stem(annotation['file_name'])
            segments = sorted((number(one['id']), classes[one['category_id']]) for one in annotation['segments_info'])
            if name in pictures and name in pngs:
                chosen.append(Picture(name, pictures[name], (pngs[name],), json.dumps(segments).encode()))
            missing += name not in pictures or name not in pngs
    except NO_RECORD as error:
        refuse_labels(place.annotations, f'not panoptic annotations in COCO format: {error!r}')
    return Source(
        title, 'panoptic', f'panoptic, {split}', in_order(chosen), names, annotations=place.annotations, left_out=unmatched(missing)
    )


def open_instances(title: str, place: FoundLayout, split: str) -> Source:
    """COCO's instances: polygons or run lengths. Crowds, whose outlines are rough, are left out."""
    assert place.annotations
    pictures = pictures_below(place.images)
    content = read_annotations(place.annotations)
    regions: dict[Any, list[Any]] = defaultdict(list)
    crowds = 0
    try:
        names, classes = categories(content)
        files = {one['id']: stem(one['file_name']) for one in content['images']}
        for annotation in content['annotations']:
            if annotation.get('iscrowd'):
                crowds += 1
            else:
                regions[annotation['image_id']].append((classes[annotation['category_id']], annotation['segmentation']))
        chosen = [
            Picture(name, pictures[name], (), json.dumps(regions.get(one, [])).encode()) for one, name in files.items() if name in pictures
        ]
    except NO_RECORD as error:
        refuse_labels(place.annotations, f'not annotations in COCO format: {error!r}')
    missing = len(pictures.keys() - set(files.values())) + len(files) - len(chosen)
    left_out = (*unmatched(missing), *([f'{crowds} crowds'] if crowds else []))
    return Source(title, 'instances', f'instances, {split}', in_order(chosen), names, annotations=place.annotations, left_out=left_out)


class Form(NamedTuple):
    """A form of COCO's annotations. wanted: its files, with * for the split."""

    layouts: tuple[Layout, ...]
    open: Callable[[str, FoundLayout, str], Source]
    wanted: str


FORMS = {
    'stuff': Form(COCO_LAYOUTS, open_stuff, 'stuffthingmaps/*/'),
    'panoptic': Form(PANOPTIC, open_panoptic, 'annotations/panoptic_*.json with panoptic_*/'),
    'instances': Form((INSTANCES,), open_instances, 'annotations/instances_*.json'),
}


def pictures_below(folder: Path) -> dict[str, Path]:
    return unique(files_below(folder, tuple(sorted(SUFFIXES))))


def in_order(pictures: Iterable[Picture]) -> tuple[Picture, ...]:
    """Sorted by name; of several with one name, the last."""
    by_name = {picture.name: picture for picture in pictures}
    return tuple(by_name[name] for name in sorted(by_name))


def stem(name: str) -> str:
    """A file's name in annotations, without suffix; only ever looked up among files that were found."""
    return name.rpartition('.')[0] or name


def categories(content: Any) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the categories in a file of COCO's form, and the place of each id in them. Raises one of NO_RECORD."""
    named = {one['id']: ' '.join(one['name'].split()) for one in content['categories']}
    if not named or not all(named.values()):
        raise ValueError('a category without a name')
    names = tuple(dict.fromkeys(named.values()))
    return names, {one: names.index(name) for one, name in named.items()}


def open_sa1b(title: str, folder: Path, options: Mapping[str, str]) -> Source:
    """SA-1B: masks without classes, a JSON file beside each picture."""
    pictures, files = pictures_below(folder), unique(files_below(folder, ('.json',)))
    both = sorted(pictures.keys() & files.keys())
    if not both:
        raise LayoutError(f'{folder} has no x.jpg with x.json beside it, as SA-1B has')
    chosen = tuple(Picture(name, pictures[name], (files[name],)) for name in both)
    return Source(title, 'sa1b', 'SA-1B', chosen, left_out=unmatched(len(pictures.keys() - files.keys())))


def open_labelled(title: str, out: Path, options: Mapping[str, str]) -> Source:
    """The results of `padseg label` or `padseg run`. Names of pictures lead nowhere else than below the folder of pictures."""
    run = read_run(out / RUN)
    if run is None or run.status != 'finished':
        raise NoImages(f'the run in {out} is not finished: the same command continues it')
    settings = settings_from(run.settings)
    images = Path(options['images']) if 'images' in options else folder_of(Path(run.source))
    if not images.is_dir():
        raise NoImages(f'the pictures of {out} were in {images}, which is not there: {title},images=FOLDER says where they are')
    entries = [entry_of(record) for record in all_records(out).values()]
    done = sorted((entry for entry in entries if entry.status == 'done'), key=lambda entry: entry.input)
    chosen = []
    for entry in done:
        file, frame = file_and_frame(entry.input)
        chosen.append(Picture(entry.input, inside(images, file, linked=True), (stored_path(out, entry.input),), frame=frame))
    if not chosen:
        raise NoImages(f'no picture is done in {out}: see failures.jsonl there')
    failed = len(entries) - len(done)
    classes = len(settings.classes)
    return Source(
        title,
        'label map',
        f'results of padseg {"label" if classes else "run"}',
        tuple(chosen),
        settings.classes,
        (VOID, *range(classes)) if classes else None,
        None if classes else 0,
        reading=settings.reading._replace(max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES),
        left_out=(f'{failed} that failed',) if failed else (),
    )


OPENERS: dict[str, Callable[[str, Path, Mapping[str, str]], Source]] = {
    'folder': open_label_maps,
    'coco': open_coco,
    'sa1b': open_sa1b,
    'label': open_labelled,
}


def read_image(source: Source, picture: Picture) -> Image:
    """Decode a picture in a process of its own: (H, W, 3). Raises ImageError with its file and the reason."""
    try:
        return decode_apart(picture.image, source.reading, picture.frame).image
    except (ImageError, OSError) as error:
        raise ImageError(f'{picture.image}: {getattr(error, "strerror", None) or error}') from error


def read_regions(source: Source, picture: Picture, size: Size, annotator: int = 0) -> Regions:
    """Read the regions of a picture of size (H, W). Raises UnreadableLabels with the file and the reason."""
    return REGIONS[source.kind](source, picture, size, annotator)


def label_map_regions(source: Source, picture: Picture, size: Size, annotator: int) -> Regions:
    path = picture.truths[annotator]
    raw = read_label_map(path, size)
    if source.table is None:
        labels = raw.astype(np.int32)
        labels[labels == source.void] = VOID
        return Regions(size, labels, (), ())
    found = look_up(raw, source.table)
    if found is None:
        strange = [value for value in np.unique(raw).tolist() if not 0 <= value < len(source.table) or source.table[value] < VOID]
        refuse_labels(path, f'the value {strange[0]} has no name: there are {len(source.names)} classes')
    return Regions(size, found, (), tuple(range(len(source.names))))


def panoptic_regions(source: Source, picture: Picture, size: Size, annotator: int) -> Regions:
    """Segments; 0, which is no segment, is void."""
    assert source.annotations
    segments = [(0, VOID), *(segment for segment in json.loads(picture.regions) if segment[0])]
    numbers = np.array([one for one, _ in segments], np.int64)
    places = segment_places(picture.truths[annotator], numbers, source.annotations, size)
    return Regions(size, places.astype(np.int32) - 1, (), tuple(category for _, category in segments[1:]))


def instances_regions(source: Source, picture: Picture, size: Size, annotator: int) -> Regions:
    assert source.annotations
    regions = json.loads(picture.regions)
    masks = runs_of(source.annotations, picture.name, [segmentation for _, segmentation in regions], size)
    return Regions(size, None, masks, tuple(category for category, _ in regions))


def sa1b_regions(source: Source, picture: Picture, size: Size, annotator: int) -> Regions:
    path = picture.truths[annotator]
    try:
        outlines = [one['segmentation'] for one in read_annotations(path, LONGEST)['annotations']]
    except NO_RECORD as error:
        refuse_labels(path, f'not annotations in the format of SA-1B: {error!r}')
    return Regions(size, None, runs_of(path, picture.name, outlines, size), ())


REGIONS: dict[str, Callable[[Source, Picture, Size, int], Regions]] = {
    'label map': label_map_regions,
    'panoptic': panoptic_regions,
    'instances': instances_regions,
    'sa1b': sa1b_regions,
}


def runs_of(path: Path, name: str, outlines: Iterable[Any], size: Size) -> tuple[Runs, ...]:
    """Run lengths of COCO's outlines, which are polygons or run lengths. Raises UnreadableLabels for damaged or misfitting ones."""
    try:
        return tuple(to_runs(outline, size) for outline in outlines)
    except NO_RECORD as error:
        refuse_labels(path, f'damaged region of {name}: {error}')


def to_runs(outline: Any, size: Size) -> Runs:
    """Raises ValueError, TypeError, KeyError or AttributeError for what is no outline in a picture of size (H, W)."""
    from pycocotools import mask

    height, width = size
    if isinstance(outline, list):
        polygons = [np.array(points, np.float64) for points in outline]
        if not polygons or not all(one.ndim == 1 and one.size >= 6 and one.size % 2 == 0 and np.isfinite(one).all() for one in polygons):
            raise ValueError('not polygons')
        inner = [one.reshape(-1, 2).clip(0, (width, height)).ravel().tolist() for one in polygons]  # memory is for the length of the edges
        return dict(mask.merge(mask.frPyObjects(inner, height, width)))
    if tuple(outline['size']) != size:
        raise ValueError(f'of size {tuple(outline["size"])} (height, width) in a picture of {size}')
    counts = outline['counts']
    if isinstance(counts, list):
        lengths = np.array(counts)
        if lengths.dtype.kind != 'i' or lengths.ndim != 1 or lengths.min() < 0 or lengths.sum() != height * width:
            raise ValueError('run lengths that do not fill the picture')
        return dict(mask.frPyObjects({'size': size, 'counts': lengths.tolist()}, height, width))
    return {'size': size, 'counts': whole_counts(counts, height * width)}


def with_captions(source: Source, captions: Mapping[str, tuple[str, ...]]) -> Source:
    """Add captions by the name of a picture, of its last part or of its number."""
    pictures = tuple(picture._replace(captions=captions_of(picture.name, captions) or picture.captions) for picture in source.pictures)
    return source._replace(pictures=pictures)


def captions_of(name: str, captions: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    last = name.rpartition('/')[2]
    names = (name, last, str(int(last)) if last.isascii() and last.isdigit() and len(last) <= 18 else last)
    return next((captions[one] for one in names if one in captions), ())


def coco_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions in COCO's form, by file name without suffix."""
    return grouped(path, coco_pairs(path, read_annotations(path)))


def coco_pairs(path: Path, content: Any) -> list[tuple[Any, Any]]:
    try:
        files = {one['id']: one['file_name'] for one in content['images']}
        return [(files[one['image_id']], one['caption']) for one in content['annotations']]
    except NO_RECORD as error:
        refuse_labels(path, f'not captions in COCO format: {error!r}')


KEYS = ('file_name', 'image', 'picture', 'image_id', 'id', 'name', 'path', 'filename')
TEXTS = ('caption', 'text', 'captions', 'description')


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions by picture, from JSON in COCO's form, from a JSON object {picture: text}, or from objects with a picture and a text, as a
    JSON list or one a line (JSONL). A text may be a list of texts. Raises UnreadableLabels.
    """
    try:
        text = contents(path, Reading(max_bytes=1 << 32)).decode('utf-8-sig')
    except (ImageError, OSError, UnicodeDecodeError) as error:
        refuse_labels(path, f'cannot be read as text: {getattr(error, "strerror", None) or error}')
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        try:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            refuse_labels(path, f'neither JSON nor JSON on each line: {error}')
    if isinstance(content, dict) and {'images', 'annotations'} <= content.keys():
        return grouped(path, coco_pairs(path, content))
    if isinstance(content, dict) and not described(content):
        return grouped(path, content.items())
    rows = content if isinstance(content, list) else [content]
    return grouped(path, [pair for row in rows for pair in pairs_of(path, row)])


def described(row: Mapping[str, Any]) -> bool:
    """Whether an object says by its keys which value is the picture and which the text."""
    return any(key in row for key in KEYS) and any(key in row for key in TEXTS)


def pairs_of(path: Path, row: Any) -> list[tuple[Any, Any]]:
    if not isinstance(row, dict):
        refuse_labels(path, 'captions are objects with a picture and a text')
    if not described(row):
        return list(row.items())
    return [(next(row[key] for key in KEYS if key in row), next(row[key] for key in TEXTS if key in row))]


def grouped(path: Path, pairs: Iterable[tuple[Any, Any]]) -> dict[str, tuple[str, ...]]:
    """Texts by picture, without suffix of a picture file; numbers without leading zeros too."""
    texts: dict[str, list[str]] = defaultdict(list)
    for name, said in pairs:
        some = said if isinstance(said, list) else [said]
        if not isinstance(name, (str, int)) or not all(isinstance(one, str) for one in some):
            refuse_labels(path, 'captions are texts by picture')
        plain = str(name)
        plain = plain.rpartition('.')[0] if os.path.splitext(plain)[1].lower() in SUFFIXES else plain
        texts[plain] += [' '.join(one.split()) for one in some if one.strip()]
    return {name: tuple(some) for name, some in texts.items() if some}
