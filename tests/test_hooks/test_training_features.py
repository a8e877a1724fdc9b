"""The norms beside other features of the training loop."""
import copy
from functools import partial

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage

from mmdet_smallbn import BRN, CBN, MABN, BatchGroupNorm, GhostBN, NaiveCBN
from tests.toy import LossScale, Toy, toy_runner

NORMS = {
    'CBN': CBN,
    'NaiveCBN': NaiveCBN,
    'MABN': partial(MABN, buffer_size=4),
    'BRN': BRN,
    'BGN': partial(BatchGroupNorm, num_groups=2),
    'GhostBN': GhostBN
}
EPOCHS = dict(by_epoch=True, max_epochs=8)


def _hooks(name):
    burns_in = name not in ('BGN', 'GhostBN')
    return [dict(type='BurnInHook', iters=2)] if burns_in else []


def _finite(model):
    tensors = [*model.parameters(), *model.buffers()]
    for block in (model.backbone, model.head):
        for state in block[1].export_states():
            tensors += _tensors(state)
    return all(t.isfinite().all() for t in tensors)


def _tensors(values):
    found = []
    for value in values.values():
        if isinstance(value, dict):
            found += _tensors(value)
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


class Overflow(Hook):
    """One iteration whose gradients are infinite behind the last norm."""

    def __init__(self, at):
        self.at = at
        self.scales = []

    def before_train(self, runner):
        runner.model.head[1].register_forward_hook(self._spoil(runner))

    def _spoil(self, runner):

        def hook(module, inputs, output):
            if runner.iter == self.at and output.requires_grad:
                output.register_hook(lambda grad: grad * float('inf'))

        return hook

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.scales.append(runner.optim_wrapper.loss_scaler.get_scale())


@pytest.mark.parametrize('name', NORMS)
def test_an_overflow_costs_one_step(tmp_path, name):
    torch.manual_seed(0)
    overflow = Overflow(at=6)
    model = Toy(NORMS[name])
    runner = toy_runner(
        tmp_path, [*_hooks(name), overflow],
        model,
        train_cfg=EPOCHS,
        optim_wrapper=LossScale(torch.optim.SGD(model.parameters(), lr=0.01)))
    runner.train()
    assert len(overflow.scales) == 16
    halved = [
        b < a for a, b in zip(overflow.scales, overflow.scales[1:])
    ]
    assert halved.count(True) == 1 and halved[5]
    if name == 'MABN':
        # The row of that backward is marked as left out until it goes.
        for block in (model.backbone, model.head):
            assert block[1]._states[0].backward.mean().isfinite().all()
    assert _finite(model)


class Weights(Hook):
    """Checks the averaged model against averages taken by hand."""
    priority = 'LOW'

    def __init__(self):
        self.average = None

    def after_train_iter(self, runner, *args, **kwargs):
        now = [p.detach().clone() for p in runner.model.parameters()]
        if self.average is None:
            self.average = now
        else:
            self.average = [
                torch.lerp(a, b, 0.1) for a, b in zip(self.average, now)
            ]


@pytest.mark.parametrize('update_buffers', [True, False])
@pytest.mark.parametrize('name', NORMS)
def test_an_average_of_models(tmp_path, name, update_buffers):
    """EMAHook copies, averages, swaps for validation, and saves."""
    torch.manual_seed(0)
    weights = Weights()
    plain = Toy(NORMS[name])
    model = copy.deepcopy(plain)
    ema = dict(
        type='EMAHook',
        ema_type=ExponentialMovingAverage,
        momentum=0.1,
        update_buffers=update_buffers)
    for m, hooks in ((plain, []), (model, [ema, weights])):
        (tmp_path / str(len(hooks))).mkdir()
        runner = toy_runner(
            tmp_path / str(len(hooks)), [*_hooks(name), *hooks],
            m,
            train_cfg=dict(by_epoch=True, max_epochs=4))
        runner.train()
    # Training is what it is without.
    for a, b in zip(plain.state_dict().values(), model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    hook, = (h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    for a, b in zip(hook.ema_model.module.parameters(), weights.average):
        torch.testing.assert_close(a, b)
    averaged = hook.ema_model.module.eval()
    assert not averaged.head[1]._states  # it was copied before the training
    x = [torch.randn(3, 8, 8)] * 2
    assert averaged(x).isfinite().all()
