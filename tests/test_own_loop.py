"""The norms in training loops without mmengine."""
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn import (BRN, CBN, MABN, CmBN, GhostBN, TrainingLoop,
                           fuse_norm)


def _model(norm, **settings):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4, **settings), nn.ReLU(),
        nn.Conv2d(4, 4, 3), norm(4, **settings)).double()


def _images(count, size=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(
        count, 2, 3, size, size, generator=generator, dtype=torch.float64) + 1


def _step(model, x, run=None, scale=1.):
    """SGD by hand, with the gradient of the loss itself."""
    out = model(x) if run is None else run(model, x)
    model.zero_grad()
    (out.sin().mean() * scale).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad / scale, alpha=0.05)
    return out.detach()


def _same(a, b):
    for key, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key], value)


@pytest.mark.parametrize('norm', [CBN, MABN, CmBN, BRN, GhostBN])
def test_where_a_forward_pass_is_an_iteration_nothing_need_be_told(norm):
    plain, told = _model(norm), _model(norm)
    loop = TrainingLoop(told)
    for x in _images(8):
        out = _step(plain, x)
        with loop.iteration():
            torch.testing.assert_close(_step(told, x), out)
    _same(plain, told)


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('norm', [CBN, MABN])
def test_activation_checkpointing_changes_nothing(norm, reentrant):

    def run(model, x):
        return checkpoint(
            model, x.requires_grad_(), use_reentrant=reentrant)

    plain, told = _model(norm), _model(norm)
    loop = TrainingLoop(told)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for x in _images(6):
            out = _step(plain, x)
            with loop.iteration():
                torch.testing.assert_close(_step(told, x, run), out)
    _same(plain, told)
    if norm is CBN:
        with pytest.warns(UserWarning, match=r"CBN\(4\) runs inside .*"
                          r'TrainingLoop\(model\) in your own training loop'):
            for x in _images(2):
                _step(_model(norm), x, run)


@pytest.mark.filterwarnings("ignore:.*'4' is called several times")
@pytest.mark.parametrize('norm', [CBN, MABN])
def test_a_head_on_several_levels_remembers_iterations(norm):
    levels = [_images(6), _images(6, 7)]
    told, alone = _model(norm), _model(norm)
    loop = TrainingLoop(told)
    with pytest.warns(UserWarning, match="'1' is called several times"):
        for pair in zip(*levels):
            with loop.iteration():
                _step(told, pair[0])
                told(pair[1])
    size = told[1].averaged_iterations
    assert told[1].held_iterations == [min(6, size)] * 2
    with pytest.warns(UserWarning, match='several sizes between two steps.*'
                      r'TrainingLoop\(model\)'):
        for pair in zip(*levels):
            _step(alone, pair[0])
            alone(pair[1])
    assert len(alone[1].held_iterations) == 1


def test_mabns_averages_are_of_the_loss_itself():
    """Whatever mixed precision's scale comes to."""
    plain, told = _model(MABN), _model(MABN)
    loop = TrainingLoop(told)
    scales = [2.**12, 2.**4, 1., 0.125, 2.**10, 2.]
    for x, scale in zip(_images(6), scales):
        out = _step(plain, x)
        with loop.iteration(gradient_scale=scale):
            torch.testing.assert_close(_step(told, x, scale=scale), out)
    _same(plain, told)


@pytest.mark.parametrize('told', [True, False])
def test_cmbn_is_told_of_a_fused_optimizers_steps(told):
    """Which bumps no version, and leaves gradients of zero where they are.

    Weights stand still, so that the parts of a step are one batch.
    """
    model = _model(CmBN)[:2]
    optimizer = torch.optim.SGD(model.parameters(), 0., fused=True)
    loop = TrainingLoop(model)
    images = _images(8)
    for part, x in enumerate(images):
        first = part % 4 == 0
        with loop.iteration(
                gradient_scale=1 / 4, after_step=first if told else None):
            out = model(x)
            out.sin().mean().div(4).backward()
        if part % 4 == 3:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    stock = nn.Sequential(model[0], nn.BatchNorm2d(4).double())
    of_the_step = images[4 if told else 0:].flatten(0, 1)
    torch.testing.assert_close(out, stock(of_the_step)[-2:])


