"""The tools, from a data set to a score, in processes of their own."""
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests.test_deploy.test_stock import STOCK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'
ITERS = 120
INTERVAL = 60


def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def _run(*command, fails=False, **environment):
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(
            os.environ,
            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
            PYTHONWARNINGS='ignore',
            **environment))
    out = result.stdout + result.stderr
    assert (result.returncode != 0) == fails, out[-6000:]
    return out


@pytest.fixture(scope='module')
def one_class(tmp_path_factory):
    """ShapesCOCO with one class, 'shape': a few iterations learn something."""
    from mmdet_smallbn.data.shapes_coco import make_shapes_coco
    root = make_shapes_coco(
        tmp_path_factory.mktemp('data') / 'shapes', 120, 12, 96, seed=2)
    for path in (root / 'annotations').iterdir():
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=1, name='shape')]
        for annotation in content['annotations']:
            annotation['category_id'] = 1
        path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope='module')
def options(one_class):
    """Overrides that make the demo config a matter of seconds."""
    changes = {
        'model.roi_head.bbox_head.conv_out_channels': 16,
        'train_dataloader.batch_size': 4,
        'optim_wrapper.optimizer.lr': 1e-3,
        'train_cfg.max_iters': ITERS,
        'train_cfg.val_interval': INTERVAL,
        'param_scheduler.0.end': 10,
        'param_scheduler.1.begin': 10,
        'param_scheduler.1.end': ITERS,
        'custom_hooks.0.iters': 20,
        'default_hooks.checkpoint.interval': INTERVAL,
        'default_hooks.logger.interval': 10,
        'randomness.seed': 0,
    }
    for loader, resize in (('train', 2), ('val', 1), ('test', 1)):
        transform = f'{loader}_dataloader.dataset.pipeline.{resize}'
        changes[f'{transform}.scale'] = '(96,96)'
    return [
        '--data',
        str(one_class), '--cfg-options',
        *(f'{k}={v}' for k, v in changes.items())
    ]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, options):
    """Work folder and output of a training run."""
    work_dir = tmp_path_factory.mktemp('work')
    out = _run(sys.executable, 'tools/train.py', DEMO, '--work-dir',
               str(work_dir), *options)
    return work_dir, out


def _scalars(work_dir):
    path = sorted(work_dir.rglob('scalars.json'))[-1]
    return [json.loads(line) for line in path.read_text().splitlines()]


def _scores(records):
    """COCO metrics of the last evaluation."""
    last = [r for r in records if 'coco/bbox_mAP' in r][-1]
    return {k: v for k, v in last.items() if k.startswith('coco/')}


def test_training_learns_and_evaluates(trained):
    work_dir, out = trained
    assert (work_dir / f'iter_{ITERS}.pth').exists()
    records = _scalars(work_dir)
    # The sum rises while ever more regions are found to be classified.
    losses = [r['loss_rpn_cls'] for r in records if 'loss_rpn_cls' in r]
    assert losses[-1] < 0.5 * losses[0]
    assert _scores(records)['coco/bbox_mAP_50'] > 0.02
    assert 'burn-in is over' in out
    assert '32 CBN layers: 8 iterations x 4 images = 32 examples' in out
    table = out[out.index('Norms of the model'):].splitlines()[1:6]
    assert table[0].startswith('part ')
    assert table[1].startswith('backbone ')
    assert re.search('8 iterations x 4 images = 32 +20 iters ', table[1])
    assert table[4] == 'No norm in rpn_head.'


@pytest.mark.parametrize(
    'norm', ['naivecbn', 'mabn', 'brn', 'bgn', 'ghostbn', 'bn', 'gn'])
def test_every_norm_of_the_demo_learns(norm, options, tmp_path):
    few = ['train_cfg.max_iters=60', 'default_hooks.checkpoint.interval=60',
           'train_cfg.val_interval=100']
    config = DEMO.replace('cbn-all', f'{norm}-all')
    hooked = norm in ('naivecbn', 'mabn', 'brn')
    options = [o for o in options if hooked or 'custom_hooks' not in o]
    _run(sys.executable, 'tools/train.py', config, '--work-dir',
         str(tmp_path), *options, *few)
    losses = [r['loss_rpn_cls'] for r in _scalars(tmp_path)
              if 'loss_rpn_cls' in r]
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]


