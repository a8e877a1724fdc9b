"""Any detector's config on the demo's images, with any norm."""
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS

from mmdet_smallbn.cli.demo_config import (put_on_shapes, stretch,
                                           use_images, use_norm)
from mmdet_smallbn.cli.runtime import build_model
from mmdet_smallbn.errors import SetupError
from mmdet_smallbn.norm_report import norm_cfgs

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
RTMDET = CONFIGS / 'cbn' / 'rtmdet_tiny_cbn-all_1xb4-40e_coco.py'
YOLOX = CONFIGS / 'cbn' / 'yolox_s_cbn-all_1xb4-40e_coco.py'
MASK = CONFIGS / 'cbn' / 'mask-rcnn_r50_fpn_4conv1fc_cbn-head_1xb2-1x_coco.py'
CMBN = (CONFIGS / 'cbn' /
        'faster-rcnn_r50_fpn_4conv1fc_cmbn-head_1xb2-accumulate8-1x_coco.py')
MABN = CONFIGS / 'demo' / 'mask-rcnn_r18_fpn_mabn-all_1xb2_shapes-coco.py'


def _norms(cfg):
    return [dict(norm_cfg) for _, norm_cfg in norm_cfgs(cfg.model, 'model')]


@pytest.mark.parametrize('path', [RTMDET, YOLOX, MASK, CMBN],
                         ids=lambda p: p.stem)
def test_data_and_schedule_are_the_demos(path):
    cfg, before = Config.fromfile(path), Config.fromfile(path)
    put_on_shapes(cfg, CONFIGS / '_base_')
    wanted = Config.fromfile(
        CONFIGS / 'demo' / 'faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py')
    for key in ('shapes_coco', 'val_dataloader', 'train_cfg',
                'param_scheduler', 'default_hooks'):
        assert cfg[key] == wanted[key], key
    assert cfg.train_dataloader.batch_size == before.train_dataloader.batch_size
    assert cfg.train_dataloader.dataset.data_root == 'data/shapes_coco/'
    assert cfg.optim_wrapper.accumulative_counts == (
        before.optim_wrapper.get('accumulative_counts', 1))
    assert _norms(cfg) == _norms(before)
    # Nothing is downloaded, so nothing may be frozen.
    assert cfg.load_from is None
    assert cfg.model.backbone.init_cfg is None
    assert cfg.model.backbone.get('frozen_stages', -1) == -1
    assert not cfg.model.backbone.get('norm_eval', False)
    # Nothing brings images to other sizes.
    assert cfg.model.data_preprocessor.batch_augments is None
    masks = 'mask_head' in before.model.get('roi_head', {})
    load = cfg.train_dataloader.dataset.pipeline[1]
    assert load.get('with_mask', False) == masks
    assert cfg.val_evaluator.metric == (['bbox', 'segm'] if masks else 'bbox')


@pytest.mark.parametrize('path, hooks', [
    (RTMDET, ['BurnInHook']),
    (CMBN, ['SmallBatchNormHook']),
    (CONFIGS / 'bgn' / 'faster-rcnn_r50_fpn_4conv1fc_bgn-head_8xb2-1x_coco.py',
     ['SmallBatchNormHook']),
    (CONFIGS / 'baselines' /
     'faster-rcnn_r50_fpn_4conv1fc_gn-head_4xb4-1x_coco.py', []),
], ids=['CBN', 'CmBN', 'BGN', 'GN'])
def test_hooks_are_those_that_the_norms_want(path, hooks):
    cfg = Config.fromfile(path)
    put_on_shapes(cfg, CONFIGS / '_base_')
    assert [hook['type'] for hook in cfg.custom_hooks] == hooks
    model = build_model(cfg)
    for hook in cfg.custom_hooks:
        HOOKS.build(hook).find_layers(model)  # which refuses what does not fit


def test_a_schedule_of_epochs_is_not_stretched():
    with pytest.raises(SetupError, match='stretch a schedule of iterations'):
        stretch(Config.fromfile(MASK), 2.)


def test_without_the_demos_files_there_is_a_remedy(tmp_path):
    cfg = Config.fromfile(RTMDET)
    with pytest.raises(SetupError, match='shapes_coco.py, which the demo.s data needs, is not in'):
        put_on_shapes(cfg, tmp_path)


def test_another_norm_in_place_of_the_configs():
    cfg = Config.fromfile(YOLOX)
    use_norm(cfg, 'BN')
    assert _norms(cfg) == 3 * [dict(type='BN', momentum=0.03, eps=0.001)]
    kinds = [hook.type for hook in cfg.custom_hooks]
    assert kinds == ['YOLOXModeSwitchHook', 'SyncNormHook', 'EMAHook']

    cfg = Config.fromfile(MABN)
    use_norm(cfg, 'CBN')  # it burns in, as MABN does
    assert {norm['type'] for norm in _norms(cfg)} == {'CBN'}
    assert [hook.type for hook in cfg.custom_hooks] == ['BurnInHook']
    use_norm(cfg, 'CmBN')
    assert cfg.custom_hooks == [dict(type='SmallBatchNormHook')]
    use_norm(cfg, 'CBN')  # and back
    assert cfg.custom_hooks == [dict(type='BurnInHook', iters=250)]

    cfg = Config.fromfile(RTMDET)
    use_norm(cfg, 'BN')
    with pytest.raises(SetupError, match='--norm BN: the config has no norm'):
        use_norm(cfg, 'BN')


def test_the_schedule_is_stretched_whole():
    cfg = Config.fromfile(MABN)
    stretch(cfg, 2.5)
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (3000, 1000)
    assert cfg.default_hooks.checkpoint.interval == 3000
    assert [(s.begin, s.end) for s in cfg.param_scheduler] == [(0, 250),
                                                              (250, 3000)]
    assert cfg.custom_hooks[0].iters == 625


@pytest.mark.parametrize('norm, window', [('cbn', 4), ('mabn', None)])
def test_other_batch_sizes_of_the_demo_see_as_many_images(norm, window):
    cfg = Config.fromfile(
        f'configs/demo/faster-rcnn_r18_fpn_{norm}-all_1xb2_shapes-coco.py')
    use_images(cfg, 4)
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.train_cfg.max_iters == 600
    assert cfg.train_cfg.val_interval == 200
    assert cfg.param_scheduler[1].end == 600
    assert cfg.default_hooks.checkpoint.interval == 600
    assert cfg.custom_hooks[0].iters == 125
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(7e-4 * 2**0.5)
    assert cfg.model.neck.norm_cfg.get('window_size') == window
    with pytest.raises(SetupError, match='--images must be at least 1'):
        use_images(cfg, 0)
