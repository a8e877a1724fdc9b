import pytest
import torch
from torch import nn

from mmdet_smallbn import BGN, GhostBN
from tests.reference import (literal_batch_group_norm,
                             literal_example_weighting, relative_error)


def _prepare(layer):
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer.double()


def _input(n, c=12):
    return (torch.randn(n, c, 4, 3).double() * 2 + 1).requires_grad_()


def _check(layer, x, expected, theirs=None):
    """Output, and gradients of the input and of both layers' parameters."""
    out = layer(x)
    grad = torch.randn_like(out)
    assert relative_error(out, expected) < 1e-9
    theirs = layer if theirs is None else theirs
    for a, b in zip(
            torch.autograd.grad(out, [x, layer.weight, layer.bias], grad),
            torch.autograd.grad(expected, [x, theirs.weight, theirs.bias],
                                grad)):
        assert (a - b).abs().max() < 1e-9 * max(b.abs().max(), 1)


@pytest.mark.parametrize('examples', [1, 2, 3, 8])
@pytest.mark.parametrize('num_groups', [1, 4, 12])
def test_equals_the_literal_equations(num_groups, examples):
    """Outputs, gradients, averages, with batches that do not divide."""
    layer = _prepare(
        BGN(
            12,
            momentum=0.1,
            num_groups=num_groups,
            examples_per_group=examples))
    mean, mean_square = torch.zeros(12).double(), torch.ones(12).double()
    for step in range(20):
        x = _input(1 + step % 5)
        _check(
            layer, x,
            literal_batch_group_norm(x, layer.weight, layer.bias, num_groups,
                                     examples, layer.eps))
        detached = x.detach()
        mean = 0.9 * mean + 0.1 * detached.mean((0, 2, 3))
        mean_square = (0.9 * mean_square +
                       0.1 * detached.square().mean((0, 2, 3)))
        assert relative_error(layer.running_mean, mean) < 1e-9
        assert relative_error(
            layer.running_var + layer.running_mean.square(),
            mean_square) < 1e-9


@pytest.mark.parametrize('training', [True, False])
def test_one_example_a_group_is_group_norm(training):
    theirs = _prepare(nn.GroupNorm(4, 12))
    layer = BGN(12, num_groups=4, examples_per_group=1).double()
    layer.load_state_dict(theirs.state_dict(), strict=False)
    layer.train(training)
    x = _input(3)
    _check(layer, x, theirs(x), theirs)


def test_the_whole_batch_and_single_channels_are_batch_norm():
    for layer in (BGN(12, num_groups=12, examples_per_group=9),
                  GhostBN(12, ghost_size=5)):
        theirs = _prepare(nn.BatchNorm2d(12))
        layer.double().load_state_dict(theirs.state_dict())
        x = _input(5)
        _check(layer, x, theirs(x), theirs)


@pytest.mark.parametrize('n', [1, 2, 5])
def test_ghost_batches_are_batch_norms_of_their_own(n):
    """Eq. (4): a BatchNorm sees one ghost batch after the other."""
    layer = _prepare(GhostBN(6, ghost_size=2))
    theirs = nn.BatchNorm2d(6).double()
    theirs.load_state_dict(layer.state_dict())
    x = _input(n, 6)
    expected = torch.cat([theirs(part) for part in x.split(2)])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('alpha', [0., 0.1, 0.7, 1.])
@pytest.mark.parametrize('num_groups', [1, 4, 12])
def test_evaluation_weighs_examples(num_groups, alpha):
    layer = _prepare(
        BGN(
            12, momentum=0.3, num_groups=num_groups, example_weight=alpha))
    for step in range(5):
        layer(_input(2 + step % 2))
    layer.eval()
    x = _input(3)
    _check(
        layer, x,
        literal_example_weighting(
            x, layer.running_mean,
            layer.running_var + layer.running_mean.square(), layer.weight,
            layer.bias, layer.eps, alpha, num_groups))


def test_without_averages_evaluation_groups_as_training():
    layer = BGN(12, num_groups=4, track_running_stats=False).double()
    x = _input(3)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)


def test_half_precision_averages_are_folded_in_float32():
    layer = BGN(4, num_groups=2, example_weight=0.)
    layer.running_mean.copy_(torch.tensor([600., -600., 3., 3.]))
    wide = layer.eval()(torch.full((1, 4, 2, 2), 300.))
    half = layer.half()(torch.full((1, 4, 2, 2), 300.).half())
    torch.testing.assert_close(half.float(), wide, rtol=0.01, atol=0.01)


def test_it_may_be_called_as_often_as_a_head_likes(recwarn):
    layer = BGN(4, num_groups=2)
    layer.iteration = 3
    for _ in range(70):
        layer(torch.randn(2, 4, 3, 3))
    assert not recwarn.list


@pytest.mark.parametrize('shape, settings', [
    ((3, 4, 1, 1), dict(num_groups=4)),  # the last group has one example
    ((1, 4, 1, 1), dict(num_groups=4, examples_per_group=8)),
])
def test_a_group_of_one_value_is_refused(shape, settings):
    layer = BGN(4, **settings)
    with pytest.raises(ValueError, match='one value per channel'):
        layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0
    layer(torch.randn(2, 4, 1, 1))  # two examples
    layer = BGN(4, num_groups=2)
    layer(torch.randn(shape))  # two channels


@pytest.mark.parametrize('settings, message', [
    (dict(num_groups=5), 'num_groups must divide num_features=12.*5'),
    (dict(num_groups=32),
     'divide num_features=12, but got 32.*common divisor'),
    (dict(num_groups=0), 'num_groups.*at least 1'),
    (dict(num_groups=4, examples_per_group=0), 'examples_per_group.*least 1'),
    (dict(num_groups=4, example_weight=1.5), r'from 0 to 1.*1\.5'),
])
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BGN(12, **settings)
    with pytest.raises(ValueError, match='ghost_size.*-1'):
        GhostBN(12, ghost_size=-1)


@pytest.mark.parametrize('width, groups', [(8, 8), (12, 12), (48, 24),
                                           (64, 32), (37, 1)])
def test_groups_by_default_divide_the_channels(width, groups):
    assert BGN(width).num_groups == groups
