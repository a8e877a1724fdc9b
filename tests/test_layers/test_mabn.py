import copy
import random
import re

import pytest
import torch
from torch import nn

from mmdet_smallbn import MABN
from tests.reference import LiteralMABN, relative_error

KINDS = ('batch', 'sma', 'ema')


def _pair(channels=6, **settings):
    """The layer in float64, and the literal equations at its settings."""
    layer = MABN(channels, **settings).double()
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    reference = LiteralMABN(
        channels, layer.buffer_size, layer.clip, layer.momentum,
        layer.forward_statistics, layer.backward_statistics, layer.centered,
        layer.eps)
    return layer, reference


def _input(step, channels=6):
    """Changing sizes, odd ones, a batch of 1; a scale and mean that drift."""
    size = (1 + step % 3, channels, 5 + step % 2, 7)
    return (torch.randn(size).double() * (1 + 0.1 * step) + 0.05 * step)


def _check_step(layer, reference, x, burning_in=False):
    x = x.clone().requires_grad_()
    layer.burning_in = burning_in
    expected, context = reference.forward(x.detach(), layer.weight.detach(),
                                          layer.bias.detach(), burning_in)
    out = layer(x)
    grad = torch.randn_like(out)
    assert relative_error(out, expected) < 1e-9
    found = torch.autograd.grad(out, [x, layer.weight, layer.bias], grad)
    for a, b in zip(found, reference.backward(context, grad)):
        assert relative_error(a, b) < 1e-9
    assert relative_error(layer.running_var, reference.running_var) < 1e-9
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.parametrize('burn_in', [0, 7])
@pytest.mark.parametrize('clip', [1.02, 100.])
@pytest.mark.parametrize('buffer_size', [1, 4, 16])
def test_equals_the_literal_equations(buffer_size, clip, burn_in):
    """Outputs, all gradients and running statistics over 24 iterations."""
    layer, reference = _pair(buffer_size=buffer_size, clip=clip, momentum=0.1)
    for step in range(24):
        _check_step(layer, reference, _input(step), step < burn_in)
    assert (reference.clipped > 0) == (clip < 2)
    assert (layer.running_mean == 0).all()


@pytest.mark.parametrize('centered', [False, True])
@pytest.mark.parametrize('backward', KINDS)
@pytest.mark.parametrize('forward', KINDS)
def test_every_kind_of_statistics_in_each_pass(forward, backward, centered):
    """The rows of Tables 2 and 4."""
    layer, reference = _pair(
        buffer_size=4,
        clip=1.5,
        momentum=0.2,
        forward_statistics=forward,
        backward_statistics=backward,
        centered=centered)
    for step in range(20):
        _check_step(layer, reference, _input(step), burning_in=4 < step < 8)


def test_batch_statistics_are_batch_norm_where_centred():
    layer = MABN(
        6,
        momentum=0.1,
        centered=True,
        forward_statistics='batch',
        backward_statistics='batch').double()
    theirs = nn.BatchNorm2d(6).double()
    for step in range(3):
        x = _input(step).requires_grad_()
        grad = torch.randn_like(x)
        a, b = layer(x), theirs(x)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0]
                                     for y in (a, b)))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def test_forwards_and_backwards_pair_in_any_order():
    """Several forwards in flight, some never followed by a backward."""
    chance = random.Random(0)
    layer, reference = _pair(buffer_size=4, momentum=0.1)
    flying, backwards = [], 0
    for step in range(60):
        if flying and chance.random() < 0.5:
            x, out, context = flying.pop(chance.randrange(len(flying)))
            if chance.random() < 0.2:
                continue  # this forward gets no backward
            grad = torch.randn_like(out)
            found = torch.autograd.grad(
                out, [x, layer.weight, layer.bias], grad)
            for a, b in zip(found, reference.backward(context, grad)):
                assert relative_error(a, b) < 1e-9
            backwards += 1
        else:
            x = _input(step).requires_grad_()
            expected, context = reference.forward(
                x.detach(), layer.weight.detach(), layer.bias.detach())
            out = layer(x)
            assert relative_error(out, expected) < 1e-9
            flying.append((x, out, context))
    assert backwards > 10 and len(reference.means) > backwards + 2


