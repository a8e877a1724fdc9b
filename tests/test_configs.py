"""Every config loads, builds, and has the intended norms, and takes a step."""
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_smallbn.layers import CBN, MABN, CenConv2d, SmallBatchNorm

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p for p in (ROOT / 'configs').rglob('*.py')
                 if p.parent.name != '_base_')
# Parts of the model that carry the norm, of the file name's "{norm}-{place}".
PLACES = {
    'head': ('neck', 'roi_head'),
    'all': ('backbone', 'neck', 'roi_head'),
}


def _load(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return cfg


def _small(cfg):
    """Depth 18, and nothing to download."""
    model = cfg.model
    if model.backbone.depth != 18:
        model.backbone.depth = 18
        model.neck.in_channels = [64, 128, 256, 512]
    model.backbone.init_cfg = None
    return MODELS.build(model)


def _kind(path):
    """(CBN, 'head') of '..._cbn-head_...'."""
    name, place = re.search(r'_([a-z]+)-(head|all)(-[a-z]+)?_',
                            path.stem).groups()[:2]
    known = {
        key.lower(): cls
        for key, cls in ROOT_MODELS.module_dict.items() if inspect.isclass(cls)
    }
    return known[name], place


def _norm_cfg(cfg, name):
    """What the config says of a norm in the model."""
    node = cfg.model
    for part in name.split('.'):
        if part not in node:
            break
        node = node[part]
    return node.norm_cfg


def _hook(cfg, kind):
    """The hook of this type in a config; None if there is none."""
    hooks = [h for h in cfg.get('custom_hooks', []) if h.type == kind]
    assert len(hooks) <= 1
    return hooks[0] if hooks else None


def test_there_are_configs():
    assert len(CONFIGS) >= 12


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_leaves_are_short_deltas(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 36
    assert any(line.startswith('_base_ = ') for line in lines)
    assert path.stem in (path.parent / 'README.md').read_text()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_norms_are_where_the_name_says_and_take_a_step(path):
    cfg = _load(path)
    norm, place = _kind(path)
    model = _small(cfg)
    model.train()
    frozen = 0
    for name, module in model.named_modules():
        if not isinstance(module, (_BatchNorm, nn.GroupNorm)):
            continue
        if name.split('.')[0] not in PLACES[place]:
            # A backbone's own BatchNorm, fixed.
            assert type(module) is nn.BatchNorm2d and not module.training
        elif not any(p.requires_grad for p in module.parameters()):
            assert name.startswith(('backbone.bn1', 'backbone.layer1'))
            assert not module.training
            frozen += 1
        else:
            assert type(module) is norm, name
            assert module.training, name
            for key, value in _norm_cfg(cfg, name).items():
                assert key in ('type', 'requires_grad') or (
                    getattr(module, key) == value), (name, key)
    assert (frozen > 0) == (place == 'all'
                            and cfg.model.backbone.frozen_stages > 0)
    # Centred weights where MABN needs them, and only there.
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and (
                name.startswith('backbone')
                or isinstance(model.get_submodule(name.rpartition('.')[0]),
                              ConvModule)):
            centred = norm is MABN and name.split('.')[0] in PLACES[place]
            assert isinstance(module, CenConv2d) == centred or (
                name.startswith('rpn_head')), name
    assert (_hook(cfg, 'BurnInHook') is not None) == getattr(
        norm, 'burns_in', False)

    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    inputs = demo_mm_inputs(
        2, [[3, 96, 96]] * 2,
        num_classes=cfg.model.roi_head.bbox_head.num_classes)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        # No norm may follow something that it cannot compensate for.
        warnings.filterwarnings('error', message='.*follows no convolution.*')
        steps = max(2, cfg.optim_wrapper.get('accumulative_counts', 1))
        for _ in range(steps):
            losses = model.train_step(inputs, wrapper)
    assert torch.isfinite(losses['loss'])
    assert any((a != b).any()
               for a, b in zip(before, model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, SmallBatchNorm) and module.training:
            assert module.num_batches_tracked == steps
        if isinstance(module, CBN) and module.training:
            # The steps are in the window, with what follows the weight.
            window, = module._states
            assert window.filled == steps
            assert (window._entries.d_square.numel() > 0) == module.compensate
        if isinstance(module, MABN) and module.training:
            state, = module._states
            assert state.forward.pushes == state.backward.pushes == steps


@pytest.mark.parametrize(
    'path', [p for p in CONFIGS if p.stem.endswith('_coco')],
    ids=lambda p: p.stem)
def test_batch_learning_rate_and_schedule_fit_the_name(path):
    cfg = _load(path)
    batch, schedule = path.stem.split('_')[-2].split('-')
    gpus, images = map(int, batch.split('xb'))
    assert cfg.train_dataloader.batch_size == images
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(
        0.02 * gpus * images / 16)
    assert cfg.train_cfg.max_epochs == {'1x': 12, '2x': 24}[schedule]
    if issubclass(_kind(path)[0], CBN):
        assert _hook(cfg, 'BurnInHook').epochs == 3
    assert cfg.auto_scale_lr.base_batch_size == gpus * images


@pytest.mark.parametrize('decay', [True, False])
def test_weight_decay_on_scale_and_shift_is_the_optimizers(decay):
    name = 'bgn-head' if decay else 'bgn-head-nodecay'
    path, = (ROOT / 'configs' / 'bgn').glob(f'*_{name}_*')
    cfg = _load(path)
    model = _small(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decays = {
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups for p in group['params']
    }
    norms = [m for m in model.modules() if isinstance(m, SmallBatchNorm)]
    assert len(norms) == 12  # 4 + 4 in the neck, 4 in the head
    for norm in norms:
        for p in norm.parameters():
            assert decays[id(p)] == (1e-4 if decay else 0)
    assert decays[id(model.rpn_head.rpn_conv.weight)] == 1e-4
