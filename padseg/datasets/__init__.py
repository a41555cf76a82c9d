"""Ground truth of data sets: `open_dataset` finds one on disk, `rows` lists them, and the JSON files here hold names and tables."""

from __future__ import annotations

from pathlib import Path

from padseg.datasets.base import VOID, LayoutError, Sample
from padseg.datasets.dataset import Dataset
from padseg.datasets.layouts import find_place, picture_name, samples
from padseg.datasets.own import DEFAULT_SPLIT, FolderSettings, label_folder, open_folder, read_settings
from padseg.datasets.rows import DATASETS, FOLDER, SEGMENTED
from padseg.datasets.segments import found_segments
from padseg.datasets.tables import background_class, facts, row_class_names, value_table
from padseg.errors import UnreadableLabels, UsageError

__all__ = (
    'DATASETS',
    'DEFAULT_SPLIT',
    'FOLDER',
    'VOID',
    'Dataset',
    'LayoutError',
    'Sample',
    'FolderSettings',
    'UnreadableLabels',
    'label_folder',
    'open_dataset',
    'open_folder',
    'picture_name',
    'read_settings',
)
RAW = 'raw'  # name of the table that uses file values as classes unchanged, for data sets that have one


def open_dataset(name: str, root: Path, split: str | None = None, raw_labels: bool = False, allow_missing: bool = False) -> Dataset:
    """Open a data set at or just below `root`; split None means val.

    raw_labels: take the values in ADE20K's files as classes unchanged, unlabelled included; other data sets have no such reading and ignore
    this. allow_missing: leave out pictures of the split that lack a picture file or labels. Raises UsageError for an unknown name or split,
    LayoutError for missing files or an unknown layout.
    """
    if name not in DATASETS:
        raise UsageError(f'data set is one of {", ".join(DATASETS)}; got {name}')
    if name == FOLDER:
        return open_folder(root, split, read_settings(root), allow_missing)
    row = DATASETS[name]
    split = split or DEFAULT_SPLIT
    if split not in row.splits:
        raise UsageError(f'split of {name} is one of {", ".join(row.splits)}; got {split}')
    chosen = row.splits[split]
    if name == SEGMENTED:
        found = found_segments(root)
        return Dataset(
            name=name,
            classes=found.classes,
            background=found.background,
            split=split,
            layout='official download',
            root=root,
            samples=found.samples,
            table=found.table,
            reader='segments',
            annotations=found.file,
            pictures=chosen.pictures,
        )
    raw = raw_labels and bool(row.facts) and RAW in facts(row.facts)['values']
    layouts = [layout for layout in row.layouts if not raw or layout.values == 'index']
    place = find_place(root, layouts, f'{name} ({split})', split, chosen.folder)
    pictures, missing = samples(place, chosen, allow_missing)
    return Dataset(
        name=name,
        classes=row_class_names(row),
        background=background_class(row),
        split=split,
        layout=place.layout.name,
        root=root,
        samples=pictures,
        table=value_table(row, RAW if raw else place.layout.values),
        reader=place.layout.reader,
        annotations=place.annotations,
        pictures=chosen.pictures,
        missing=missing,
    )
