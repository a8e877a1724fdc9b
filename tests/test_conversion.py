"""BatchNorms of a model without a toolbox become norms of the package."""
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import mmdet_smallbn
from mmdet_smallbn import (BRN, CBN, MABN, CenConv2d, CmBN, GhostBN, NaiveCBN,
                           convert_norms, fuse_norm)
from mmdet_smallbn.errors import SetupError
from mmdet_smallbn.layers import SmallBatchNorm


class Block(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self, inputs, channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.norm2, self.norm1 = norm(channels), norm(channels)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return x + self.norm2(self.conv2(x))


class Network(nn.Module):

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.backbone = Block(3, 4, norm)
        self.neck = nn.Sequential(Block(4, 8, norm), nn.GroupNorm(2, 8))
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)).mean((2, 3)))


def _step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _trained(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x in torch.randn(steps, 4, 3, 9, 9) + 1:
        _step(model, optimizer, x)
    return model


def _kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


NORMS = [name for name, cls in vars(mmdet_smallbn).items()
         if isinstance(cls, type) and issubclass(cls, SmallBatchNorm)]


def test_all_norms_are_tried():
    assert set(NORMS) == {
        'BGN', 'BRN', 'CBN', 'CmBN', 'GhostBN', 'MABN', 'NaiveCBN'
    }


@pytest.mark.filterwarnings('ignore:.*loaded the statistics')
@pytest.mark.parametrize('name', NORMS)
def test_a_converted_model_is_one_that_was_built_so(name):
    """With an optimizer that was made, and had momentum, before."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x in torch.randn(3, 4, 3, 9, 9):
        _step(model, optimizer, x)
    parameters = list(model.parameters())

    twin = Network(getattr(mmdet_smallbn, name))
    twin.load_state_dict(model.state_dict())
    if name == 'MABN':
        for block in (twin.backbone, twin.neck[0]):
            block.conv1.__class__ = block.conv2.__class__ = CenConv2d
    theirs = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    report = convert_norms(model, name)
    assert {n for n in report.converted if 'norm' in n} == {
        'backbone.norm1', 'backbone.norm2', 'neck.0.norm1', 'neck.0.norm2'
    }
    assert _kinds(model) == _kinds(twin)
    for a, b in zip(model.parameters(), parameters):
        assert a is b
    for x in torch.randn(6, 2, 3, 9, 9):
        _step(model, optimizer, x)
        _step(twin, theirs, x)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize('name', ['CBN', 'NaiveCBN', 'CmBN', 'BRN', 'GhostBN'])
def test_evaluation_stays_what_it_was(name):
    model = _trained(Network()).eval()
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    convert_norms(model, name)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_the_report_prints_what_became_of_what():
    report = convert_norms(Network(), 'CBN', where='neck')
    assert str(report).splitlines() == [
        'neck.0.norm2  BatchNorm2d -> CBN',
        'neck.0.norm1  BatchNorm2d -> CBN',
        'neck.1        left: GroupNorm does not depend on the batch',
    ]
    report = convert_norms(Network(), 'CBN')
    assert report.left == {
        'neck.1': 'GroupNorm does not depend on the batch',
        'head.1': 'BatchNorm1d does not take feature maps of shape '
        '(N, C, H, W)',
    }


def test_where_takes_several_and_calls_add_up():
    model = Network()
    convert_norms(model, 'GhostBN', where=('backbone.norm1', 'neck'))
    assert _kinds(model)['backbone.norm2'] is nn.BatchNorm2d
    report = convert_norms(model, 'CBN')
    assert list(report.converted) == ['backbone.norm2']
    assert report.left['neck.0.norm1'] == 'GhostBN is of this package already'


def test_settings_and_what_a_batch_norm_has_of_its_own():
    model = nn.ModuleDict(
        dict(
            plain=nn.BatchNorm2d(4),
            other=nn.BatchNorm2d(4, eps=1e-3, momentum=0.01),
            cumulative=nn.BatchNorm2d(4, momentum=None, affine=False),
            bare=nn.BatchNorm2d(4, track_running_stats=False),
            wide=nn.BatchNorm2d(4).double().requires_grad_(False).eval()))
    model['other'].weight.requires_grad_(False)
    kept = copy.deepcopy(model)
    convert_norms(model, 'CBN', window_size=8)
    for name, norm in model.items():
        stock = kept[name]
        assert type(norm) is CBN and norm.window_size == 8 and not norm.sync
        assert norm.layer_name == name
        for key in ('eps', 'momentum', 'affine', 'track_running_stats',
                    'training', 'num_features'):
            assert getattr(norm, key) == getattr(stock, key)
        for a, b in zip([*norm.parameters(), *norm.buffers()],
                        [*stock.parameters(), *stock.buffers()]):
            assert a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b)
        x = torch.randn(2, 4, 3, 3).to(norm.weight) if norm.affine else (
            torch.randn(2, 4, 3, 3))
        torch.testing.assert_close(norm(x), stock(x))


@pytest.mark.parametrize('name, momentum', [('CBN', 0.3), ('GhostBN', 0.3),
                                            ('CmBN', 0.3), ('MABN', 0.02),
                                            ('BRN', 0.02), ('BGN', 0.01)])
def test_momentum_is_the_methods_where_it_has_one(name, momentum):
    norm = nn.BatchNorm2d(4, momentum=0.3)
    inputs = torch.randn(2, 4, 3, 3) if name == 'MABN' else None
    convert_norms(norm, name, inputs=inputs)
    assert norm.momentum == momentum
    norm = nn.BatchNorm2d(4, momentum=0.3)
    convert_norms(norm, name, inputs=inputs, momentum=0.1)
    assert norm.momentum == 0.1


def test_a_scale_without_a_shift_stays_without():
    norm = nn.BatchNorm2d(4)
    norm.bias = None
    stock = copy.deepcopy(norm)
    convert_norms(norm, 'NaiveCBN', window_size=1)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), stock(x))
    assert list(norm.state_dict()) == list(stock.state_dict())


def test_a_norm_under_two_names_and_with_hooks_stays_one():
    shared, seen = nn.BatchNorm2d(4), []
    shared.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared)
    report = convert_norms(model, 'CBN')
    assert list(report.converted) == ['1']
    assert model[1] is model[3] is shared and type(shared) is CBN
    model(torch.randn(2, 3, 9, 9))
    assert len(seen) == 2


def test_a_norm_by_itself():
    norm = nn.BatchNorm2d(4)
    report = convert_norms(norm, 'BRN', r_max=2.)
    assert report.converted == {'': 'BatchNorm2d -> BRN'}
    assert type(norm) is BRN and norm.r_max == 2.


class MyNorm(nn.BatchNorm2d):
    """Norm and activation in one, as some libraries have them."""

    def forward(self, x):
        return super().forward(x).relu()


class Frozen(nn.Module):
    """As torchvision's."""

    def __init__(self):
        super().__init__()
        self.register_buffer('running_var', torch.ones(4))


@pytest.mark.parametrize('norm, reason', [
    (MyNorm(4), 'MyNorm is another class'),
    (Frozen(), 'Frozen is another class'),
    (nn.BatchNorm3d(4), 'BatchNorm3d does not take feature maps'),
    (nn.LazyBatchNorm2d(), 'LazyBatchNorm2d does not know its channels'),
    (nn.LayerNorm(4), 'LayerNorm does not depend on the batch'),
    (nn.InstanceNorm2d(4), 'InstanceNorm2d does not depend on the batch'),
    (nn.SyncBatchNorm(4, process_group=object()), 'SyncBatchNorm has a'),
], ids=lambda v: type(v).__name__)
def test_what_is_left_has_a_reason(norm, reason):
    model = nn.ModuleList([norm, nn.BatchNorm2d(4)])
    report = convert_norms(model, 'CBN')
    assert report.left['0'].startswith(reason)
    assert model[0] is norm
    with pytest.raises(SetupError, match=f"^where='0' holds no BatchNorm2d to "
                       f"convert: '0': {reason}"):
        convert_norms(model, 'CBN', where='0')


def test_sync_batch_norm_becomes_a_norm_with_sync():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Network())
    convert_norms(model, 'GhostBN', where='backbone')
    convert_norms(model, 'CBN', where='neck', sync=False)
    assert type(model.backbone.norm1) is GhostBN and model.backbone.norm1.sync
    assert type(model.neck[0].norm1) is CBN and not model.neck[0].norm1.sync
    # Nothing of SyncBatchNorm is left.
    assert set(vars(model.backbone.norm1)) == set(vars(GhostBN(4)))


