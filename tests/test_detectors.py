"""`norm_cfg=dict(type='CBN')` in mmdet's detectors, without another change."""
import warnings

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.hub import get_config
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope

from mmdet_smallbn.layers import SmallBatchNorm

NORM = dict(type='CBN', window_size=4)


def _mask_rcnn(model):
    model.neck.norm_cfg = NORM
    model.roi_head.bbox_head.update(
        type='Shared4Conv1FCBBoxHead', norm_cfg=NORM)
    model.roi_head.mask_head.norm_cfg = NORM


def _retinanet(model):
    model.bbox_head.norm_cfg = NORM


def _retinanet_separate(model):
    model.bbox_head.update(type='RetinaSepBNHead', num_ins=5, norm_cfg=NORM)


# Base, what carries the norm, and the windows of a norm in its head.
DETECTORS = {
    'Mask R-CNN': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', _mask_rcnn,
                   'roi_head', [3]),
    'RetinaNet, norms shared over levels':
    ('retinanet/retinanet_r50_fpn_1x_coco.py', _retinanet, 'bbox_head',
     [3] * 5),
    'RetinaNet, a norm for each level':
    ('retinanet/retinanet_r50_fpn_1x_coco.py', _retinanet_separate,
     'bbox_head', [3]),
}


@pytest.mark.parametrize('name', DETECTORS)
def test_every_norm_gathers_its_iterations(name):
    base, edit, head, windows = DETECTORS[name]
    init_default_scope('mmdet')
    cfg = get_config(f'mmdet::{base}').model
    cfg.backbone.update(
        depth=18, norm_cfg=NORM, norm_eval=False, init_cfg=None)
    cfg.neck.in_channels = [64, 128, 256, 512]
    edit(cfg)
    model = MODELS.build(cfg).train()
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SmallBatchNorm) and module.training
    }
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    inputs = demo_mm_inputs(2, [[3, 96, 96]] * 2, num_classes=3,
                            with_mask=True)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*follows no convolution.*')
        warnings.filterwarnings('ignore', message='.*called several times.*')
        for iteration in range(3):
            for norm in norms.values():
                norm.iteration = iteration
            losses = model.train_step(inputs, optimizer)
    assert torch.isfinite(losses['loss'])
    assert any(key.startswith(head) for key in norms)
    for key, norm in norms.items():
        expected = windows if key.startswith(head) else [3]
        assert [w.filled for w in norm._states] == expected, key
