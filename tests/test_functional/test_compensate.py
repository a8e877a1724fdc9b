import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2dPack
from torch import nn

from mmdet_smallbn import CBN
from mmdet_smallbn.functional import (ConvCall, batch_moments,
                                      factors_are_smaller, inner_products,
                                      moment_derivatives)
from mmdet_smallbn.layers.moment_window import MomentWindow
from mmdet_smallbn.layers.statistics import Batch


def _call(x, weight, **kwargs):
    settings = dict(
        bias_trains=False,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1)
    settings.update(kwargs)
    return ConvCall(x, weight, **settings)


def _derivatives(y, call, *args, **kwargs):
    return moment_derivatives(y, batch_moments(y), call, *args, **kwargs)


def _at_weight(y, call, weight, other_y=None):
    """Past mean and variance of ``y`` at another weight."""
    window = MomentWindow(2)
    for x, c in ((y, call), (y if other_y is None else other_y,
                             call._replace(weight=weight))):
        moments = batch_moments(x)
        means, variances = window.enter(Batch(x, moments, moments), c)
    return means[0], variances[0]


def test_derivatives_are_those_of_finite_differences():
    x = torch.randn(2, 4, 6, 5).double()
    weight = torch.randn(6, 2, 3, 3).double()
    call = _call(x, weight, groups=2, stride=(2, 1), padding=(1, 0))

    def conv(w):
        return F.conv2d(x, w, None, call.stride, call.padding, 1, 2)

    y = conv(weight)
    moments = batch_moments(y)
    found_mean, found_square = _derivatives(y, call)
    for channel, place in ((0, (0, 1, 2)), (4, (1, 2, 0))):
        step = torch.zeros_like(weight)
        step[(channel, *place)] = 1e-6
        up, down = conv(weight + step), conv(weight - step)
        flat = place[0] * 9 + place[1] * 3 + place[2]
        d_mean = (up - down).mean((0, 2, 3))[channel] / 2e-6
        group = channel // 3
        torch.testing.assert_close(
            found_mean[group, flat], d_mean, rtol=1e-6, atol=1e-8)
        centre = moments.mean[channel]
        d_square = ((up[:, channel] - centre)**2 -
                    (down[:, channel] - centre)**2).mean() / 2e-6
        torch.testing.assert_close(
            found_square[channel, flat], d_square, rtol=1e-6, atol=1e-8)


def test_same_weight_gives_back_the_moments_in_half_precision():
    # However coarse the derivatives, the offsets make up for them.
    x = torch.randn(2, 8, 9, 9).bfloat16()
    weight = torch.randn(8, 8, 3, 3).bfloat16() * 0.2
    y = F.conv2d(x, weight, padding=1)
    moments = batch_moments(y)
    mean, var = _at_weight(y, _call(x, weight), weight)
    torch.testing.assert_close(mean, moments.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, moments.var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.01),
                                              (torch.float16, 0.002)])
def test_half_precision_derivatives_are_close(dtype, tolerance):
    """With a mean ten times the deviation, which rounds coarsely."""
    x = (torch.randn(4, 8, 9, 9) + 3).to(dtype)
    weight = (torch.randn(8, 4, 3, 3) * 0.1 + 0.3).to(dtype)
    y = F.conv2d(x.float(), weight.float(), padding=1, groups=2).to(dtype)

    def derivatives(kind):
        return _derivatives(
            y.to(kind), _call(x.to(kind), weight.to(kind), groups=2))

    for a, b in zip(derivatives(dtype), derivatives(torch.float64)):
        assert (a - b).norm() < tolerance * b.norm()


def test_mean_is_exact_at_any_weight_and_variance_is_clamped():
    x = torch.rand(2, 3, 5, 5).double()
    weight = torch.randn(4, 3, 3, 3).double()
    y = F.conv2d(x, weight, padding=1)
    call, other = _call(x, weight), -weight
    mean, var = _at_weight(y, call, other)
    torch.testing.assert_close(mean, F.conv2d(
        x, other, padding=1).mean((0, 2, 3)))
    # First order says: second moment - 2 * step, far below zero.
    moments = batch_moments(y)
    _, step = inner_products(*(v[None] for v in _derivatives(y, call)),
                             (other - weight).flatten(1))
    assert (moments.var + step < 0).all()
    assert (var == 0).all()


