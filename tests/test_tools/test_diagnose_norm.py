"""The norm doctor on configs as people have them."""
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.utils import get_installed_path

from mmdet_smallbn.cli.diagnose_norm import main, parse_args
from mmdet_smallbn.cli.runtime import build_model
from mmdet_smallbn.doctor import advice as advice_module
from tests.test_doctor.test_lines import norms_of

DEMO = 'configs/demo/faster-rcnn_r18_fpn_bn-all_1xb2_shapes-coco.py'
FAST = ['--iters', '4', '--reference', '4', '--images', '8']
SMALL = ['model.backbone.depth=18', 'model.backbone.init_cfg=None',
         'model.neck.in_channels=[64,128,256,512]']
FEW = ['model.train_cfg.rcnn.sampler.num=8',
       'model.train_cfg.rpn_proposal.max_per_img=20']
SIZE = ['train_dataloader.dataset.pipeline.2.scale=(64,64)']


def run(capsys, tmp_path, config, shapes, *flags, options=()):
    arguments = [config, *FAST, *flags, '--work-dir', str(tmp_path),
                 '--data', str(shapes)]
    if options:
        arguments += ['--cfg-options', *options]
    main(arguments)
    held = json.loads((tmp_path / 'doctor.json').read_text())
    said = capsys.readouterr()
    # What is no terminal gets a line for each bar.
    assert re.findall(r'^(.*) \.\.\.$', said.err, re.M) == [
        'checking val images', 'checking train images', 'measuring images'
    ]
    return said.out, held


@pytest.fixture(scope='module')
def coco():
    """Configs of mmdet, as files."""
    return Path(get_installed_path('mmdet')) / '.mim' / 'configs'


def test_the_demo(capsys, tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(advice_module, 'THRESHOLD', 2.)
    out, held = run(capsys, tmp_path, DEMO, shapes)
    assert len(held['advice']) >= 3
    assert held['images'] == 2 and held['reference'] == 4
    assert len(held['layers']) == 32 and held['windows']['4'][1] > 0
    assert held['summary'][0] in out and 'backbone' in out
    assert (tmp_path / 'doctor.png').stat().st_size > 10000
    scalars = list(tmp_path.glob('*/vis_data/scalars.json'))
    assert 'doctor/agreement_2' in scalars[0].read_text()
    for advice in held['advice']:
        if advice['lines']:
            leaf = tmp_path / 'leaf.py'
            base = str(Path(DEMO).resolve())
            leaf.write_text(f'_base_ = {base!r}\n{advice["lines"]}\n')
            assert set(norms_of(Config.fromfile(leaf))) == {
                'backbone', 'neck', 'roi_head'}


@pytest.mark.slow
def test_a_frozen_coco_config(capsys, tmp_path, shapes, coco, monkeypatch):
    monkeypatch.setattr(advice_module, 'THRESHOLD', 2.)
    out, held = run(
        capsys, tmp_path,
        str(coco / 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'), shapes,
        '--auto-scale-lr', options=SMALL + SIZE + FEW)
    assert 'Every BatchNorm (20) stays in evaluation mode' in out
    assert len(held['asleep']) == len(held['layers']) == 20
    assert held['advice'][0]['title'] == 'Keep BatchNorm frozen'


@pytest.mark.slow
def test_retinanet_with_a_shared_head(capsys, tmp_path, shapes, coco):
    out, held = run(
        capsys, tmp_path, str(coco / 'retinanet/retinanet_r50_fpn_1x_coco.py'),
        shapes, '--auto-scale-lr', options=SMALL + SIZE + [
            'model.bbox_head.norm_cfg.type=BN'])
    assert {layer['calls'] for layer in held['layers']} == {5}
    assert ('one set of running statistics between 5 feature maps: '
            'bbox_head.cls_convs.0.bn and 7 more' in out)
    assert ('norms in evaluation mode (norm_eval or frozen_stages): '
            'backbone.bn1 and 19 more' in out)


@pytest.mark.slow
def test_mask_rcnn_with_one_image(capsys, tmp_path, shapes):
    out, held = run(
        capsys, tmp_path, 'configs/baselines/mask-rcnn_r50-scratch_fpn_4conv1f'
        'c_bn-all_8xb2-2x_coco.py', shapes, '--auto-scale-lr',
        options=SMALL + SIZE + FEW + ['train_dataloader.batch_size=1'])
    assert held['images'] == 1 and list(held['agreement']) == ['1', '2']
    assert held['summary'][0].endswith('with 1 image.')
    assert any('mask_head' in layer['name'] for layer in held['layers'])


def test_a_large_batch_is_left_alone(capsys, tmp_path, shapes):
    out, held = run(capsys, tmp_path, DEMO, shapes, '--reference', '2',
                    '--images', '4')
    assert held['verdict'] == 'fine' and held['advice'] == []
    assert 'A batch of 2 images is large enough' in out
    assert not (tmp_path / 'doctor.png').exists()


def test_a_checkpoint_is_diagnosed_as_it_is(capsys, tmp_path, shapes,
                                            monkeypatch):
    monkeypatch.setattr(advice_module, 'THRESHOLD', 2.)
    cfg = Config.fromfile(DEMO)
    model = build_model(cfg)
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    _, held = run(capsys, tmp_path, DEMO, shapes, str(path))
    assert held['moved'] > 0 and held['agreement']
    assert 'example weights' in held['advice'][0]['title']
    state = model.state_dict()
    del state['backbone.conv1.weight']
    torch.save(state, path)
    with pytest.raises(SystemExit):
        run(capsys, tmp_path, DEMO, shapes, str(path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and 'does not fit' in error
    assert '1 missing (backbone.conv1.weight)' in error


def test_an_empty_folder(capsys, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit):
        run(capsys, tmp_path, DEMO, tmp_path / 'empty')
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and 'annotations' in error


@pytest.mark.parametrize('flags, message', [
    (['--images', '16'], '--images must be at least twice --reference, but '
     'got 16 and 16'),
    (['--iters', '1'], '--iters must be at least 2, but got 1')])
def test_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args([DEMO, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_augmentations_that_ask_for_the_iteration(capsys, tmp_path, shapes):
    leaf = tmp_path / 'resized.py'
    leaf.write_text(
        f'_base_ = {str(Path(DEMO).resolve())!r}\n'
        'model = dict(data_preprocessor=dict(batch_augments=[dict(\n'
        "    type='BatchSyncRandomResize', random_size_range=(96, 128),\n"
        '    interval=1, size_divisor=32)]))\n')
    _, held = run(capsys, tmp_path, str(leaf), shapes)
    assert held['agreement']