@pytest.mark.parametrize('kind', ['sma', 'ema'])
def test_a_second_backward_through_a_forward_takes_the_firsts_place(kind):
    layer, reference = _pair(
        buffer_size=3, momentum=0.2, backward_statistics=kind)
    for step in range(5):
        x = _input(step).requires_grad_()
        _, context = reference.forward(x.detach(), layer.weight.detach(),
                                       layer.bias.detach())
        out = layer(x)
        for _ in range(2):  # another loss through the same graph
            torch.autograd.grad(
                out, x, torch.randn_like(out), retain_graph=True)
        grad = torch.randn_like(out)
        found, = torch.autograd.grad(out, x, grad)
        assert relative_error(found, reference.backward(context, grad)[0]) < (
            1e-9)
    held, = layer.export_states()
    assert held['state']['backward']['turn'] == 4


@pytest.mark.filterwarnings('ignore:.*called several times')
def test_calls_of_an_iteration_have_averages_of_their_own():
    shared, _ = _pair(buffer_size=3, momentum=0.)
    apart = [_pair(buffer_size=3, momentum=0.)[0] for _ in range(2)]
    for layer in apart:
        layer.load_state_dict(shared.state_dict())
    for iteration in range(5):
        shared.iteration = iteration
        xs = [_input(iteration + k).requires_grad_() for k in range(2)]
        grads = [torch.randn_like(x) for x in xs]
        outs = [shared(x) for x in xs]
        # Backwards in the other order, as autograd does.
        found = [
            torch.autograd.grad(out, x, g)[0]
            for out, x, g in reversed(list(zip(outs, xs, grads)))
        ][::-1]
        for x, g, out, dx, own in zip(xs, grads, outs, found, apart):
            wanted = own(x)
            torch.testing.assert_close(out, wanted)
            torch.testing.assert_close(dx,
                                       torch.autograd.grad(wanted, x, g)[0])


def test_burn_in_fills_the_averages():
    layer, reference = _pair(buffer_size=4)
    for step in range(6):
        _check_step(layer, reference, _input(step), burning_in=step < 5)
    assert layer.held_iterations == [4]
    held, = layer.export_states()
    assert held['state']['backward']['turn'] == 5


def test_an_overflowing_gradient_enters_no_average():
    layer, reference = _pair(buffer_size=3, momentum=0.1)
    for step in range(3):
        _check_step(layer, reference, _input(step))
    x = _input(3).requires_grad_()
    _, context = reference.forward(x.detach(), layer.weight.detach(),
                                   layer.bias.detach())
    grad = torch.randn_like(x)
    grad[0, 2] = float('inf')
    dx, = torch.autograd.grad(layer(x), x, grad)
    # It shows, in its channel alone.
    assert not dx[:, 2].isfinite().all()
    assert dx[:, [0, 1, 3, 4, 5]].isfinite().all()
    reference.backward(context, grad)
    x = _input(4).requires_grad_()
    expected, context = reference.forward(x.detach(), layer.weight.detach(),
                                          layer.bias.detach())
    out = layer(x)
    grad = torch.randn_like(x)
    dx, = torch.autograd.grad(out, x, grad)
    # In channel 2 the average is over the two that are left.
    psi = (context[4] * context[3])[2] * (grad * context[0])[:, 2].mean()
    reference.psis[-1][2] = (psi + reference.psis[-2][2]) / 2
    wanted = reference.backward(context, grad)[0]
    assert relative_error(dx, wanted) < 1e-9


