"""ONNX files of whole detectors find what mmdet finds."""
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmcv import imread
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdet_smallbn.cli import export_onnx as cli
from mmdet_smallbn.deploy import onnx_two_stage
from mmdet_smallbn.deploy.onnx_export import export_onnx
from mmdet_smallbn.deploy.onnx_two_stage import TwoStage
from mmdet_smallbn.errors import SetupError

FASTER = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'
MASK = 'configs/demo/mask-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'
CASCADE = 'configs/demo/cascade-mask-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'
SMALL = {
    'model.backbone.base_channels': 8,
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 16,
    'model.rpn_head.in_channels': 16,
    'model.rpn_head.feat_channels': 16,
    'model.roi_head.bbox_head.in_channels': 16,
    'model.roi_head.bbox_head.conv_out_channels': 16,
    'model.roi_head.bbox_head.fc_out_channels': 16,
    'model.roi_head.bbox_roi_extractor.out_channels': 16
}
SMALL_MASKS = {
    **SMALL, 'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.mask_head.in_channels': 16,
    'model.roi_head.mask_head.conv_out_channels': 16
}
DETECTORS = {
    'Faster R-CNN': (FASTER, SMALL),
    'Mask R-CNN': (MASK, SMALL_MASKS),
    # What mmdet's own configs have, and a norm that looks at each region.
    'Mask R-CNN, boxes by class': (MASK, {
        **SMALL_MASKS, 'model.roi_head.bbox_head.reg_class_agnostic': False,
        'model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio': 0,
        'model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio': 0,
        'model.roi_head.mask_head.norm_cfg': dict(
            _delete_=True, type='BGN', num_groups=4)
    }),
    'Faster R-CNN, rarer settings': (FASTER, {
        **SMALL, 'model.rpn_head.loss_cls.use_sigmoid': False,
        'model.test_cfg.rpn.min_bbox_size': 4,
        'model.test_cfg.rcnn.max_per_img': -1,
        'model.roi_head.bbox_roi_extractor.roi_layer.aligned': False
    })
}


def _build(config, options):
    init_default_scope('mmdet')
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    # Statistics and scores of a model that tells things apart.
    model.train()
    for _ in range(8):
        model.extract_feat(torch.randn(2, 3, 64, 64))
    for layer in (model.rpn_head.rpn_cls, model.rpn_head.rpn_reg,
                  model.roi_head.bbox_head.fc_cls,
                  model.roi_head.bbox_head.fc_reg):
        nn.init.normal_(layer.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope='module', params=DETECTORS.values(), ids=DETECTORS)
def detector(request):
    return _build(*request.param)


@pytest.fixture(scope='module')
def faster():
    return _build(*DETECTORS['Faster R-CNN'])


@pytest.fixture(scope='module')
def exported(detector, tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'detector.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return path, export_onnx(detector, path, (1, 3, 96, 96))


def _run(path, image, size):
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    inputs = dict(input=image.numpy(), size=np.array(size))
    return {
        name: torch.from_numpy(out)
        for name, out in zip(names, session.run(names, inputs))
    }


def _assert_found(model, path, shapes, scale=0.5):
    """Compare with mmdet's detections on images, one side of each padded."""
    found = 0
    for number, file in enumerate(sorted((shapes / 'val').iterdir())):
        size = (80, 96) if number % 2 else (96, 70)
        image = torch.from_numpy(imread(file)).permute(2, 0, 1)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=size,
                ori_shape=tuple(int(side / scale) for side in size),
                scale_factor=(scale, scale)))
        data = dict(
            inputs=[image[:, :size[0], :size[1]]], data_samples=[sample])
        inputs = model.data_preprocessor(data)['inputs']
        assert inputs.shape == (1, 3, 96, 96)
        with torch.no_grad():
            [wanted] = model.test_step(data)
        wanted = wanted.pred_instances
        outputs = _run(path, inputs, size)
        boxes = outputs['boxes'] / scale
        torch.testing.assert_close(boxes, wanted.bboxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            outputs['scores'], wanted.scores, atol=1e-5, rtol=0)
        assert torch.equal(outputs['labels'], wanted.labels)
        if 'masks' in wanted:
            masks, _ = _do_paste_mask(
                outputs['masks'][:, None],
                boxes,
                *sample.ori_shape,
                skip_empty=False)
            differ = (masks >= 0.5) != wanted.masks
            assert differ.float().mean() < 1e-4
            assert 0.05 < wanted.masks.float().mean() < 0.95
        found += len(boxes)
    assert found > 100


def test_detections_are_mmdets(detector, exported, shapes):
    path, export = exported
    masks = detector.roi_head.with_mask
    assert list(export.outputs) == ['boxes', 'scores', 'labels', 'masks'
                                    ][:3 + masks]
    assert export.outputs['boxes'][0] > 10 and export.difference < 1e-4
    _assert_found(detector, path, shapes)


def test_operators_are_standard(exported):
    nodes = onnx.load(str(exported[0])).graph.node
    assert {node.domain for node in nodes} <= {'', 'ai.onnx'}
    assert {'NonMaxSuppression', 'RoiAlign'} <= {n.op_type for n in nodes}


def test_nothing_is_found(exported):
    # The image without padding is empty, and so are the boxes in it.
    found = _run(exported[0], torch.zeros(1, 3, 96, 96), (0, 0))
    assert {name: tuple(out.shape) for name, out in found.items()} == {
        name: (0, *shape[1:])
        for name, shape in exported[1].outputs.items()
    }