def test_norms_burn_in():
    model = _model(CBN)
    stock = _model(nn.BatchNorm2d)
    loop = TrainingLoop(model, burn_in=3)
    for i, x in enumerate(_images(5)):
        out = _step(stock, x)
        with loop.iteration():
            if i < 3:
                torch.testing.assert_close(_step(model, x), out)
            else:
                _step(model, x)
    assert model[1].held_iterations == [2]
    # A training that is resumed after it.
    model = _model(CBN)
    loop = TrainingLoop(model, burn_in=3)
    for i, x in enumerate(_images(4), 2):
        with loop.iteration(i):
            _step(model, x)
        assert model[1].iteration == i
    assert model[1].held_iterations == [3]
    loop.release()
    TrainingLoop(model, burn_in=9).begin(0)
    assert model[1].burning_in


def test_a_burn_in_of_ones_own_is_left_alone():
    model = _model(MABN)
    model[1].burning_in = True
    loop = TrainingLoop(model)
    with loop.iteration():
        _step(model, _images(1)[0])
    loop.release()
    assert model[1].burning_in and not model[4].burning_in


@pytest.mark.parametrize('norm', [GhostBN, nn.BatchNorm2d])
def test_a_burn_in_of_nothing_is_refused(norm):
    with pytest.raises(ValueError, match='burn_in=5, but the model has no no'):
        TrainingLoop(_model(norm), burn_in=5)
    with pytest.raises(ValueError, match='burn_in must be .* got -1'):
        TrainingLoop(_model(CBN), burn_in=-1)


def test_a_model_with_batch_norm_trains_in_the_same_loop():
    plain, told = _model(nn.BatchNorm2d), _model(nn.BatchNorm2d)
    loop = TrainingLoop(told)
    for x in _images(3):
        _step(plain, x)
        with loop.iteration():
            _step(told, x)
    _same(plain, told)


def test_an_error_in_an_iteration_costs_that_iteration():
    model = _model(CBN)
    loop = TrainingLoop(model)
    images = _images(4)
    for x in images[:2]:
        with loop.iteration():
            _step(model, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='not today'):
        with loop.iteration():
            model(images[2] * torch.inf)
            raise RuntimeError('not today')
    for key in ('1.running_mean', '1.running_var'):
        torch.testing.assert_close(model.state_dict()[key], before[key])
    with loop.iteration():
        assert _step(model, images[3]).isfinite().all()
    assert model[1].iteration == 3


def test_what_is_let_go_leaves_no_trace():
    model = _model(CBN)
    loop = TrainingLoop(model, burn_in=9)
    with loop.iteration():
        _step(model, _images(1)[0])
    loop.release()
    assert not any(m._forward_hooks for m in model.modules())
    assert model[1].iteration is None and not model[1].burning_in
    model(_images(1)[0])


def test_an_old_loop_does_not_end_a_new_one():
    model = _model(CBN)
    old = TrainingLoop(model)
    new = TrainingLoop(model)
    old.release()
    for i, x in enumerate(_images(3)):
        with new.iteration():
            _step(model, x)
        assert model[1].iteration == i
    new.release()
    assert model[1].iteration is None


def test_a_loop_that_was_not_let_go_is_no_obstacle_to_folding():
    model = _model(CBN)
    loop = TrainingLoop(model)
    for x in _images(3):
        with loop.iteration():
            _step(model, x)
    x = _images(1)[0]
    out = model.eval()(x)
    torch.testing.assert_close(fuse_norm(model)(x), out)


def test_messages_name_the_layer():
    model = _model(CBN)
    TrainingLoop(model)
    with pytest.raises(ValueError, match="CBN '1' .* 4 channels"):
        model[1](torch.ones(2, 3, 4, 4))
