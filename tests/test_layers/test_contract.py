"""Promises that every registered norm keeps."""
import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn.functional import fold_groups
from mmdet_smallbn.layers import (CenConv2d, SmallBatchNorm, TrainingLoop,
                                  remember_calls)
from tests.device import device_type

NORMS = sorted(name for name, cls in MODELS.module_dict.items()
               if inspect.isclass(cls) and issubclass(cls, SmallBatchNorm))


# What a norm of 6 channels needs besides its type.
SETTINGS = {'BGN': dict(num_groups=3)}
# Evaluation is stock BatchNorm's, on a stock state dict. The others divide by
# the mean square, or average over groups of channels.
STOCK_EVALUATION = {'CBN', 'CmBN', 'NaiveCBN', 'BRN', 'GhostBN'}
# Normalise one value a channel without any past; the others refuse.
TAKE_ONE_VALUE = {'BRN', 'MABN', 'BGN'}


def _cfg(name, **kwargs):
    return dict(type=name, **SETTINGS.get(name, {}), **kwargs)


def _build(name, **kwargs):
    return MODELS.build(_cfg(name, num_features=6, **kwargs))


@pytest.fixture(params=NORMS)
def norm(request):
    layer = _build(request.param)
    layer.registered_as = request.param
    return layer


def _trained(norm, dtype=torch.float32, steps=3):
    """The norm after a few training steps behind a convolution."""
    conv = nn.Conv2d(3, 6, 3, padding=1).to(dtype)
    norm.to(dtype).train()
    for n in range(1, steps + 1):
        norm(conv(torch.randn(n, 3, 5, 5).to(dtype))).square().sum().backward()
    norm.zero_grad()  # as after a step of the optimizer
    return conv


def test_the_norms_are_registered():
    assert set(NORMS) == {
        'BGN', 'BRN', 'CBN', 'CmBN', 'GhostBN', 'MABN', 'NaiveCBN'
    }


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmcv'])
@pytest.mark.parametrize('name', NORMS)
def test_built_in_every_scope_under_batch_norms_name(name, scope):
    cnn = pytest.importorskip('mmcv.cnn')
    with DefaultScope.overwrite_default_scope(scope):
        key, layer = cnn.build_norm_layer(
            _cfg(name, requires_grad=False), 6, postfix=1)
    assert key == 'bn1'  # so that pretrained weights load
    assert isinstance(layer, nn.BatchNorm2d) and cnn.is_norm(layer)
    # ConstantInit looks there.
    assert {_BatchNorm, nn.BatchNorm2d} <= set(type(layer).__bases__)
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


def _stock_state():
    stock = nn.BatchNorm2d(6)
    nn.init.uniform_(stock.weight, 0.5, 1.5)
    nn.init.normal_(stock.bias)
    _trained(stock, steps=5)
    return stock.eval()


@pytest.mark.filterwarnings('ignore:.*loaded the statistics')
def test_a_stock_state_dict_loads(norm):
    stock = _stock_state()
    norm.load_state_dict(stock.state_dict())
    norm.eval()
    x = torch.randn(2, 6, 4, 4)
    if norm.registered_as in STOCK_EVALUATION:
        torch.testing.assert_close(norm(x), stock(x), rtol=0, atol=0)
    assert norm(x).isfinite().all()
    torch.testing.assert_close(norm.weight, stock.weight)


@pytest.mark.filterwarnings('ignore:.*loaded the statistics')
def test_evaluation_is_a_fixed_affine_map(norm):
    norm.load_state_dict(_stock_state().state_dict())
    norm.eval()
    norm.example_weight = 0.
    before = copy.deepcopy(norm.state_dict())
    x, other = torch.randn(2, 2, 6, 4, 4)
    out = norm(x)
    torch.testing.assert_close(norm(x), out, rtol=0, atol=0)
    # No example sees the rest of its batch.
    torch.testing.assert_close(norm(x[1:]), out[1:], rtol=0, atol=0)
    torch.testing.assert_close(
        norm(0.3 * x + 0.7 * other), 0.3 * out + 0.7 * norm(other))
    mean, var = fold_groups(norm.running_mean, norm.running_var,
                            norm.num_groups)
    mean, var = mean.view(1, 6, 1, 1), var.view(1, 6, 1, 1)
    affine = (x - mean) / (var + norm.eps).sqrt()
    affine = affine * norm.weight.view(1, 6, 1, 1) + (
        norm.bias.view(1, 6, 1, 1))
    torch.testing.assert_close(out, affine)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize('weight', [0.25, 1.])
