"""What a training loop prepares for all layers at once."""
import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_smallbn import (BRN, CBN, MABN, CenConv2d, CmBN, GhostBN,
                           NaiveCBN)
from mmdet_smallbn.functional import ConvCall, Processes
from mmdet_smallbn.layers import (SmallBatchNorm, TrainingLoop,
                                  remember_calls)
from tests.device import device_type


class Network(nn.Module):
    """Layers of all kinds, of which some are not called each time."""

    def __init__(self, cls):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.centred = CenConv2d(6, 4, 3)
        self.frozen = nn.Conv2d(4, 5, 1).requires_grad_(False)
        self.up = nn.ConvTranspose2d(5, 4, 2, stride=2)
        self.shared = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(map(cls, (6, 6, 4, 5, 4, 4)))

    def forward(self, x, skip=False):
        x = self.norms[0](self.first(x)).relu()
        if not skip:
            x = x + self.norms[1](self.grouped(x))
        x = self.norms[2](self.centred(x))
        x = self.norms[3](self.frozen(x)).relu()
        x = self.norms[4](self.up(x))
        for _ in range(2):
            x = self.norms[5](self.shared(x))
        return x


NORMS = {
    'CBN': CBN,
    'CBN, released': partial(CBN, gradient='released', window_size=3),
    'CBN, all positions': partial(CBN, derivative_positions=None),
    'CBN, few positions': partial(CBN, derivative_positions=5),
    'NaiveCBN': NaiveCBN,
    'MABN': partial(MABN, buffer_size=3),
    'MABN, centred': partial(
        MABN, centered=True, backward_statistics='ema', buffer_size=3),
    'CmBN': CmBN,
    'BRN': BRN,
    'GhostBN': GhostBN,
}


def _norms(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SmallBatchNorm)
    }


def _step(model, x, **kwargs):
    model.zero_grad()
    out = model(x, **kwargs)
    out.sin().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.02)
    return out