def test_the_weight_of_examples_is_swept(trained, options, tmp_path):
    """Against test.py at 0; a second run goes on where the first ended."""
    work_dir, _ = trained
    command = [sys.executable, 'tools/sweep_example_weight.py', DEMO,
               str(work_dir / f'iter_{ITERS}.pth'), '--work-dir',
               str(tmp_path), *options]
    out = _run(*command, '--weights', '0', '0.2')
    path = tmp_path / 'example_weight.json'
    rows = json.loads(path.read_text())['weights']
    assert [row['weight'] for row in rows] == [0, 0.2]
    scores = _scores(_scalars(work_dir))
    assert {k: rows[0][k] for k in scores} == scores
    assert rows[1] != dict(rows[0], weight=0.2)
    assert 'best: ' in out
    again = _run(*command, '--weights', '0', '0.2', '0.01')
    assert '2 of 3 weights are already in' in again
    assert 'weight 0.01: coco/bbox_mAP' in again
    assert 'weight 0.2: coco/bbox_mAP' not in again
    assert json.loads(path.read_text())['weights'][2] == rows[1]
    assert cv2.imread(str(path.with_suffix('.png'))).std() > 5
    other = _run(*command, '--exclude', 'backbone', fails=True)
    assert 'another sweep. It differs in exclude' in other
    path.unlink()
    _run(*command, '--exclude', 'backbone', '--weights', '0.2')
    apart = json.loads(path.read_text())['weights']
    assert apart[0] == rows[0]  # as trained, added
    assert apart[1] != rows[1]


def test_group_norm_is_calibrated_and_swept(options, tmp_path):
    """From the sweep's best weight to the config entry it names."""
    config = DEMO.replace('cbn-all', 'gn-all')
    options = [o for o in options if 'custom_hooks' not in o]
    few = ['train_cfg.max_iters=40', 'default_hooks.checkpoint.interval=40',
           'train_cfg.val_interval=100']
    _run(sys.executable, 'tools/train.py', config, '--work-dir',
         str(tmp_path / 'gn'), *options, *few)
    checkpoint = str(tmp_path / 'gn' / 'iter_40.pth')
    scores = []
    for folder in ('a', 'b'):  # the same images are calibrated on
        _run(sys.executable, 'tools/sweep_example_weight.py', config,
             checkpoint, '--weights', '0.3', '--calibration-images', '8',
             '--metric', 'coco/bbox_mAP_50', '--work-dir',
             str(tmp_path / folder), *options)
        scores.append(json.loads(
            (tmp_path / folder / 'example_weight.json').read_text()))
    assert scores[0] == scores[1]
    assert [row['weight'] for row in scores[0]['weights']] == [0.3, 1]
    with_hook = tmp_path / 'gn_weighted.py'
    with_hook.write_text(
        f"_base_ = '{ROOT / config}'\n"
        "custom_hooks = [dict(type='ExampleWeightHook', weight=0.3,\n"
        '                     calibration_images=8)]\n')
    _run(sys.executable, 'tools/test.py', str(with_hook), checkpoint,
         '--work-dir', str(tmp_path / 'test'), '--tta', *options)
    _run(sys.executable, 'tools/test.py', str(with_hook), checkpoint,
         '--work-dir', str(tmp_path / 'plain'), *options)
    path, = (tmp_path / 'plain').glob('*/*.json')
    tested = json.loads(path.read_text())
    for key, value in scores[0]['weights'][0].items():
        if key.startswith('coco/'):
            assert tested[key] == value


def test_test_reproduces_the_last_score(trained, options, tmp_path):
    work_dir, _ = trained
    out = _run(sys.executable, 'tools/test.py', DEMO,
               str(work_dir / f'iter_{ITERS}.pth'), '--work-dir',
               str(tmp_path), '--out',
               str(tmp_path / 'found.pkl'), '--show-dir', 'drawn', *options)
    tested = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    tested = {k: v for k, v in tested.items() if k.startswith('coco/')}
    assert tested == _scores(_scalars(work_dir))
    assert 'trust' not in out  # it loads safely
    assert (tmp_path / 'found.pkl').stat().st_size > 0
    assert list(tmp_path.rglob('drawn/**/*.jpg'))


def test_resume_continues_the_schedule(trained, options, tmp_path):
    work_dir, _ = trained
    out = _run(sys.executable, 'tools/train.py', DEMO, '--work-dir',
               str(tmp_path), '--resume',
               str(work_dir / f'iter_{INTERVAL}.pth'), *options)
    assert f'resumed epoch: 0, iter: {INTERVAL}' in out
    # Past its burn-in, in the middle of the learning rate's decay.
    assert f'at iteration {INTERVAL}, epoch 0: burn-in is over' in out
    whole = {r['step']: r['lr'] for r in _scalars(work_dir) if 'loss' in r}
    again = {r['step']: r['lr'] for r in _scalars(tmp_path) if 'loss' in r}
    assert list(again) == [s for s in whole if s > INTERVAL]
    assert again == {s: whole[s] for s in again}
    assert (tmp_path / f'iter_{ITERS}.pth').exists()