def test_evaluation_with_examples_is_deterministic(norm, weight):
    _trained(norm)
    norm.eval()
    norm.example_weight = weight
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(3, 6, 4, 4)
    out = norm(x)
    torch.testing.assert_close(norm(x), out, rtol=0, atol=0)
    torch.testing.assert_close(norm(x[1:]), out[1:])
    norm.example_weight = 0.
    assert not torch.allclose(norm(x), out)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_one_value_a_channel(norm):
    conv = nn.Conv2d(3, 6, 1)
    x = torch.randn(1, 3, 1, 1)
    before = copy.deepcopy(norm.state_dict())
    if norm.registered_as in TAKE_ONE_VALUE:
        norm(conv(x)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in conv.parameters())
    else:
        with pytest.raises(ValueError, match='one value per channel'):
            norm(conv(x))
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(value, before[key])
    for value in norm.state_dict().values():
        assert value.isfinite().all()


@pytest.mark.parametrize('clone', [
    copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))
], ids=['deepcopy', 'pickle'])
def test_copies_carry_the_state_and_do_not_share_it(norm, clone):
    conv = _trained(norm)
    other = clone(norm)
    x = torch.randn(2, 3, 5, 5)
    other(conv(torch.randn(2, 3, 5, 5))).square().sum().backward()
    third = clone(norm)
    results = []
    for layer in (norm, third):
        conv.weight.grad = None
        out = layer(conv(x))
        out.square().sum().backward()
        results.append((out, conv.weight.grad.clone()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_any_batch_and_image_size(norm):
    conv = nn.Conv2d(3, 6, 3, padding=1)
    for n, h, w in ((1, 7, 5), (4, 3, 9), (2, 16, 1), (1, 2, 2), (3, 5, 5)):
        out = norm(conv(torch.randn(n, 3, h, w)))
        out.square().sum().backward()
        assert out.shape == (n, 6, h, w) and out.isfinite().all()
    assert norm.num_batches_tracked == 5


@pytest.mark.filterwarnings('ignore:.*called several times')
def test_several_calls_an_iteration(norm):
    """Each of them has states of its own, where there are any."""
    conv = nn.Conv2d(3, 6, 3, padding=1)
    for iteration in range(3):
        norm.iteration = iteration
        levels = [norm(conv(torch.randn(2, 3, s, s))) for s in (8, 4, 2)]
        sum(level.square().mean() for level in levels).backward()
        assert all(level.isfinite().all() for level in levels)
    assert len(norm.export_states()) == (3 if norm.keeps_states else 0)


def test_a_nan_shows_and_does_not_stay(norm):
    conv = _trained(norm, torch.float64)
    bad = torch.randn(2, 3, 5, 5).double()
    bad[1, 0, 2, 2] = math.nan
    out = norm(conv(bad))
    assert out.isnan().any()
    out.square().sum().backward()
    for value in norm.state_dict().values():
        assert value.isfinite().all()
    conv.weight.grad = None
    out = norm(conv(torch.randn(2, 3, 5, 5).double()))
    out.square().sum().backward()
    assert out.isfinite().all() and conv.weight.grad.isfinite().all()


def test_no_grad_passes_leave_the_past_alone(norm):
    conv = _trained(norm)
    before, past = norm.num_batches_tracked.clone(), _tensors(norm)
    with torch.no_grad():
        norm(conv(torch.randn(2, 3, 5, 5)))
    # As in BatchNorm, the running statistics do move.
    assert norm.num_batches_tracked == before + 1
    assert len(past) == len(_tensors(norm))
    for a, b in zip(past, _tensors(norm)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_running_statistics_are_estimated_anew_as_batch_norms(norm):
    """By passes under ``no_grad``, as PreciseBN makes."""
    conv = _trained(norm, torch.float64)
    stock = nn.BatchNorm2d(6, momentum=None).double()
    norm.reset_running_stats()
    norm.momentum = None
    batches = [conv(torch.randn(2, 3, 5, 5).double()) for _ in range(4)]
    with torch.no_grad():
        for x in batches:
            norm(x)
            stock(x)
    mean, var = norm.running_mean, norm.running_var
    if norm.registered_as in ('BGN', 'GhostBN'):  # of all batches' values
        x = torch.cat(batches)
        wanted = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    elif norm.registered_as == 'MABN':
        x = torch.cat(batches)
        wanted = torch.zeros(6).double(), x.square().mean((0, 2, 3))
    else:
        wanted = stock.running_mean, stock.running_var
    torch.testing.assert_close((mean, var), wanted)


def test_evaluation_in_autocast(norm):
    """As ``val_cfg=dict(fp16=True)`` does."""
    conv = _trained(norm)
    norm.eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = norm(conv(x))
        with torch.autocast(device_type(), torch.bfloat16):
            out = norm(conv(x))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)


def test_what_was_frozen_trains_later(norm):
    """Norm and convolution, one after the other, beside a fresh norm."""
    conv = nn.Conv2d(3, 6, 3).double()
    norm.double().requires_grad_(False).eval()
    conv.requires_grad_(False)
    x = torch.randn(6, 2, 3, 6, 6).double()
    before = copy.deepcopy(norm.state_dict())
    norm(conv(x[0]))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert not norm.export_states()
    norm.requires_grad_(True).train()
    for batch in x[:3]:
        norm(conv(batch)).square().mean().backward()
    conv.requires_grad_(True)
    grads = []
    for batch in x[3:]:
        conv.weight.grad = None
        out = norm(conv(batch))
        out.pow(3).mean().backward()
        grads.append(conv.weight.grad)
        assert out.isfinite().all()
    assert all(g.isfinite().all() and g.any() for g in grads)
    assert norm.num_batches_tracked == 6
    if norm.registered_as == 'CBN':
        # What came before has no patches, and was left behind.
        held, = norm.export_states()
        assert held['state']['turn'] == 2


@pytest.mark.parametrize('calls', [1, 3])
@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.filterwarnings('ignore:.*called several times')
def test_activation_checkpointing_changes_nothing(norm, use_reentrant, calls):
    """Outputs, gradients, running statistics, states over 10 iterations."""
    conv = CenConv2d(3, 6, 3, padding=1).double()
    norm.double()
    models = [nn.ModuleList([conv, norm])]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        remember_calls(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    for iteration in range(10):
        inputs = [torch.randn(2, 3, 5, 5).double() for _ in range(calls)]
        results = []
        for (conv, norm), optimizer in zip(models, optimizers):
            norm.iteration = iteration
            leaves = [x.clone().requires_grad_() for x in inputs]

            def block(x, conv=conv, norm=norm):
                return torch.relu_(norm(conv(x)))

            outs = [
                block(x) if conv is models[0][0] else checkpoint(
                    block, x, use_reentrant=use_reentrant) for x in leaves
            ]
            optimizer.zero_grad()
            sum(out.square().sum() for out in outs).backward()
            results.append([
                *outs, *(leaf.grad for leaf in leaves),
                *(p.grad.clone() for p in conv.parameters()),
                *(p.grad.clone() for p in norm.parameters())
            ])
            optimizer.step()
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        for a, b in zip(*(m.state_dict().values() for m in models)):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert models[1][1].num_batches_tracked == 10 * calls
    for a, b in zip(*(_tensors(m[1]) for m in models)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def _tensors(norm):
    """Every tensor that a layer remembers, in order."""
    values, _ = tree_flatten(norm.export_states())
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointed_layers_are_copied_and_saved(norm, use_reentrant):
    """What waits for the backward pass is left behind."""
    conv = nn.Conv2d(3, 6, 3)
    remember_calls(nn.Sequential(conv, norm))
    x = torch.randn(2, 3, 5, 5).requires_grad_()
    out = checkpoint(
        lambda x: norm(conv(x)), x, use_reentrant=use_reentrant)
    assert len(norm._first_passes) == 1
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert len(copied._first_passes) == 0
    out.sum().backward()
    for _ in range(80):
        checkpoint(lambda x: norm(conv(x)), x, use_reentrant=use_reentrant)
    assert len(norm._first_passes) <= 64


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('calls', [1, 12])
def test_a_repeated_batch_is_not_taken_for_the_last_one(
        norm, use_reentrant, calls):
    """Without a hook, and with the same input in every iteration."""
    conv = nn.Conv2d(3, 6, 3).double()
    models = [nn.Sequential(conv, norm).double()]
    models.append(copy.deepcopy(models[0]))
    remember_calls(models[1])
    inputs = torch.randn(2, 3, 5, 5).double().expand(calls, -1, -1, -1, -1)
    for _ in range(4):
        gradients = []
        for model in models:
            model.zero_grad()
            leaf = inputs.clone().requires_grad_()
            outs = [
                model(x) if model is models[0] else checkpoint(
                    model, x, use_reentrant=use_reentrant) for x in leaf
            ]
            sum(i * out.pow(3).sum()
                for i, out in enumerate(outs, 1)).backward()
            gradients.append([leaf.grad, model[0].weight.grad])
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad.sign(), alpha=0.01)
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('outside', ['convolution', 'norm'])
def test_regions_that_part_convolution_and_norm(norm, use_reentrant, outside):
    first, conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3)
    inner = copy.deepcopy(norm)
    models = [nn.ModuleList([first, inner, conv, norm]).double()]
    models.append(copy.deepcopy(models[0]))
    remember_calls(models[1])
    for iteration in range(4):
        x = torch.randn(2, 3, 5, 5).double().requires_grad_()
        outs = []
        for model in models:
            a, b, c, d = model
            b.iteration = d.iteration = iteration

            def region(x, run=(lambda x: d(x)) if outside == 'convolution' else
                       (lambda x: c(b(a(x))))):
                return run(x)

            before = (lambda x: c(b(a(x)))) if outside == 'convolution' else (
                lambda x: x)
            after = (lambda x: x) if outside == 'convolution' else d
            x_in = before(x)
            out = (
                region(x_in) if model is models[0] else checkpoint(
                    region, x_in, use_reentrant=use_reentrant))
            outs.append(after(out))
            outs[-1].square().sum().backward()
        torch.testing.assert_close(*outs)
    for a, b in zip(*(m.buffers() for m in models)):
        torch.testing.assert_close(a, b)
    for i in (1, 3):
        assert models[0][i].held_iterations == models[1][i].held_iterations


def test_data_parallel_is_refused_in_training(norm):
    assert norm._replicate_for_data_parallel()._is_replica
    replica = copy.copy(norm)
    replica._is_replica = True
    with pytest.raises(RuntimeError, match='DistributedDataParallel'):
        replica(torch.randn(2, 6, 3, 3))
    replica.eval()
    replica(torch.randn(2, 6, 3, 3))


def test_symbolic_tracing_is_refused(norm):
    with pytest.raises(TypeError, match='efficient_conv_bn_eval'):
        torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 6, 1), norm))


