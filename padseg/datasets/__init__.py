"""Ground truth of data sets: `open_dataset` finds one on disk, its rows are in `rows`, its names and tables in the JSON files here."""

from __future__ import annotations

from pathlib import Path

from padseg.datasets.base import VOID, LayoutError, Sample
from padseg.datasets.dataset import Dataset
from padseg.datasets.layouts import find_place, picture_name, samples
from padseg.datasets.own import DEFAULT_SPLIT, FolderSettings, label_folder, open_folder, read_settings
from padseg.datasets.rows import DATASETS, FOLDER
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
RAW = 'raw'  # the table that takes the values in the files as classes, where a data set has one


def open_dataset(name: str, root: Path, split: str | None = None, raw_labels: bool = False, allow_missing: bool = False) -> Dataset:
    """A data set at or a little below `root`; split None is val.

    raw_labels: the values of ADE20K's files are taken as classes as they are, unlabelled included; other data sets have no such
    reading and stay as they are. allow_missing: pictures of the split without file or without labels are left out.
    Raises UsageError for an unknown name or split, LayoutError for files that are missing or lie otherwise.
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
