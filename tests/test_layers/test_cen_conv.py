import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet_smallbn import CenConv2d
from tests.device import device_type

CONVS = {
    'plain': dict(kernel_size=3),
    '1x1': dict(kernel_size=1, bias=False),
    'strided': dict(kernel_size=3, stride=(2, 1), padding=1),
    'dilated': dict(kernel_size=(3, 1), dilation=2, padding='same'),
    'grouped': dict(kernel_size=3, groups=2),
    'depthwise': dict(kernel_size=3, groups=4, padding=1),
    'reflect': dict(kernel_size=3, padding=1, padding_mode='reflect'),
    'circular': dict(kernel_size=5, padding=2, padding_mode='circular'),
}


@pytest.mark.parametrize('name', CONVS)
def test_is_a_convolution_with_centred_filters(name):
    ours = CenConv2d(4, 8, **CONVS[name]).double()
    theirs = nn.Conv2d(4, 8, **CONVS[name]).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 7, 8).double().requires_grad_()
    with torch.no_grad():
        for o in range(8):  # Eq. (18), filter by filter
            theirs.weight[o] -= theirs.weight[o].mean()
    out, expected = ours(x), theirs(x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    dx, dw = torch.autograd.grad(out, [x, ours.weight], grad)
    dx_, dw_ = torch.autograd.grad(expected, [x, theirs.weight], grad)
    torch.testing.assert_close(dx, dx_)
    # The derivative of centring centres the gradient.
    torch.testing.assert_close(dw, dw_ - dw_.mean((1, 2, 3), keepdim=True))


def test_initialisation_and_keys_are_those_of_a_convolution():
    torch.manual_seed(3)
    theirs = nn.Conv2d(4, 8, 3)
    torch.manual_seed(3)
    ours = CenConv2d(4, 8, 3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('name', ['CenConv', 'CenConv2d'])
def test_is_built_from_a_config(name):
    cnn = pytest.importorskip('mmcv.cnn')
    conv = cnn.build_conv_layer(dict(type=name), 4, 8, 3, padding=1)
    assert type(conv) is CenConv2d
    block = cnn.ConvModule(
        4, 8, 3, conv_cfg=dict(type=name), norm_cfg=dict(type='MABN'))
    assert block(torch.randn(2, 4, 5, 5)).shape == (2, 8, 3, 3)
    assert block.conv.bias is None


def test_centring_is_in_float32_under_autocast_and_in_half_precision():
    # Filters whose mean is large against their deviation: bfloat16 would
    # keep few digits of what is left.
    conv = CenConv2d(16, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight.mul_(0.01).add_(1)
    x = torch.randn(1, 16, 6, 6)
    expected = conv(x)
    with torch.autocast(device_type(), torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.01
    weight = conv.weight.detach()
    coarse = weight.bfloat16() - weight.bfloat16().mean(
        (1, 2, 3), keepdim=True)
    coarse = F.conv2d(x.bfloat16(), coarse).float()
    assert (coarse - expected).norm() / expected.norm() > 10 * error
    half = copy.deepcopy(conv).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_the_weight_that_is_given_is_centred():
    """Fused evaluation passes the norm's scale in with the weight."""
    conv = CenConv2d(4, 8, 3)
    x = torch.randn(2, 4, 5, 5)
    scale = torch.rand(8)
    out = conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), None)
    expected = conv._conv_forward(x, conv.weight, None)
    torch.testing.assert_close(out, expected * scale.view(1, -1, 1, 1))


def test_a_filter_of_one_weight_is_refused():
    with pytest.raises(ValueError, match=r'CenConv2d\(4, 4.*one weight'):
        CenConv2d(4, 4, 1, groups=4)
