"""The printed config lines work as they are."""
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import HOOKS, MODELS, init_default_scope

from mmdet_smallbn.cli.runtime import check_norms
from mmdet_smallbn.doctor import Advice, advise
from mmdet_smallbn.doctor.lines import config_lines
from tests.test_doctor.test_advice import HURTS, diagnosis, layer

DEMO = 'configs/demo/faster-rcnn_r18_fpn_bn-all_1xb2_shapes-coco.py'
FROZEN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
CASCADE = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'


def norms_of(cfg):
    """Kinds of the norms of the config's model, by their part."""
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    check_norms(cfg)
    model = MODELS.build(cfg.model)
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ('BatchNorm2d', 'SyncBatchNorm', 'CBN', 'MABN', 'GroupNorm',
                    'GhostBN'):
            found.setdefault(name.split('.')[0], set()).add(kind)
    return found


def _leaf(tmp_path, base, lines):
    path = tmp_path / 'leaf.py'
    path.write_text(f'_base_ = [{base!r}]\n{lines}\n')
    return Config.fromfile(path)


def _all_advice(**kwargs):
    found = {}
    for detects in (True, False):
        for one in advise(diagnosis(HURTS, loss=dict(
                batch=[0.5] * 2, fixed=[1.] * 2, reference=[1.] * 2),
                **kwargs), detects):
            found[one.title] = one
    return found.values()


PARTS = [layer(f'{part}.bn', channels=32)
         for part in ('backbone', 'neck', 'roi_head.bbox_head')]
KINDS = dict(CBN='CBN', MABN='MABN', GN='GroupNorm', GhostBN='GhostBN',
             SyncBN='SyncBatchNorm')


@pytest.mark.parametrize('number', range(6))
def test_the_demo_takes_every_advice(number, tmp_path):
    found = diagnosis(layers=PARTS)
    advice = list(_all_advice(layers=PARTS))[number]
    base = Config.fromfile(DEMO)
    lines = config_lines(advice, found, base)
    cfg = _leaf(tmp_path, str(Path(DEMO).resolve()), lines)
    kind = 'BatchNorm2d'
    if advice.norm_cfg:
        kind = KINDS[advice.norm_cfg['type']]
    parts = norms_of(cfg)
    assert parts == {part: {kind} for part in ('backbone', 'neck', 'roi_head')}
    hooks = [HOOKS.build(hook) for hook in cfg.get('custom_hooks') or []]
    assert [type(hook).__name__ for hook in hooks] == (
        [advice.hook] if advice.hook else [])


def test_there_is_no_other_advice():
    assert len(_all_advice(layers=PARTS)) == 6


def test_a_frozen_backbone_wakes_up(tmp_path):
    asleep = [layer('backbone.bn1')]
    found = diagnosis(layers=asleep, asleep=['backbone.bn1'])
    keep, cbn, *_ = advise(found)
    base = get_config(FROZEN)
    assert config_lines(keep, found, base) == ''
    lines = config_lines(cbn, found, base)
    assert 'custom_imports' in lines and 'norm_eval=False' in lines
    cfg = _leaf(tmp_path, FROZEN, lines)
    assert norms_of(cfg) == dict(backbone={'CBN'})
    assert cfg.model.backbone.norm_eval is False
    assert cfg.custom_hooks == [dict(type='BurnInHook', epochs=1)]


def test_heads_in_a_list_get_flags(tmp_path):
    base = get_config(CASCADE)
    for head in base.model.roi_head.bbox_head:
        head.update(type='Shared4Conv1FCBBoxHead',
                    norm_cfg=dict(type='BN', requires_grad=True))
    found = diagnosis(layers=[layer(f'roi_head.bbox_head.{i}.bn')
                              for i in range(3)])
    advice = Advice('', [], dict(type='CBN', window_size=8))
    lines = config_lines(advice, found, base)
    comment = lines.splitlines()[-1]
    assert comment.startswith('# --cfg-options ')
    options = dict(item.split('=') for item in comment.split()[2:])
    assert len(options) == 6
    base.merge_from_dict(options)
    assert [head.norm_cfg.type for head in base.model.roi_head.bbox_head] == [
        'CBN'] * 3


def test_other_hooks_stay():
    cfg = Config(dict(
        model=dict(type='A', backbone=dict(norm_cfg=dict(type='BN'))),
        custom_hooks=[dict(type='EMAHook'), dict(type='BurnInHook', iters=3)],
        custom_imports=dict(imports=['a', 'mmdet_smallbn']),
        train_cfg=ConfigDict(max_epochs=12)))
    found = diagnosis(layers=[layer('backbone.bn1')])
    freeze, cbn, gn, *_ = advise(found)
    assert config_lines(freeze, found, cfg).split() == """custom_hooks = [
        dict(type='EMAHook'), dict(epochs=9, type='FreezeStatisticsHook'), ]
        """.split()
    assert "dict(epochs=1, type='BurnInHook')" in config_lines(cbn, found, cfg)
    assert 'BurnInHook' not in config_lines(gn, found, cfg)
