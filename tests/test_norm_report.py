"""The table of norms says what is, not what the config wished for."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmcv.ops import DeformConv2d
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_smallbn import (BurnInHook, ExampleWeightHook,
                           FreezeStatisticsHook, SmallBatchNormHook,
                           set_example_weight)
from mmdet_smallbn.cli.print_norms import main
from mmdet_smallbn.layers import (BGN, BRN, CBN, MABN, CenConv2d, CmBN,
                                  GhostBN, NaiveCBN)
from mmdet_smallbn.norm_report import describe_norms, norm_summary, notes

ROOT = Path(__file__).resolve().parents[1]
CBN_ALL = 'configs/cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-all_4xb4-1x_coco.py'
CBN_HEAD = 'configs/cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py'
MABN_T7 = 'configs/mabn/retinanet_r50-scratch_fpn_mabn-all_8xb2-2x_coco.py'


def _norms(*layers, roi_head=False):
    model = nn.Sequential(*layers)
    return nn.ModuleDict(dict(roi_head=model)) if roi_head else model


def _said(layer, images=4, processes=2, **kwargs):
    """Statistics in training, and at inference."""
    norm, = describe_norms(_norms(layer, **kwargs), images, processes)
    return norm.statistics, norm.inference


@pytest.mark.parametrize(
    'layer, statistics, inference', [
        (nn.BatchNorm2d(8), '4 images', 'running averages'),
        (nn.SyncBatchNorm(8), '4 images x 2 GPUs', 'running averages'),
        (nn.GroupNorm(
            4, 8), '1 example, 4 groups of channels', "each example's own"),
        (nn.InstanceNorm2d(8), '1 example', "each example's own"),
        (nn.InstanceNorm2d(8, track_running_stats=True), '1 example',
         'running averages'),
        (nn.LayerNorm(8), '1 position', "each example's own"),
        (nn.BatchNorm2d(
            8, track_running_stats=False), '4 images', "each example's own"),
        (CBN(8, window_size=3), '3 iterations x 4 images = 12',
         'running averages'),
        (CBN(8, window_size=1), '4 images', 'running averages'),
        (CBN(8, window_size=3, sync=True), '3 iterations x 4 images x 2 GPUs',
         'running averages'),
        (MABN(8, buffer_size=5),
         '5 iterations x 4 images, ema forward, sma backward',
         'running averages'),
        (MABN(8, backward_statistics='batch'),
         '4 images, ema forward, batch backward', 'running averages'),
        (BRN(8), '4 images, renormalised to the running averages',
         'running averages'),
        (BGN(8, num_groups=2),
         'groups of 2 images, 2 groups of channels', "each example's own"),
        (BGN(8, num_groups=2, example_weight=0.25),
         'groups of 2 images, 2 groups of channels',
         "running averages, 0.25 of each example's own"),
        (GhostBN(8, ghost_size=1), 'groups of 1 image', 'running averages'),
        (GhostBN(8, sync=True), 'groups of 2 images over all GPUs',
         'running averages'),
    ],
    ids=str)
def test_what_is_behind_the_statistics(layer, statistics, inference):
    assert _said(layer) == (statistics, inference)


def test_examples_of_roi_heads_are_regions():
    assert _said(
        CBN(8), roi_head=True)[0] == ('4 iterations x regions of 4 images')
    assert _said(GhostBN(8), roi_head=True)[0] == 'groups of 2 regions'


def test_what_is_unknown_is_not_made_up():
    assert _said(nn.BatchNorm2d(8), None)[0] == 'all images'
    assert _said(nn.SyncBatchNorm(8), 4, None)[0] == '4 images x all GPUs'
    assert _said(CBN(8), None)[0] == '4 iterations x all images'


def test_the_model_is_asked_not_the_config():
    """Example weights set later, frozen parameters, modes."""
    frozen = nn.BatchNorm2d(8)
    frozen.requires_grad_(False)
    model = _norms(
        nn.Conv2d(8, 8, 1), frozen, CenConv2d(8, 8, 1), MABN(8, affine=False))
    set_example_weight(model, 0.5)
    model.eval()
    first, second = describe_norms(model, 2)
    assert model.training  # as the training loop sets it
    assert (first.kind, first.after, first.mode,
            first.affine) == ('ExampleWeightedBatchNorm2d', 'Conv2d', 'train',
                              'frozen')
    assert first.inference == "running averages, 0.5 of each example's own"
    assert (second.kind, second.after, second.affine) == ('MABN', 'CenConv2d',
                                                          'none')


def test_a_norm_in_evaluation_has_no_burn_in():

    class Asleep(nn.Sequential):

        def train(self, mode=True):
            return super().train(False)

    hooks = [BurnInHook(epochs=3, prefix='0'), BurnInHook(iters=0)]
    model = nn.Sequential(
        nn.Sequential(NaiveCBN(4)), Asleep(CBN(4), BGN(64)), BRN(4),
        nn.BatchNorm2d(4))
    norms = describe_norms(model, 2, hooks=hooks)
    assert [n.burn_in for n in norms] == ['3 epochs', '-', '-', 'none', '-']
    assert norms[1].statistics == 'running averages, fixed'
    assert norms[2].statistics == "each example's own"
    said, = notes(model, norms, hooks)
    assert said.startswith('2 norms (first: 1.0) should train, but')


def test_norms_that_stop_to_gather_statistics():
    hooks = [FreezeStatisticsHook(epochs=9, prefix=['0', '1', '2', '4']),
             FreezeStatisticsHook(iters=500, prefix='3')]
    model = _norms(CBN(4, window_size=2), BGN(4),
                   nn.GroupNorm(2, 4), nn.BatchNorm2d(4),
                   nn.BatchNorm2d(4, track_running_stats=False))
    said = [n.statistics for n in describe_norms(model, 2, hooks=hooks)]
    assert said[0].endswith(', from epoch 9 on running averages')
    assert said[1].endswith(", from epoch 9 on each example's own")
    assert said[2] == '1 example, 2 groups of channels'
    assert said[3] == '2 images, from iteration 500 on running averages'
    assert said[4] == '2 images'


def test_a_shared_norm_is_described_once():
    conv, norm = nn.Conv2d(3, 4, 1), CBN(4)
    model = nn.ModuleDict(
        dict(
            a=nn.Sequential(conv, norm),
            b=nn.Sequential(nn.ReLU(), norm, nn.BatchNorm2d(4))))
    norms = describe_norms(model, 2)
    assert [(n.name, n.after) for n in norms] == [('a.1', 'Conv2d'),
                                                  ('b.2', '?')]
    notes(model, norms)


def test_several_hooks_on_one_norm():
    hooks = [
        BurnInHook(epochs=3, prefix='0'),
        BurnInHook(iters=9),
        ExampleWeightHook(0.25, exclude='1')
    ]
    model = _norms(CBN(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    norms = describe_norms(model, 2, hooks=hooks)
    assert norms[0].burn_in == '3 epochs and 9 iters'
    mixed = "running averages, 0.25 of each example's own"
    assert [n.inference for n in norms] == [mixed, 'running averages', mixed]


def test_what_cbn_may_not_follow():
    model = _norms(
        nn.AvgPool2d(2), CBN(4), CBN(4), nn.Conv2d(4, 4, 1), CBN(4),
        nn.ConvTranspose2d(3, 4, 1), CBN(4), DeformConv2d(4, 4, 3), CBN(4),
        NaiveCBN(4))
    hooks = [BurnInHook(iters=0)]
    said, = notes(model, describe_norms(model, hooks=hooks), hooks)
    assert said.startswith(
        'no convolution found before 2 CBN layers (first: 1).')


def test_a_model_without_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert norm_summary(model, 2) == 'no norms'


def test_detectors_within_detectors_and_labels():
    head = nn.ModuleDict(
        dict(
            bbox_head=nn.Sequential(nn.Conv2d(4, 4, 1), CBN(4)),
            mask_head=nn.Sequential(nn.Conv2d(4, 4, 1))))
    backbone = nn.ModuleDict()
    for name, norm in (('a', nn.BatchNorm2d(4)), ('b', CBN(4))):
        backbone[name] = nn.ModuleDict(dict(c=nn.Conv2d(4, 4, 1), n=norm))
    deep = nn.ModuleDict(dict(x=backbone))
    model = nn.ModuleDict(
        dict(student=nn.ModuleDict(dict(backbone=deep, roi_head=head))))
    lines = norm_summary(model, 2).splitlines()
    assert [re.split(r'  +', line)[0] for line in lines[1:4]] == [
        'student.backbone.x (n)', 'student.backbone.x (n)',
        'student.roi_head.bbox_head'
    ]
    assert lines[4] == 'No norm in student.roi_head.mask_head.'


def test_notes_of_what_is_missing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), MABN(4))
    said = notes(model, describe_norms(model))
    assert len(said) == 2
    assert 'before 1 MABN layer (first: 1) does not centre' in said[0]
    assert 'no BurnInHook in custom_hooks' in said[1]
    assert not notes(model, describe_norms(model, hooks=[BurnInHook(iters=0)]),
                     [BurnInHook(iters=0)])[1:]


def test_a_step_that_nobody_tells():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CmBN(4))
    said, = notes(model, describe_norms(model))
    assert said.startswith('there is no SmallBatchNormHook')
    hooks = [SmallBatchNormHook()]
    assert not notes(model, describe_norms(model, hooks=hooks), hooks)


def test_a_norm_cfg_that_a_part_ignores():
    init_default_scope('mmdet')
    cfg = Config.fromfile(CBN_HEAD)
    cfg.model.backbone.init_cfg = None
    cfg.model.roi_head.bbox_head.type = 'Shared2FCBBoxHead'
    model = MODELS.build(cfg.model)
    hooks = [BurnInHook(epochs=3)]
    said, = notes(model, describe_norms(model, 4, 1, hooks), hooks, cfg)
    assert said.startswith('model.roi_head.bbox_head.norm_cfg asks for CBN, '
                           'but Shared2FCBBoxHead has no norm')


def _table(capsys, *arguments):
    main(arguments)
    return capsys.readouterr().out.splitlines()


def test_a_readable_table(capsys):
    lines = _table(capsys, CBN_ALL)
    cells = [re.split(r'  +', line) for line in lines[:-1]]
    assert cells == [[
        'part', 'norms', 'kind', 'after', 'mode', 'scale, shift',
        'statistics in training', 'burn-in', 'at inference'
    ],
                     [
                         'backbone.bn1, layer1', '11', 'CBN', 'Conv2d', 'eval',
                         'frozen', 'running averages, fixed', '-',
                         'running averages'
                     ],
                     [
                         'backbone.layer2, layer3, layer4', '42', 'CBN',
                         'Conv2d', 'train', 'trained',
                         '4 iterations x 4 images = 16', '3 epochs',
                         'running averages'
                     ],
                     [
                         'neck', '8', 'CBN', 'Conv2d', 'train', 'trained',
                         '4 iterations x 4 images = 16', '3 epochs',
                         'running averages'
                     ],
                     [
                         'roi_head.bbox_head', '4', 'CBN', 'Conv2d', 'train',
                         'trained', '4 iterations x regions of 4 images',
                         '3 epochs', 'running averages'
                     ]]
    assert lines[-1] == 'No norm in rpn_head.'


def test_prefixes_data_and_options(capsys, shapes):
    lines = _table(capsys, MABN_T7, '--data', str(shapes), '--gpus', '8',
                   '--cfg-options', 'train_dataloader.batch_size=1',
                   'model.neck.conv_cfg=None')
    assert [re.split(r'  +', line)[-2]
            for line in lines[1:4]] == ['none', '10000 iters', '10000 iters']
    assert '16 iterations x 1 image, ema forward' in lines[1]
    assert lines[-1].startswith(
        'Note: the convolution before 8 MABN layers '
        '(first: neck.lateral_convs.0.bn) does not')


def test_a_row_for_each(capsys):
    lines = _table(capsys, CBN_HEAD, '--each')
    assert len(lines) == 1 + 53 + 8 + 4 + 1
    assert lines[1].startswith('backbone.bn1 ')


def test_what_would_stop_the_training_is_said(capsys):
    lines = _table(capsys, CBN_HEAD, '--cfg-options',
                   'custom_hooks.0.epochs=12')
    assert lines[-1].startswith('Training would stop at its start: BurnInHook:'
                                ' epochs=12 is not shorter')
    lines = _table(capsys, CBN_HEAD, '--cfg-options',
                   'custom_hooks.0.prefix=nek')
    assert ("BurnInHook: prefix='nek' matches no layer that burns in of the "
            'model. Parts with a layer that burns in: neck, roi_head') in (
                lines[-1])
    with pytest.raises(SystemExit):
        main([CBN_HEAD, '--gpus', '0'])


@pytest.mark.parametrize('settings, said', [
    ('epochs=9', None),
    ('epochs=12', 'epochs=12, but the training ends after 12'),
    ('iters=90000', None),
    ("epochs=9, prefix='nek'", "prefix='nek' matches no norm with running"),
])
def test_norms_that_freeze_late_are_in_the_table(capsys, tmp_path, settings,
                                                 said):
    config = tmp_path / 'late.py'
    config.write_text(
        f'_base_ = {str(ROOT / CBN_HEAD)!r}\ncustom_hooks = [\n'
        "    dict(type='BurnInHook', epochs=3),\n"
        f"    dict(type='FreezeStatisticsHook', {settings})]\n")
    lines = _table(capsys, str(config))
    if said is None:
        when = settings.replace('epochs=', 'epoch ').replace(
            'iters=', 'iteration ')
        neck, = (line for line in lines if line.startswith('neck '))
        assert f', from {when} on running averages' in neck
        assert 'Training would stop' not in lines[-1]
    else:
        assert lines[-1].startswith('Training would stop at its start: '
                                    f'FreezeStatisticsHook: {said}')


def test_sync_bn_and_syncbn(capsys):
    syncbn = CBN_HEAD.replace('cbn/', 'baselines/').replace('cbn-', 'syncbn-')
    lines = _table(capsys, syncbn, '--gpus', '4')
    assert 'SyncBN  Conv2d' in lines[3] and '4 images x 4 GPUs' in lines[3]
    lines = _table(capsys, syncbn, '--gpus', '1')
    assert 'BN (was SyncBN)  Conv2d' in lines[3] and ' 4 images ' in lines[3]
    gn = syncbn.replace('syncbn-', 'gn-')
    lines = _table(capsys, gn, '--cfg-options', 'sync_bn=torch')
    assert "sync_bn='torch' turns every BatchNorm into " in lines[-1]
    lines = _table(capsys, gn, '--gpus', '1', '--cfg-options', 'sync_bn=torch')
    assert 'sync_bn' not in lines[-1]
    with pytest.raises(SystemExit):
        main([CBN_HEAD, '--cfg-options', 'sync_bn=torch'])
    assert "sync_bn='torch' would turn" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tool_ends_in_one_line_on_a_mistake():
    result = subprocess.run([
        sys.executable, '-W', 'ignore', 'tools/print_norms.py', CBN_HEAD,
        '--cfg-options', 'model.neck.norm_cfg.type=CNB'
    ],
                            cwd=ROOT,
                            capture_output=True,
                            text=True)
    assert result.returncode == 1 and result.stdout == ''
    assert 'Did you mean CBN' in result.stderr.splitlines()[-1]


def test_a_name_at_the_top_that_reaches_no_part(tmp_path, capsys):
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n"
                    "norm_cfg = dict(type='CBN')\n"
                    "conv_cfg = dict(type='CenConv')\n")
    said = [line for line in _table(capsys, str(path))
            if line.startswith('Note: ')]
    assert len(said) == 2
    assert said[0].startswith('Note: norm_cfg at the top of the config asks '
                              'for CBN, but no part of the model uses it')
    assert 'model=dict(neck=dict(conv_cfg=conv_cfg))' in said[1]


def test_a_window_that_is_far_too_long(capsys):
    lines = _table(capsys, CBN_HEAD, '--cfg-options',
                   'model.neck.norm_cfg.window_size=100000')
    assert lines[-1].startswith(
        'Note: window_size=100000 in 8 CBN layers (first: '
        'neck.lateral_convs.0.bn) is too large: no window above 16')
