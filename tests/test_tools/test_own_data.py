"""`--data DIR`: any config of the zoo on a user's own COCO-format folder."""
import json
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from mmdet_smallbn.cli.own_data import use_data
from mmdet_smallbn.cli.runtime import load_config
from mmdet_smallbn.cli.test import parse_args as parse_test_args
from mmdet_smallbn.cli.train import parse_args
from mmdet_smallbn.data.shapes import CLASSES
from mmdet_smallbn.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
FASTER = 'configs/cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-head_1xb2-1x_coco.py'
MASK = 'configs/cbn/mask-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py'
RETINA = 'configs/cbn/retinanet_r50_fpn_cbn-head_4xb4-1x_coco.py'
DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'


@pytest.fixture
def own(shapes, tmp_path):
    """A copy of ShapesCOCO whose annotations may be edited."""
    return shutil.copytree(shapes, tmp_path / 'own')


def _edit(root, split, change):
    path = root / 'annotations' / f'instances_{split}.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('path', [FASTER, MASK, RETINA, DEMO])
def test_a_config_reads_the_users_images_and_classes(path, shapes):
    cfg = load_config(parse_args([path, '--data', str(shapes)]))
    init_default_scope('mmdet')
    for name, images in (('train', 24), ('val', 8), ('test', 8)):
        data = DATASETS.build(cfg[f'{name}_dataloader'].dataset)
        assert data.metainfo['classes'] == CLASSES
        assert 0 < len(data) <= images
        found = data[0]['data_samples'].gt_instances
        assert found.labels.max() < len(CLASSES) and len(found) > 0
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.ann_file == str(shapes /
                                         'annotations/instances_val.json')
    heads = [cfg.model.bbox_head] if path == RETINA else [
        head for name, head in cfg.model.roi_head.items()
        if name in ('bbox_head', 'mask_head')
    ]
    assert [head.num_classes for head in heads] == [7] * len(heads)
    assert 'num_classes' not in cfg.model.get('rpn_head', {})


def test_the_command_line_goes_further(shapes):
    cfg = load_config(
        parse_test_args([
            FASTER, 'a.pth', '--data',
            str(shapes), '--cfg-options', 'test_evaluator.ann_file=other.json'
        ]))
    assert cfg.test_evaluator.ann_file == 'other.json'


def test_heads_of_a_cascade_and_wrapped_data_sets(shapes):
    cfg = Config(
        dict(
            model=dict(
                rpn_head=dict(num_classes=1),
                roi_head=dict(
                    bbox_head=[dict(num_classes=80),
                               dict(num_classes=80)])),
            train_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset',
                    dataset=dict(type='CocoDataset', pipeline=[]))),
            val_evaluator=[dict(ann_file='a'),
                           dict(type='Other')]))
    use_data(cfg, shapes)
    heads = cfg.model.roi_head.bbox_head
    assert [head.num_classes for head in heads] == [7, 7]
    assert cfg.model.rpn_head.num_classes == 1
    inner = cfg.train_dataloader.dataset.dataset
    assert inner.metainfo.classes == CLASSES
    assert cfg.val_evaluator[0].ann_file.endswith('instances_val.json')
    assert cfg.val_evaluator[1] == dict(type='Other')


@pytest.mark.parametrize('nothing', [[], [[]], None])
def test_masks_are_missed_before_training(own, nothing):

    def boxes_alone(content):
        content['annotations'][-1]['segmentation'] = nothing

    _edit(own, 'val', boxes_alone)
    with pytest.raises(SetupError, match='val.json has a segmentation.*Faste'):
        load_config(parse_args([MASK, '--data', str(own)]))
    load_config(parse_args([FASTER, '--data', str(own)]))


def test_splits_must_have_the_same_classes(own):

    def rename(content):
        content['categories'][0]['name'] = 'cat'

    _edit(own, 'val', rename)
    with pytest.raises(ValueError, match='the same categories.*cat'):
        load_config(parse_args([FASTER, '--data', str(own)]))


def test_testing_needs_no_training_images(own):
    shutil.rmtree(own / 'train')
    (own / 'annotations/instances_train.json').unlink()
    arguments = [FASTER, 'a.pth', '--data', str(own)]
    cfg = load_config(parse_test_args(arguments), training=False)
    assert cfg.model.roi_head.bbox_head.num_classes == 7
    assert cfg.test_dataloader.dataset.metainfo.classes == CLASSES
    assert 'coco' in cfg.train_dataloader.dataset.data_root
    with pytest.raises(FileNotFoundError, match='no train annotations'):
        load_config(parse_args([FASTER, '--data', str(own)]))


def test_a_relative_folder_holds_from_elsewhere(own, monkeypatch):
    config = str(ROOT / FASTER)
    monkeypatch.chdir(own.parent)
    cfg = load_config(parse_args([config, '--data', 'own/']))
    ann_file = Path(cfg.train_dataloader.dataset.ann_file)
    assert ann_file.is_absolute() and ann_file.exists()


def test_as_many_colours_as_classes(own):

    def many(content):
        content['categories'] = [
            dict(id=i + 1, name=f'class {i}') for i in range(97)
        ]

    for split in ('train', 'val'):
        _edit(own, split, many)
    cfg = load_config(parse_args([FASTER, '--data', str(own)]))
    assert len(cfg.test_dataloader.dataset.metainfo.palette) == 97


def test_what_it_cannot_do_is_said(shapes):
    cfg = Config.fromfile(FASTER)
    cfg.train_dataloader.dataset.type = 'LVISV1Dataset'
    with pytest.raises(SetupError, match='train_dataloader reads a LVISV1Da'):
        use_data(cfg, shapes)
    cfg = Config.fromfile(FASTER)
    cfg.model = ConfigDict(backbone=dict(depth=50))
    with pytest.raises(SetupError, match='no num_classes to set to 7'):
        use_data(cfg, shapes)
    with pytest.raises(FileNotFoundError, match='no data set folder at .*now'):
        use_data(cfg, 'nowhere')
    for change, message in ((dict(proposal_file='a.pkl'), 'proposal_file'),
                            (dict(data_prefix=dict(img='a', seg='b')),
                             'seg')):
        cfg = Config.fromfile(FASTER)
        cfg.train_dataloader.dataset.update(change)
        with pytest.raises(SetupError, match=rf'annotations \({message}\)'):
            use_data(cfg, shapes)


def test_a_config_without_a_model_is_said(tmp_path):
    path = tmp_path / 'part.py'
    path.write_text('train_cfg = dict()')
    with pytest.raises(SetupError, match='part.py has no model'):
        load_config(parse_args([str(path)]))
