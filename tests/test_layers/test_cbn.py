import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn import CBN, NaiveCBN, suggested_window_size
from mmdet_smallbn.layers import remember_calls
from tests.device import device_type
from tests.reference import (LiteralCBN, ReparametrisedConv2d, centred,
                             relative_error, standardised)

CONVS = {
    '1x1': dict(kernel_size=1),
    '3x3': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, stride=2, padding=1),
    'dilated': dict(kernel_size=3, dilation=2, padding=2),
    'grouped': dict(kernel_size=3, padding=1, groups=2),
    'depthwise': dict(kernel_size=3, padding=1, groups=4, out_channels=4),
    'multiplier': dict(kernel_size=3, padding=1, groups=4),
    'asymmetric': dict(
        kernel_size=(1, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)),
    'biased': dict(kernel_size=3, padding=1, bias=True),
    'reflect': dict(kernel_size=3, padding=1, padding_mode='reflect'),
    'centred': dict(kernel_size=3, padding=1, effective=centred),
    'standardised': dict(kernel_size=3, padding=1, effective=standardised),
    'transposed': dict(
        cls=nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1, bias=True),
    'transposed, out of reach': dict(
        cls=nn.ConvTranspose2d,
        kernel_size=3,
        dilation=2,
        output_padding=1),
    'transposed by groups': dict(
        cls=nn.ConvTranspose2d,
        kernel_size=(3, 2),
        stride=(2, 1),
        output_padding=(1, 0),
        groups=2),
    'deformable': dict(cls='DeformConv2dPack', kernel_size=3, padding=1),
    'deformable by groups': dict(
        cls='DeformConv2dPack',
        kernel_size=3,
        stride=2,
        groups=2,
        deform_groups=2),
    'modulated': dict(
        cls='ModulatedDeformConv2dPack', kernel_size=3, padding=1, bias=True),
    'modulated by groups': dict(
        cls='ModulatedDeformConv2dPack', kernel_size=3, groups=4, dilation=2),
}


def _conv(kernel_size,
          out_channels=8,
          bias=False,
          effective=None,
          cls=nn.Conv2d,
          **kwargs):
    if effective is not None:
        cls = ReparametrisedConv2d
        kwargs['effective'] = effective
    if isinstance(cls, str):
        cls = getattr(pytest.importorskip('mmcv.ops'), cls)
    conv = cls(4, out_channels, kernel_size, bias=bias, **kwargs).double()
    if hasattr(conv, 'conv_offset'):  # it begins on the grid
        nn.init.normal_(conv.conv_offset.weight, std=0.1)
        conv.conv_offset.requires_grad_(False)
    return conv


def _literal(conv, layer):
    """The reference in terms of the weight as used, and of the bias."""

    def forward(parameters, x):
        weight, bias = (*parameters, None)[:2]
        if isinstance(conv, ReparametrisedConv2d):
            # nn.Conv2d's own: the effective weight goes in as it is.
            return nn.Conv2d._conv_forward(conv, x, weight, bias)
        given = dict(weight=weight)
        if bias is not None:
            given['bias'] = bias
        return torch.func.functional_call(conv, given, x)

    return LiteralCBN(forward, layer.window_size, layer.compensate,
                      layer.gradient, layer.eps)


def _effective(conv):
    weight = conv.weight
    if isinstance(conv, ReparametrisedConv2d):
        weight = conv.effective(weight)
    bias = getattr(conv, 'bias', None)
    return [weight] if bias is None else [weight, bias]


