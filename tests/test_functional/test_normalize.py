import pytest
import torch
import torch.nn.functional as F

from mmdet_smallbn.functional import (batch_moments, example_moments,
                                      normalize, pool_moments,
                                      renormalization)


def _inputs(n=3, c=4, h=5, w=2):
    x = torch.randn(n, c, h, w).double().requires_grad_()
    weight = torch.rand(c).double().requires_grad_()
    bias = torch.randn(c).double().requires_grad_()
    return x, weight, bias


def _assert_same(out, expected, leaves):
    """Values, and gradients of the leaves."""
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(
            torch.autograd.grad(out, leaves, grad),
            torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(found, wanted)


def test_own_statistics_are_batch_norm():
    x, weight, bias = _inputs()
    grad = torch.randn_like(x)
    moments = batch_moments(x)
    out = normalize(x, moments.mean, moments.var, weight, bias, 1e-3)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0., 1e-3)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(
            torch.autograd.grad(out, (x, weight, bias), grad),
            torch.autograd.grad(expected, (x, weight, bias), grad)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize('affine', [True, False])
def test_pooled_statistics_pass_their_share_of_the_gradient(affine):
    """Against autograd through mean and mean square of two batches."""
    x, weight, bias = _inputs()
    other = torch.randn(2, 4, 3, 3).double()
    parts = [batch_moments(x), batch_moments(other)]
    mean, var = pool_moments(
        torch.stack([p.mean for p in parts]),
        torch.stack([p.var for p in parts]),
        torch.ones(2, 1).double())
    share = torch.full((4, ), 0.5).double()
    leaves = (x, weight, bias) if affine else (x, )
    out = normalize(x, mean, var, *(leaves[1:] or (None, None)), 1e-5, share)

    def expected():
        mu = (x.mean((0, 2, 3)) + other.mean((0, 2, 3))) / 2
        nu = ((x**2).mean((0, 2, 3)) + (other**2).mean((0, 2, 3))) / 2
        y = ((x - mu.view(1, -1, 1, 1)) /
             (nu - mu**2 + 1e-5).sqrt().view(1, -1, 1, 1))
        if affine:
            y = y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        return y

    grad = torch.randn_like(x)
    wanted = expected()
    torch.testing.assert_close(out, wanted)
    for a, b in zip(
            torch.autograd.grad(out, leaves, grad),
            torch.autograd.grad(wanted, leaves, grad)):
        torch.testing.assert_close(a, b)


def test_gradient_statistics_as_they_are_give_batch_norm():
    x, weight, bias = _inputs()
    moments = batch_moments(x)
    grad = torch.randn_like(x)
    seen = []

    def keep(mean_g, mean_gx):
        seen.append((mean_g, mean_gx))
        return mean_g, mean_gx

    out = normalize(
        x, moments.mean, moments.var, weight, bias, 1e-5, gradient=keep)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0., 1e-5)
    for found, wanted in zip(
            torch.autograd.grad(out, (x, weight, bias), grad),
            torch.autograd.grad(expected, (x, weight, bias), grad)):
        torch.testing.assert_close(found, wanted)
    # Called once, with the means of g and g * x_hat.
    (mean_g, mean_gx), = seen
    g = grad * weight.view(1, -1, 1, 1)
    x_hat = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(mean_g, g.mean((0, 2, 3)))
    torch.testing.assert_close(mean_gx, (g * x_hat).mean((0, 2, 3)))


def test_without_the_gradients_mean_it_is_a_root_mean_square_norm():
    """MABN Eq. (15), (16), against autograd."""
    x, weight, bias = _inputs()
    moments = batch_moments(x)
    square = moments.mean_square()
    out = normalize(
        x,
        torch.zeros_like(square),
        square,
        weight,
        bias,
        1e-5,
        gradient=lambda mean_g, mean_gx: (None, mean_gx))
    chi = (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    expected = (x / chi * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1))
    _assert_same(out, expected, (x, weight, bias))


@pytest.mark.parametrize('gradient', [
    None, lambda mean_g, mean_gx: (mean_g, mean_gx)
], ids=['by default', 'as they are'])
def test_statistics_of_each_example(gradient):
    """Instance normalisation: groups of one."""
    x, weight, bias = _inputs()
    moments = example_moments(x)
    out = normalize(
        x,
        moments.mean,
        moments.var,
        weight,
        bias,
        1e-5,
        gradient=gradient)
    expected = F.instance_norm(x, weight=weight, bias=bias, eps=1e-5)
    _assert_same(out, expected, (x, weight, bias))


def test_an_empty_batch_tells_who_waits_for_its_gradient():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    moments = batch_moments(x)
    calls = []

    def gradient(mean_g, mean_gx):
        calls.append((mean_g.tolist(), mean_gx.tolist()))
        return mean_g, mean_gx

    out = normalize(
        x, moments.mean, moments.var, weight, gradient=gradient)
    out.sum().backward()
    assert calls == [([0.] * 3, [0.] * 3)]
    assert (weight.grad == 0).all() and x.grad.shape == x.shape


def test_renormalization_leads_to_the_targets_unless_clipped():
    x = torch.randn(4, 3, 5, 5).double() * 2 + 1
    moments = batch_moments(x)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    r, d = renormalization(moments.mean, moments.var, mean, var, 1e-5, 1e6,
                           1e6)
    out = normalize(x, moments.mean, moments.var, r, d)
    torch.testing.assert_close(
        out, F.batch_norm(x, mean, var, eps=1e-5))
    r, d = renormalization(moments.mean, moments.var, mean, var, 1e-5, 1.1,
                           0.2)
    assert ((1 / 1.1 <= r) & (r <= 1.1)).all() and (d.abs() <= 0.2).all()


def test_only_what_is_needed_gets_a_gradient():
    x, weight, bias = _inputs()
    moments = batch_moments(x)
    out = normalize(x.detach(), moments.mean, moments.var, weight.detach(),
                    bias)
    out.sum().backward()
    assert x.grad is None and weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 30.))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
    weight = torch.rand(3, requires_grad=True)
    moments = batch_moments(x)
    share = torch.full((3, ), 0.5)
    out = normalize(x, moments.mean, moments.var, weight, None, 1e-5, share)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    x32 = x.detach().float().requires_grad_()
    w32 = weight.detach().clone().requires_grad_()
    out32 = normalize(x32, moments.mean, moments.var, w32, None, 1e-5, share)
    out32.square().sum().backward()
    torch.testing.assert_close(x.grad.float(), x32.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(weight.grad, w32.grad, rtol=0.05, atol=0.05)


def test_statistics_may_lie_apart():
    """torch's kernels would read between them."""
    x, weight, bias = _inputs()
    mean, var = torch.rand(4, 2).double().add(0.5).t()
    share = torch.rand(4).double()
    grad = torch.randn_like(x)
    results = []
    for values in ((mean, var), (mean.contiguous(), var.contiguous())):
        out = normalize(x, *values, weight, bias, 1e-5, share)
        results.append(torch.autograd.grad(out, (x, weight, bias), grad))
    torch.testing.assert_close(*results)
