"""A training that is killed again and again comes to its end."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdet_smallbn.cli.checkpoints import latest_checkpoint, load_from_local
from mmdet_smallbn.errors import SetupError
from tests.small_training import training_cfg

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
ITERATIONS = 120


def run_and_kill(config, work_dir, seed):
    """Train with ``--resume``, killed 20 times at random, and then not.

    To be called in a process of its own: the trainings are forks of it, which
    are there at once.

    Returns:
        dict: Exit statuses, and what was the newest checkpoint after each.
    """
    from mmdet_smallbn.cli import train
    import tests.small_training  # noqa: F401  registers its hooks
    rng = random.Random(seed)
    last = Path(work_dir) / 'last_checkpoint'
    statuses, newest, usual = [], [], None
    for attempt in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            log = os.open(
                Path(work_dir).with_suffix('.log'),
                os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                train.main([config, '--work-dir', work_dir, '--resume'])
            except BaseException:
                os._exit(1)
            os._exit(0)
        if attempt < KILLS:
            if usual is None:  # how long the first checkpoint takes here
                begin = time.monotonic()
                while not last.is_file():
                    time.sleep(0.01)
                usual = time.monotonic() - begin
            else:
                time.sleep(rng.uniform(0, 2 * usual))
            os.kill(child, signal.SIGKILL)
        statuses.append(os.waitpid(child, 0)[1])
        newest.append(last.read_text() if last.is_file() else '')
    return dict(statuses=statuses, newest=newest)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(shapes, tmp_path):
    features = dict(
        norm='CBN',
        checkpointing='none',
        accumulate=1,
        amp=False,
        ema='none',
        norm_eval=False)
    cfg = training_cfg(shapes, tmp_path / 'work', features)
    cfg.custom_hooks = [h for h in cfg.custom_hooks if h.type != 'Losses']
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=3)
    cfg.train_cfg.max_iters = ITERATIONS
    cfg.pop('experiment_name')
    cfg.dump(tmp_path / 'config.py')
    code = ('import json, sys; from tests.test_tools.test_faults import '
            'run_and_kill; json.dump(run_and_kill(*sys.argv[1:3], 0), '
            'open(sys.argv[3], "w"))')
    subprocess.run([
        sys.executable, '-W', 'ignore', '-c', code,
        str(tmp_path / 'config.py'),
        str(tmp_path / 'work'),
        str(tmp_path / 'result.json')
    ],
                   cwd=ROOT,
                   check=True)
    result = json.loads((tmp_path / 'result.json').read_text())
    log = (tmp_path / 'work.log').read_text()
    # Killed, or at its end before; an error of its own would be another.
    assert set(result['statuses']) <= {0, signal.SIGKILL}, log
    assert result['statuses'].count(signal.SIGKILL) >= 10, result
    assert result['statuses'][-1] == 0
    # Several of them found something to go on from.
    assert len(set(result['newest'])) >= 3, result
    checkpoint = load_from_local(str(tmp_path / f'work/iter_{ITERATIONS}.pth'))
    assert checkpoint['meta']['iter'] == ITERATIONS
    for name, value in checkpoint['state_dict'].items():
        assert value.isfinite().all(), name
        if name.endswith('num_batches_tracked'):
            assert value == ITERATIONS, name


def _save(path, whole=True):
    torch.save(dict(state_dict=dict(x=torch.zeros(1000))), path)
    if not whole:
        path.write_bytes(path.read_bytes()[:2000])
    os.utime(path, (0, int(path.stem.split('_')[1])))


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None
    for iteration, whole in ((2, True), (4, True), (6, False)):
        _save(tmp_path / f'iter_{iteration}.pth', whole)
    (tmp_path / 'best_bbox_mAP_iter_9.pth').write_bytes(b'')
    record = tmp_path / 'last_checkpoint'
    fourth = str(tmp_path / 'iter_4.pth')
    # Not written yet; of the newest; of the one before; empty; of a removed.
    for named in (None, fourth, str(tmp_path / 'iter_2.pth'), '',
                  str(tmp_path / 'iter_1.pth')):
        if named is not None:
            record.write_text(named)
        assert latest_checkpoint(str(tmp_path)) == fourth
    # As old versions of torch wrote them.
    torch.save(
        dict(x=torch.zeros(3)),
        tmp_path / 'iter_8.pth',
        _use_new_zipfile_serialization=False)
    assert latest_checkpoint(str(tmp_path)).endswith('iter_8.pth')
    for path in tmp_path.glob('iter_*.pth'):
        path.write_bytes(b'')
    with pytest.raises(SetupError, match='no checkpoint in .* is complete'):
        latest_checkpoint(str(tmp_path))


def test_checkpoints_elsewhere_are_mmengines_to_find(tmp_path):
    _save(tmp_path / 'epoch_1.pth')
    record = tmp_path / 'last_checkpoint'
    record.write_text('s3://bucket/epoch_2.pth')
    assert latest_checkpoint(str(tmp_path)) is None
    shards = tmp_path / 'epoch_3.pth'
    shards.mkdir()
    record.write_text(str(shards))
    assert latest_checkpoint(str(tmp_path)) is None
    other = tmp_path / 'out'
    other.mkdir()
    _save(other / 'model_4.pth')
    record.write_text(str(other / 'model_5.pth'))
    assert latest_checkpoint(str(tmp_path)) == str(other / 'model_4.pth')