def test_levels_that_pose_as_iterations_are_told(norm):
    conv = nn.Conv2d(3, 6, 1)
    optimizer = torch.optim.SGD([*conv.parameters(), *norm.parameters()], 0.1)

    def forward(size):
        norm(conv(torch.randn(2, 3, size, size))).square().sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for size in (4, 6, 5):  # multi-scale training
            forward(size)
            optimizer.step()
        forward(5)  # accumulation
        forward(5)
    if not norm.keeps_states:
        return
    with pytest.warns(UserWarning, match='several sizes between two steps'):
        forward(3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        forward(2)


@pytest.mark.filterwarnings('ignore:.*does not have a deterministic')
def test_deterministic_algorithms_change_nothing(norm):
    """Uninitialised memory is filled with NaN there."""
    conv = nn.Conv2d(3, 6, 3)
    other, x = copy.deepcopy(nn.Sequential(conv, norm)), torch.randn(
        3, 2, 3, 6, 6)
    for batch in x:
        norm(conv(batch)).square().sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        for batch in x:
            other(batch).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(other[0].weight.grad, conv.weight.grad)
    for a, b in zip(other[1].buffers(), norm.buffers()):
        torch.testing.assert_close(a, b)


def test_complexity_is_batch_norms_and_counting_is_no_training(norm):
    if norm.registered_as == 'BGN':
        norm.example_weight = 0.
    flops = []
    for layer in (norm, nn.BatchNorm2d(6)):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), layer).eval()
        flops.append(
            get_model_complexity_info(
                model, (3, 8, 8), show_table=False, show_arch=False)['flops'])
    assert flops[0] == flops[1] > 0
    assert norm.num_batches_tracked == 0 and not norm.export_states()


