"""Training examples: masks against loops, determinism, ignored pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from padseg.errors import NoImages
from padseg.train.data import (
    CELL,
    MAX_MASKS,
    ROWS,
    VIEWS,
    batch,
    class_masks,
    crop,
    paste,
    photographs,
    recolour,
    soft_masks,
    word_weights,
)
from padseg.train.scenes import CLASSES, Scene
from padseg.train.settings import Mixture
from padseg.train.tiny_model import SLOTS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Three photographs with two annotators, one without labels; the left half is region 3, the right region 9, a corner is void."""
    rng = np.random.default_rng(0)
    for part in ('images', 'labels'):
        (tmp_path / part / 'train').mkdir(parents=True)
    for name in ('a', 'b', 'c', 'unlabelled'):
        image = rng.integers(0, 40, (120, 160, 3), dtype=np.uint8)
        image[:, 80:] += 200
        cv2.imwrite(str(tmp_path / f'images/train/{name}.jpg'), image)
        labels = np.full((120, 160), 3, np.uint8)
        labels[:, 80:] = 9
        labels[:10, :10] = 255
        if name != 'unlabelled':
            for annotator in range(2):
                cv2.imwrite(str(tmp_path / f'labels/train/{name}_{annotator}.png'), labels)
    return tmp_path


def test_photographs_are_paired_by_stem_and_only_train_is_read(folder):
    (folder / 'images' / 'val').mkdir()
    found = photographs(f'{folder}=2.5=255')
    assert [path.stem for path, _ in found.pairs] == ['a', 'b', 'c']
    assert all(len(maps) == 2 for _, maps in found.pairs)
    assert (found.weight, found.void) == (2.5, 255)


def test_a_folder_without_pairs_says_what_is_expected(tmp_path):
    with pytest.raises(NoImages, match='x_0.png'):
        photographs(str(tmp_path))


def test_soft_masks_equal_the_loop():
    labels = np.random.default_rng(1).integers(-1, 4, (3 * CELL, 2 * CELL))
    labels[:, :CELL] = 7  # the largest, though last in number
    masks = soft_masks(labels)
    assert masks.dtype == np.uint8 and masks.shape == (5, 3, 2)
    names = sorted(set(labels.ravel()) - {-1}, key=lambda name: (-(labels == name).sum(), name))
    for mask, name in zip(masks, names, strict=True):
        for y in range(3):
            for x in range(2):
                assert mask[y, x] == (labels[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] == name).sum()


def test_too_many_regions_keep_the_largest():
    labels = np.arange(4 * CELL * 4 * CELL).reshape(4 * CELL, 4 * CELL) // 30
    labels[:CELL] = 5000
    masks = soft_masks(labels)
    assert len(masks) == MAX_MASKS and masks[0].sum() == 4 * CELL * CELL


def test_a_picture_without_labels_has_no_masks():
    assert soft_masks(np.full((2 * CELL, 2 * CELL), -1)).shape == (0, 2, 2)


