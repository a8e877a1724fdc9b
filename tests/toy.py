"""A model of two blocks, its images, and a runner for them."""
import logging

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmdet_smallbn import CBN


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


class LossScale(OptimWrapper):
    """Mixed precision's dynamic loss scale, on any device."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_scaler = torch.amp.GradScaler(
            'cpu', init_scale=2.**12, growth_interval=2)

    def backward(self, loss):
        self.loss_scaler.scale(loss).backward()
        self._inner_count += 1

    def step(self):
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()


def toy_runner(tmp_path, hooks, model=None, by_epoch=True, **kwargs):
    """3 epochs of 2 batches, or 6 iterations; ``kwargs`` are the Runner's."""
    train_cfg = (
        dict(by_epoch=True, max_epochs=3)
        if by_epoch else dict(by_epoch=False, max_iters=6))
    settings = dict(
        model=model or Toy(),
        work_dir=str(tmp_path),
        experiment_name='_'.join(
            [*tmp_path.parts[1:], str(len(list(tmp_path.iterdir())))]),
        train_dataloader=dict(
            dataset=Images(),
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', interval=1, by_epoch=by_epoch)),
        # As the tools have it.
        custom_hooks=[*hooks, dict(type='PlainCheckpointHook')])
    return Runner(**{**settings, **kwargs})


def read_log(tmp_path):
    for handler in logging.getLogger().handlers:
        handler.flush()
    return ''.join(p.read_text() for p in sorted(tmp_path.rglob('*.log')))