def test_torch_compile_changes_nothing(norm):
    """Losses and states of 12 steps, and nothing is compiled anew."""
    plain = nn.Sequential(
        CenConv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 6, 3),
        copy.deepcopy(norm), nn.ReLU()).double()
    model = copy.deepcopy(plain)
    for hooked in (plain, model):
        remember_calls(hooked)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend='aot_eager')
    optimizers = [
        torch.optim.SGD(m.parameters(), 0.01) for m in (plain, model)
    ]
    for _ in range(12):
        x = torch.randn(2, 3, 9, 9).double()
        losses = []
        for forward, optimizer in zip((plain, compiled), optimizers):
            optimizer.zero_grad()
            losses.append(forward(x).square().sum())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for a, b in zip(plain.buffers(), model.buffers()):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(_tensors(m[1]) for m in (plain, model))):
        torch.testing.assert_close(a, b)
    assert 0 < torch._dynamo.utils.counters['stats']['unique_graphs'] < 8
    plain.eval()
    model.eval()
    torch.testing.assert_close(plain(x), compiled(x))


def test_no_value_is_asked_for(norm):
    """Nothing waits for the device: the tensors here have no values."""
    with FakeTensorMode():
        conv = nn.Conv2d(3, 6, 3)
        layer = _build(norm.registered_as)
        x = torch.randn(4, 3, 66, 66).requires_grad_()
        for _ in range(3):
            layer(conv(x)).sum().backward()
    assert x.grad.shape == x.shape
    # What was made there is not taken for the truth here.
    conv = nn.Conv2d(3, 6, 3)
    assert norm(conv(torch.randn(4, 3, 66, 66))).isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_every_tensor_is_made_where_the_input_is(norm, dtype):
    """In training and evaluation, where the default device is another one."""
    conv = nn.Conv2d(3, 6, 3)
    loop = TrainingLoop({'norm': norm})
    x = torch.randn(4, 3, 9, 9).requires_grad_()
    with torch.device('meta'), torch.autocast(
            x.device.type, dtype, enabled=dtype != torch.float32):
        for iteration in range(3):
            loop.begin(iteration)
            norm(conv(x)).sum().backward()
            loop.end()
        for weight in (0., 0.5):
            norm.eval().example_weight = weight
            assert norm(conv(x)).device == x.device
    for held in (x.grad, *norm.buffers(), *_tensors(norm)):
        assert held.device.type in (x.device.type, 'cpu')
        assert held.isfinite().all()


