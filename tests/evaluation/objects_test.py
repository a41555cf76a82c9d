"""ConceptAttention's protocols: one object a picture by its map or by the strongest name, and VOC with several classes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from padseg.commands import main
from padseg.datasets import VOID
from padseg.errors import UsageError
from padseg.evaluation.predict import naming_for, predict_classes
from padseg.evaluation.protocols import OBJECT, compared_view, protocol, scored_classes
from padseg.evaluation.scores import ScoreTotals, score_object
from padseg.methods import concepts
from padseg.types import Frame, LabelMap, TokenMaps

CLASSES = ('cat', 'dog', 'background')


def test_scores_of_an_object_by_hand():
    rules = protocol('conceptattention-imagenet')
    totals = ScoreTotals(OBJECT, rules)
    # object 0, background 1: one of two pixels of the object found, one of background taken for it
    totals.add(score_object('a', np.array([[0, 1, 0, 1]]), np.array([[0, 0, 1, 1]]), np.array([[4.0, 0, 3, 1]]), rules))
    totals.add(score_object('b', np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1, 1]]), np.array([[4.0, 3, 2, 1]]), rules))
    result = totals.result()
    assert result.accuracy == 6 / 8 and result.iou == {'object': 3 / 5, 'background': 3 / 5} and result.miou == 3 / 5
    assert result.acc_by_2_minus_acc == 0.75 / 1.25
    # of the first, half of the pixels above every threshold are right, of the second all
    assert result.mean_average_precision == pytest.approx((0.5 + 1) / 2) and result.pictures == 2
    unbalanced = ScoreTotals(OBJECT, rules)
    unbalanced.add(score_object('a', np.array([[1, 1, 1, 1]]), np.array([[0, 1, 1, 1]]), None, rules))
    assert unbalanced.result().miou == 3 / 8 and unbalanced.result().acc_by_2_minus_acc == pytest.approx(0.6)
    assert np.isnan(unbalanced.result().mean_average_precision)


def test_an_object_needs_a_background():
    with pytest.raises(UsageError, match='score a data set with background as a class, such as voc21'):
        scored_classes(('cat', 'dog'), None, protocol('conceptattention-single'))
    assert scored_classes(CLASSES, 2, protocol('conceptattention-single')) == OBJECT


class Told:
    """A method that keeps what it is told, and gives one map of ramps for each name."""

    BACKGROUND_BY_RULE = False

    def __init__(self):
        self.told = []

    def prepare(self, backbone, options, classes, keep):
        self.told.append((tuple(classes), options.background_words, options.caption))
        return SimpleNamespace(classes=classes)

    def maps(self, images, prepared, names):
        ramp = torch.arange(16.0).reshape(1, 4, 4).repeat(len(prepared.classes) + 1, 1, 1)
        return [TokenMaps(ramp, ('x',) * len(ramp), Frame(images[0].shape[:2], (0, 0, *images[0].shape[:2])))]

    def labels(self, image, maps, prepared):
        return LabelMap(np.zeros(image.shape[:2], np.int32), ())


def predicted(name, options, shown, classes=CLASSES):
    rules, method = protocol(name), Told()
    image = np.zeros((8, 8, 3), np.uint8)
    naming = naming_for(method, options, name, len(classes) - 1)
    predict = predict_classes(method, None, options, classes, len(classes) - 1, rules=rules, naming=naming)
    return method.told, predict('a', image, compared_view((8, 8), rules.compare), shown)


def test_what_a_method_is_told():
    voc = ('aeroplane', 'cat', 'potted plant', 'background')
    told, _ = predicted('conceptattention', concepts.Options(), (0, 2, 3), voc)
    assert told == [(('plane', 'pot'), ('background', 'floor', 'grass', 'tree', 'sky'), 'a plane,a pot')]
    told, _ = predicted('conceptattention', concepts.Options(background_words=('wood',), caption='b'), (0, 3), voc)
    assert told == [(('aeroplane', 'background'), ('wood',), 'b')]
    told, _ = predicted('conceptattention-imagenet', concepts.Options(), (1,), ('cat', 'person', 'background'))
    assert told == [(('person',), ('background', 'floor', 'tree', 'grass', 'face'), 'a person')]
    told, _ = predicted('seg4diff-ovss', concepts.Options(), (0, 3), voc)
    assert told == [(('aeroplane', 'background'), (), None)]


def test_the_object_is_above_the_mean_of_its_map_or_what_no_word_of_background_has():
    _, (mask, values) = predicted('conceptattention-imagenet', concepts.Options(), (1,))
    assert mask.shape == values.shape == (224, 224)
    assert (mask[:112] == 2).all() and (mask[112:] == 1).all()
    assert (values[0, 0], values[-1, -1]) == (0, 15)
    _, (classes, values) = predicted('conceptattention-single', concepts.Options(), (0,))
    assert (classes == 2).all() and values.max() == 15


@pytest.mark.parametrize('name', ['conceptattention-single', 'conceptattention-imagenet'])
def test_pictures_of_one_class_end_to_end(name, texts_folder, picture, tmp_path):
    for folder in ('images', 'labels'):
        (tmp_path / 'set' / folder).mkdir(parents=True)
    truth = np.full(picture.shape[:2], 2, np.uint8)
    truth[10:30, 10:50] = 0
    other = truth.copy()
    other[:5] = 1
    for file, own in (('a', truth), ('b', other), ('c', np.full_like(truth, 2))):
        PIL.Image.fromarray(picture).save(tmp_path / f'set/images/{file}.png')
        PIL.Image.fromarray(own).save(tmp_path / f'set/labels/{file}.png')
    (tmp_path / 'set/padseg.toml').write_text(f'classes = {json.dumps(CLASSES)}\nbackground = "background"\n')
    command = ['eval', 'folder', '--root', str(tmp_path / 'set'), '--protocol', name, '--method', 'concepts', '--side', '64', '-q']
    command += ['--model', str(texts_folder), '--device', 'cpu', '--background-words', 'photo', '--out', str(tmp_path / 'out')]
    assert main(command) == 0
    record = json.loads((tmp_path / 'out/scores.json').read_text())
    assert record['counts'] == {'pictures': 1, 'ignored': 2, 'failed': 0, 'missing': 0}
    scores = record['scores']
    assert scores['acc_by_2_minus_acc'] == pytest.approx(scores['accuracy'] / (2 - scores['accuracy']))
    assert 0 < scores['mean_average_precision'] <= 1 and list(record['iou']) == ['object', 'background']
    assert record['settings']['rules']['counted'].startswith('object: all classes but background')
    before = (tmp_path / 'out/pictures.jsonl').read_bytes()
    assert main(command) == 0 and (tmp_path / 'out/pictures.jsonl').read_bytes() == before
    labels = np.array(PIL.Image.open(tmp_path / 'out/labels/a.png'))
    assert labels.shape == (224, 224) and set(np.unique(labels)) <= {0, 2} and VOID not in labels
    stored = ['eval', 'folder', '--root', str(tmp_path / 'set'), '--protocol', name, '--pred', str(tmp_path / 'set/labels')]
    assert main([*stored, '-q', '--out', str(tmp_path / 'perfect')]) == 0
    perfect = json.loads((tmp_path / 'perfect/scores.json').read_text())['scores']
    assert perfect == {'accuracy': 1, 'miou': 1, 'acc_by_2_minus_acc': 1, 'mean_average_precision': None}


def test_nothing_is_told_where_there_is_no_background():
    assert naming_for(Told(), concepts.Options(), 'conceptattention', None) is None
    assert naming_for(Told(), concepts.Options(), 'conceptattention', 0).called['potted plant'] == 'pot'