def test_batches_depend_on_seed_and_index_only(folder):
    folders = [photographs(str(folder))]
    first, again, other = (batch(0, index, 3, folders, Mixture(0.5)) for index in (4, 4, 5))
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    assert first.images.shape != other.images.shape or not torch.equal(first.images, other.images)
    assert tuple(first.images.shape[1:3]) in VIEWS
    assert first.masks.shape == (3, ROWS, first.images.shape[1] // CELL, first.images.shape[2] // CELL)
    assert first.images.dtype == torch.uint8


def test_masks_cover_what_is_labelled_once(folder):
    examples = batch(0, 1, 4, [photographs(f'{folder}=1=255')], Mixture(0.0))
    assert examples.captions == [''] * 4
    assert examples.masks.sum(1).max() <= CELL * CELL
    for masks, count in zip(examples.masks, examples.counts, strict=True):
        assert 0 < count <= 4 and masks[count:].sum() == 0 and (masks[:count].flatten(1).sum(1) > 0).all()


def test_scenes_alone_need_no_photographs():
    examples = batch(0, 0, 2, [], Mixture(0.0))
    assert all(examples.captions) and (examples.counts > 0).all()
    assert (examples.masks.sum(1) == CELL * CELL).all()


def test_crop_keeps_picture_and_labels_together():
    labels = np.zeros((90, 150), np.int32)
    labels[20:60, 40:100] = 1
    image = np.repeat((labels * 255).astype(np.uint8)[..., None], 3, 2)
    for seed in range(20):
        seen, regions = crop(np.random.default_rng(seed), image, labels, (64, 96))
        assert seen.shape == (64, 96, 3) and regions.shape == (64, 96)
        assert (
            (seen[..., 0] > 127) == (regions == 1)
        ).mean() > 0.97  # they differ along the border, by the rounding of two kinds of resizing


def test_paste_adds_one_region_with_the_source_inside():
    image, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.int32)
    source = np.full((64, 64, 3), 200, np.uint8)
    regions = np.zeros((64, 64), np.int32)
    regions[20:44, 20:44] = 1
    mixed, new = paste(np.random.default_rng(0), image, labels, source, regions)
    assert set(np.unique(new)) == {0, 1}
    assert mixed[new == 1].mean() > 180 and mixed[new == 0].mean() < 10


def test_recolour_keeps_shape_and_moves_values():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    changed = [recolour(np.random.default_rng(seed), image) for seed in range(60)]
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in changed)
    grey = [np.ptp(each.astype(int), axis=2).max() == 0 for each in changed]
    assert any(grey) and not all(grey)


@pytest.mark.parametrize('others', [0, 3, len(CLASSES)])
def test_named_scenes_have_a_mask_for_each_word_of_the_prompt(others):
    """The prompt of a named scene lists its classes and some others; masks are the classes' pixels, counted here one by one."""
    examples = batch(0, 3, 6, [], Mixture(1.0, named=1.0, others=others))
    plain = batch(0, 3, 6, [], Mixture(1.0, named=0.0))
    assert plain.prompts == [''] * 6 and not plain.words.any()
    for prompt, masks, count, words in zip(examples.prompts, examples.masks, examples.counts.tolist(), examples.words, strict=True):
        names = prompt.split()
        assert len(names) == len(set(names)) == count
        assert int((masks.flatten(1).sum(1) == 0).sum()) - (ROWS - count) <= others
        for row in range(ROWS):
            assert torch.equal(words[row].nonzero().flatten(), torch.tensor([row + 1] if row < count else [], dtype=torch.int64))
        assert (masks.sum(0) == CELL * CELL).all()  # every pixel has a class
        assert not masks[count:].any()


def test_the_mask_of_a_name_is_the_union_of_its_regions():
    labels = np.zeros((2 * CELL, 2 * CELL), np.int32)
    labels[:CELL, CELL:] = 1
    labels[CELL:, CELL : CELL + 2] = 2
    drawn = Scene(np.zeros((*labels.shape, 3), np.uint8), labels, ('grass', 'disk', 'disk'), '')
    masks = class_masks(drawn, ('star', 'disk', 'grass'))
    assert masks.tolist() == [[[0, 0], [0, 0]], [[0, 64], [0, 16]], [[64, 0], [64, 48]]]


def test_names_of_several_words_share_their_slots():
    weights = word_weights(('traffic light', 'cat'))
    assert weights[0, 1:4].tolist() == [0.5, 0.5, 0.0] and weights[1, 1:4].tolist() == [0.0, 0.0, 1.0]
    assert weights.shape == (ROWS, SLOTS) and not weights[2:].any()


def test_every_word_is_one_token_where_its_weight_says():
    from padseg.train import tiny_model as tiny
    from padseg.train.vocabulary import WORDS

    for tokenizer in tiny.make_tokenizers(WORDS):
        for name in CLASSES:
            assert len(tokenizer(name).input_ids) == 2 + len(name.split())
