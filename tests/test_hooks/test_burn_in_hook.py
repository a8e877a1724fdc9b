import logging
import re

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmdet_smallbn import CBN, BurnInHook
from mmdet_smallbn.cli.runtime import register_checkpoint_loader
from mmdet_smallbn.errors import SetupError


class Toy(BaseModel):
    """Two blocks, so that a prefix can tell them apart."""

    def __init__(self, norm=CBN):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), norm(4))

    def forward(self, inputs, mode='tensor'):
        out = self.head(self.backbone(torch.stack(inputs)))
        return dict(loss=out.square().mean()) if mode == 'loss' else out


class Images(Dataset):

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 8, 8), index / 8.) +
                    torch.linspace(0, 1, 8))


class Phases(Hook):
    """What the layers were told, iteration by iteration."""
    priority = 'VERY_LOW'

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = runner.model
        self.seen.append((runner.iter, model.backbone[1].burning_in,
                          model.head[1].burning_in, model.head[1].iteration))


def _runner(tmp_path, hooks, model=None, by_epoch=True, **kwargs):
    phases = Phases()
    train_cfg = (
        dict(by_epoch=True, max_epochs=3)
        if by_epoch else dict(by_epoch=False, max_iters=6))
    runner = Runner(
        model=model or Toy(),
        work_dir=str(tmp_path),
        experiment_name=f'{tmp_path.name}_{len(list(tmp_path.iterdir()))}',
        train_dataloader=dict(
            dataset=Images(),
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', interval=1, by_epoch=by_epoch)),
        custom_hooks=[*hooks, phases],
        **kwargs)
    return runner, phases


def _log(tmp_path):
    for handler in logging.getLogger().handlers:
        handler.flush()
    return ''.join(p.read_text() for p in sorted(tmp_path.rglob('*.log')))


def test_by_epoch(tmp_path):
    runner, phases = _runner(tmp_path, [dict(type='BurnInHook', epochs=2)])
    runner.train()  # 2 iterations an epoch
    assert [s[1] for s in phases.seen] == [True] * 4 + [False] * 2
    assert [s[3] for s in phases.seen] == list(range(6))
    text = _log(tmp_path)
    assert 'burn-in of 2 epochs, the present batch alone' in text
    assert '2 norms at iteration 4, epoch 2: burn-in is over' in text
    assert text.count('burn-in is over') == 1
    # Whoever uses the model next is not in the last iteration any more.
    assert runner.model.head[1].iteration is None
    assert runner.model.head[1].layer_name == 'head.1'


def test_by_iteration_and_prefix(tmp_path):
    runner, phases = _runner(
        tmp_path, [
            dict(type='BurnInHook', iters=3, prefix='head'),
            dict(type='BurnInHook', iters=1, prefix=['backbone'])
        ],
        by_epoch=False)
    runner.train()
    assert [s[1] for s in phases.seen] == [True] + [False] * 5
    assert [s[2] for s in phases.seen] == [True] * 3 + [False] * 3


@pytest.mark.parametrize('by_epoch', [True, False])
def test_resume_continues_where_it_was(tmp_path, by_epoch):
    register_checkpoint_loader()
    hook = (
        dict(type='BurnInHook', epochs=2)
        if by_epoch else dict(type='BurnInHook', iters=4))
    first, whole = _runner(tmp_path, [hook], by_epoch=by_epoch)
    first.train()
    name = 'epoch_1.pth' if by_epoch else 'iter_2.pth'
    resumed, phases = _runner(
        tmp_path, [hook],
        by_epoch=by_epoch,
        resume=True,
        load_from=str(tmp_path / name))
    resumed.train()
    assert phases.seen == whole.seen[2:]
    assert [s[1] for s in phases.seen] == [True, True, False, False]
    fresh, phases = _runner(
        tmp_path, [hook], by_epoch=by_epoch, load_from=str(tmp_path / name))
    fresh.train()
    assert phases.seen == whole.seen


def test_examples_and_suggestion_are_logged(tmp_path):
    _runner(tmp_path, [dict(type='BurnInHook', epochs=0)])[0].train()
    assert '2 CBN layers: 4 iterations x 4 images = 16 examples' in _log(tmp_path)
    assert 'suggests' not in _log(tmp_path)


def test_another_window_logs_the_papers(tmp_path):
    model = Toy(lambda c: CBN(c, window_size=2))
    _runner(tmp_path, [dict(type='BurnInHook', epochs=0)], model)[0].train()
    assert re.search(r'2 iterations x 4 images = 8 .*window_size=4 .*ceil\(16 / 4',
                     _log(tmp_path))


@pytest.mark.parametrize('settings, message', [
    (dict(), 'exactly one'),
    (dict(epochs=1, iters=1), 'exactly one'),
    (dict(epochs=-1), 'at least 0.*-1'),
    (dict(iters=1.5), 'at least 0.*1.5'),
])
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        BurnInHook(**settings)


@pytest.mark.parametrize('hook, model, extra, message', [
    (dict(epochs=1), Toy(nn.BatchNorm2d), {}, 'no layer that burns in'),
    (dict(epochs=1, prefix='neck'), None, {},
     "'neck' of the model.*backbone, head"),
    (dict(epochs=3), None, {}, 'epochs=3 is no shorter.*3 epochs'),
    (dict(epochs=1), None, dict(by_epoch=False), 'epochs=1.*Use iters'),
    (dict(iters=6), None, dict(by_epoch=False), 'iters=6 is no shorter'),
])
def test_what_does_not_fit_is_refused(tmp_path, hook, model, extra, message):
    runner, phases = _runner(tmp_path, [dict(type='BurnInHook', **hook)],
                             model, **extra)
    with pytest.raises(SetupError, match=message):
        runner.train()
    assert not phases.seen


def test_converted_norms_are_refused(tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Toy())
    # Without processes mmengine turns SyncBatchNorm back: take its place.
    runner, _ = _runner(tmp_path, [dict(type='BurnInHook', epochs=1)])
    runner.model = model
    with pytest.raises(SetupError, match='but SyncBatchNorm.*sync_bn'):
        runner.train()


class Asleep(Toy):
    """Keeps some of its norms in evaluation, as norm_eval=True does."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def train(self, mode=True):
        super().train(mode)
        for part in self.parts:
            getattr(self, part)[1].eval()
        return self


def test_norms_kept_in_evaluation_are_told(tmp_path):
    hook = dict(type='BurnInHook', epochs=1)
    _runner(tmp_path, [hook], Asleep('backbone'))[0].train()
    assert re.search("1 of 2 norms stay in evaluation.*'backbone.1'.*"
                     'norm_eval=False', _log(tmp_path))
    runner, _ = _runner(tmp_path, [hook], Asleep('backbone', 'head'))
    with pytest.raises(SetupError, match='2 of 2 norms stay in evaluation'):
        runner.train()


def test_frozen_norms_are_not_asleep(tmp_path):
    model = Asleep('backbone')
    model.backbone.requires_grad_(False)
    _runner(tmp_path, [dict(type='BurnInHook', epochs=1)], model)[0].train()
    text = _log(tmp_path)
    assert 'stay in evaluation' not in text
    assert '1 CBN layers: 4 iterations' in text
