"""What is remembered of iterations, and what is said of it at other weights.

That Eq. (7)-(12) hold, over sequences and for all kinds of convolutions, is in
test_layers/test_cbn.py.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdet_smallbn import CBN
from mmdet_smallbn.functional import (ConvCall, Filters, Loan, Memory,
                                      apply_filters, batch_moments,
                                      follow_filters, mix_moments, normalize,
                                      pool, replay)
from mmdet_smallbn.functional.positions import _TURNS
from tests.device import device_type, seeded


def _call(x, weight, bias=None, groups=1, **kwargs):
    settings = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    settings.update(kwargs)
    return ConvCall(Filters(weight, bias, groups), x, **settings)


def _with_weight(call, weight):
    return call._replace(filters=call.filters._replace(weight=weight))


def _outputs(filters, patches):
    return apply_filters(filters.rows, patches,
                         patches.new_empty(len(filters.rows), len(patches)))


def _remembered(calls, positions=None, turn=0):
    """A memory of the iterations that these calls were, and its patches."""
    rows = []
    for call in calls:
        y = _conv(call)
        moments = batch_moments(y)
        patches = call.sample(y, positions, turn)
        outputs = _outputs(call.filters, patches)
        rows.append((torch.stack(moments[:2]), outputs, patches))
    moments, outputs, patches = zip(*rows)
    mean, var = torch.stack(moments, 2)
    count = len(patches[0])
    memory = Memory(mean, var, torch.stack(outputs, 1), 1 / count,
                    2 / count if positions is None else 2 / (count - 1))
    return memory, torch.cat(patches)


def _replay(memory, filters, patches):
    now = _outputs(filters, patches).view_as(memory.outputs)
    return replay(memory, now)


def _at_weight(call, weight):
    """First-order moments of a call's outputs at another weight."""
    memory, patches = _remembered([call])
    past = _replay(memory, _with_weight(call, weight).filters, patches)
    return past.mean[:, 0], past.var[:, 0]


def test_moments_follow_their_derivatives():
    """Those of finite differences."""
    x = torch.randn(2, 4, 6, 5).double()
    weight = torch.randn(6, 2, 3, 3).double()
    call = _call(x, weight, groups=2, stride=(2, 1), padding=(1, 0))
    step = 1e-6 * torch.randn_like(weight)
    found = [(up - down) / 2e-6
             for up, down in zip(
                 _at_weight(call, weight + step),
                 _at_weight(call, weight - step))]
    up, down = (batch_moments(_conv(_with_weight(call, weight + sign * step)))
                for sign in (1, -1))
    wanted = [(a - b) / 2e-6 for a, b in zip(up[:2], down[:2])]
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_same_weight_gives_back_the_moments():
    call = _call(torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3) * 0.2)
    moments = batch_moments(_conv(call))
    for found, wanted in zip(_at_weight(call, call.filters.weight), moments):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_mean_is_exact_at_any_weight_and_variance_is_clamped():
    x = torch.rand(2, 3, 5, 5).double()
    weight = torch.randn(4, 3, 3, 3).double()
    mean, var = _at_weight(_call(x, weight), -weight)
    torch.testing.assert_close(
        mean, F.conv2d(x, -weight, padding=1).mean((0, 2, 3)))
    # First order says: second moment - 2 * step, far below zero.
    assert (var == 0).all()


def test_autocast_does_not_coarsen_the_products():
    call = _call(torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3))
    plain = _at_weight(call, call.filters.weight * 1.001)
    with torch.autocast(device_type(), torch.bfloat16):
        memory, _ = _remembered([call])
        assert memory.outputs.dtype == torch.float32
        cast = _at_weight(call, call.filters.weight * 1.001)
    for a, b in zip(cast, plain):
        assert a.dtype == torch.float32
    torch.testing.assert_close(cast[0] - plain[0], torch.zeros(8), atol=0.01,
                               rtol=0)


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
    bias = torch.randn(6).double() if groups == 1 else None
    return _call(x, weight, bias, **{'padding': (0, 0), **settings})


def _conv(call):
    weight, bias, groups, transposed, _ = call.filters
    settings = (weight, bias, call.stride, call.padding)
    if transposed:
        return F.conv_transpose2d(call.input, *settings, (1, 0), groups,
                                  call.dilation)
    return F.conv2d(call.input, *settings, call.dilation, groups)


def _transposed():
    torch.manual_seed(0)
    filters = Filters(torch.randn(4, 3, 3, 4).double(), None, 2, True)
    return ConvCall(filters, torch.randn(3, 4, 9, 7).double(), (2, 1), (1, 0),
                    (1, 2))


SAMPLED = [*((name, shape) for name in GEOMETRIES
             for shape in ((2, 4, 33, 40), (70, 4, 9, 7))),
           ('transposed', (3, 4, 9, 7))]