def test_autocast_does_not_coarsen_the_products():
    x = torch.randn(2, 8, 6, 6)
    weight = torch.randn(8, 8, 3, 3)
    y = F.conv2d(x, weight, padding=1)
    call = _call(x, weight)
    plain = _at_weight(y, call, weight * 1.001)
    with torch.autocast('cpu', torch.bfloat16):
        cast = _at_weight(y, call, weight * 1.001)
    for a, b in zip(cast, plain):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


GEOMETRIES = {
    '1x1': dict(kernel=(1, 1)),
    '3x3': dict(kernel=(3, 3), padding=(1, 1)),
    'strided': dict(kernel=(3, 3), padding=(1, 1), stride=(2, 2)),
    'dilated by groups': dict(
        kernel=(3, 3), padding=(2, 2), dilation=(2, 2), groups=2),
    'asymmetric': dict(kernel=(1, 5), padding=(0, 3), stride=(2, 1)),
    '1x1, strided': dict(kernel=(1, 1), stride=(2, 2)),
    '1x1, padded': dict(kernel=(1, 1), stride=(2, 2), padding=(16, 20)),
}


def _geometry(name, shape=(2, 4, 33, 40)):
    settings = dict(GEOMETRIES[name])
    kernel = settings.pop('kernel')
    groups = settings.get('groups', 1)
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, *kernel, dtype=torch.float64)
    return _call(
        x, weight, **{
            'padding': (0, 0),
            **settings
        })


def _conv(call, weight):
    return F.conv2d(call.input, weight, None, call.stride, call.padding,
                    call.dilation, call.groups)


@pytest.mark.parametrize('name', GEOMETRIES)
def test_the_sum_of_patches_is_that_of_the_convolution(name):
    call = _geometry(name)
    weight = call.weight.clone().requires_grad_()
    y = _conv(call, weight)
    wanted, = torch.autograd.grad(y.sum(), weight)
    first = wanted.view(call.groups, -1, *wanted.shape[1:])[:, 0]
    found = call.patch_sum(y.shape[2:], torch.float64)
    torch.testing.assert_close(found, first.flatten(1))


def _transposed():
    torch.manual_seed(0)
    return ConvCall(
        torch.randn(3, 4, 9, 7).double(),
        torch.randn(4, 3, 3, 4).double(), False, (2, 1), (1, 0), (1, 2), 2,
        True)


SAMPLED = [*((name, shape) for name in GEOMETRIES
             for shape in ((2, 4, 33, 40), (70, 4, 9, 7))),
           ('transposed', (3, 4, 9, 7))]


@pytest.mark.parametrize('name, shape', SAMPLED, ids=str)
def test_a_sample_is_of_outputs_and_their_patches(name, shape):
    """With the filters each patch gives the output that it came with."""
    call = _transposed() if name == 'transposed' else _geometry(name, shape)
    if name == 'transposed':
        y = F.conv_transpose2d(call.input, call.weight, None, call.stride,
                               call.padding, (1, 0), call.groups,
                               call.dilation)
    else:
        y = _conv(call, call.weight)
    filters = call.filters.unflatten(0, (call.groups, -1))
    values = y.transpose(0, 1).flatten(1).t()
    # Places can be told by their values, unless most are padding.
    many = y[:, 0].numel() > 400 and (y[:, 0] != 0).all()
    seen = []
    for turn in range(9):
        patches = call.sample(y, 40, turn)
        assert len(patches) == 40
        outputs = torch.einsum('pgf,gcf->pgc', patches.flatten(2),
                               filters).flatten(1)
        distance, places = (outputs[:, None] - values).norm(dim=2).min(1)
        assert distance.max() < 1e-9
        torch.testing.assert_close(
            call.sample_mean(y, 40, turn, y.dtype), outputs.mean(0))
        seen.append(places)
        # Spread evenly: over rows, and over examples.
        rows = places // y.size(3) % y.size(2)
        for part in (rows / y.size(2), places / y[:, 0].numel()):
            for third in range(3 if many else 0):
                inside = (part >= third / 3) & (part < (third + 1) / 3)
                assert 5 <= inside.sum() <= 22
    assert (seen[0] == seen[8]).all()  # the turns begin again
    if many and y[:, 0].numel() > 1000:
        assert torch.cat(seen[:8]).unique().numel() > 240


