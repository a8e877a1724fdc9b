import pytest
import torch
from torch import nn

from mmdet_smallbn import BRN, MABN
from tests.reference import LiteralBRN, relative_error


def _input(step):
    return (torch.randn(1 + step % 3, 5, 4 + step % 2, 6).double() *
            (1 + 0.1 * step) + 0.2 * step).requires_grad_()


@pytest.mark.parametrize('burn_in', [0, 8])
@pytest.mark.parametrize('r_max, d_max', [(1.05, 0.1), (3., 5.), (1e4, 1e4)])
def test_equals_the_literal_equations(r_max, d_max, burn_in):
    """Outputs, all gradients and running statistics over 24 iterations."""
    layer = BRN(5, momentum=0.1, r_max=r_max, d_max=d_max).double()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    reference = LiteralBRN(5, r_max, d_max, 0.1, layer.eps)
    for step in range(24):
        layer.burning_in = step < burn_in
        x = _input(step)
        leaves = [x, layer.weight, layer.bias]
        expected = reference(*leaves, layer.burning_in)
        out = layer(x)
        grad = torch.randn_like(out)
        assert relative_error(out, expected) < 1e-9
        for a, b in zip(
                torch.autograd.grad(out, leaves, grad),
                torch.autograd.grad(expected, leaves, grad)):
            assert relative_error(a, b) < 1e-9
        assert relative_error(layer.running_mean, reference.mean) < 1e-9
        assert relative_error(layer.running_var, reference.var) < 1e-9
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    assert (reference.clipped > 0) == (r_max < 2)


def test_is_a_setting_of_mabns_statistics():
    """'ema' over 'batch', centred: the MABN paper's Eq. (14)."""
    ours = BRN(5, momentum=0.1, r_max=1.5, d_max=1.5).double()
    theirs = MABN(
        5,
        momentum=0.1,
        clip=1.5,
        backward_statistics='batch',
        centered=True).double()
    for step in range(6):
        x = _input(step)
        a, b = ours(x), theirs(x)
        torch.testing.assert_close(a, b)
        grad = torch.randn_like(a)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0]
                                     for y in (a, b)))


def test_without_clipping_training_is_evaluation():
    layer = BRN(5, r_max=1e6, d_max=1e6).double()
    x = _input(3)
    evaluated = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), evaluated)


def test_one_value_is_renormalised_but_not_in_burn_in():
    layer = BRN(4).double()
    x = torch.randn(1, 4, 1, 1).double()
    # Nothing to normalise by: d alone, (x - 0) / sqrt(1 + eps).
    torch.testing.assert_close(layer(x), x / (1 + layer.eps)**0.5)
    layer.burning_in = True
    with pytest.raises(ValueError, match='one value per channel'):
        layer(x)


@pytest.mark.parametrize('settings, message', [
    (dict(r_max=0.9), r'r_max.*at least 1.*0\.9'),
    (dict(d_max=-1), 'd_max.*at least 0.*-1'),
    (dict(d_max=True), 'd_max.*True'),
    (dict(track_running_stats=False), 'track_running_stats=True'),
])
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BRN(4, **settings)
