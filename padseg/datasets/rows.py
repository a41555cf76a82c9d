"""The data sets that padseg knows, as data: their scored classes, splits and possible layouts."""

from __future__ import annotations

from padseg.datasets.base import DatasetRow, Layout, Split

OTHER_ENCODINGS = ('_labelTrainIds.png', '_instanceTrainIds.png')  # made by tools, next to the original files

VOC_HOME = ('VOCdevkit/VOC2012',)
VOC_LIST = 'ImageSets/Segmentation/{split}.txt'
VOC_SPLITS = {'val': Split('val', pictures=1449), 'train': Split('train', pictures=1464), 'trainval': Split('trainval', pictures=2913)}
VOC_LAYOUTS = (
    Layout('official download', VOC_HOME, ('JPEGImages',), ('SegmentationClass',), listing=VOC_LIST),
    Layout('augmented annotations', VOC_HOME, ('JPEGImages',), ('SegmentationClassAug',), listing=VOC_LIST),
)


def prepared_voc(folder: str) -> Layout:
    """VOC as detectron2 projects convert it: class numbers."""
    return Layout('prepared for detectron2', VOC_HOME, ('JPEGImages',), (folder + '/{split}',), values='classes', listing=VOC_LIST)


CONTEXT_HOME = ('VOCdevkit/VOC2010',)
CONTEXT_SPLITS = {'val': Split('val', ids='context_val_5104'), 'train': Split('train')}
CONTEXT_LAYOUTS = (
    Layout(
        'official download', CONTEXT_HOME, ('JPEGImages',), ('trainval',), values='ids', reader='context', label_end='.mat', splits=('val',)
    ),
    Layout('PASCAL in Detail', CONTEXT_HOME, ('JPEGImages',), (), values='ids', reader='detail', annotations=('trainval_merged.json',)),
    Layout(
        'mmsegmentation',
        CONTEXT_HOME,
        ('JPEGImages',),
        ('SegmentationClassContext',),
        listing='ImageSets/SegmentationContext/{split}.txt',
    ),
    Layout(
        'prepared for detectron2',
        CONTEXT_HOME,
        ('JPEGImages',),
        ('annotations_detectron2/pc59_{split}',),
        values='classes',
        splits=('val',),
    ),
)

COCO_HOMES = ('coco', 'coco_stuff164k', 'coco-stuff')
COCO_IMAGES = ('{split}', 'images/{split}')
COCO_MAPS = (
    'stuffthingmaps_trainval2017/{split}',
    'stuffthingmaps/{split}',
    'annotation_{split}',
    'annotations/stuffthingmaps/{split}',
    'annotations/{split}',
)
COCO_CONVERTED = ('annotations/{split}', 'stuffthingmaps/{split}')
COCO_2175 = Split('val2017', ids='coco_val_2175', pictures=2175)
COCO_5000 = Split('val2017', pictures=5000, exact=True)
COCO_TRAIN = Split('train2017', pictures=118287)
COCO_LAYOUTS = (
    Layout('official download (stuffthingmaps)', COCO_HOMES, COCO_IMAGES, COCO_MAPS, beside=OTHER_ENCODINGS),
    Layout('mmsegmentation (171 classes)', COCO_HOMES, COCO_IMAGES, COCO_CONVERTED, values='train ids', label_end='_labelTrainIds.png'),
    Layout('prepared for detectron2', COCO_HOMES, COCO_IMAGES, ('annotations_detectron2/{split}',), values='train ids'),
)
COCO_OBJECT_LAYOUTS = (
    *COCO_LAYOUTS,
    Layout(
        'panoptic annotations',
        COCO_HOMES,
        COCO_IMAGES,
        ('panoptic_{split}', 'annotations/panoptic_{split}'),
        values='categories',
        reader='panoptic',
        annotations=('annotations/panoptic_{split}.json', 'panoptic_{split}.json'),
    ),
    Layout('object classes', COCO_HOMES, COCO_IMAGES, COCO_CONVERTED, values='objects', label_end='_instanceTrainIds.png'),
    Layout(
        'object classes, in a folder of their own',
        COCO_HOMES,
        COCO_IMAGES,
        ('annotations_object/{split}',),
        values='objects',
        beside=OTHER_ENCODINGS,
    ),
)
COCO_OBJECT_SPLITS = {'val': COCO_5000, 'val-2175': COCO_2175, 'val-5000': COCO_5000, 'train': COCO_TRAIN}
COCO_STUFF_SPLITS = {'val': COCO_2175, 'val-2175': COCO_2175, 'val-5000': COCO_5000, 'train': COCO_TRAIN}