def _layer(conv, **kwargs):
    """All positions are remembered, so that Eq. (7), (8) are not estimated."""
    layer = CBN(
        conv.out_channels, derivative_positions=None, **kwargs).double()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize('settings', [
    dict(gradient='whole'),
    dict(gradient='released'),
    dict(compensate=False)
], ids=['whole', 'released', 'naive'])
@pytest.mark.parametrize('window_size', [1, 4, 8])
@pytest.mark.parametrize('name', CONVS)
def test_equals_the_literal_equations(name, window_size, settings):
    """Outputs and all gradients over 12 updates with changing batches."""
    torch.manual_seed(0)
    conv = _conv(**CONVS[name])
    layer = _layer(conv, window_size=window_size, **settings)
    reference = _literal(conv, layer)
    leaves = [p for p in conv.parameters() if p.requires_grad]
    leaves += layer.parameters()
    optimizer = torch.optim.SGD(leaves, lr=0.05, momentum=0.9)
    for step in range(12):
        size = (1 + step % 3, 4, 7 + step % 2, 9)
        x = (torch.randn(size).double() * 2 + 1).requires_grad_()
        expected = reference(_effective(conv), x, layer.weight, layer.bias)
        out = layer(conv(x))
        grad = torch.randn_like(out)
        assert relative_error(out, expected) < 1e-9
        wanted = torch.autograd.grad(expected, [x, *leaves], grad)
        found = torch.autograd.grad(out, [x, *leaves], grad)
        scale = max(g.abs().max() for g in wanted)
        for a, b in zip(found, wanted):
            # Window 1: a bias before BatchNorm has a gradient of zero.
            assert (a - b).abs().max() < 1e-9 * max(b.abs().max(),
                                                    1e-3 * scale)
        for leaf, g in zip(leaves, found[1:]):
            leaf.grad = g
        optimizer.step()


def test_whole_gradient_is_that_of_finite_differences():
    """By weight and bias, a past with steps behind it, first order alone."""
    torch.manual_seed(0)
    conv = _conv(**CONVS['biased'])
    layer = _layer(conv, window_size=4)
    for _ in range(5):
        layer(conv(torch.randn(2, 4, 6, 6).double()))
        with torch.no_grad():
            for p in conv.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    x = torch.randn(2, 4, 6, 6).double()
    factors = torch.randn(2, 8, 6, 6).double()

    def loss(*parameters):
        """Of the next iteration, by a copy: the window goes on in it."""
        convolution, norm = copy.deepcopy(conv), copy.deepcopy(layer)
        for p, value in zip(convolution.parameters(), parameters):
            p.data.copy_(value)
        value = (norm(convolution(x)) * factors).sum()
        return value, torch.autograd.grad(value, [*convolution.parameters()])

    start = [p.detach() for p in conv.parameters()]
    _, gradients = loss(*start)
    for index in range(len(start)):
        step = [torch.zeros_like(p) for p in start]
        step[index].normal_(std=1e-6)
        up, down = (
            loss(*(p + sign * s for p, s in zip(start, step)))[0]
            for sign in (1, -1))
        wanted = (gradients[index] * step[index]).sum()
        torch.testing.assert_close((up - down) / 2, wanted, rtol=1e-5, atol=0)


def test_whole_gradient_of_weights_at_rest_is_orthogonal_to_them():
    """The scale of a filter before a norm does not matter."""
    torch.manual_seed(0)
    cosines = {}
    for gradient in ('whole', 'released'):
        conv = _conv(**CONVS['3x3'])
        layer = _layer(conv, window_size=4, gradient=gradient)
        layer.eps = 0.
        for _ in range(6):
            out = layer(conv(torch.randn(2, 4, 6, 6).double() + 1))
        (out * torch.randn_like(out)).sum().backward()
        cosines[gradient] = F.cosine_similarity(
            conv.weight.flatten(1), conv.weight.grad.flatten(1)).abs().max()
    assert cosines['whole'] < 1e-9 < 1e-3 < cosines['released']


def test_gradients_over_a_window_at_rest_are_batch_norms():
    """Summed over the iterations, of this convolution's own weight."""
    torch.manual_seed(0)
    conv = _conv(**CONVS['biased'])
    layer = _layer(conv, window_size=4)
    stock = nn.BatchNorm2d(8).double()
    stock.load_state_dict(layer.state_dict())
    batches = [torch.randn(2, 4, 6, 6).double() * i for i in range(1, 5)]
    factors = torch.randn(4, 2, 8, 6, 6).double()
    for x in batches:  # fills the window
        layer(conv(x))
    for x, factor in zip(batches, factors):
        (layer(conv(x)) * factor).sum().backward()
    found = [p.grad for p in conv.parameters()]
    out = stock(conv(torch.cat(batches)))
    wanted = torch.autograd.grad((out * factors.flatten(0, 1)).sum(),
                                 list(conv.parameters()))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('steps', [1, 6])