def test_a_model_that_finds_nothing(tmp_path):
    model = _build(*DETECTORS['Mask R-CNN, boxes by class'])
    model.roi_head.test_cfg.score_thr = 1.
    export = export_onnx(model, tmp_path / 'a.onnx', (1, 3, 96, 96))
    assert export.outputs['boxes'] == (0, 4) and export.difference == 0


def test_folded(faster, shapes, tmp_path):
    path = tmp_path / 'folded.onnx'
    norms = [m for m in faster.modules() if hasattr(m, 'running_mean')]
    export_onnx(faster, path, (1, 3, 96, 96), fold=True)
    assert norms == [m for m in faster.modules() if hasattr(m, 'running_mean')]
    operators = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert 'BatchNormalization' not in operators
    _assert_found(faster, path, shapes)


def test_a_file_that_finds_other_things_is_not_written(faster, tmp_path,
                                                       monkeypatch):
    clip = onnx_two_stage._clip
    monkeypatch.setattr(onnx_two_stage, '_clip',
                        lambda boxes, limits: clip(boxes, limits) * 0.99)
    with pytest.raises(SetupError, match='output detections differs by'):
        export_onnx(faster, tmp_path / 'a.onnx', (1, 3, 96, 96))
    assert not (tmp_path / 'a.onnx').exists()


def _detections(count):
    return dict(
        boxes=torch.rand(count, 4) * 100,
        scores=torch.rand(count),
        labels=torch.randint(9, (count, )),
        masks=torch.rand(count, 2, 2))


def _of(detections, index):
    return {name: out[index] for name, out in detections.items()}


def test_detections_are_compared_in_any_order():
    wanted = _detections(40)
    difference = TwoStage.onnx_difference
    assert difference(_of(wanted, torch.randperm(40)), wanted) == 0
    # Rounding may tip the balance for one of 20, but for no more.
    assert difference(_of(wanted, slice(2, None)), wanted) == 0
    assert difference(_of(wanted, slice(8, None)), wanted) > 0.01
    for name in wanted:
        assert difference({**wanted, name: wanted[name] + 1}, wanted) > 0.009
    none = _of(wanted, slice(0))
    assert difference(none, none) == 0
    assert difference(none, wanted) == difference(wanted, none) == np.inf


@pytest.mark.parametrize('options, message', [
    ({
        'model.test_cfg.rcnn.nms.type': 'soft_nms'
    }, "this FasterRCNN roi_head.test_cfg.nms.type is 'soft_nms'"),
    ({
        'model.roi_head.type': 'DoubleHeadRoIHead',
        'model.roi_head.reg_roi_scale_factor': 1.3
    }, 'this FasterRCNN roi_head is DoubleHeadRoIHead'),
    ({
        'model.roi_head.bbox_roi_extractor.type': 'GenericRoIExtractor'
    }, 'bbox_roi_extractor is GenericRoIExtractor'),
    ({
        'model.test_cfg.rcnn.nms.class_agnostic': True
    }, 'roi_head.test_cfg.nms has class_agnostic=True'),
    ({
        'model.test_cfg.rpn.nms.max_num': 3
    }, 'rpn_head.test_cfg.nms has max_num=3')
], ids=['NMS', 'RoI head', 'extractor', 'agnostic', 'limited'])
def test_other_parts_are_refused(options, message, tmp_path):
    model = _build(FASTER, {**SMALL, **options})
    with pytest.raises(SetupError, match=message + '.*Export its parts'):
        export_onnx(model, tmp_path / 'a.onnx')


def test_other_detectors_are_refused(tmp_path):
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(CASCADE).model)
    with pytest.raises(
            SetupError, match='this CascadeRCNN roi_head is CascadeRoIH'):
        export_onnx(model, tmp_path / 'a.onnx')


@pytest.mark.parametrize('settings, message', [
    (dict(dynamic=('height', )), 'got 1 images, dynamic axes .height., op'),
    (dict(shape=(2, 3, 96, 96)), 'got 2 images'),
    (dict(opset=15), 'opset 16 or above, .*opset 15'),
], ids=['dynamic', 'batch', 'opset'])
def test_other_files_are_refused(settings, message, faster, tmp_path):
    with pytest.raises(SetupError, match=message):
        export_onnx(faster, tmp_path / 'a.onnx', **settings)


def test_the_tool_lists_the_outputs_last(tmp_path, capsys):
    model = _build(*DETECTORS['Mask R-CNN'])
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    path = tmp_path / 'out.onnx'
    options = [
        f'{key}={value}'.replace(' ', '') for key, value in SMALL_MASKS.items()
    ]
    cli.main([
        MASK, str(tmp_path / 'a.pth'), '-o', str(path), '--shape', '96',
        '--cfg-options', *options
    ])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f'written: {path}'
    assert told[1].startswith('largest difference between onnxruntime and '
                              'torch, over 95% of the detections: ')
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider'])
    names = [out.name for out in session.get_outputs()]
    assert [line.split()[0] for line in told[-4:]] == names == [
        'boxes', 'scores', 'labels', 'masks'
    ]
    assert told[2:5] == [
        'inputs:', '  input (1, 3, 96, 96): a normalised image, padded with '
        'zeros at the right and bottom',
        "  size (2,): the image's height and width without the padding"
    ]
    assert told[5] == 'outputs, the detections, here of a random image:'
    assert told[6].endswith(", 4): x1, y1, x2, y2 in the input's pixels")
