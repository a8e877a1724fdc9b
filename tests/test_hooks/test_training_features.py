"""The norms beside other features of the training loop."""
import copy
import gc
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmdet_smallbn import BGN, BRN, CBN, MABN, CmBN, GhostBN, NaiveCBN
from tests.device import device, device_type
from tests.toy import LossScale, Toy, read_log, toy_runner

NORMS = {
    'CBN': CBN,
    'NaiveCBN': NaiveCBN,
    'MABN': partial(MABN, buffer_size=4),
    'BRN': BRN,
    'CmBN': CmBN,
    'BGN': partial(BGN, num_groups=2),
    'GhostBN': GhostBN
}
EPOCHS = dict(by_epoch=True, max_epochs=8)


def _hooks(name):
    if name in ('BGN', 'GhostBN'):
        return []
    if name == 'CmBN':
        return [dict(type='SmallBatchNormHook')]
    return [dict(type='BurnInHook', iters=2)]


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
            assert block[1].states[0].backward.mean().isfinite().all()
    assert _finite(model)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', NORMS)
def test_mixed_precision_trains(tmp_path, name, dtype):
    """By mmengine's AmpOptimWrapper; what the norms hold stays float32."""
    if device_type() != 'cuda':
        pytest.skip('of CUDA: --device cuda')
    model = Toy(NORMS[name])
    before = copy.deepcopy(model.state_dict())
    _train(
        tmp_path / 'amp',
        model,
        _hooks(name),
        optim_wrapper=dict(
            type='AmpOptimWrapper',
            dtype=dtype,
            loss_scale=dict(init_scale=2.**9),
            optimizer=dict(type='SGD', lr=0.01)))
    assert _finite(model)
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        if key.endswith('weight') or 'running' in key:
            assert not torch.equal(value.cpu(), before[key].cpu()), key
    for block in (model.backbone, model.head):
        for state in block[1].export_states():
            assert {t.dtype for t in _tensors(state)} == {torch.float32}


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
    # It was copied before the training.
    assert not averaged.head[1].export_states()
    x = [torch.randn(3, 8, 8)] * 2
    assert averaged(x).isfinite().all()


def _train(folder, model, hooks=(), **kwargs):
    folder.mkdir(exist_ok=True)
    kwargs.setdefault('train_cfg', dict(by_epoch=True, max_epochs=4))
    runner = toy_runner(folder, list(hooks), model, **kwargs)
    runner.train()
    return runner


class Began(Hook):
    """What the norms hold when a training begins."""
    priority = 'LOW'

    def before_train(self, runner):
        self.states = [
            state for block in (runner.model.backbone, runner.model.head)
            for state in block[1].export_states()
        ]


