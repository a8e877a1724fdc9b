import pytest
import torch
import torch.nn.functional as F

from mmdet_smallbn.functional import (AffineMoments, ConvCall, affine_moments,
                                      batch_moments, moment_derivatives,
                                      moments_at_weight,
                                      variance_about)


def _call(x, weight, **kwargs):
    settings = dict(
        bias_trains=False,
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1)
    settings.update(kwargs)
    return ConvCall(x, weight, **settings)


def _stack(moments):
    return AffineMoments(*(v[None] for v in moments))


def test_derivatives_are_those_of_finite_differences():
    x = torch.randn(2, 4, 6, 5).double()
    weight = torch.randn(6, 2, 3, 3).double()
    call = _call(x, weight, groups=2, stride=(2, 1), padding=(1, 0))

    def conv(w):
        return F.conv2d(x, w, None, call.stride, call.padding, 1, 2)

    y = conv(weight)
    moments = batch_moments(y)
    found = affine_moments(y, moments, call)
    for channel, place in ((0, (0, 1, 2)), (4, (1, 2, 0))):
        step = torch.zeros_like(weight)
        step[(channel, *place)] = 1e-6
        up, down = conv(weight + step), conv(weight - step)
        flat = place[0] * 9 + place[1] * 3 + place[2]
        d_mean = (up - down).mean((0, 2, 3))[channel] / 2e-6
        group = channel // 3
        torch.testing.assert_close(
            found.d_mean[group, flat], d_mean, rtol=1e-6, atol=1e-8)
        centre = moments.mean[channel]
        d_square = ((up[:, channel] - centre)**2 -
                    (down[:, channel] - centre)**2).mean() / 2e-6
        torch.testing.assert_close(
            found.d_square[channel, flat], d_square, rtol=1e-6, atol=1e-8)


def test_same_weight_gives_back_the_moments_in_half_precision():
    # However coarse the derivatives, the offsets make up for them.
    x = torch.randn(2, 8, 9, 9).bfloat16()
    weight = torch.randn(8, 8, 3, 3).bfloat16() * 0.2
    y = F.conv2d(x, weight, padding=1)
    moments = batch_moments(y)
    past = _stack(affine_moments(y, moments, _call(x, weight)))
    mean, square = moments_at_weight(past, weight.flatten(1))
    var = variance_about(past.centre, mean, square)
    torch.testing.assert_close(mean[0], moments.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var[0], moments.var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.01),
                                              (torch.float16, 0.002)])
def test_half_precision_derivatives_are_close(dtype, tolerance):
    """With a mean ten times the deviation, which rounds coarsely."""
    x = (torch.randn(4, 8, 9, 9) + 3).to(dtype)
    weight = (torch.randn(8, 4, 3, 3) * 0.1 + 0.3).to(dtype)
    y = F.conv2d(x.float(), weight.float(), padding=1, groups=2).to(dtype)

    def derivatives(kind):
        return affine_moments(
            y.to(kind), batch_moments(y.to(kind)),
            _call(x.to(kind), weight.to(kind), groups=2))

    found, exact = derivatives(dtype), derivatives(torch.float64)
    for a, b in ((found.d_square, exact.d_square),
                 (found.d_mean, exact.d_mean)):
        assert (a - b).norm() < tolerance * b.norm()


def test_mean_is_exact_at_any_weight_and_variance_is_clamped():
    x = torch.rand(2, 3, 5, 5).double()
    weight = torch.randn(4, 3, 3, 3).double()
    y = F.conv2d(x, weight, padding=1)
    past = _stack(
        affine_moments(y, batch_moments(y), _call(x, weight)))
    other = -weight
    mean, square = moments_at_weight(past, other.flatten(1))
    torch.testing.assert_close(mean[0], F.conv2d(
        x, other, padding=1).mean((0, 2, 3)))
    # First order says: second moment - 2 * step, far below zero.
    assert (square < 0).all()
    assert (variance_about(past.centre, mean, square) == 0).all()