CITY_SPLITS = {'val': Split('val', pictures=500), 'train': Split('train', pictures=2975)}


def city(name: str, values: str, kind: str) -> Layout:
    """Cityscapes with one of its kinds of label files, which lie side by side."""
    return Layout(
        name,
        ('cityscapes',),
        ('leftImg8bit/{split}',),
        ('gtFine/{split}',),
        values,
        image_end='_leftImg8bit.png',
        label_end=f'_gtFine_{kind}.png',
    )


CITY_IDS = city('official download (label ids)', 'ids', 'labelIds')
CITY_TRAIN_IDS = city('official download (train ids)', 'train ids', 'labelTrainIds')

ADE_HOME = ('ade/ADEChallengeData2016',)
BSDS_SPLITS = {'val': Split('val', pictures=100), 'train': Split('train', pictures=200), 'test': Split('test', pictures=200)}
CAMVID_SPLITS = {'val': Split('val', pictures=101), 'train': Split('train', pictures=367), 'test': Split('test', pictures=233)}

FOLDER = 'folder'
SEGMENTED = 'imagenet-segmentation'
DATASETS: dict[str, DatasetRow] = {
    'voc21': DatasetRow(
        'PASCAL VOC 2012, 20 classes and background',
        'voc',
        VOC_SPLITS,
        (*VOC_LAYOUTS, prepared_voc('annotations_detectron2_bg')),
        background='last',
    ),
    'voc20': DatasetRow(
        'PASCAL VOC 2012, 20 classes, background ignored', 'voc', VOC_SPLITS, (*VOC_LAYOUTS, prepared_voc('annotations_detectron2'))
    ),
    'context60': DatasetRow('PASCAL Context, 59 classes and background', 'context', CONTEXT_SPLITS, CONTEXT_LAYOUTS, background='last'),
    'context59': DatasetRow('PASCAL Context, 59 classes, background ignored', 'context', CONTEXT_SPLITS, CONTEXT_LAYOUTS),
    'coco-object': DatasetRow('COCO, 80 things and background', 'coco_object', COCO_OBJECT_SPLITS, COCO_OBJECT_LAYOUTS, background='first'),
    'coco-object80': DatasetRow('COCO, 80 things, background ignored', 'coco_object', COCO_OBJECT_SPLITS, COCO_OBJECT_LAYOUTS),
    'coco-stuff27': DatasetRow('COCO-Stuff, 27 coarse classes', 'coco_stuff27', COCO_STUFF_SPLITS, COCO_LAYOUTS),
    'cityscapes27': DatasetRow('Cityscapes, 27 classes', 'cityscapes27', CITY_SPLITS, (CITY_IDS,)),
    'cityscapes19': DatasetRow('Cityscapes, 19 classes', 'cityscapes19', CITY_SPLITS, (CITY_IDS, CITY_TRAIN_IDS)),
    'ade150': DatasetRow(
        'ADE20K, 150 classes',
        'ade150',
        {'val': Split('validation', pictures=2000), 'train': Split('training', pictures=20210)},
        (
            Layout('official download', ADE_HOME, ('images/{split}',), ('annotations/{split}',)),
            Layout('prepared for detectron2', ADE_HOME, ('images/{split}',), ('annotations_detectron2/{split}',), values='classes'),
        ),
    ),
    'bsds500': DatasetRow(
        'BSDS500, regions without classes of several annotators',
        '',
        BSDS_SPLITS,
        (
            Layout(
                'official download', ('BSR/BSDS500/data',), ('images/{split}',), ('groundTruth/{split}',), reader='bsds', label_end='.mat'
            ),
            Layout('PNG files', ('bsds500',), ('images/{split}',), ('labels/{split}',), annotators=True),
        ),
    ),
    'camvid': DatasetRow(
        'CamVid, 11 classes',
        'camvid',
        CAMVID_SPLITS,
        (
            Layout('SegNet', ('CamVid',), ('{split}',), ('{split}annot',)),
            Layout('images and labels', ('camvid',), ('images/{split}',), ('labels/{split}',)),
        ),
    ),
    SEGMENTED: DatasetRow('ImageNet-Segmentation, an object in each picture', '', {'val': Split('', pictures=4276)}, ()),
    FOLDER: DatasetRow(
        'your own data, described by a padseg.toml in the folder',
        '',
        {},
        (
            Layout('images and labels', ('',), ('images/{split}',), ('labels/{split}',)),
            Layout('mmsegmentation', ('',), ('img_dir/{split}',), ('ann_dir/{split}',)),
            Layout('images and annotations', ('',), ('images/{split}',), ('annotations/{split}',)),
        ),
    ),
}
