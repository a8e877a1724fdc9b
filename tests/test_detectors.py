"""The norms in mmdet's detectors."""
import warnings

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner.activation_checkpointing import \
    turn_on_activation_checkpointing

from mmdet_smallbn.cli.runtime import build_runner, load_config
from mmdet_smallbn.cli.train import parse_args
from mmdet_smallbn.layers import SmallBatchNorm, remember_calls

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
    'Mask R-CNN':
    ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', _mask_rcnn, 'roi_head', [3]),
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
    inputs = demo_mm_inputs(
        2, [[3, 96, 96]] * 2, num_classes=3, with_mask=True)
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
        assert norm.held_iterations == expected, key


@pytest.mark.parametrize('kind', ['CBN', 'MABN', 'BRN', 'BGN', 'GhostBN'])
@pytest.mark.parametrize('by', ['with_cp', 'the runner'])
@pytest.mark.filterwarnings('ignore:.*use_reentrant.*')
@pytest.mark.filterwarnings('error:.*inside activation checkpointing')
def test_a_checkpointed_backbone_trains_alike(kind, by):
    """Losses, gradients, running statistics and windows of ten steps."""
    init_default_scope('mmdet')
    cfg = dict(
        type='ResNet',
        depth=18,
        base_channels=32,
        norm_cfg=dict(type=kind),
        norm_eval=False)
    plain = MODELS.build(cfg).double()
    model = MODELS.build(dict(cfg, with_cp=by == 'with_cp')).double()
    model.load_state_dict(plain.state_dict())
    if by == 'the runner':
        turn_on_activation_checkpointing(model, ['layer2', 'layer4'])
    images = torch.randn(10, 2, 3, 96, 96).double()
    results = []
    for m in (plain, model):
        remember_calls(m)
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-4)
        for iteration in range(10):
            for norm in _norms(m):
                norm.iteration = iteration
            optimizer.zero_grad()
            loss = sum(out.square().mean() for out in m(images[iteration]))
            loss.backward()
            optimizer.step()
            results.append(loss.item())
    assert results[10:] == pytest.approx(results[:10], rel=1e-8)
    for a, b in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)
    for a, b in zip(plain.buffers(), model.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    for norm in _norms(model):
        assert norm.num_batches_tracked == 10
        if kind == 'CBN':
            assert norm.held_iterations == [4]


def _norms(model):
    return [m for m in model.modules() if isinstance(m, SmallBatchNorm)]


# A config of each detector family, and what makes 20 iterations of it, on the
# same two images, a matter of seconds.
FAMILIES = {
    'Faster R-CNN': 'cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-all_1xb2-1x_coco',
    'Mask R-CNN':
    'bgn/mask-rcnn_r50_fpn_4conv1fc_bgn-head_8xb2-1x_coco',
    'RetinaNet': 'mabn/retinanet_r50-scratch_fpn_mabn-all_8xb2-2x_coco'
}
SMALL = {
    'model.backbone.depth': 18,
    'model.backbone.init_cfg': None,
    'model.neck.in_channels': '64,128,256,512',
    'train_cfg.max_epochs': 20,
    'train_cfg.val_interval': 20,
    'param_scheduler.0.end': 10,
    'default_hooks.checkpoint.interval': 99,
    'train_dataloader.dataset.indices': 2,
    'train_dataloader.dataset.pipeline.2.scale': '(96,96)',
    'val_dataloader.dataset.indices': 2,
    'val_dataloader.dataset.pipeline.1.scale': '(96,96)',
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'randomness.seed': 0
}


class _Losses(Hook):

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.values.append(outputs['loss'].item())


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_a_config_of_each_family_trains(family, shapes, tmp_path):
    changes = dict(SMALL)
    if 'R-CNN' in family:
        changes['model.train_cfg.rcnn.sampler.num'] = 32
        changes['model.test_cfg.rpn.max_per_img'] = 32
    if 'mabn' in FAMILIES[family]:
        changes['custom_hooks.0.iters'] = 3
    args = parse_args([
        f'configs/{FAMILIES[family]}.py', '--data',
        str(shapes), '--work-dir',
        str(tmp_path), '--cfg-options',
        *(f'{key}={value}' for key, value in changes.items())
    ])
    cfg = load_config(args)
    cfg.experiment_name = f'{tmp_path.name} {family}'
    runner = build_runner(cfg)
    losses = _Losses()
    runner.register_hook(losses)
    runner.train()
    assert len(losses.values) == 20
    # 0.65 to 0.85 with several seeds.
    assert sum(losses.values[-5:]) < 0.9 * sum(losses.values[:5])