@pytest.mark.parametrize('sync', [False, True])
def test_two_processes_train_on_the_cpu(options, tmp_path, sync):
    few = ['train_cfg.max_iters=6', 'train_cfg.val_interval=6',
           'custom_hooks.0.iters=2', 'default_hooks.checkpoint.interval=6',
           'default_hooks.logger.interval=2',
           *(f'model.{part}.norm_cfg.sync={sync}'
             for part in ('backbone', 'neck', 'roi_head.bbox_head'))]
    out = _run('bash', 'tools/dist_train.sh', DEMO, '2', '--work-dir',
               str(tmp_path), *options, *few, PORT=_free_port())
    assert 'Distributed training: True' in out and 'GPU number: 2' in out
    assert 'at iteration 2, epoch 0: burn-in is over' in out
    # One of the processes says it.
    assert out.count('Norms of the model') == 1
    assert ('8 iterations x 4 images x 2 GPUs' in out) == sync
    images = 8 if sync else 4
    assert f'32 CBN layers: 8 iterations x {images} images' in out
    losses = [r['loss'] for r in _scalars(tmp_path) if 'loss' in r]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert (tmp_path / 'iter_6.pth').exists()


def test_two_processes_score_as_one(trained, options, tmp_path):
    work_dir, _ = trained
    _run('bash', 'tools/dist_test.sh', DEMO,
         str(work_dir / f'iter_{ITERS}.pth'), '2', '--work-dir',
         str(tmp_path), *options, PORT=_free_port())
    tested = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    assert {k: v for k, v in tested.items() if k.startswith('coco/')
            } == _scores(_scalars(work_dir))


def test_converted_norms_end_in_one_line(options, tmp_path):
    out = _run('bash', 'tools/dist_train.sh', DEMO, '2', '--work-dir',
               str(tmp_path), *options, 'sync_bn=torch', PORT=_free_port(),
               fails=True)
    assert "error: sync_bn='torch' would turn model." in out


def test_demo_on_a_folder_of_ones_own(one_class, tmp_path):
    out = _run(
        sys.executable, 'tools/demo.py', DEMO, '--data', str(one_class),
        '--work-dir', str(tmp_path), '--cfg-options', 'train_cfg.max_iters=8',
        'train_cfg.val_interval=8', 'custom_hooks.0.iters=2',
        'model.roi_head.bbox_head.conv_out_channels=16',
        'default_hooks.logger.interval=2')
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert -1 <= metrics['coco/bbox_mAP'] <= 1 and metrics['step'] == 8
    for name in ('curves.png', 'detections.png'):
        assert cv2.imread(str(tmp_path / name)).std() > 5
    assert list(tmp_path.glob('*.pth'))
    assert 'of 1 classes' in out and 'AP50' in out
    assert 'make demo DATA=' in out


def test_demo_shows_what_batch_norm_has_in_the_same_training(tmp_path):
    data = dict(root=str(tmp_path / 'data'), train=8, val=4, size=64)
    config = tmp_path / 'small.py'
    config.write_text(
        f"_base_ = '{ROOT / DEMO.replace('cbn-all', 'bn-all')}'\n"
        f'shapes_coco = {dict(data, _delete_=True)}\n'
        'train_cfg = dict(max_iters=4, val_interval=4)\n'
        'param_scheduler = []\n')
    results = tmp_path / 'results' / 'demo.json'
    command = [
        sys.executable, 'tools/demo.py', str(config), '--results',
        str(results), '--size', '64', '--work-dir', str(tmp_path / 'work')
    ]
    assert 'BatchNorm, trained in' not in _run(*command)
    assert not results.exists()
    out = _run(*command, '--record')
    run, = json.loads(results.read_text())['runs']
    said = ('BatchNorm, trained in the same way: '
            f'{run["ap"]:.3f} AP (1 seed, python tools/demo.py {config} '
            '--size 64)')
    assert said in out
    assert run['norm'] == 'BN' and run['trained_as'] == dict(
        detector='FasterRCNN', model=run['trained_as']['model'], data=dict(train=8, val=4, size=64), size=64,
        images=2, parts=1, iterations=4, lr=7e-4, options={})
    assert said in _run(*command)
    out = _run(*command, '--cfg-options', 'optim_wrapper.optimizer.lr=1e-4')
    assert 'BatchNorm, trained in' not in out
    out = _run(*command, '--record', '--data', data['root'], fails=True)
    assert 'error: --record stores only trainings on the demo' in out


def test_stock_mmdet_finds_what_was_found_here(trained, options, tmp_path):
    """In a process that cannot import this package, and folded there."""
    work_dir, _ = trained
    out = _run(sys.executable, 'tools/convert_to_stock.py', DEMO,
               str(work_dir / f'iter_{ITERS}.pth'), '-o',
               str(tmp_path / 'stock.pth'), *options)
    assert 'model.backbone.norm_cfg: CBN -> BN' in out
    out = _run(sys.executable, '-c', STOCK, str(tmp_path), 'stock')
    found = [
        json.loads(line.split(' ', 2)[2]) for line in out.splitlines()
        if line.startswith('SCORES')
    ]
    assert len(found) == 2
    for metric, score in _scores(_scalars(work_dir)).items():
        assert [s[metric] for s in found] == pytest.approx(2 * [score],
                                                           abs=1e-4)
