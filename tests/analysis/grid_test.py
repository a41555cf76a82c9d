"""The grid of noise levels, blocks and text encoders: planted maps, and the same answers as `padseg label`'s own maps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from padseg import LabelOptions
from padseg.analysis import grid
from padseg.analysis.grid import Choice, best_cell, cell_counts, halves
from padseg.analysis.recording import Subject
from padseg.errors import UsageError
from padseg.evaluation.metrics import ClassCounts
from padseg.methods.open_vocabulary import score_maps
from padseg.methods.stages.enlarging import upsample
from padseg.system.progress import Silent

NAMES = ('cat', 'dog', 'grass')
OPTIONS = LabelOptions(side=32)


@pytest.fixture
def subject(picture) -> Subject:
    truth = np.full(picture.shape[:2], 2, np.uint8)
    truth[:, 40:], truth[:4] = 0, 255
    return Subject('a.png', picture, '', truth)


@pytest.mark.parametrize('names', ['present', 'all'])
def test_cells_are_counted_as_label_maps_are(speller, subject, names):
    cells = [Choice('l', 1, 0), Choice('l+g', 1, 2), Choice('l+g', 3, 2)]
    counts = cell_counts(subject, speller, NAMES, OPTIONS, cells, names)
    assert [*counts] == cells
    numbers = [0, 2] if names == 'present' else [0, 1, 2]
    for cell, one in counts.items():
        options = dataclasses.replace(OPTIONS, encoders=cell.encoders, steps=(cell.step,), layers=(cell.layer,))
        scores = score_maps(subject.image, speller, [NAMES[number] for number in numbers], options).maps.numpy()
        pred = np.array(numbers)[np.stack([upsample(values, subject.truth.shape) for values in scores]).argmax(0)]
        for number in range(3):
            true, said = subject.truth == number, (pred == number) & (subject.truth != 255)
            assert one.true_positive[number] == (true & said).sum() and one.false_negative[number] == (true & ~said).sum()
            assert one.false_positive[number] == (said & ~true).sum()


def test_pictures_without_classes_do_not_count(speller, subject):
    assert cell_counts(subject._replace(truth=np.full_like(subject.truth, 255)), speller, NAMES, OPTIONS, [Choice('l', 1, 0)]) == {}


def test_pictures_are_parted_evenly(picture):
    subjects = [Subject(str(number), picture, '') for number in range(10)]
    train, val = halves(subjects, 0.5)
    assert [one.name for one in train] == list('13579') and [one.name for one in val] == list('02468')
    assert [len(part) for part in halves(subjects, 0.2)] == [2, 8]


def planted(monkeypatch, hits: dict[str, dict[Choice, int]]) -> list[tuple[str, int]]:
    """Let cells of each picture have so many of 10 pixels right, and say which pictures were asked for how many cells."""
    asked = []

    def counted(subject, backbone, classes, options, cells, names):
        asked.append((subject.name, len(cells)))
        right = {cell: hits[subject.name].get(cell, 1) for cell in cells}
        none = np.zeros(1, np.int64)
        return {cell: ClassCounts(np.array([n]), np.array([10 - n]), np.array([10 - n]), none, 10) for cell, n in right.items()}

    monkeypatch.setattr(grid, 'cell_counts', counted)
    return asked


def test_the_best_cell_of_training_pictures_is_reported_on_the_others(monkeypatch, speller, picture):
    good, lucky = Choice('g', 3, 1), Choice('l', 1, 2)
    asked = planted(monkeypatch, {'t1': {good: 9, lucky: 5}, 't2': {good: 7}, 'v': {good: 6, lucky: 10}})
    train, val = [Subject(name, picture, '') for name in ('t1', 't2')], [Subject('v', picture, '')]
    found = grid.measure(train, val, speller, ('cat',), LabelOptions(), ('l', 'g'), (1, 3), 'present', Silent())
    assert len(found.train) == 2 * 2 * 4 and found.best == good and found.train[good] == pytest.approx(16 / 24)
    assert found.val[good] == pytest.approx(6 / 14) and found.own == Choice('l+g', 8, 2) and [*found.val] == [good, found.own]
    assert asked == [('t1', 16), ('t2', 16), ('v', 2)]  # others are not even looked at on these pictures
    rows = grid.rows(found)
    assert len(rows) == 17 and rows[-1] == {**found.own._asdict(), 'train_miou': None, 'val_miou': pytest.approx(1 / 19)}
    assert [row['cell'] for row in grid.summary(found)] == ['best', 'best of its encoders', "the model's own"]


def test_equal_cells_and_no_classes(monkeypatch, speller, subject):
    assert best_cell({Choice('l', 1, 0): 0.5, Choice('l', 1, 1): 0.5, Choice('l', 2, 0): 0.2}) == Choice('l', 1, 0)
    empty = subject._replace(truth=np.full_like(subject.truth, 255))
    with pytest.raises(UsageError, match='no picture to choose by shows a class'):
        grid.measure([empty], [subject], speller, NAMES, OPTIONS, ('l',), (1,), 'present', Silent())


def test_maps_are_those_of_the_picked_tokens(speller):
    from padseg.types import Attention, Prompt

    seen = Attention(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))
    prompt = Prompt(torch.zeros(1, 2, 4), torch.zeros(1, 0), (1,), ('cat',))
    assert grid.name_maps(seen, speller, prompt, (2, 3)).tolist() == [[[0.125] * 3] * 2]
