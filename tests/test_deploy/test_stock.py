"""Trained models without this package: in processes that cannot import it."""
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmdet_smallbn import CBN
from mmdet_smallbn.cli import convert_to_stock
from mmdet_smallbn.cli.own_data import use_data
from mmdet_smallbn.cli.runtime import build_runner
from mmdet_smallbn.deploy.stock import check_same, stock_config, to_stock
from mmdet_smallbn.errors import SetupError
from tests.test_deploy.models import NORMS, build, retinanet, train

ROOT = Path(__file__).resolve().parents[2]
DEMO = 'configs/demo/faster-rcnn_r18_fpn_{}-all_1xb2_shapes-coco.py'
TRAINED = ('cbn', 'mabn', 'brn', 'bgn', 'ghostbn')
# What an engineer's process does: mmengine and mmdet, without this package.
STOCK = '''
import json, pickle, sys

class Absent:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'mmdet_smallbn':
            raise ModuleNotFoundError('not installed: ' + name)

sys.meta_path.insert(0, Absent())
from mmcv.cnn.utils import fuse_conv_bn
from mmengine.config import Config
from mmengine.runner import Runner

folder, *names = sys.argv[1:]
for name in names:
    for fused in (False, True):
        kind = name + fused * '_fused'
        cfg = Config.fromfile(f'{folder}/{name}.py')
        cfg.load_from = f'{folder}/{name}.pth'
        cfg.work_dir, cfg.experiment_name = f'{folder}/{kind}', kind
        cfg.test_evaluator = [cfg.test_evaluator, dict(
            type='DumpDetResults', out_file_path=f'{folder}/{kind}.pkl')]
        runner = Runner.from_cfg(cfg)
        if fused:
            load = runner.load_or_resume
            runner.load_or_resume = lambda: (
                load(), fuse_conv_bn(runner.model))
        print('SCORES', kind, json.dumps(runner.test()))
assert 'mmdet_smallbn' not in sys.modules
'''


def _config(name, shapes, folder):
    cfg = Config.fromfile(DEMO.format(name))
    cfg.work_dir = str(folder / 'work' / name)
    cfg.experiment_name, cfg.launcher = f'{name}_{folder.name}', 'none'
    model = cfg.model
    model.backbone.base_channels = 8
    model.neck.in_channels, model.neck.out_channels = [8, 16, 32, 64], 16
    model.rpn_head.in_channels = model.rpn_head.feat_channels = 16
    model.roi_head.bbox_roi_extractor.out_channels = 16
    head = model.roi_head.bbox_head
    head.in_channels = head.conv_out_channels = 16
    head.fc_out_channels = 32
    model.test_cfg.rcnn.score_thr = 0.01
    for part in (model.backbone, model.neck, head):
        if part.norm_cfg.type == 'BGN':
            part.norm_cfg.num_groups = 4
    use_data(cfg, shapes)
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].num_workers = 0
        cfg[f'{part}_dataloader'].persistent_workers = False
    cfg.train_cfg.max_iters, cfg.train_cfg.val_interval = 12, 13
    cfg.param_scheduler = None
    cfg.randomness = dict(seed=0)  # near ties differ from seed to seed
    cfg.default_hooks.checkpoint.interval = 12
    for hook in cfg.get('custom_hooks') or []:
        if hook.type == 'BurnInHook':
            hook.iters = 3
    return cfg


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('stock')


@pytest.fixture(scope='module')
def scores(shapes, folder):
    """Of every norm: trained here, converted, and tested in both places."""
    found = {}
    for name in TRAINED:
        cfg = _config(name, shapes, folder)
        path = folder / f'{name}_ours.py'
        build_runner(copy.deepcopy(cfg)).train()
        checkpoint = f'{cfg.work_dir}/iter_12.pth'
        weights = []
        if name in ('bgn', 'ghostbn'):
            weights = ['--example-weight', '0']
            for part in (cfg.model.backbone, cfg.model.neck,
                         cfg.model.roi_head.bbox_head):
                part.norm_cfg.example_weight = 0.
        _config(name, shapes, folder).dump(path)
        convert_to_stock.main([
            str(path), checkpoint, '-o', str(folder / f'{name}.pth'), *weights
        ])
        cfg.load_from = checkpoint
        cfg.experiment_name += '_test'
        cfg.test_evaluator = [
            cfg.test_evaluator,
            dict(
                type='DumpDetResults',
                out_file_path=str(folder / f'{name}_ours.pkl'))
        ]
        found[name] = Runner.from_cfg(cfg).test()
    result = subprocess.run([sys.executable, '-c', STOCK,
                             str(folder), *TRAINED],
                            cwd=folder,
                            capture_output=True,
                            text=True,
                            env={
                                k: v
                                for k, v in os.environ.items()
                                if k != 'PYTHONPATH'
                            })
    assert result.returncode == 0, result.stderr[-4000:]
    for line in result.stdout.splitlines():
        if line.startswith('SCORES'):
            _, kind, told = line.split(' ', 2)
            found[f'{kind}_stock'] = json.loads(told)
    return found