def test_autocast_does_not_coarsen_the_products():
    x = torch.randn(2, 8, 6, 6)
    weight = torch.randn(8, 8, 3, 3)
    y = F.conv2d(x, weight, padding=1)
    moments = batch_moments(y)
    call = _call(x, weight)
    filters = (weight * 1.001).flatten(1)
    plain = moments_at_weight(
        _stack(affine_moments(y, moments, call)), filters)
    with torch.autocast('cpu', torch.bfloat16):
        cast = moments_at_weight(
            _stack(affine_moments(y, moments, call)), filters)
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


@pytest.mark.parametrize('shape', [(2, 4, 33, 40), (70, 4, 9, 7)],
                         ids=['maps', 'regions'])
@pytest.mark.parametrize('name',
                         [n for n in GEOMETRIES if 'padded' not in n])
def test_a_part_is_a_part_of_the_call(name, shape):
    """In all turns together every place whose patch lies inside, once."""
    call = _geometry(name, shape)
    weight = call.weight.clone().requires_grad_()
    y = _conv(call, weight)
    places = torch.arange(y.numel(), dtype=torch.float64).view_as(y)
    seen = torch.zeros_like(y)
    positions = y.numel() // y.size(1) // 6
    for turn in range(6):
        at, part = call.part(places, positions, turn)
        assert positions / 3 < at.numel() / at.size(1) < positions * 3
        chosen = torch.isin(places, at)
        assert chosen.sum() == at.numel()
        seen += chosen
        # Each place with the patch that made it.
        grad = torch.randn_like(at)
        whole = torch.zeros_like(y)
        whole.flatten()[at.flatten().long()] = grad.flatten()
        wanted, = torch.autograd.grad(y, weight, whole, retain_graph=True)
        torch.testing.assert_close(part.products(grad), wanted.flatten(1))
    assert call.part(places, 10**6, 0) is None


@pytest.mark.parametrize('width', [1, 2, 3, 9])
def test_narrow_maps_are_taken_as_they_are_or_rightly(width):
    call = _geometry('3x3', (2, 4, 400, width))
    weight = call.weight.clone().requires_grad_()
    y = _conv(call, weight)
    places = torch.arange(y.numel(), dtype=torch.float64).view_as(y)
    part = call.part(places, 32, 5)
    assert (part is None) == (width < 4)
    if part is not None:
        grad = torch.zeros_like(y)
        grad.flatten()[part[0].flatten().long()] = 1
        wanted, = torch.autograd.grad(y, weight, grad)
        torch.testing.assert_close(part[1].products(torch.ones_like(part[0])),
                                   wanted.flatten(1))


def test_the_estimate_from_a_part_is_unbiased_and_close():
    """On averages over turns; features after a ReLU have a large mean."""
    x = torch.randn(2, 8, 66, 66).double().relu()
    weight = torch.randn(8, 8, 3, 3).double() * 0.1
    y = F.conv2d(x, weight)
    call = _call(x, weight, padding=(0, 0))
    moments = batch_moments(y)
    d_mean, exact = moment_derivatives(y, moments, call, moments.mean)
    parts = []
    for turn in range(8):
        same, estimate = moment_derivatives(y, moments, call, moments.mean,
                                            1024, turn)
        torch.testing.assert_close(same, d_mean)
        parts.append(estimate)
    error = (torch.stack(parts) - exact).norm(dim=(1, 2)) / exact.norm()
    assert (error > 0.01).all() and (error < 0.4).all()
    mean_error = (torch.stack(parts).mean(0) - exact).norm() / exact.norm()
    assert mean_error < 0.7 * error.mean()
    # About another centre, as where several processes share a batch.
    centre = moments.mean + 0.5
    _, exact = moment_derivatives(y, moments, call, centre)
    _, estimate = moment_derivatives(y, moments, call, centre, 1024)
    assert (estimate - exact).norm() < 0.4 * exact.norm()
