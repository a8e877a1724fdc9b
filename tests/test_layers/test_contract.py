"""Promises that every registered norm keeps."""
import copy
import inspect
import warnings

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_smallbn.layers import SmallBatchNorm

NORMS = sorted(name for name, cls in MODELS.module_dict.items()
               if inspect.isclass(cls) and issubclass(cls, SmallBatchNorm))


@pytest.fixture(params=NORMS)
def norm(request):
    return build_norm_layer(dict(type=request.param), 6)[1]


def _trained(norm, dtype=torch.float32, steps=3):
    """The norm after a few training steps behind a convolution."""
    conv = nn.Conv2d(3, 6, 3, padding=1).to(dtype)
    norm.to(dtype).train()
    for n in range(1, steps + 1):
        norm(conv(torch.randn(n, 3, 5, 5).to(dtype))).square().sum().backward()
    return conv


def test_the_norms_are_registered():
    assert {'CBN', 'NaiveCBN'} <= set(NORMS)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmcv'])
@pytest.mark.parametrize('name', NORMS)
def test_built_in_every_scope_under_batch_norms_name(name, scope):
    with DefaultScope.overwrite_default_scope(scope):
        key, layer = build_norm_layer(
            dict(type=name, requires_grad=False), 6, postfix=1)
    assert key == 'bn1'  # so that pretrained weights load
    assert isinstance(layer, nn.BatchNorm2d) and is_norm(layer)
    assert _BatchNorm in type(layer).__bases__  # ConstantInit looks there
    assert not any(p.requires_grad for p in layer.parameters())


def test_unknown_keyword_raises(norm):
    with pytest.raises(TypeError, match='windowsize'):
        type(norm)(6, windowsize=3)


def test_state_dict_is_batch_norms_before_and_after_training(norm):
    stock = nn.BatchNorm2d(6)
    for _ in range(2):
        assert list(norm.state_dict()) == list(stock.state_dict())
        assert [n for n, _ in norm.named_buffers()
                ] == [n for n, _ in stock.named_buffers()]
        for a, b in zip(norm.buffers(), stock.buffers()):
            assert a.shape == b.shape and a.dtype == b.dtype
        _trained(norm)


def test_evaluation_is_stock_batch_norm(norm):
    stock = nn.BatchNorm2d(6)
    _trained(stock, steps=5)
    norm.load_state_dict(stock.state_dict())
    norm.eval()
    stock.eval()
    x = torch.randn(2, 6, 4, 4)
    before = copy.deepcopy(norm.state_dict())
    torch.testing.assert_close(norm(x), stock(x), rtol=0, atol=0)
    torch.testing.assert_close(norm(x), norm(x), rtol=0, atol=0)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_an_empty_batch_touches_nothing_and_keeps_the_graph(norm):
    conv = _trained(norm)
    before = copy.deepcopy(norm)
    out = norm(conv(torch.randn(0, 3, 5, 5)))
    assert out.shape == (0, 6, 5, 5)
    for p in (*conv.parameters(), *norm.parameters()):
        p.grad = None
    out.sum().backward()
    for p in (*norm.parameters(), *conv.parameters()):
        assert (p.grad == 0).all()
    for key, value in before.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(norm(conv(x)), before(conv(x)))


def test_channels_last(norm):
    conv = _trained(norm)
    other = copy.deepcopy(norm)
    x = torch.randn(2, 3, 5, 5)
    y = conv(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    out = other(y)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, norm(conv(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_output_keeps_the_dtype(norm, dtype):
    conv = _trained(norm, dtype)
    out = norm(conv(torch.randn(2, 3, 5, 5).to(dtype)))
    assert out.dtype == dtype and out.isfinite().all()


def test_autocast(norm):
    conv = nn.Conv2d(3, 6, 3)
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16):
            out = norm(conv(torch.randn(2, 3, 6, 6)))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert norm.weight.grad.isfinite().all()
    assert norm.running_var.dtype == torch.float32


def test_inplace_relu_after_the_norm(norm):
    conv = nn.Conv2d(3, 6, 3)
    grads = []
    for inplace in (True, False):
        layer = copy.deepcopy(norm)
        torch.manual_seed(0)
        for _ in range(2):
            x = torch.randn(2, 3, 6, 6)
            conv.weight.grad = None
            nn.ReLU(inplace)(layer(conv(x))).square().sum().backward()
        grads.append(conv.weight.grad)
    torch.testing.assert_close(*grads)


def test_frozen_affine_and_input_without_gradient(norm):
    norm.requires_grad_(False)
    conv = nn.Conv2d(3, 6, 3)
    norm(conv(torch.randn(2, 3, 6, 6))).sum().backward()
    assert norm.weight.grad is None and conv.weight.grad is not None
    norm.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        norm(torch.randn(2, 6, 6, 6)).sum().backward()
    assert norm.weight.grad is not None


def test_two_forwards_before_the_backwards(norm):
    conv = nn.Conv2d(3, 6, 3).double()
    norm.double()
    xs = [torch.randn(2, 3, 6, 6).double() for _ in range(2)]
    alone = []
    layer = copy.deepcopy(norm)
    for x in xs:
        alone += torch.autograd.grad(
            layer(conv(x)).square().sum(), layer.weight)
    outs = [norm(conv(x)) for x in xs]
    for out, wanted in reversed(list(zip(outs, alone))):
        found, = torch.autograd.grad(out.square().sum(), norm.weight)
        torch.testing.assert_close(found, wanted)


def test_wrong_inputs_are_named(norm):
    with pytest.raises(ValueError, match='4D'):
        norm(torch.randn(2, 6))
    norm.layer_name = 'neck.bn'
    with pytest.raises(ValueError, match=r"'neck.bn'.*6 channels.*\(2, 5"):
        norm(torch.randn(2, 5, 3, 3))


def test_in_mmcvs_conv_module(norm):
    block = ConvModule(
        3, 6, 3, norm_cfg=dict(type=type(norm).__name__), bias=False)
    block.init_weights()
    for _ in range(3):
        out = block(torch.randn(2, 3, 6, 6))
    assert isinstance(block.bn, type(norm))
    assert block.bn.num_batches_tracked == 3
    assert out.shape == (2, 6, 4, 4) and (out > 0).any()