def _detections(path):
    with open(path, 'rb') as file:
        return [sample['pred_instances'] for sample in pickle.load(file)]


def _assert_same_detections(ours, theirs, exactly):
    """Every detection has its like: label, score and box.

    Folding rounds otherwise: of scores that are nearly the same, another may
    come first, or be the last that is kept.
    """
    found = total = 0
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs):
        scores = [sample['scores'].sort(descending=True)[0]
                  for sample in (a, b)]
        assert abs(len(scores[0]) - len(scores[1])) <= (0 if exactly else 1)
        for score, other in zip(*scores):
            assert abs(score - other) < 1e-4
        alike = a['labels'][:, None] == b['labels']
        alike &= (a['scores'][:, None] - b['scores']).abs() < 1e-4
        alike &= (a['bboxes'][:, None] - b['bboxes']).abs().amax(2) < 2e-2
        found += int(alike.any(1).sum())
        total += len(a['labels'])
    assert total > 20
    assert found == total if exactly else found >= 0.98 * total


@pytest.mark.slow
@pytest.mark.parametrize('fused', ['', '_fused'])
@pytest.mark.parametrize('name', TRAINED)
def test_stock_detects_the_same(name, fused, scores, folder):
    """In a process that cannot import this package; folded by mmcv, too."""
    _assert_same_detections(
        _detections(folder / f'{name}_ours.pkl'),
        _detections(folder / f'{name}{fused}.pkl'),
        exactly=not fused)
    for metric, score in scores[name].items():
        if 'mAP' in metric:
            assert scores[f'{name}{fused}_stock'][metric] == (
                pytest.approx(score, abs=1e-4 if not fused else 2e-3))


@pytest.mark.slow
def test_nothing_of_this_package_is_left(scores, folder):
    for name in TRAINED:
        assert 'smallbn' not in (folder / f'{name}.py').read_text()
        checkpoint = torch.load(folder / f'{name}.pth', weights_only=True)
        assert set(checkpoint) == {'state_dict', 'meta'}
        assert checkpoint['meta']['iter'] == 12
        assert checkpoint['meta']['dataset_meta']['classes']


@pytest.mark.parametrize('name', [n for n in NORMS if n != 'BN'])
def test_a_model_is_the_same_in_numbers(name):
    cfg = Config(dict(model=retinanet(NORMS[name])))
    model = build(copy.deepcopy(cfg.model))
    train(model, torch.randn(1, 3, 128, 128))
    stock_cfg, state, changes = to_stock(cfg, model.state_dict())
    stock = build(stock_cfg.model).eval()
    stock.load_state_dict(state)
    x = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        for a, b in zip(stock(x), model(x)):
            for found, wanted in zip(a, b):
                assert (found - wanted).abs().max() < 1e-5 * (
                    1 + wanted.abs().max())
    kind = NORMS[name]['norm_cfg']['type']
    assert f'model.backbone.norm_cfg: {kind} -> BN' in changes
    assert any(line.endswith('layers compared on random maps: equal')
               and int(line.split()[0]) > 20 for line in changes)
    # A wrong number does not pass.
    key = next(k for k in state if k.endswith('layer1.0.bn1.running_var'))
    state[key] *= 2
    stock.load_state_dict(state)
    with pytest.raises(SetupError, match="'backbone.layer1.0.bn1' and its"):
        check_same(model, stock)