def _only_on_cuda():
    if device_type() != 'cuda':
        pytest.skip('of CUDA: --device cuda')


def test_the_host_waits_for_nothing(norm):
    """In a training step, with a hook's work, and in evaluation."""
    _only_on_cuda()
    conv = nn.Conv2d(3, 6, 3)
    loop = TrainingLoop({'norm': norm})
    x = torch.randn(4, 3, 9, 9)
    for iteration in range(12):
        if iteration == 6:  # tables of positions are made
            torch.cuda.set_sync_debug_mode('error')
        try:
            loop.begin(iteration)
            norm(conv(x)).square().sum().backward()
            loop.end()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    norm.eval()
    torch.cuda.set_sync_debug_mode('error')
    try:
        norm(conv(x))
    finally:
        torch.cuda.set_sync_debug_mode('default')


# Their training forward is the same from step to step.
CAPTURED = {'BGN', 'BRN', 'GhostBN'}


def test_a_cuda_graph_replays_a_step_or_the_capture_is_refused(norm):
    _only_on_cuda()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm)
    plain = copy.deepcopy(model)
    x, grad = torch.randn(4, 3, 9, 9), torch.randn(4, 6, 7, 7)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for each in (model, plain):
            for _ in range(3):
                each(x).backward(grad)
    torch.cuda.current_stream().wait_stream(side)
    for each in (model, plain):
        each.zero_grad()
    graph = torch.cuda.CUDAGraph()
    if norm.registered_as not in CAPTURED:
        with pytest.raises(RuntimeError, match='CUDA graph'):
            with torch.cuda.graph(graph):
                model(x)
        return
    with torch.cuda.graph(graph):
        out = model(x)
        out.backward(grad)
    for _ in range(3):
        x.normal_()
        graph.replay()
        plain.zero_grad()
        expected = plain(x)
        expected.backward(grad)
        torch.testing.assert_close(out, expected)
        for a, b in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.buffers(), plain.buffers()):
        torch.testing.assert_close(a, b)


