"""Norms folded into the convolutions before them."""
import copy

import mmcv.cnn
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, ConvWS2d
from mmcv.cnn.utils import fuse_conv_bn
from mmcv.ops import ModulatedDeformConv2dPack
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_smallbn import (BGN, CBN, MABN, CenConv2d, GhostBN, fuse_norm,
                           set_example_weight)
from mmdet_smallbn.errors import SetupError
from tests.test_deploy.models import (NORMS, backbone, build, neck, retinanet,
                                      tensors, train)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def _assert_folded(model):
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert nn.Conv2d in kinds
    assert kinds <= {nn.Conv2d, mmcv.cnn.Conv2d}  # the latter without a norm
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())


def _assert_equal(a, b, dtype):
    a, b = tensors(a), tensors(b)
    assert len(a) == len(b) > 0
    for found, wanted in zip(a, b):
        assert found.dtype == dtype
        assert (found - wanted).abs().max() <= TOLERANCE[dtype] * (
            wanted.abs().max())


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('name', NORMS)
def test_backbone_and_neck_fold(name, dtype):
    norm = NORMS[name]
    if name == 'MABN':  # 1 x 1 convolutions of several channels are centred
        assert CenConv2d in map(type, build(neck(norm)).modules())
    model = nn.Sequential(
        build(backbone(norm), dtype), build(neck(norm), dtype))
    x = torch.randn(2, 3, 64, 96, dtype=dtype)
    train(model, x)
    with torch.no_grad():
        wanted = model(x)
        theirs = fuse_conv_bn(copy.deepcopy(model))(x)
        assert fuse_norm(model) is model
        found = model(x)
    _assert_folded(model)
    _assert_equal(found, wanted, dtype)
    if name != 'BGN':  # whose groups mmcv does not know
        _assert_equal(theirs, wanted, dtype)


@pytest.mark.parametrize('name', NORMS)
def test_a_shared_head_folds(name):
    """One tower for all levels: the same pair in each of them."""
    model = build(retinanet(NORMS[name]))
    x = torch.randn(1, 3, 128, 128)
    train(model, x)
    with torch.no_grad():
        wanted = model(x)
        fuse_norm(model)
        _assert_equal(model(x), wanted, torch.float32)
    _assert_folded(model)


def test_two_stages_fold_with_all_of_their_heads():
    from mmengine.config import Config
    cfg = Config.fromfile(
        'configs/cbn/mask-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py')
    model = cfg.model
    norm = model.neck.norm_cfg
    model.backbone = backbone(dict(norm_cfg=norm))
    model.neck = neck(dict(norm_cfg=norm))
    model.rpn_head.update(in_channels=8, feat_channels=8)
    model.roi_head.bbox_roi_extractor.out_channels = 8
    model.roi_head.bbox_head.update(
        in_channels=8, conv_out_channels=8, fc_out_channels=16, num_classes=3)
    model.roi_head.mask_roi_extractor.out_channels = 8
    model.roi_head.mask_head.update(
        in_channels=8, conv_out_channels=8, num_classes=3)
    detector = build(model)
    head, mask = detector.roi_head.bbox_head, detector.roi_head.mask_head
    regions = torch.randn(6, 8, 7, 7), torch.randn(6, 8, 14, 14)
    train(head, regions[0])
    train(mask, regions[1])
    with torch.no_grad():
        wanted = head(regions[0]), mask(regions[1])
        fuse_norm(detector)
        _assert_equal((head(regions[0]), mask(regions[1])), wanted,
                      torch.float32)
    _assert_folded(detector)


@pytest.mark.parametrize('conv', [
    nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
    nn.Conv2d(6, 8, (1, 3), dilation=2, padding=2, padding_mode='reflect'),
    nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, groups=2),
    nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, bias=False),
    CenConv2d(6, 8, 3, groups=2),
], ids=repr)
@pytest.mark.parametrize('norm', [
    CBN(8), CBN(8, affine=False), GhostBN(8), MABN(8),
    BGN(8, num_groups=2, example_weight=0.), nn.BatchNorm2d(8),
    nn.SyncBatchNorm(8)
], ids=repr)
def test_every_kind_of_convolution(conv, norm):
    model = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm)).double()
    if isinstance(norm, nn.SyncBatchNorm):  # trains on GPUs alone
        nn.init.uniform_(model[1].running_mean)
        nn.init.uniform_(model[1].running_var, 1, 2)
    else:
        train(model, torch.randn(3, 6, 9, 9).double())
    model.eval()
    x = torch.randn(2, 6, 11, 9).double()
    wanted = model(x)
    fuse_norm(model, torch.randn(1, 6, 16, 16).double())
    assert type(model[1]) is nn.Identity
    assert type(model[0]) in (nn.Conv2d, nn.ConvTranspose2d)
    _assert_equal(model(x), wanted, torch.float64)
    assert model[0].weight.requires_grad