@pytest.mark.parametrize('resumed_with', [True, False])
@pytest.mark.parametrize('name', NORMS)
def test_an_average_may_begin_or_end_with_a_resume(tmp_path, name,
                                                   resumed_with):
    """Without it, mmengine goes on from the average, and the norms anew."""
    model = Toy(NORMS[name])
    ema = dict(type='EMAHook', momentum=0.1)
    whole = _train(tmp_path / 'whole', copy.deepcopy(model), _hooks(name))
    before, after = ([], [ema]) if resumed_with else ([ema], [])
    _train(
        tmp_path / 'part',
        model, [*_hooks(name), *before],
        train_cfg=dict(by_epoch=True, max_epochs=2))
    began = Began()
    resumed = _train(
        tmp_path / 'part',
        Toy(NORMS[name]), [*_hooks(name), *after, began],
        resume=True,
        load_from=str(tmp_path / 'part/epoch_2.pth'))
    assert resumed.iter == 8 and _finite(resumed.model)
    text = read_log(tmp_path / 'part')
    remembers = name in ('CBN', 'NaiveCBN', 'MABN')
    if not resumed_with:
        assert ('averaged weights' in text) == remembers
        assert not began.states
        return
    assert bool(began.states) == remembers
    for a, b in zip(whole.model.state_dict().values(),
                    resumed.model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('norm, hook', [
    (partial(CBN, window_size=4), dict(type='BurnInHook', iters=0)),
    (CmBN, dict(type='SmallBatchNormHook')),
    (CmBN, None),
], ids=['CBN', 'CmBN', 'CmBN, no hook'])
def test_parts_of_an_accumulated_batch_are_one_batch(tmp_path, norm, hook):
    """The last part is normalised as BatchNorm does with all of them."""
    seen = []

    def watch(norm, inputs, output):
        seen.append([
            v.detach().clone()
            for v in (inputs[0], output, norm.weight, norm.bias)
        ])

    model = Toy(norm).double()
    model.head[1].register_forward_hook(watch)
    images = [dict(inputs=torch.randn(3, 8, 8).double()) for _ in range(16)]
    _train(
        tmp_path / 'run',
        model, [hook] if hook else [],
        train_dataloader=dict(
            dataset=images,
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.1), accumulative_counts=4))
    assert len(seen) == 16
    for step in range(4):
        # At the end of a step the window holds its four parts alone.
        inputs, outputs, weights, biases = zip(*seen[4 * step:4 * step + 4])
        wanted = F.batch_norm(
            torch.cat(inputs), None, None, weights[-1], biases[-1], True)
        torch.testing.assert_close(outputs[-1], wanted[-2:])
        alone = F.batch_norm(
            inputs[-1], None, None, weights[-1], biases[-1], True)
        assert (outputs[-1] - alone).abs().max() > 0.1
    assert not torch.equal(weights[-1], seen[0][2])  # steps were made


@pytest.mark.parametrize('name', NORMS)
@pytest.mark.filterwarnings('ignore:.*loaded the statistics')
def test_fine_tuning_from_a_stock_checkpoint(tmp_path, name, capsys):
    """Everything is found, and the log has no word on keys."""
    _train(tmp_path / 'stock', Toy(nn.BatchNorm2d))
    capsys.readouterr()
    runner = toy_runner(
        tmp_path,
        _hooks(name),
        Toy(NORMS[name]),
        load_from=str(tmp_path / 'stock/epoch_4.pth'))
    runner.load_or_resume()
    stock = torch.load(
        tmp_path / 'stock/epoch_4.pth',
        device(),
        weights_only=True)
    for key, value in runner.model.state_dict().items():
        if name != 'MABN' or 'running' not in key:
            assert torch.equal(value, stock['state_dict'][key]), key
    text = read_log(tmp_path) + capsys.readouterr().out
    assert 'Load checkpoint from' in text
    for word in ('missing key', 'unexpected key', 'size mismatch'):
        assert word not in text
    runner.train()


def test_buffers_of_another_length_are_named(tmp_path, capsys):
    """As any parameter's: an error if strict, else said."""
    state = Toy().state_dict()
    state['head.1.running_var'] = torch.ones(5)
    model = Toy()
    with pytest.raises(RuntimeError, match=r'head.1.running_var.*\[5\].*\[4'):
        model.load_state_dict(state)
    torch.save(dict(state_dict=state), tmp_path / 'other.pth')
    runner = toy_runner(
        tmp_path, [dict(type='BurnInHook', iters=1)],
        model,
        load_from=str(tmp_path / 'other.pth'))
    runner.train()
    assert 'size mismatch for head.1.running_var' in (
        capsys.readouterr().out)
    assert runner.model.head[1].running_var.shape == (4, )


class OutOfMemory(RuntimeError):
    pass


class Skips(Toy):
    """Goes on after a batch that is too large, as some training loops do."""

    def train_step(self, data, optim_wrapper):
        try:
            return super().train_step(data, optim_wrapper)
        except OutOfMemory:
            optim_wrapper.zero_grad()
            return dict(loss=torch.zeros(()))


