"""What the flags do to a config."""

import pytest
from mmengine.config import Config

from mmdet_smallbn import CBN
from mmdet_smallbn.cli import test as test_cli
from mmdet_smallbn.cli import train as train_cli
from mmdet_smallbn.cli.runtime import check_norms, load_config
from mmdet_smallbn.errors import SetupError

HEAD = 'configs/cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py'


def _train(*arguments):
    args = train_cli.parse_args([HEAD, *arguments])
    cfg = load_config(args)
    train_cli.apply_train_flags(cfg, args)
    return cfg


def _test(*arguments):
    args = test_cli.parse_args([HEAD, 'a.pth', *arguments])
    cfg = load_config(args)
    test_cli.apply_test_flags(cfg, args)
    return cfg


def test_work_dir():
    assert _train().work_dir.startswith('work_dirs/faster-rcnn_r50_fpn_4conv')
    assert _train('--work-dir', 'here').work_dir == 'here'


def test_resume():
    assert not _train().get('resume')
    assert _train('--resume').resume and _train('--resume').load_from is None
    assert _train('--resume', 'a.pth').load_from == 'a.pth'


def test_amp_and_learning_rate():
    cfg = _train('--amp', '--auto-scale-lr')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.optim_wrapper.clip_grad.max_norm == 35
    assert cfg.auto_scale_lr.enable
    args = train_cli.parse_args([HEAD, '--auto-scale-lr'])
    with pytest.raises(SetupError, match='base_batch_size'):
        train_cli.apply_train_flags(Config(dict(optim_wrapper={})), args)


def test_cfg_options():
    cfg = _train('--cfg-options', 'custom_hooks.0.epochs=1',
                 'model.backbone.depth=18')
    assert cfg.custom_hooks[0].epochs == 1 and cfg.model.backbone.depth == 18


def test_drawing_and_output():
    cfg = _test('--show-dir', 'drawn', '--show', '--wait-time', '0.5')
    hook = cfg.default_hooks.visualization
    assert hook.draw and hook.show and hook.wait_time == 0.5
    assert hook.test_out_dir == 'drawn' and cfg.load_from == 'a.pth'
    with pytest.raises(SystemExit):
        test_cli.parse_args([HEAD, 'a.pth', '--out', 'a.json'])


def test_tta_flips():
    cfg = _test('--tta')
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'FasterRCNN'
    last = cfg.test_dataloader.dataset.pipeline[-1]
    assert [t.prob for t in last.transforms[0]] == [1., 0.]


def test_norm_types_are_looked_up_wherever_they_stand():
    check_norms(Config.fromfile(HEAD))
    for kind in ('BN', 'SyncBN', 'GN', 'NaiveCBN'):
        check_norms(Config(dict(model=dict(norm_cfg=dict(type=kind)))))
    nested = dict(model=dict(heads=[dict(norm_cfg=dict(type='Batch'))]))
    with pytest.raises(SetupError, match="model.heads.0.norm_cfg.type='Batch'"
                       '.*Known names: .*CBN'):
        check_norms(Config(nested))


@pytest.mark.parametrize('norm_cfg, message', [
    (dict(type='CBN', windowsize=3), "CBN takes no 'windowsize'. Did you mean "
     'window_size'),
    (dict(type='NaiveCBN', window_size=0), 'window_size must be .* got 0'),
    (dict(type='NaiveCBN', compensate=True), "NaiveCBN takes no 'compensate'"),
    (dict(type='mmengine.CBN', windowsize=3), "CBN takes no 'windowsize'"),
    (dict(type=CBN, windowsize=3), "CBN takes no 'windowsize'"),
    (dict(type='CBN', eps='x'), "eps must be .* got 'x'"),
    (dict(type='CBN', momentum=-0.1), 'momentum must be .* got -0.1'),
    (dict(type='MABN', buffer_size='8'), "buffer_size must be .* got '8'"),
    (dict(type='BGN', num_groups=0), 'num_groups must be .* got 0'),
    (dict(type='BRN', r_max=0.5), 'r_max must be .* got 0.5'),
    (dict(type='GhostBN', num_groups=3), "GhostBN takes no 'num_groups'"),
])
def test_a_norms_settings_are_checked_where_they_stand(norm_cfg, message):
    cfg = Config(dict(model=dict(neck=dict(norm_cfg=norm_cfg))))
    with pytest.raises(SetupError, match=f'model.neck.norm_cfg: .*{message}'):
        check_norms(cfg)
    for good in (dict(type='BGN', num_groups=24, requires_grad=False),
                 dict(type=CBN, sync=True, momentum=None),
                 dict(type='CmBN', momentum=0.2, sync=True),
                 dict(type='GhostBN', ghost_size=3, device='cpu')):
        check_norms(Config(dict(model=dict(neck=dict(norm_cfg=good)))))


def test_sync_bn_over_our_norms_is_refused():
    cfg = Config.fromfile(HEAD)
    cfg.sync_bn = 'torch'
    cfg.launcher = 'none'
    check_norms(cfg)  # mmengine converts in distributed training alone
    cfg.launcher = 'pytorch'
    with pytest.raises(SetupError, match="sync_bn='torch'.*'CBN'.*remove"):
        check_norms(cfg)
    cfg.model.neck.norm_cfg = cfg.model.roi_head.bbox_head.norm_cfg = dict(
        type='BN')
    check_norms(cfg)
