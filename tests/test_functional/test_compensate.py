import pytest
import torch
import torch.nn.functional as F

from mmdet_smallbn.functional import (AffineMoments, ConvCall, affine_moments,
                                      batch_moments, moments_at_weight,
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