@pytest.mark.parametrize('settings, message', [
    (dict(norm='CNB'), "'CNB' is not a known norm. Did you mean CBN"),
    (dict(norm='GN'), "'GN' is not a known norm"),
    (dict(windowsize=3), "CBN takes no 'windowsize'. Did you mean window"),
    (dict(window_size=0), "norm2': window_size must be .* got 0"),
    (dict(affine=False), 'affine cannot be given.* Remove affine'),
    (dict(where='nek'), "where='nek' holds no BatchNorm2d .*backbone, neck"),
    (dict(where=('neck', 'head')), "where='head' .*'head.1': BatchNorm1d"),
    (dict(where=[]), r'where must be the name .* got \[\]'),
    (dict(where=1), 'where must be the name of a module .* got 1'),
    (dict(inputs=torch.ones(1)), 'inputs are for norms .* such as MABN'),
    (dict(norm='BGN', num_groups=8), "backbone.norm2': num_groups must div"),
    (dict(norm='MABN', inputs=torch.ones(1, 4, 9, 9)),
     'Network cannot run on the inputs given'),
])
def test_errors_come_before_any_change(settings, message):
    model = Network()
    model.neck.eval()
    kinds, state = _kinds(model), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with pytest.raises(SetupError, match=message) as error:
        convert_norms(model, **{'norm': 'CBN', **settings})
    assert '\n' not in str(error.value)
    assert _kinds(model) == kinds
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks
                   for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize('model', [nn.Sequential(nn.Conv2d(3, 4, 3)),
                                   nn.Sequential(nn.GroupNorm(2, 4))])
