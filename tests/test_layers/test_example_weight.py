import copy
import pickle

import pytest
import torch
from mmengine.model.utils import revert_sync_batchnorm
from torch import nn

from mmdet_smallbn import (BGN, BRN, CBN, MABN, GhostBN,
                           calibrate_group_norms, set_example_weight)
from tests.reference import literal_example_weighting, relative_error


def _train(norm):
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    norm.double().train()
    for n in (2, 3, 4):
        norm(torch.randn(n, 6, 4, 5).double() * 2 + 1)
    return norm.eval()


def _reverted_sync():
    """What mmengine makes of SyncBatchNorm without processes."""
    return revert_sync_batchnorm(nn.SyncBatchNorm(6))


NORMS = {
    'BatchNorm2d': lambda: nn.BatchNorm2d(6),
    'SyncBatchNorm, reverted': _reverted_sync,
    'CBN': lambda: CBN(6),
    'MABN': lambda: MABN(6),
    'BRN': lambda: BRN(6),
    'GhostBN': lambda: GhostBN(6),
    'BGN': lambda: BGN(6, num_groups=3, example_weight=0.),
}


@pytest.mark.parametrize('alpha', [0., 1e-3, 0.3, 1.])
@pytest.mark.parametrize('name', NORMS)
def test_equals_the_literal_equation(name, alpha):
    norm = _train(NORMS[name]())
    x = torch.randn(3, 6, 4, 5).double().requires_grad_()
    assert set_example_weight(norm, alpha) == ['']
    expected = literal_example_weighting(
        x,
        norm.running_mean,
        norm.running_var + norm.running_mean.square(),
        norm.weight,
        norm.bias,
        norm.eps,
        alpha,
        getattr(norm, 'num_groups', None),
        centered=name != 'MABN')
    out = norm(x)
    assert relative_error(out, expected) < 1e-9
    # Also in its gradients: frozen norms are in evaluation in training.
    grad = torch.randn_like(out)
    leaves = [x, norm.weight, norm.bias]
    for a, b in zip(
            torch.autograd.grad(out, leaves, grad),
            torch.autograd.grad(expected, leaves, grad)):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize('undo', [0., None])
@pytest.mark.parametrize('name', NORMS)
def test_is_undone_bit_for_bit(name, undo):
    norm = _train(NORMS[name]()).float()
    cls, state = type(norm), copy.deepcopy(norm.state_dict())
    attributes = set(norm.__dict__)
    x = torch.randn(2, 6, 4, 5)
    before = norm(x)
    set_example_weight(norm, 0.5)
    assert not torch.equal(norm(x), before)
    assert list(norm.state_dict()) == list(state)
    set_example_weight(norm, undo)
    assert torch.equal(norm(x), before)
    assert type(norm) is cls
    assert set(norm.__dict__) == attributes
    for key, value in norm.state_dict().items():
        assert torch.equal(value, state[key])


def test_syncbatchnorm_itself():
    stock, sync = nn.BatchNorm2d(6), nn.SyncBatchNorm(6)
    _train(stock).float()
    sync.load_state_dict(stock.state_dict())
    sync.eval()
    x = torch.randn(2, 6, 4, 5)
    for norm in (stock, sync):
        set_example_weight(norm, 0.3)
    torch.testing.assert_close(sync(x), stock(x))
    set_example_weight(sync, None)
    assert type(sync) is nn.SyncBatchNorm


class Detector(nn.Module):

    def __init__(self, head=lambda: nn.BatchNorm2d(6)):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.head = nn.Sequential(nn.Conv2d(6, 6, 3), head())
        self.fc = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.fc(self.head(self.backbone(x)).mean((2, 3)))


def test_parts_are_left_out_and_brought_back():
    model = Detector().eval()
    assert set_example_weight(model, 0.2) == ['backbone.1', 'head.1']
    assert 'example_weight=0.2' in repr(model)
    assert set_example_weight(model, 0.3, 'backbone') == ['head.1']
    assert type(model.backbone[1]) is nn.BatchNorm2d
    assert model.head[1].example_weight == 0.3
    assert set_example_weight(model, None) == ['backbone.1', 'head.1']
    assert type(model.head[1]) is nn.BatchNorm2d


def test_training_is_not_touched():
    model = Detector()
    other = copy.deepcopy(model)
    set_example_weight(model, 0.5)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    for a, b in zip(model.buffers(), other.buffers()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('clone', [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))
], ids=['deepcopy', 'pickle'])
def test_copies_keep_the_weight(clone):
    model = Detector().eval()
    set_example_weight(model, 0.5)
    x = torch.randn(2, 3, 8, 8)
    other = clone(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    set_example_weight(other, None)
    assert type(other.head[1]) is nn.BatchNorm2d
    assert not torch.equal(other(x), model(x))


def test_group_norm_after_calibration():
    norm = nn.GroupNorm(3, 6).double()
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    batches = [torch.randn(n, 6, 4, 5).double() + n for n in (3, 1, 2)]
    x = torch.randn(2, 6, 4, 5).double()
    before = norm(x)
    with pytest.raises(ValueError, match='calibrate_group_norms'):
        set_example_weight(norm, 0.9)
    with calibrate_group_norms(norm):
        for batch in (*batches, batches[0][:0]):
            norm(input=batch)
    assert list(norm.state_dict()) == ['weight', 'bias']
    assert torch.equal(norm(x), before)
    joined = torch.cat(batches)
    for alpha in (0., 0.6, 0.99):
        set_example_weight(norm, alpha)
        norm.eval()
        expected = literal_example_weighting(
            x, joined.mean((0, 2, 3)),
            joined.square().mean((0, 2, 3)), norm.weight, norm.bias, norm.eps,
            alpha, 3)
        assert relative_error(norm(x), expected) < 1e-9
    for undo in (1., None):
        set_example_weight(norm, 0.5)
        set_example_weight(norm, undo)
        assert torch.equal(norm(x), before) and type(norm) is nn.GroupNorm


def test_bgn_goes_back_to_what_it_was_built_with():
    norm = _train(BGN(6, num_groups=3))
    x = torch.randn(2, 6, 4, 5).double()
    before = norm(x)
    set_example_weight(norm, 0.)
    assert not torch.equal(norm(x), before)
    set_example_weight(norm, None)
    assert norm.example_weight == 1. and torch.equal(norm(x), before)


@pytest.mark.parametrize('model, weight, exclude, message', [
    (Detector(), 1.5, (), r'from 0 to 1, but got 1\.5'),
    (Detector(), -0.1, (), 'from 0 to 1'),
    (Detector(), 0.1, 'neck', "'neck'.*backbone, head"),
    (Detector(), 0.1, ('backbone', 'head'), '2 norms, and 2 of them'),
    (Detector(lambda: nn.GroupNorm(3, 6)), 0.1, (), "GroupNorm 'head.1'"),
    (Detector(lambda: nn.BatchNorm2d(6, track_running_stats=False)), 0.1, (),
     "BatchNorm2d 'head.1'.*track_running_stats=False"),
    (nn.Conv2d(3, 3, 1), 0.1, (), 'no norm'),
])
def test_what_cannot_be_is_refused(model, weight, exclude, message):
    with pytest.raises(ValueError, match=message):
        set_example_weight(model, weight, exclude)
    assert 'example_weight' not in repr(model)