def test_what_a_config_becomes():
    norm = dict(
        type='MABN', eps=1e-3, buffer_size=8, clip=2., requires_grad=False)
    cfg = Config(
        dict(
            custom_imports=dict(
                imports=['mmdet_smallbn', 'mine'], allow_failed_imports=False),
            custom_hooks=[
                dict(type='BurnInHook', iters=3),
                dict(type='EMAHook'),
                dict(type='ExampleWeightHook', weight=0.),
                dict(type='FreezeStatisticsHook', epochs=9),
            ],
            model=dict(
                type='FasterRCNN',
                backbone=dict(
                    type='ResNet',
                    norm_cfg=norm,
                    conv_cfg=dict(type='mmdet_smallbn.CenConv')),
                roi_head=dict(bbox_head=[dict(norm_cfg=dict(type=CBN))])),
            model_wrapper_cfg=dict(type='MMDistributedDataParallel')))
    before = copy.deepcopy(cfg._cfg_dict)
    stock, changes = stock_config(cfg)
    assert cfg._cfg_dict == before
    assert stock.custom_imports.imports == ['mine']
    assert stock.custom_hooks == [dict(type='EMAHook')]
    backbone = stock.model.backbone
    assert backbone.norm_cfg == dict(type='BN', eps=1e-3, requires_grad=False)
    assert backbone.conv_cfg == dict(type='Conv2d')
    assert stock.model.roi_head.bbox_head[0].norm_cfg == dict(type='BN')
    assert stock.model_wrapper_cfg.type == 'MMDistributedDataParallel'
    assert len(changes) == 7
    assert 'model.roi_head.bbox_head[0].norm_cfg: CBN -> BN' in changes
    cfg = Config(
        dict(
            custom_imports=dict(imports='mmdet_smallbn.layers'),
            default_hooks=dict(
                burn=dict(type='BurnInHook', iters=3),
                timer=dict(type='IterTimerHook')),
            model=dict(norm_cfg=dict(type='BRN', momentum=0.1))))
    stock, changes = stock_config(cfg)
    assert 'custom_imports' not in stock
    assert list(stock.default_hooks) == ['timer']
    assert stock.model.norm_cfg == dict(type='BN', momentum=0.1)
    for imports in ('mine_mmdet_smallbn', ['mine']):
        cfg.custom_imports.imports = imports
        stock, _ = stock_config(cfg)
        assert stock.custom_imports.imports == imports


def test_layers_that_no_image_reaches_are_compared_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.unused = CBN(4)
    stock = copy.deepcopy(model)
    stock.unused = nn.BatchNorm2d(4)
    assert check_same(model, stock) == 1
    stock.unused.running_mean += 1
    with pytest.raises(SetupError, match="CBN 'unused' and its stock"):
        check_same(model, stock)


def test_what_weighs_examples_is_refused():
    model = retinanet(dict(norm_cfg=dict(type='BGN', num_groups=4)))
    cfg = Config(dict(model=model))
    state = build(copy.deepcopy(cfg.model)).state_dict()
    with pytest.raises(
            SetupError, match="'backbone.bn1' has the example weight 1: it"):
        to_stock(cfg, state)
    _, _, changes = to_stock(cfg, state, example_weight=0.)
    assert changes
    cfg = Config(
        dict(
            model=retinanet(NORMS['BN']),
            custom_hooks=[dict(type='ExampleWeightHook', weight=0.1)]))
    with pytest.raises(SetupError, match='sets the example weight 0.1'):
        to_stock(cfg, {})
    cfg.custom_hooks = []
    with pytest.raises(SetupError, match='there is nothing to convert'):
        to_stock(cfg, {})


def test_a_checkpoint_that_does_not_fit_is_told(tmp_path, capsys):
    cfg = Config(dict(model=retinanet(NORMS['CBN'])))
    with pytest.raises(SetupError, match="does not fit the config's model: "
                       '164 missing'):
        to_stock(cfg, {})
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'some.pth'
    cfg.dump(config)
    torch.save(dict(epoch=1), checkpoint)
    out = tmp_path / 'out.pth'
    with pytest.raises(SystemExit):
        convert_to_stock.main([str(config), str(checkpoint), '-o', str(out)])
    assert 'some.pth has no state dict' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert_to_stock.main([str(config), str(checkpoint), '-o', 'out'])
    assert '--out must end in .pth' in capsys.readouterr().err
    for inputs in ((config, out), (out.with_suffix('.py'), checkpoint)):
        with pytest.raises(SystemExit):
            convert_to_stock.main([*map(str, inputs), '-o', str(out)])
        assert 'would overwrite' in capsys.readouterr().err
    assert not out.exists()