def test_memory_does_not_grow(norm):
    conv = nn.Conv2d(3, 6, 3)
    sizes = []
    for _ in range(100):
        norm(conv(torch.randn(2, 3, 6, 6))).square().sum().backward()
        sizes.append(len(pickle.dumps(norm)))
    assert max(sizes[40:]) <= sizes[40] + 64  # counters take more digits


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
    norm.zero_grad()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(norm(conv(x)), before(conv(x)))


def test_channels_last(norm):
    conv = _trained(norm)
    other = copy.deepcopy(norm)
    x, grad = torch.randn(2, 3, 5, 5), torch.randn(2, 6, 5, 5)
    y = conv(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    out = other(y)
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = norm(conv(x))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(
        out, [conv.weight, other.weight],
        grad.to(memory_format=torch.channels_last))
    wanted = torch.autograd.grad(expected, [conv.weight, norm.weight], grad)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16,
                                   torch.float16])
def test_output_keeps_the_dtype(norm, dtype):
    conv = _trained(norm, dtype)
    out = norm(conv(torch.randn(2, 3, 5, 5).to(dtype)))
    assert out.dtype == dtype and out.isfinite().all()


def test_autocast(norm):
    conv = nn.Conv2d(3, 6, 3)
    for _ in range(3):
        with torch.autocast(device_type(), torch.bfloat16):
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
    norm.layer_name = 'neck.bn'
    for mode in (True, False):
        norm.train(mode)
        with pytest.raises(ValueError, match=r"'neck.bn'.*\(2, 6\).*4D"):
            norm(torch.randn(2, 6))
        with pytest.raises(ValueError, match=r"'neck.bn'.*6 channels.*\(2, 5"):
            norm(torch.randn(2, 5, 3, 3))


def test_in_mmcvs_conv_module(norm):
    block = pytest.importorskip('mmcv.cnn').ConvModule(
        3, 6, 3, norm_cfg=_cfg(norm.registered_as), bias=False)
    block.init_weights()
    for _ in range(3):
        out = block(torch.randn(2, 3, 6, 6))
    assert isinstance(block.bn, type(norm))
    assert block.bn.num_batches_tracked == 3
    assert out.shape == (2, 6, 4, 4) and (out > 0).any()