@pytest.mark.filterwarnings('ignore:.*called several times')
@pytest.mark.parametrize('name', NORMS)
def test_what_is_prepared_is_what_a_layer_would_compute(name):
    """Outputs, gradients and buffers, whatever happens in between."""
    torch.manual_seed(0)
    models = [Network(NORMS[name]).double()]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        remember_calls(model)
    loop = TrainingLoop(_norms(models[1]))
    for iteration in range(12):
        size = 6 + 2 * (iteration % 5 == 4)
        x = torch.randn(1 + iteration % 3, 3, size, 6).double() + 1
        for norm in _norms(models[0]).values():
            norm.iteration = iteration
        loop.begin(iteration)
        if iteration == 7:  # weights change after they were looked at
            with torch.no_grad():
                for model in models:
                    model.first.weight.mul_(1.1)
                    model.shared.bias.add_(0.1)
        if iteration == 8:  # the model moves
            models[1].to('cpu').to(device_type())
        outs = [_step(model, x, skip=iteration == 5) for model in models]
        loop.end()
        torch.testing.assert_close(*outs, rtol=1e-7, atol=1e-7)
        for a, b in zip(*(m.parameters() for m in models)):
            if a.requires_grad and a.grad is not None:
                assert a.grad.isfinite().all()
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)
            b.data.copy_(a)  # rounding is not to grow
        for a, b in zip(*(m.buffers() for m in models)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(*(_norms(m).values() for m in models)):
        assert a.held_iterations == b.held_iterations
    loop.release()
    assert all(n.iteration is None for n in _norms(models[1]).values())


@pytest.mark.parametrize('name', ['CBN', 'MABN'])
def test_iterations_whose_backward_passes_come_later(name):
    """The first forward's patches are kept for it."""
    torch.manual_seed(0)
    gradients = []
    for together in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[name](4)).double()
        loop = TrainingLoop(_norms(model))
        losses = []
        for iteration in range(8):
            loop.begin(iteration)
            loss = model(torch.randn(2, 3, 9, 9).double()).pow(3).mean()
            loop.end()
            if together and iteration > 4:
                losses.append(loss)
            else:
                loss.backward()
        if losses:
            # MABN's averages take in backward passes in their order.
            for loss in losses:
                loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('copied', [
    copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))
], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('name', ['CBN', 'NaiveCBN', 'MABN'])
def test_a_copy_holds_the_layers_own_part(name, copied):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3).double() for _ in range(20)]
    norms = [NORMS[name](8).double() for _ in convs]
    alone = NORMS[name](8).double()
    loop = TrainingLoop(dict(enumerate(norms)))
    for iteration in range(6):
        loop.begin(iteration)
        for conv, norm in zip(convs, norms):
            x = torch.randn(2, 3, 9, 9).double()
            norm(conv(x)).sum().backward()
        alone(convs[-1](x)).sum().backward()
        loop.end()
    loop.begin(6)
    twin = copied(norms[-1])
    assert len(pickle.dumps(twin)) < 1.1 * len(pickle.dumps(alone))
    x = convs[-1](torch.randn(2, 3, 9, 9).double())
    torch.testing.assert_close(norms[-1](x), alone(x))
    torch.testing.assert_close(twin(x), alone(x), atol=0.2, rtol=0.2)
    exported, = norms[-1].export_states()
    assert len(pickle.dumps(exported)) < 1.1 * len(
        pickle.dumps(alone.export_states()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', NORMS)
def test_running_statistics_are_mended(name, dtype):
    """Those of channels that were not finite, at the iteration's end."""
    norm, stock = NORMS[name](4), nn.BatchNorm2d(4)
    loop = TrainingLoop(dict(norm=norm))
    for iteration in range(4):
        x = torch.randn(3, 4, 5, 5, dtype=dtype).requires_grad_()
        if iteration == 2:
            x.data[0, 1, 0, 0] = torch.inf
            before = norm.running_var.clone()
        loop.begin(iteration)
        with torch.autocast(device_type(), torch.bfloat16, enabled=False):
            norm(x * 1)
            stock(x)
        loop.end()
        if iteration == 2:
            assert norm.running_var.isfinite().all()
            changed = norm.running_var != before
            assert changed.tolist() == [True, False, True, True]
            stock.running_mean.copy_(norm.running_mean)
            stock.running_var.copy_(norm.running_var)
        elif isinstance(norm, CBN):
            torch.testing.assert_close(norm.running_mean, stock.running_mean)
            torch.testing.assert_close(norm.running_var, stock.running_var)
    assert norm.num_batches_tracked == 4


@pytest.mark.parametrize('place', ['sampling', 'copying'])
def test_an_error_in_a_forward_pass_leaves_the_past_alone(monkeypatch, place):
    """As out of memory, after which training may go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4)).double()
    twin, waits = copy.deepcopy(model), []
    x = torch.randn(9, 2, 3, 9, 9).double()
    for i, batch in enumerate(x):
        if i == 6:
            waits = [model(batch)]  # its patches are needed: a copy is made
            twin(batch).sum().backward()
            with monkeypatch.context() as patch:
                patch.setattr(
                    *((ConvCall, 'sample') if place == 'sampling' else
                      (torch.Tensor, 'clone')), _out_of_memory)
                with pytest.raises(MemoryError):
                    model(batch)
        else:
            outs = [m(batch) for m in (model, twin)]
            torch.testing.assert_close(*outs)
            for out in outs:
                out.sum().backward()
    assert waits[0].isfinite().all()


def _out_of_memory(*args, **kwargs):
    raise MemoryError


@pytest.mark.parametrize('setting, cls', [('window_size', CBN),
                                          ('buffer_size', MABN)])
def test_a_setting_that_changes_empties_the_past(setting, cls):
    conv, norm = nn.Conv2d(3, 4, 3), cls(4, **{setting: 3})
    fresh = cls(4, **{setting: 6})
    x = torch.randn(12, 2, 3, 9, 9)
    for batch in x[:4]:
        norm(conv(batch)).sum().backward()
    assert norm.held_iterations == [3]
    setattr(norm, setting, 6)
    assert not norm.export_states()
    fresh.load_state_dict(norm.state_dict())
    for batch in x[4:]:
        torch.testing.assert_close(norm(conv(batch)), fresh(conv(batch)))
    assert norm.held_iterations == [6]


class Count(TorchDispatchMode):
    """Operators that do arithmetic: no views, copies or allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split('::')[1]
        if not func.is_view and name not in (
                'detach', 'empty', 'empty_like', 'new_empty',
                'new_empty_strided', 'copy_'):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _counted(make, conv, layers):
    """Of preparing, of a norm's forward pass, and of the backward pass."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.ModuleList([conv(8, 8, 3, padding=1, bias=False), make(8)])
        for _ in range(layers))
    loop = TrainingLoop(_norms(blocks))
    for iteration in range(12):
        with Count() as began:
            loop.begin(iteration)
        x = torch.randn(2, 8, 9, 9)
        for conv_, norm in blocks:
            x = conv_(x)
            with Count() as forward:
                x = norm(x)
        with Count() as backward:
            x.square().sum().backward()
        loop.end()
        for p in blocks.parameters():
            p.data.sub_(p.grad, alpha=0.01)
            p.grad = None
    return began.names, forward.names, backward.names


def test_operators_of_cbn():
    """In all, and what a layer more adds: launches are what a GPU counts."""
    stock = [_counted(nn.BatchNorm2d, nn.Conv2d, n)[2] for n in (3, 4)]
    begun, forward, backward = zip(
        *(_counted(CBN, nn.Conv2d, n) for n in (3, 4)))
    assert len(forward[0]) == len(forward[1]) <= 16
    # Beside one product a layer, and a copy of the running statistics.
    assert begun[0].count('mm') == 3
    assert len(begun[0]) - 3 <= 40
    assert len(begun[1]) - len(begun[0]) == 1
    # A layer's own, then a product and a sum for the weight's gradient.
    more = len(backward[1]) - len(backward[0])
    assert more - (len(stock[1]) - len(stock[0])) <= 4 + 2


def test_operators_of_mabn():
    begun, forward, backward = zip(
        *(_counted(MABN, nn.Conv2d, n) for n in (3, 4)))
    assert len(forward[0]) == len(forward[1]) <= 12
    assert len(begun[0]) == len(begun[1]) <= 14
    # Beside the convolution's own.
    assert len(backward[1]) - len(backward[0]) - 1 <= 8


def test_processes_with_other_iterations_are_named(monkeypatch):

    def gather(theirs, mine):
        theirs[:] = [mine, dict(mine, neck=2)]

    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 2)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 0)
    monkeypatch.setattr('torch.distributed.all_gather_object', gather)
    Processes().check_alike(dict(neck=2, head=3), 'iterations')
    with pytest.raises(RuntimeError, match="iterations: 'neck' has 3 in "
                       'process 0 and 2 in process 1'):
        Processes().check_alike(dict(neck=3), 'iterations')