class Raises(Hook):
    """An error at a place of the second block, in one iteration."""

    def __init__(self, place, at):
        self.place, self.at = place, at

    def before_train(self, runner):

        def fail(*args):
            if runner.iter == self.at:
                raise OutOfMemory

        conv, norm = runner.model.head
        if self.place == 'before the norm':
            norm.register_forward_pre_hook(fail)
        elif self.place == 'behind the norm':
            norm.register_forward_hook(fail)
        else:
            conv.register_full_backward_hook(fail)


@pytest.mark.parametrize(
    'place', ['before the norm', 'behind the norm', 'in the backward pass'])
@pytest.mark.parametrize('name', NORMS)
def test_an_error_in_an_iteration_costs_that_iteration(tmp_path, name, place):
    model = Skips(NORMS[name])
    runner = _train(
        tmp_path / 'run', model, [*_hooks(name), Raises(place, at=3)])
    assert runner.iter == 8 and _finite(model)
    missed = place == 'before the norm'
    assert model.backbone[1].num_batches_tracked == 8
    assert model.head[1].num_batches_tracked == 8 - missed
    for block in (model.backbone, model.head):
        assert not len(block[1]._first_passes)
        for exported in block[1].export_states():
            state = exported['state']
            if 'turn' in state:
                # The window is 4, and what came before the error counts.
                assert block[1].held_iterations == [4]


def test_a_training_that_ended_in_an_error_is_forgotten(tmp_path):
    """The next one of the same model begins as if there had been none."""
    model = Toy()
    fresh = copy.deepcopy(model)
    with pytest.raises(OutOfMemory):
        _train(
            tmp_path / 'broken', model,
            [*_hooks('CBN'), Raises('behind the norm', at=5)])
    model.load_state_dict(fresh.state_dict())
    model.head[1]._forward_hooks.clear()
    for m in (model, fresh):
        _train(tmp_path / f'run{m is fresh}', m, _hooks('CBN'))
    for a, b in zip(model.state_dict().values(), fresh.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Memory(Hook):
    """Tensors that Python knows of, and pages that are in use."""
    priority = 'LOWEST'

    def __init__(self):
        self.tensors, self.pages = [], []

    def after_train_iter(self, runner, *args, **kwargs):
        if (runner.iter + 1) % 50 == 0:
            gc.collect()
            self.tensors.append(
                sum(
                    torch.is_tensor(o) for o in gc.get_objects()))
            resident = Path('/proc/self/statm').read_text().split()[1]
            self.pages.append(int(resident))


@pytest.mark.parametrize('name', NORMS)
def test_memory_is_constant_over_200_iterations(tmp_path, name):
    memory = Memory()
    model = Toy(NORMS[name])
    image = dict(inputs=torch.randn(3, 160, 160))
    loader = dict(
        dataset=[image] * 2,
        batch_size=2,
        sampler=dict(type='InfiniteSampler', shuffle=False))
    _train(
        tmp_path / 'run',
        model, [*_hooks(name), memory],
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=200),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', interval=100, by_epoch=False)))
    assert len(set(memory.tensors[1:])) == 1, memory.tensors
    # The features of an iteration are 800 kB, a page 4.
    grown = (memory.pages[3] - memory.pages[1]) * resource.getpagesize()
    assert grown < 20e6, memory.pages


@pytest.mark.parametrize('name', NORMS)
def test_compiled_by_the_runner(tmp_path, name):
    """mmengine compiles the whole step, forward and backward."""
    model = Toy(NORMS[name])
    plain = copy.deepcopy(model)
    for m in (plain, model):
        cfg = {} if m is plain else dict(compile=dict(backend='aot_eager'))
        _train(
            tmp_path / f'run{m is plain}',
            m,
            _hooks(name),
            cfg=cfg,
            train_cfg=dict(by_epoch=True, max_epochs=3))
    for a, b in zip(plain.state_dict().values(), model.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