@pytest.mark.parametrize('kind', ['sma', 'ema', 'batch'])
@pytest.mark.parametrize('as_tensor', [False, True])
def test_a_loss_scale_that_changes_leaves_the_averages_alone(kind, as_tensor):
    plain, _ = _pair(buffer_size=4, momentum=0.2, backward_statistics=kind)
    scaled = copy.deepcopy(plain)
    for step, scale in enumerate([2.**16] * 5 + [2.**17, 1., 1., 2.**-3]):
        x = _input(step).requires_grad_()
        scaled.gradient_scale = torch.tensor(scale) if as_tensor else scale
        grad = torch.randn_like(x)
        wanted, = torch.autograd.grad(plain(x), x, grad)
        found, = torch.autograd.grad(scaled(x), x, grad * scale)
        assert relative_error(found / scale, wanted) < 1e-9


@pytest.mark.parametrize('assign', [False, True])
def test_loading_does_not_touch_what_is_loaded(assign):
    state = _pair()[0].state_dict()
    state['running_mean'] = torch.ones(6).double()
    layer = MABN(6).double()
    with pytest.warns(UserWarning, match='statistics of a BatchNorm'):
        layer.load_state_dict(state, assign=assign)
    assert (state['running_mean'] == 1).all()
    assert (state['running_var'] == 1).all()
    assert (layer.running_var == 2).all() and (layer.running_mean == 0).all()
    with torch.device('meta'):
        MABN(6).load_state_dict({}, strict=False)


def test_evaluation_divides_by_the_root_of_the_mean_square():
    layer, reference = _pair(momentum=0.5)
    for step in range(4):
        _check_step(layer, reference, _input(step))
    layer.eval()
    x = _input(1)
    expected = (
        x / (reference.running_var.view(1, -1, 1, 1) + layer.eps).sqrt() *
        layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1))
    torch.testing.assert_close(layer(x), expected)


def test_without_clipping_training_is_evaluation():
    """r leads the output to the moving average, whatever the batch."""
    layer, _ = _pair(clip=1e6)
    x = _input(3)
    evaluated = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), evaluated)


def test_a_batch_norms_statistics_become_a_mean_square():
    stock = nn.BatchNorm2d(6).double()
    for step in range(30):
        stock(_input(step) + 2)
    layer = MABN(6).double()
    layer.layer_name = 'backbone.bn1'
    with pytest.warns(UserWarning, match="MABN 'backbone.bn1'.*mean square"):
        layer.load_state_dict(stock.state_dict())
    assert (layer.running_mean == 0).all()
    torch.testing.assert_close(
        layer.running_var, stock.running_var + stock.running_mean.square())
    centred = MABN(6, centered=True).double()
    centred.load_state_dict(stock.state_dict())
    torch.testing.assert_close(centred.running_mean, stock.running_mean)


def test_its_own_state_dict_loads_as_it_is(recwarn):
    layer, reference = _pair()
    _check_step(layer, reference, _input(1))
    other = MABN(6).double()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.running_var, layer.running_var)
    assert not recwarn.list


@pytest.mark.parametrize('settings, message', [
    (dict(buffer_size=0), 'buffer_size.*at least 1.*0'),
    (dict(buffer_size=2.), r'buffer_size.*2\.0'),
    (dict(clip=0.5), r'clip.*at least 1.*0\.5'),
    (dict(clip='5'), "clip.*'5'"),
    (dict(forward_statistics='bn'), "forward_statistics.*sma.*'bn'"),
    (dict(backward_statistics='EMA'), "backward_statistics.*ema.*'EMA'"),
    (dict(track_running_stats=False), 'track_running_stats=True.*False'),
    (dict(momentum=None), 'momentum.*None'),
])
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        MABN(4, **settings)
    assert re.search(message, str(error.value))


def test_one_value_is_refused_where_it_has_no_variance():
    layer = MABN(4, centered=True, backward_statistics='batch')
    with pytest.raises(ValueError, match='one value per channel'):
        layer(torch.randn(1, 4, 1, 1))
    layer = MABN(4, centered=True)
    layer(torch.randn(2, 4, 3, 3))
    assert layer(torch.randn(1, 4, 1, 1)).isfinite().all()
