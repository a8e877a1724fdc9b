"""Which operations are taken for a convolution that can be followed."""
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvWS2d
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn.layers.conv_call import (FROZEN, UNKNOWN, find_producer,
                                            graph_is_recorded, in_backward)


def _x():
    return torch.randn(2, 4, 6, 6)


def _frozen(conv):
    conv.requires_grad_(False)
    return conv


FOLLOWED = {
    'plain': lambda x: nn.Conv2d(4, 4, 3)(x),
    'biased by groups': lambda x: nn.Conv2d(4, 4, 3, groups=2, bias=True)(x),
    'standardised': lambda x: ConvWS2d(4, 4, 3)(x),
    'spectral': lambda x: nn.utils.parametrizations.spectral_norm(
        nn.Conv2d(4, 4, 3))(x),
    'reflect': lambda x: nn.Conv2d(
        4, 4, 3, padding=1, padding_mode='reflect')(x),
    'same': lambda x: nn.Conv2d(4, 4, 2, padding='same')(x),
}
NOT_FOLLOWED = {
    'transposed': lambda x: nn.ConvTranspose2d(4, 4, 3)(x),
    'deformable': lambda x: DeformConv2dPack(4, 4, 3)(x),
    'modulated': lambda x: ModulatedDeformConv2dPack(4, 4, 3)(x),
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


@pytest.mark.parametrize('name', FOLLOWED)
def test_convolutions_are_followed(name):
    x = FOLLOWED[name](_x())
    producer = find_producer(x)
    call = producer.call
    assert producer.known
    again = F.conv2d(call.input, call.weight, None, call.stride, call.padding,
                     call.dilation, call.groups)
    # Up to a bias, which moves every value of a channel alike.
    offset = (x - again).detach()
    torch.testing.assert_close(offset, offset[:1, :, :1, :1].expand_as(offset))
    assert not (call.weight.requires_grad or call.input.requires_grad)


@pytest.mark.parametrize('name', NOT_FOLLOWED)
def test_other_producers_are_unknown(name):
    assert find_producer(NOT_FOLLOWED[name](_x())) is UNKNOWN


@pytest.mark.parametrize('name', NOTHING_MOVES)
def test_nothing_moves_what_is_frozen(name):
    assert find_producer(NOTHING_MOVES[name](_x())) is FROZEN


def test_bias_moves_only_if_it_trains():
    conv = nn.Conv2d(4, 4, 1)
    assert find_producer(conv(_x())).call.bias_trains
    conv.bias.requires_grad_(False)
    assert not find_producer(conv(_x())).call.bias_trains


def test_a_bias_alone_may_move():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight.requires_grad_(False)
    call = find_producer(conv(_x())).call
    assert call.bias_trains and call.input.shape == (2, 4, 6, 6)


def test_autocast_shows_the_weight_that_was_used():
    conv = nn.Conv2d(4, 4, 1)
    with torch.autocast('cpu', torch.bfloat16):
        call = find_producer(conv(_x())).call
    assert call.weight.dtype == call.input.dtype == torch.bfloat16


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointing_is_noticed(use_reentrant):
    seen = []

    def block(x):
        seen.append((graph_is_recorded(), in_backward()))
        return x.exp()

    x = _x().requires_grad_()
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [(False, False), (False, True)]
    assert graph_is_recorded() and not in_backward()
    with torch.no_grad():
        assert not graph_is_recorded()