def _filled_window(as_sample, groups, bias=None):
    """Iterations at weights that move, their derivatives in either form."""
    torch.manual_seed(0)
    weight = torch.randn(12, 8 // groups, 3, 3).double()
    window = MomentWindow(3, 16)
    window._as_sample = as_sample
    window._weight_shape = (*weight.shape, True)
    for _ in range(5):
        x = torch.randn(2, 8, 24, 24).double()
        weight = weight + 0.01 * torch.randn_like(weight)
        call = _call(x, weight, groups=groups, bias_trains=bias is not None)
        y = _conv(call, weight)
        if bias is not None:
            bias = bias + 0.1
            y = y + bias
        moments = batch_moments(y)
        means, variances = window.enter(Batch(y, moments, moments), call)
    return window, means, variances


@pytest.mark.parametrize('bias', [None, 3.])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_factors_say_what_their_product_says(groups, bias):
    factors, *moments = _filled_window(True, groups, bias=bias)
    product, *expected = _filled_window(False, groups, bias=bias)
    assert [v.dim() for v in factors._derivatives] == [6, 3]
    assert [v.dim() for v in product._derivatives] == [3, 3]
    for a, b in zip(moments, expected):
        torch.testing.assert_close(a, b)


def test_derivatives_are_held_in_the_smaller_form():

    def smaller(channels, kernel, groups=1):
        weight = torch.randn(channels, channels // groups, kernel, kernel)
        return factors_are_smaller(
            _call(torch.randn(1, channels, 9, 9), weight, groups=groups), 64)

    assert smaller(256, 3) and smaller(256, 1)
    assert not smaller(64, 3) and not smaller(256, 3, groups=256)
    # A window keeps to the form that it has begun with.
    window = MomentWindow(2, 64)
    weight = torch.randn(160, 160, 1, 1)
    for n in (2, 1, 0, 2):
        x = torch.randn(n, 160, 30, 30)
        call = _call(x, weight, padding=(0, 0))
        y = _conv(call, weight)
        moments = batch_moments(y)
        window.enter(Batch(y, moments, moments), call)
    assert window.filled == 2
    assert sum(v[0].numel() for v in window._derivatives) < 160 * 160


def test_a_window_follows_another_convolution():
    """Also one that cannot be sampled, and other positions."""
    layer = CBN(160)
    x = torch.randn(2, 160, 30, 30)
    for conv in (nn.Conv2d(160, 160, 1), nn.Conv2d(160, 160, 3),
                 DeformConv2dPack(160, 160, 1), nn.Conv2d(160, 160, 1)):
        for _ in range(2):
            layer(conv(x))
        window, = layer._states
        assert window.filled == 2
    layer.derivative_positions = 64
    layer(nn.Conv2d(160, 160, 1)(x))
    window, = layer._states
    assert window.filled == 1 and len(window._derivatives[0][0]) == 64


def test_the_estimate_from_a_sample_is_unbiased_and_close():
    """On averages over turns; features after a ReLU have a large mean."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 66, 66).double().relu()
    weight = torch.randn(8, 8, 3, 3).double() * 0.1
    y = F.conv2d(x, weight)
    call = _call(x, weight, padding=(0, 0))
    moments = batch_moments(y)
    # About another centre, too, as where several processes share a batch.
    for centre in (None, moments.mean + 0.5):
        exact = _derivatives(y, call, centre)
        parts = [_derivatives(y, call, centre, 256, turn) for turn in range(8)]
        assert not torch.equal(parts[0][1], exact[1])
        for truth, estimates in zip(exact, zip(*parts)):
            estimates = torch.stack(estimates)
            error = (estimates - truth).norm(dim=(1, 2)) / truth.norm()
            assert (error > 0.01).all() and (error < 0.7).all()
            mean_error = (estimates.mean(0) - truth).norm() / truth.norm()
            assert mean_error < 0.5 * error.mean()