class _Net(nn.Module):
    """Convolution and norm in a forward that is up to the test."""

    def __init__(self, forward, conv=None, norm=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.norm = norm or CBN(4)
        self.other = CBN(4)
        self.fine = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), CBN(4))
        self.program = forward

    def forward(self, x):
        return self.program(self, x)


def _used_twice(net, x):
    y = net.conv(x)
    return net.fine(net.other(net.fine[0](net.norm(y) + y)))


def _shared(net, x):
    return net.fine(net.norm(net.conv(x)) + net.other(net.conv(x)))


def _between(net, x):
    return net.fine(net.norm(net.conv(x).relu_())), net.other(net.conv(x))


def _called_again(net, x):
    return net.fine(net.norm(net.conv(x)) + net.conv(x))


def _returned(net, x):
    y = net.conv(x)
    return net.fine(net.norm(y)), y


def _first(net, x):
    return net.conv(net.norm(x)) + net.fine(x)


def _left_out(net, x):
    return net.fine(net.conv(x))


def _two_sources(net, x):
    return net.norm(net.conv(x)) + net.norm(net.fine[0](x))


def _plain(net, x):
    return net.fine(net.norm(net.conv(x)))


def _weight_elsewhere(net, x):
    other = F.conv2d(x.flip(0), net.conv.weight, padding=1)
    return net.fine(net.norm(net.conv(x)) + other)


def _scale_elsewhere(net, x):
    return net.fine(net.norm(net.conv(x)) * net.norm.weight.view(1, -1, 1, 1))


def _not_called_as_a_module(net, x):
    return net.fine(net.norm(net.conv(x)) + net.conv.forward(x.flip(0)))


def _norm_not_called_as_a_module(net, x):
    return net.fine(net.norm(net.conv(x)) + net.norm.forward(x))


@torch.jit.script
def _scripted_sum(a, b):
    return a + b


def _scripted(net, x):
    y = net.conv(x)
    return net.fine(_scripted_sum(net.norm(y), y))


def _leaves_torch(net, x):
    y = net.conv(x)
    return net.fine(net.norm(y) + torch.tensor(y.tolist()))


_USED = "'norm' follows 'conv', whose output or weight is also used"