def test_a_model_without_batch_norms_is_refused(model):
    with pytest.raises(SetupError, match='holds no BatchNorm2d to convert'):
        convert_norms(model, 'CBN')


def test_a_second_conversion_of_all_is_refused():
    model = Network()
    convert_norms(model, 'CBN')
    with pytest.raises(SetupError, match='CBN is of this package already'):
        convert_norms(model, 'CBN', window_size=8)
    assert model.backbone.norm1.window_size == 4


class Odd(nn.Module):
    """Every way in which a norm's input may be made."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.behind = nn.BatchNorm2d(4)
        self.activated = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.behind_relu = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)
        self.behind_depthwise = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.behind_up = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.BatchNorm2d(4)
        self.centred = CenConv2d(4, 4, 3, padding=1)
        self.behind_centred = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x, reach=True):
        x = self.behind(self.conv(x)).relu()
        x = self.behind_relu(self.relu(self.activated(x)))
        x = self.behind_depthwise(self.depthwise(x)) + x
        x = self.behind_up(self.up(x))
        x = self.shared(self.twice(self.shared(self.twice(x)))) + x
        x = self.shared(x)
        if reach:
            x = self.behind_centred(self.centred(x))
        return self.last(x)


def test_mabns_convolutions_are_found_in_a_forward_pass():
    model = Odd()
    model.behind.eval()
    report = convert_norms(model, 'MABN')
    assert not model.behind.training and model.shared.training
    assert model.behind.num_batches_tracked == 0
    assert {n for n, m in model.named_modules() if type(m) is CenConv2d} == {
        'conv', 'twice', 'centred'
    }
    assert report.converted['conv'] == 'Conv2d -> CenConv2d'
    assert 'centred' not in report.converted
    none = ('BatchNorm2d -> MABN, whose input does not come from a '
            'convolution')
    assert {n for n, text in report.converted.items() if text == none} == {
        'behind_relu', 'shared'
    }
    assert report.left == {
        'depthwise': 'Conv2d has only one weight per filter, which centring '
        'would make 0',
        'up': 'ConvTranspose2d is not centred: only nn.Conv2d itself can be'
    }


def test_mabn_centres_what_is_before_the_norms_that_are_meant():
    model = Odd()
    convert_norms(model, 'MABN', where='behind')
    assert {n for n, m in model.named_modules() if type(m) is CenConv2d} == {
        'conv', 'centred'
    }
    model = Odd()
    convert_norms(model, 'MABN', centered=True)  # it subtracts means itself
    assert type(model.conv) is nn.Conv2d


def test_a_norm_that_is_not_reached_is_named():
    model = Odd()
    with pytest.raises(SetupError, match="'behind_centred' was not reached.*"
                       'name only other parts in where'):
        convert_norms(
            model, 'MABN', inputs=(torch.randn(1, 3, 8, 8), False))
    assert type(model.behind) is nn.BatchNorm2d


def test_mabn_gets_a_mean_square():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].running_mean.copy_(torch.arange(4.))
    with pytest.warns(UserWarning, match="MABN .*mean square of them: train"):
        convert_norms(model, 'MABN')
    assert type(model[1]) is MABN
    assert model[1].running_var.tolist() == [1., 2., 5., 10.]
    assert not model[1].running_mean.any()


@pytest.mark.parametrize('name', ['CBN', 'MABN'])
def test_a_converted_model_is_saved_copied_and_folded(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        convert_norms(model, name)
        _trained(model).eval()
    x = torch.randn(2, 3, 9, 9)
    out = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                 fuse_norm(copy.deepcopy(model))):
        torch.testing.assert_close(twin(x), out)
    assert type(twin[0]) is nn.Conv2d and type(twin[1]) is nn.Identity


def test_kinds_of_norms_in_one_model():
    model = Network()
    convert_norms(model, 'CmBN', where='backbone')
    convert_norms(model, 'NaiveCBN', where='neck', window_size=2)
    _trained(model)
    assert type(model.backbone.norm1) is CmBN
    assert type(model.neck[0].norm1) is NaiveCBN
    assert model.neck[0].norm1.held_iterations == [2]
