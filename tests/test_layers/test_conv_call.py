"""Which operations are taken for a convolution that can be followed."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn.functional import apply_filters
from mmdet_smallbn.layers import CBN, MABN, CenConv2d, NaiveCBN
from mmdet_smallbn.layers.conv_call import (FROZEN, UNKNOWN, find_producer,
                                            remember_calls)
from mmdet_smallbn.layers.forward_pass import ForwardPass, current_pass
from tests.device import device_type


def _mmcv(part):
    return pytest.importorskip(f'mmcv.{part}')


def _find_producer(x):
    return find_producer(x, current_pass())


def _x():
    return torch.randn(2, 4, 6, 6)


def _frozen(conv):
    conv.requires_grad_(False)
    return conv


FOLLOWED = {
    'plain': lambda x: nn.Conv2d(4, 4, 3)(x),
    'biased by groups': lambda x: nn.Conv2d(4, 4, 3, groups=2, bias=True)(x),
    'standardised': lambda x: _mmcv('cnn').ConvWS2d(4, 4, 3)(x),
    'spectral': lambda x: nn.utils.parametrizations.spectral_norm(
        nn.Conv2d(4, 4, 3))(x),
    'reflect': lambda x: nn.Conv2d(
        4, 4, 3, padding=1, padding_mode='reflect')(x),
    'same': lambda x: nn.Conv2d(4, 4, 2, padding='same')(x),
    'transposed by groups': lambda x: nn.ConvTranspose2d(
        4, 6, 3, stride=2, output_padding=1, groups=2)(x),
    'deformable': lambda x: _mmcv('ops').DeformConv2dPack(4, 4, 3)(x),
    'modulated': lambda x: _mmcv('ops').ModulatedDeformConv2dPack(
        4, 4, 3)(x),
}
NOT_FOLLOWED = {
    'sum': lambda x: nn.Conv2d(4, 4, 1)(x) + x,
    'relu': lambda x: nn.Conv2d(4, 4, 1)(x).relu(),
    'concatenation': lambda x: torch.cat([nn.Conv2d(4, 2, 1)(x)] * 2, 1),
    'pooling': lambda x: F.avg_pool2d(nn.Conv2d(4, 4, 1)(x), 2),
    'leaf': lambda x: x.clone().detach().requires_grad_(),
}
NOTHING_MOVES = {
    'input': lambda x: x,
    'frozen': lambda x: _frozen(nn.Conv2d(4, 4, 1))(x),
    'no bias': lambda x: _frozen(nn.Conv2d(4, 4, 1, bias=False))(nn.Conv2d(
        4, 4, 1)(x)),
    'frozen after trainable': lambda x: _frozen(nn.Conv2d(4, 4, 1))(nn.Conv2d(
        4, 4, 1)(x)),
}


def _outputs(call, x):
    """What the filters make of all patches, in the shape of ``x``."""
    patches = call.sample(x, None, 0)
    outputs = apply_filters(call.filters.rows, patches,
                            patches.new_empty(x.size(1), len(patches)))
    n, _, h, w = x.shape
    return outputs.view(-1, n, h, w).transpose(0, 1)


@pytest.mark.parametrize('name', FOLLOWED)
@pytest.mark.filterwarnings('ignore:.*even kernel lengths.*')
def test_convolutions_are_followed(name):
    x = FOLLOWED[name](_x())
    producer = _find_producer(x)
    assert producer.known
    torch.testing.assert_close(
        _outputs(producer.call, x), x, rtol=1e-4, atol=1e-5)
    # Its filters lead to the parameters, and its input to nothing.
    assert producer.call.filters.rows.requires_grad
    assert not producer.call.input.requires_grad


@pytest.mark.parametrize('name', NOT_FOLLOWED)
def test_other_producers_are_unknown(name):
    assert _find_producer(NOT_FOLLOWED[name](_x())) is UNKNOWN


@pytest.mark.parametrize('name', NOTHING_MOVES)
def test_nothing_moves_what_is_frozen(name):
    assert _find_producer(NOTHING_MOVES[name](_x())) is FROZEN


def test_bias_moves_only_if_it_trains():
    conv = nn.Conv2d(4, 4, 1)
    assert _find_producer(conv(_x())).call.filters.bias is conv.bias
    conv.bias.requires_grad_(False)
    assert _find_producer(conv(_x())).call.filters.bias is None


def test_a_bias_that_is_computed_is_unknown():
    conv = nn.Conv2d(4, 4, 1)
    bias = conv.bias.exp()
    assert _find_producer(F.conv2d(_x(), conv.weight, bias)) is UNKNOWN
    assert _find_producer(F.conv2d(_x(), conv.weight, bias.detach())).known


def test_a_bias_alone_may_move():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight.requires_grad_(False)
    call = _find_producer(conv(_x())).call
    assert call.filters.bias is conv.bias and call.input.shape == (2, 4, 6, 6)


def test_autocast_hides_no_parameter():
    conv = nn.Conv2d(4, 4, 1)
    with torch.autocast(device_type(), torch.bfloat16):
        call = _find_producer(conv(_x())).call
    assert call.filters.weight is conv.weight
    assert call.filters.are_parameters


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_the_kind_of_pass(use_reentrant):
    seen = []

    def block(x):
        seen.append(current_pass())
        return x.exp()

    x = _x().requires_grad_()
    out = checkpoint(block, x, use_reentrant=use_reentrant)
    assert seen.pop() is ForwardPass.CHECKPOINTED
    with torch.no_grad():  # validation between forward and backward
        assert current_pass() is ForwardPass.UNTRACKED
        # Nobody will come back for this one, but it is no matter.
        checkpoint(block, x, use_reentrant=False)
    assert seen.pop() is ForwardPass.UNTRACKED
    out.sum().backward()
    assert seen == [ForwardPass.RECOMPUTED]
    assert current_pass() is ForwardPass.PLAIN
    with torch.autograd.graph.save_on_cpu():
        assert current_pass() is ForwardPass.CHECKPOINTED


# Convolutions that are followed where there is no graph to be read.
REMEMBERED = {
    'plain': lambda: nn.Conv2d(4, 4, 3),
    'strided, dilated, grouped': lambda: nn.Conv2d(
        4, 8, 3, stride=2, padding=(2, 1), dilation=2, groups=2),
    'no bias': lambda: nn.Conv2d(4, 4, 1, bias=False),
    'reflecting': lambda: nn.Conv2d(
        4, 4, 3, padding=(2, 1), padding_mode='reflect'),
    'same': lambda: nn.Conv2d(4, 4, 3, padding='same'),
    'same, not symmetric': lambda: nn.Conv2d(4, 4, 4, padding='same'),
    'centred': lambda: CenConv2d(4, 4, 3),
    'transposed': lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2),
    "mmcv's": lambda: _mmcv('cnn').build_conv_layer(
        dict(type='Conv'), 4, 6, 3),
    "mmcv's transposed": lambda: _mmcv('cnn').build_conv_layer(
        dict(type='deconv'), 4, 6, 4, stride=2),
    'frozen weight': lambda: nn.Conv2d(4, 4, 3).requires_grad_(False),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('name', REMEMBERED)
def test_what_the_graph_tells_is_remembered(name, use_reentrant, dtype):
    conv = REMEMBERED[name]()
    x = _x().requires_grad_(name != 'frozen weight')
    told = []

    def block(x):
        x = conv(x)
        told.append(_find_producer(x))
        return x

    with torch.autocast(device_type(), dtype, enabled=dtype is torch.bfloat16):
        block(x)
        checkpoint(block, x, use_reentrant=use_reentrant)
        handles = remember_calls(nn.Sequential(conv, CBN(conv.out_channels)))
        assert len(handles) == 1
        checkpoint(block, x, use_reentrant=use_reentrant)
        for handle in handles:
            handle.remove()
        checkpoint(block, x, use_reentrant=use_reentrant)
    graph, before, remembered, after = told
    if name == 'frozen weight':
        assert graph is remembered is FROZEN
        return
    assert before is after is UNKNOWN and remembered.known
    out = conv(_x()).detach()
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(
        atol=0.05, rtol=0.05)
    found, wanted = (_outputs(told.call, out) for told in (remembered, graph))
    torch.testing.assert_close(found.to(dtype), wanted.to(dtype), **tolerance)
    assert remembered.call.filters.rows.requires_grad
    assert remembered.call.filters.are_parameters


OF_THEIR_OWN = {
    'standardised': lambda: _mmcv('cnn').ConvWS2d(4, 4, 3),
    'weight norm': lambda: nn.utils.parametrizations.weight_norm(
        nn.Conv2d(4, 4, 3, bias=False)),
    'spectral norm': lambda: nn.utils.spectral_norm(
        nn.Conv2d(4, 4, 3, bias=False)),
}


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('name', OF_THEIR_OWN)
def test_another_weight_than_a_parameter_is_not_guessed(name, use_reentrant):
    conv = OF_THEIR_OWN[name]()
    assert remember_calls(nn.Sequential(conv, CBN(4)))
    told = []

    def block(x):
        x = conv(x)
        told.append(_find_producer(x))
        return x

    x = _x().requires_grad_()
    checkpoint(block, x, use_reentrant=use_reentrant)
    assert told == [UNKNOWN]
    block(x)  # where the graph tells
    assert told[1].known and told[1].call is not None


@pytest.mark.parametrize('change', [
    lambda x: x.relu_(), lambda x: x.add_(1), lambda x: x.clone()
])
def test_what_works_on_the_output_ends_what_was_remembered(change):
    conv = nn.Conv2d(4, 4, 3)
    remember_calls(nn.Sequential(conv, CBN(4)))
    told = []

    def block(x):
        x = change(conv(x))
        told.append(_find_producer(x))
        return x

    for use_reentrant in (True, False):
        checkpoint(block, _x().requires_grad_(), use_reentrant=use_reentrant)
    assert told == [UNKNOWN, UNKNOWN]


def test_only_what_cbn_may_follow_is_remembered():
    """A hook on a convolution parts the graphs of torch.compile."""
    block = _mmcv('cnn').ConvModule

    def conv():
        return nn.Conv2d(4, 4, 1)

    lists = nn.Module()
    lists.convs = nn.ModuleList([conv(), conv()])
    lists.bns = nn.ModuleList([CBN(4), CBN(4)])
    for model, count in ((nn.Sequential(conv(), MABN(4)), 0),
                         (nn.Sequential(conv(), NaiveCBN(4)), 0),
                         (nn.Sequential(conv(), CBN(4)), 1),
                         (nn.ModuleList(
                             [block(4, 4, 1, norm_cfg=dict(type='CBN')),
                              block(4, 4, 1, norm_cfg=dict(type='BN')),
                              conv()]), 1), (lists, 2)):
        assert len(remember_calls(model)) == count


@pytest.mark.parametrize('hooked', [False, True])
def test_a_weight_that_is_gone_after_its_forward_is_unknown(hooked):
    """FSDP frees it where a convolution is a unit of its own."""
    conv = nn.Conv2d(4, 4, 3)
    # There it is a part of a larger tensor.
    whole = torch.randn(1000)
    conv.weight.data = whole[10:10 + conv.weight.numel()].view(4, 4, 3, 3)
    if hooked:
        remember_calls(nn.Sequential(conv, CBN(4)))
    x = conv(_x())
    assert _find_producer(x).call is not None
    conv.weight.data.untyped_storage().resize_(0)
    assert _find_producer(x) is UNKNOWN