@pytest.mark.parametrize('forward, conv, norm, message', [
    (_weight_elsewhere, None, None, r'used by conv2d \(its weight\)'),
    (_scale_elsewhere, None, None, r'used by view \(its weight\)'),
    (_not_called_as_a_module, None, None, r'used by conv2d \(its weight\)'),
    (_norm_not_called_as_a_module, None, None, r'\(its weight\)'),
    (_scripted, None, None, 'the folded model has another output'),
    (_leaves_torch, None, None, 'also used by tolist'),
    (_used_twice, None, None, _USED),
    (_shared, None, None, f'{_USED} by other'),
    (_between, None, None, f'{_USED} by '),
    (_called_again, None, None, _USED),
    (_returned, None, None, 'also used by the caller'),
    (_first, None, None, "'norm' follows no convolution"),
    (_left_out, None, None, "'norm' was not reached"),
    (_two_sources, None, None, "'norm' follows more than one operation"),
    (_plain, ConvWS2d(4, 4, 3, padding=1), None, 'a ConvWS2d. It does m'),
    (_plain, ModulatedDeformConv2dPack(4, 4, 3, padding=1), None,
     'a ModulatedDeformConv2dPack. It does more'),
    (_plain,
     nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
     None, 'It does more than a convolution'),
    (_plain, None, BGN(4, num_groups=2),
     "BGN 'norm' has the example weight 1: it normalises each"),
    (_plain, None, CBN(4, track_running_stats=False), 'no moving averages'),
], ids=lambda v: getattr(v, '__name__', type(v).__name__))
def test_what_is_not_certain_is_refused(forward, conv, norm, message):
    net = _Net(forward, copy.deepcopy(conv), copy.deepcopy(norm))
    if forward not in (_used_twice, _shared, _between):
        net.other = nn.Identity()
    if net.norm.running_var is not None:
        nn.init.uniform_(net.norm.running_var, 3, 4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kinds = [type(m) for m in net.modules()]
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(SetupError, match=message):
        fuse_norm(net, x)
    assert [type(m) for m in net.modules()] == kinds
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    # The rest folds, if that is what is wanted.
    if forward in (_plain, _first, _returned, _called_again):
        wanted = net.eval()(x)
        with pytest.warns(UserWarning, match=message):
            fuse_norm(net, x, strict=False)
        assert type(net.fine[1]) is nn.Identity
        assert type(net.norm) is not nn.Identity
        _assert_equal(net(x), wanted, torch.float32)


def test_what_the_forward_pass_keeps_elsewhere_is_seen():

    class Kept(nn.Module):

        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
            nn.init.uniform_(self.parts[1].weight, 2, 3)
            self.norm = self.parts[1].__call__

        def forward(self, x):
            return self.norm(self.parts[0](x))

    model = Kept()
    norm = model.parts[1]
    with pytest.raises(SetupError, match='model has another output'):
        fuse_norm(model)
    assert model.parts[1] is norm and model.training


@pytest.mark.parametrize('part', [0, 1])
@pytest.mark.parametrize('register', [
    'register_forward_hook', 'register_forward_pre_hook'])
def test_hooks_are_not_lost(part, register):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
    getattr(model[part], register)(lambda *args: None)
    with pytest.raises(SetupError, match=f"and '{part}' has a hook"):
        fuse_norm(model)


def test_calls_by_keyword_and_with_more_arguments():

    class Net(nn.Module):

        def __init__(self, conv, *args, **kwargs):
            super().__init__()
            self.conv, self.norm = conv, CBN(4)
            self.args, self.kwargs = args, kwargs

        def forward(self, x):
            y = self.conv(x, *self.args, **self.kwargs)
            return self.norm(input=y)

    up = nn.ConvTranspose2d(3, 4, 3, stride=2)
    with pytest.raises(SetupError, match='a call with further arguments'):
        fuse_norm(Net(up, output_size=(258, 258)))
    assert type(fuse_norm(Net(nn.Conv2d(3, 4, 3))).norm) is nn.Identity
    assert type(fuse_norm(Net(up)).norm) is nn.Identity


def test_work_in_place_behind_the_pair_is_harmless():
    model = _Net(_in_place)
    model.other = model.fine = nn.Identity()
    x = torch.randn(1, 4, 8, 8)
    wanted = model.eval()(x.clone())
    given = x.clone()
    fuse_norm(model, given)
    assert torch.equal(given, x)
    _assert_equal(model(x.clone()), wanted, torch.float32)


def _in_place(net, x):
    y = net.conv(x)
    x.relu_()  # its own input
    return net.norm(y).relu_() + x


def test_no_regions_are_no_proof():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), CBN(4))
    with pytest.raises(SetupError, match='received only empty inputs'):
        fuse_norm(model, torch.randn(0, 3, 7, 7))


def test_examples_that_weigh_do_not_fold_until_set_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    set_example_weight(model, 0.1)
    with pytest.raises(SetupError, match="'1' has the example weight 0.1"):
        fuse_norm(model)
    set_example_weight(model, None)
    assert type(fuse_norm(model)[1]) is nn.Identity


def test_a_head_with_norms_of_its_own_for_each_level_shares_convolutions():
    model = build(
        retinanet(NORMS['CBN'], head='RetinaSepBNHead', num_ins=5))
    with pytest.raises(SetupError, match="s.0.0.conv', whose output or"):
        fuse_norm(model)


@pytest.mark.parametrize('order, folds', [
    (('conv', 'norm', 'act'), True), (('norm', 'conv', 'act'), False),
    (('conv', 'act', 'norm'), False)])
def test_the_order_is_that_of_the_forward_pass(order, folds):
    model = ConvModule(4, 4, 3, norm_cfg=dict(type='CBN'), order=order)
    if folds:
        fuse_norm(model)
        _assert_folded(model)
    else:
        with pytest.raises(SetupError, match="CBN 'bn' follows"):
            fuse_norm(model)


def test_inputs_that_do_not_fit_are_told():
    with pytest.raises(SetupError, match='cannot run on the inputs given'):
        fuse_norm(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 5, 8, 8))
    with pytest.raises(SetupError, match='Give it inputs that it accepts'):
        fuse_norm(nn.Sequential(nn.Flatten(), nn.Linear(8, 8)))


def test_folding_leaves_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
    state = torch.get_rng_state()
    fuse_norm(model)
    # Making the convolutions draws none that a caller would miss.
    assert torch.equal(torch.get_rng_state(), state)