def test_forwards_before_their_backwards_keep_what_they_need(steps):
    """Without a hook each is an iteration, and overwrites the oldest."""
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    layers = [_layer(conv, window_size=3)]
    layers.append(copy.deepcopy(layers[0]))
    batches = torch.randn(4 + steps, 2, 4, 6, 6).double()
    results = []
    for layer, together in zip(layers, (True, False)):
        torch.manual_seed(1)
        for x in batches[:4]:
            layer(conv(x)).square().sum().backward()
        conv.zero_grad()
        outs = []
        for x in batches[4:]:
            outs.append((layer(conv(x)) * torch.randn(8, 6, 6)).sum())
            if not together:
                outs.pop().backward()
        if outs:
            sum(outs).backward()
        results.append(conv.weight.grad.clone())
    torch.testing.assert_close(*results)


def test_a_bias_alone_may_train():
    torch.manual_seed(0)
    conv = _conv(**CONVS['biased'])
    conv.weight.requires_grad_(False)
    layer = _layer(conv, window_size=2)
    for _ in range(2):
        out = layer(conv(torch.randn(2, 4, 5, 5).double()))
    out.square().sum().backward()
    assert conv.weight.grad is None and conv.bias.grad.isfinite().all()


def test_a_bad_gradient_is_named():
    with pytest.raises(ValueError, match="'whole' or 'released'.*'full'"):
        CBN(4, gradient='full')


def test_clamping_is_reached_and_right():
    """Steps so large that Eq. (8) leaves nu < mu^2, which Eq. (10) mends."""
    torch.manual_seed(0)
    conv = _conv(**CONVS['biased'])
    layer = _layer(conv, window_size=4)
    reference = _literal(conv, layer)
    for _ in range(12):
        x = torch.randn(2, 4, 6, 6).double() + 3
        expected = reference(_effective(conv), x, layer.weight, layer.bias)
        assert relative_error(layer(conv(x)), expected) < 1e-9
        with torch.no_grad():
            for p in conv.parameters():
                p.add_(torch.randn_like(p) * 0.5)
    assert reference.clamped > 20


@pytest.mark.parametrize('settings', [
    dict(), dict(momentum=None), dict(affine=False),
    dict(track_running_stats=False), dict(eps=1e-2, momentum=0.3)
])
def test_window_1_is_batch_norm(settings):
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    ours = CBN(8, window_size=1, **settings).double()
    theirs = nn.BatchNorm2d(8, **settings).double()
    for step in range(10):
        x = torch.randn(1 + step % 3, 4, 5, 5).double()
        for mode in (True, False):
            ours.train(mode)
            theirs.train(mode)
            a, b = (norm(conv(x)) for norm in (ours, theirs))
            grad = torch.randn_like(a)
            leaves = ([*conv.parameters(), *ours.parameters()],
                      [*conv.parameters(), *theirs.parameters()])
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            for g, h in zip(
                    torch.autograd.grad(a, leaves[0], grad),
                    torch.autograd.grad(b, leaves[1], grad)):
                torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)
            for key, value in theirs.state_dict().items():
                torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize('cls', [CBN, NaiveCBN])
def test_frozen_weights_make_k_batches_one(cls):
    """CBN over k batches equals BatchNorm over their concatenation."""
    torch.manual_seed(0)
    conv = _conv(**CONVS['biased'])
    layer = cls(8, window_size=4).double()
    batches = [torch.randn(2, 4, 6, 6).double() * i for i in range(1, 7)]
    for end, x in enumerate(batches, 1):
        out = layer(conv(x))
        joined = torch.cat(batches[max(0, end - 4):end])
        expected = F.batch_norm(
            conv(joined), None, None, training=True, eps=layer.eps)[-2:]
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_running_statistics_follow_the_present_batch():
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    ours = CBN(8, window_size=4).double()
    theirs = nn.BatchNorm2d(8).double()
    for _ in range(6):
        y = conv(torch.randn(2, 4, 5, 5).double())
        ours(y)
        theirs(y)
        with torch.no_grad():
            conv.weight.add_(torch.randn_like(conv.weight) * 0.1)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def _errors(step):
    """Mean errors of CBN and NaiveCBN, against the past batches sent through
    today's weight, in float32."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    layers = [
        CBN(16, window_size=4, derivative_positions=None),
        NaiveCBN(16, window_size=4)
    ]
    batches, errors = [], torch.zeros(2)
    for _ in range(12):
        batches = [*batches, torch.randn(2, 16, 8, 8) + 1][-4:]
        y = conv(batches[-1])
        wanted = F.batch_norm(
            conv(torch.cat(batches)), None, None, training=True)[-2:]
        errors += torch.stack([(layer(y) - wanted).abs().mean()
                               for layer in layers]).detach()
        with torch.no_grad():
            conv.weight.add_(torch.randn_like(conv.weight) * step)
    return errors


def test_compensation_leaves_an_error_of_second_order():
    """Half the weight step: half the naive error, a quarter of CBN's."""
    coarse, fine = _errors(2e-3), _errors(1e-3)
    assert coarse[0] < 0.1 * coarse[1]
    assert 0.2 < fine[0] / coarse[0] < 0.3
    assert 0.45 < fine[1] / coarse[1] < 0.55