@pytest.mark.parametrize('name, shape', SAMPLED, ids=str)
def test_a_sample_is_of_patches_spread_evenly(name, shape):
    """Today's filters make of each patch the output that it belongs to."""
    call = _transposed() if name == 'transposed' else _geometry(name, shape)
    y = _conv(call)
    values = y.transpose(0, 1).flatten(1).t()
    # Places can be told by their values, unless most are padding.
    many = y[:, 0].numel() > 400 and len(values.unique(dim=0)) == len(values)
    seen = []
    for turn in range(_TURNS + 1):
        patches = call.sample(y, 40, turn)
        assert len(patches) == 40
        outputs = _outputs(call.filters, patches).t()
        distance, places = (outputs[:, None] - values).norm(dim=2).min(1)
        assert distance.max() < 1e-9
        seen.append(places)
        # Spread evenly: over rows, and over examples.
        size = y.size(2) * y.size(3)
        examples, rows = places // size, places % size // y.size(3)
        for part in (rows / y.size(2), examples / y.size(0)):
            for third in range(3 if many and y.size(0) > 2 else 0):
                inside = (part >= third / 3) & (part < (third + 1) / 3)
                assert 5 <= inside.sum() <= 22
    assert (seen[0] == seen[_TURNS]).all()  # the turns begin again
    if many and y[:, 0].numel() > 1000:
        assert torch.cat(seen[:_TURNS]).unique().numel() > 240


def test_all_positions_are_all_of_them():
    call = _geometry('strided', (3, 4, 9, 7))
    y = _conv(call)
    outputs = _outputs(call.filters, call.sample(y, None, 3))
    torch.testing.assert_close(outputs, y.transpose(0, 1).flatten(1))


def _random_positions(call, count):
    """The input of a 1x1 convolution with its positions in random order."""
    n, c, h, w = call.input.shape
    rows = call.input.permute(0, 2, 3, 1).reshape(-1, c)
    rows = rows[torch.randperm(len(rows))].view(n, h, w, c)
    return call._replace(input=rows.permute(0, 3, 1, 2))


def _gradient(calls, filters, positions):
    """Moments of the past, and a loss's gradient by today's filters."""
    memory, patches = _remembered(calls, positions)
    past = _replay(memory, filters, patches)
    live = filters.rows.clone().requires_grad_()
    own, = follow_filters(memory, past, pool(past), [len(live)], [live],
                          [Loan(patches)])
    generator = seeded(0)
    x, factor = torch.randn(
        (2, 3, len(live), 4, 4), generator=generator, dtype=live.dtype)
    mean, var = mix_moments(own.moments, torch.stack(batch_moments(x)[:2]),
                            own.share)
    out = normalize(x, mean, var, gradient=own.share, past=own)
    (out * factor).sum().backward()
    return torch.cat([past.mean, past.var]), live.grad


@pytest.mark.parametrize('step', [0., 0.02])
def test_what_a_sample_says_is_unbiased(step):
    """Means over 400 random samples, within 4.5 of their standard errors.

    Moments at another weight and the gradient by it, against all positions.
    """
    torch.manual_seed(0)
    calls = [
        _call(torch.randn(2, 5, 20, 20).double().relu() + i, weight,
              padding=(0, 0)) for i, weight in enumerate(
                  torch.randn(3, 4, 5, 1, 1).double() * step +
                  torch.randn(4, 5, 1, 1).double())
    ]
    filters = calls[-1].filters
    exact = _gradient(calls, filters, None)
    draws = [
        _gradient([_random_positions(call, 32) for call in calls], filters, 32)
        for _ in range(400)
    ]
    for truth, found in zip(exact, map(torch.stack, zip(*draws))):
        assert truth.abs().max() > 0.1
        error = found.std(0) / 20
        away = (found.mean(0) - truth).abs()
        # The square of the mean's step in Eq. (10): a bias of second order.
        assert (away <= 4.5 * error + 0.05 * step * truth.abs() +
                1e-12).all()
        if step:
            assert (error > 0).all()


def test_a_window_follows_another_convolution():
    """With filters of another shape it begins again."""
    layer = CBN(160)
    x = torch.randn(2, 160, 30, 30)
    for conv in (nn.Conv2d(160, 160, 1), nn.Conv2d(160, 160, 3),
                 nn.Conv2d(160, 160, 1, groups=2)):
        for n in (2, 0, 1):
            layer(conv(x[:n]))
        state, = layer.export_states()
        assert state['state']['turn'] == 1
    layer.derivative_positions = 64
    layer(nn.Conv2d(160, 160, 1)(x))
    state, = layer.export_states()
    assert state['state']['turn'] == 0