def test_autocast_is_close_to_float32():
    """Outputs, and gradients by the weights."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2)]
    convs[1].load_state_dict(convs[0].state_dict())
    layers = [CBN(8, window_size=4) for _ in range(2)]
    for _ in range(6):
        x = torch.randn(2, 8, 8, 8) + 1
        plain = layers[0](convs[0](x))
        with torch.autocast(device_type(), torch.bfloat16):
            half = layers[1](convs[1](x))
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), plain, rtol=0.05, atol=0.05)
        grad = torch.randn_like(plain)
        a, b = (
            torch.autograd.grad(out, conv.weight, grad.to(out.dtype))[0]
            for out, conv in zip((plain, half), convs))
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99
        step = torch.randn_like(convs[0].weight) * 0.02
        with torch.no_grad():
            for conv in convs:
                conv.weight.add_(step)


def _step(conv, layer, n=2):
    layer(conv(torch.randn(n, 4, 6, 6).double())).sum().backward()
    with torch.no_grad():
        conv.weight.add_(torch.randn_like(conv.weight) * 0.05)


def test_a_nan_batch_shows_and_does_not_outlive_its_iteration():
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    layer = CBN(8, window_size=3).double()
    clean = copy.deepcopy(layer)
    batches = [torch.randn(2, 4, 6, 6).double() for _ in range(4)]
    bad = batches[0].clone()
    bad[0, 0, 0, 0] = math.nan
    for x in batches[:2]:
        layer(conv(x))
        clean(conv(x))
    assert layer(conv(bad)).isnan().any()
    for value in layer.state_dict().values():
        assert value.isfinite().all()
    # The bad entry takes a place in the window, but not part in it.
    out = layer(conv(batches[2]))
    joined = conv(torch.cat(batches[1:3]))
    expected = F.batch_norm(joined, None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected)


def test_one_overflowing_channel_leaves_the_others_alone():
    conv = _conv(**CONVS['1x1'])
    layers = [CBN(8, window_size=3).double() for _ in range(2)]
    y = conv(torch.randn(2, 4, 5, 5).double())
    for layer in layers:
        layer(y)
    with torch.no_grad():
        broken = conv.weight.clone()
        broken[3] = math.inf
        good, conv.weight.data = conv.weight.data, broken
    layers[0](conv(torch.randn(2, 4, 5, 5).double()))
    with torch.no_grad():
        conv.weight.data = good
    x = torch.randn(2, 4, 5, 5).double()
    out = layers[0](conv(x))
    assert out.isfinite().all()
    # Channel 3 saw two batches, the others three.
    expected = layers[1](conv(x))
    torch.testing.assert_close(out[:, 3], expected[:, 3])
    assert not torch.allclose(out[:, 2], expected[:, 2])


def test_unknown_producer_is_batch_norm_and_said_once():
    layer = CBN(4, window_size=4)
    layer.layer_name = 'neck.norm'
    conv = nn.Conv2d(4, 4, 1)
    with pytest.warns(UserWarning, match=r"CBN 'neck.norm'.*NaiveCBN"):
        layer(F.relu(conv(torch.randn(2, 4, 3, 3))))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(3):
            y = F.relu(conv(torch.randn(2, 4, 3, 3)))
            torch.testing.assert_close(
                layer(y), F.batch_norm(y, None, None, training=True))


def test_naive_cbn_needs_no_producer():
    layer = NaiveCBN(4, window_size=2)
    batches = [torch.rand(2, 4, 3, 3) for _ in range(2)]
    for x in batches:
        out = layer(x.requires_grad_().relu())
    expected = F.batch_norm(
        torch.cat(batches), None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected)


def test_no_grad_passes_do_not_enter_the_window():
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    layer = CBN(8, window_size=4).double()
    _step(conv, layer)
    untouched = copy.deepcopy(layer)
    with torch.no_grad():
        y = conv(torch.randn(3, 4, 6, 6).double())
        torch.testing.assert_close(
            layer(y), F.batch_norm(y, None, None, training=True))
    layer.eval()
    layer(conv(torch.randn(3, 4, 6, 6).double()))
    layer.train()
    x = torch.randn(2, 4, 6, 6).double()
    torch.testing.assert_close(layer(conv(x)), untouched(conv(x)))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointing_is_told_once(use_reentrant):
    conv, layer = nn.Conv2d(4, 8, 1), CBN(8, window_size=2)

    def step():
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        checkpoint(lambda x: layer(conv(x)), x,
                   use_reentrant=use_reentrant).sum().backward()

    with pytest.warns(
            UserWarning,
            match=r'CBN\(8\) runs inside activation.*SmallBatchNormHook'):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        step()


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointing_frees_the_convolutions_inputs(use_reentrant):
    """Although its filters are kept for the recomputation."""
    model = nn.Sequential(nn.Conv2d(4, 8, 1), CBN(8, window_size=2))
    remember_calls(model)
    storages = []

    def block(x):
        x = x * 2
        storages.append(StorageWeakRef(x.untyped_storage()))
        return model(x)

    for _ in range(3):
        x = torch.randn(2, 4, 64, 64, requires_grad=True)
        out = checkpoint(block, x, use_reentrant=use_reentrant)
        assert storages[-1].expired()
        out.sum().backward()


@pytest.mark.filterwarnings('ignore:.*called several times')
def test_an_empty_call_keeps_its_place_in_the_iteration():
    conv, layer = nn.Conv2d(4, 8, 1), CBN(8, window_size=4)
    for iteration, sizes in enumerate([(2, 2), (0, 2), (2, 2)]):
        layer.iteration = iteration
        for n in sizes:
            layer(conv(torch.randn(n, 4, 3, 3)))
    assert layer.held_iterations == [2, 3]


def test_a_new_window_size_takes_effect():
    conv, layer = nn.Conv2d(4, 8, 1), CBN(8, window_size=2)
    for _ in range(3):
        layer(conv(torch.randn(2, 4, 3, 3)))
    layer.window_size = 5
    for _ in range(6):
        layer(conv(torch.randn(2, 4, 3, 3)))
    assert layer.held_iterations == [5]


def test_a_moving_bias_over_frozen_weights_is_followed():
    torch.manual_seed(0)
    conv = _conv(**CONVS['biased'])
    conv.weight.requires_grad_(False)
    layer = _layer(conv, window_size=3)
    reference = _literal(conv, layer)
    for _ in range(5):
        x = torch.randn(2, 4, 5, 5).double()
        expected = reference(_effective(conv), x, layer.weight, layer.bias)
        assert relative_error(layer(conv(x)), expected) < 1e-9
        with torch.no_grad():
            conv.bias.add_(torch.randn_like(conv.bias))


def test_calls_of_one_iteration_have_windows_of_their_own():
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    shared = CBN(8, window_size=4).double()
    apart = [CBN(8, window_size=4).double() for _ in range(2)]
    with pytest.warns(UserWarning, match='RetinaSepBNHead') as told:
        for iteration in range(4):
            shared.iteration = iteration
            for level, own in enumerate(apart):
                x = torch.randn(2, 4, 8 >> level, 8 >> level).double() + level
                torch.testing.assert_close(shared(conv(x)), own(conv(x)))
            with torch.no_grad():
                conv.weight.add_(torch.randn_like(conv.weight) * 0.05)
    assert len(told) == 1


def test_an_iteration_that_never_ends_is_refused():
    conv, layer = nn.Conv2d(4, 8, 1), CBN(8, window_size=2)
    layer.iteration = 7
    with pytest.warns(UserWarning), pytest.raises(
            RuntimeError, match=r'64 times in iteration 7.*iteration = None'):
        for _ in range(65):
            layer(conv(torch.randn(2, 4, 3, 3)))


def test_burn_in_is_batch_norm_and_the_window_fills_after_it():
    torch.manual_seed(0)
    conv = _conv(**CONVS['3x3'])
    layer = CBN(8, window_size=2).double()
    layer.burning_in = True
    for _ in range(3):
        y = conv(torch.randn(2, 4, 5, 5).double())
        torch.testing.assert_close(
            layer(y), F.batch_norm(y, None, None, training=True))
    layer.burning_in = False
    layer(conv(torch.randn(2, 4, 5, 5).double()))
    y = conv(torch.randn(2, 4, 5, 5).double())
    assert not torch.allclose(
        layer(y), F.batch_norm(y, None, None, training=True))


def test_loading_weights_empties_the_window():
    conv = _conv(**CONVS['3x3'])
    layer = CBN(8, window_size=4).double()
    _step(conv, layer)
    layer.load_state_dict(nn.BatchNorm2d(8).double().state_dict())
    y = conv(torch.randn(2, 4, 5, 5).double())
    torch.testing.assert_close(
        layer(y), F.batch_norm(y, None, None, training=True))


def test_one_value_is_refused_as_in_torch_unless_the_window_has_more():
    conv = nn.Conv2d(4, 4, 1)
    layer = CBN(4, window_size=2)
    with pytest.raises(ValueError, match='one value per channel'):
        layer(conv(torch.randn(1, 4, 1, 1)))
    assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()
    layer(conv(torch.randn(2, 4, 3, 3)))
    assert layer(conv(torch.randn(1, 4, 1, 1))).isfinite().all()
    assert layer.running_var.isfinite().all()


def test_frozen_convolution_is_used_as_it_is():
    torch.manual_seed(0)
    stem, conv = nn.Conv2d(4, 4, 1).double(), _conv(**CONVS['3x3'])
    conv.requires_grad_(False)
    layer = CBN(8, window_size=2).double()
    batches = [torch.randn(2, 4, 5, 5).double() for _ in range(2)]
    for x in batches:
        out = layer(conv(stem(x)))
    expected = F.batch_norm(
        conv(stem(torch.cat(batches))), None, None, training=True)[-2:]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('value', [0, -1, 2.5, '4', True])
def test_bad_window_size_is_named(value):
    with pytest.raises(ValueError, match='window_size.*at least 1.*'):
        CBN(4, window_size=value)


def test_suggested_window_size():
    # min(ceil(16 / images), 8), CBN Sec. 4.3.
    assert [suggested_window_size(n) for n in (1, 2, 3, 4, 8, 16, 32)
            ] == [8, 8, 6, 4, 2, 1, 1]


@pytest.mark.parametrize('scale', [1e21, 3e37, 1e38])
@pytest.mark.parametrize('compensate', [False, True])
def test_an_overflowing_batch_is_what_batch_norm_makes_of_it(
        compensate, scale):
    """Of finite mean and infinite variance, or of neither."""
    conv, layer = nn.Conv2d(3, 4, 3), CBN(4, compensate=compensate)
    stock = nn.BatchNorm2d(4)
    for factor in (1., 1., 1., scale):
        x = conv(torch.randn(2, 3, 8, 8) * factor)
        out = layer(x)
    with torch.backends.cudnn.flags(enabled=False):  # whose moments overflow
        expected = stock(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    out = layer(conv(torch.randn(2, 3, 8, 8)))
    assert out.isfinite().all()
    out.square().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_running_statistics_take_small_values_exactly():
    layer, stock = CBN(4, momentum=1.), nn.BatchNorm2d(4, momentum=1.)
    x = torch.randn(4, 4, 9, 9) * 3e-5
    layer(x), stock(x)
    torch.testing.assert_close(
        layer.running_var, stock.running_var, rtol=1e-5, atol=0)
