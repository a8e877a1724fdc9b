"""Cross mini-Batch Normalization: BatchNorm over the parts of a step."""
import copy

import pytest
import torch
from torch import nn

from mmdet_smallbn.layers import CmBN, TrainingLoop

PARTS = ((2, 6, 5, 7), (1, 6, 4, 4), (3, 6, 8, 3))


def _joined(norm, parts):
    """BatchNorm of all values of the parts, as its output on the last one."""
    flat = torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1)
    out = norm(flat.t()[:, :, None, None])
    n, c, h, w = parts[-1].shape
    return out[-n * h * w:, :, 0, 0].t().view(c, n, h, w).transpose(0, 1)


def _double(norm):
    return norm.double().train()


def test_the_last_part_sees_batch_norm_over_all_parts():
    torch.manual_seed(0)
    norm, stock = _double(CmBN(6)), _double(nn.BatchNorm2d(6))
    parts = [torch.randn(shape).double() * 3 + 100 for shape in PARTS]
    for last in range(len(parts)):  # and each of them over those so far
        out = norm(parts[last])
        torch.testing.assert_close(out, _joined(stock, parts[:last + 1]))
        out.sum().backward()


def test_the_gradient_is_that_of_the_joined_batch_by_the_last_part():
    torch.manual_seed(0)
    norm, stock = _double(CmBN(6)), _double(nn.BatchNorm2d(6))
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    stock.load_state_dict(norm.state_dict())
    *before, last = [torch.randn(shape).double() for shape in PARTS]
    for part in before:
        norm(part).sum().mul(0).backward()
    grad = torch.randn_like(last)
    mine = last.clone().requires_grad_()
    norm(mine).backward(grad)
    wanted = last.clone().requires_grad_()
    _joined(stock, [*before, wanted]).backward(grad)
    torch.testing.assert_close(mine.grad, wanted.grad)
    torch.testing.assert_close(norm.weight.grad, stock.weight.grad)
    torch.testing.assert_close(norm.bias.grad, stock.bias.grad)


def test_one_part_a_step_is_batch_norm():
    torch.manual_seed(0)
    norm, stock = CmBN(6).train(), nn.BatchNorm2d(6).train()
    steps = [torch.optim.SGD(n.parameters(), 0.1) for n in (norm, stock)]
    for _ in range(4):
        x = torch.randn(2, 6, 4, 4)
        outs = norm(x), stock(x)
        torch.testing.assert_close(*outs)
        for out, step in zip(outs, steps):
            step.zero_grad()
            out.pow(3).mean().backward()
            step.step()
    torch.testing.assert_close(norm.state_dict(), stock.state_dict())


@pytest.mark.parametrize('make, to_none', [
    (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), False),
    (lambda p: torch.optim.SGD(p, 0.1, foreach=True), False),
    (lambda p: torch.optim.AdamW(p, fused=True), True),
], ids=['loop', 'foreach', 'fused'])
def test_a_step_of_the_optimizer_begins_anew(make, to_none):
    norm = CmBN(6).train()
    optimizer = make(norm.parameters())
    for _ in range(3):
        for _ in range(2):
            norm(torch.randn(2, 6, 4, 4)).square().sum().backward()
        assert norm.held_iterations == [2], 'parts of another step'
        optimizer.step()
        optimizer.zero_grad(to_none)


def test_the_loop_tells_the_steps_where_the_scale_does_not():
    norm = CmBN(6, affine=False).train()
    loop = TrainingLoop(dict(norm=norm))
    held = []
    for iteration in range(6):
        loop.begin(iteration, after_step=iteration % 3 == 0)
        norm(torch.randn(2, 6, 4, 4))
        held += norm.held_iterations
        loop.end()
    assert held == [1, 2, 3, 1, 2, 3]
    loop.release()
    with pytest.warns(UserWarning, match='cannot tell when the optimizer'):
        out = norm(x := torch.randn(2, 6, 4, 4))
    torch.testing.assert_close(out, nn.BatchNorm2d(6, affine=False)(x))


def test_each_call_of_an_iteration_has_parts_of_its_own():
    norm = CmBN(6).train()
    loop = TrainingLoop(dict(norm=norm))
    low, high = torch.randn(2, 2, 6, 4, 4), torch.randn(2, 2, 6, 8, 8) + 9
    with pytest.warns(UserWarning, match='called several times'):
        for iteration in range(2):
            loop.begin(iteration, after_step=iteration == 0)
            norm(low[iteration])
            out = norm(high[iteration])
            loop.end()
    torch.testing.assert_close(
        out, _joined(nn.BatchNorm2d(6), list(high)), rtol=1e-4, atol=1e-5)


def test_a_part_that_is_not_finite_does_not_enter_the_step():
    norm = CmBN(6).train()
    first, third = torch.randn(2, 2, 6, 4, 4)
    second = torch.randn(2, 6, 4, 4)
    second[0, 1] = float('nan')
    norm(first).sum().backward()
    assert norm(second)[:, 1].isnan().all()  # the loss shows it
    out = norm(third)
    assert out.isfinite().all()
    joined = _joined(nn.BatchNorm2d(6), [first, third])
    torch.testing.assert_close(out[:, 1], joined[:, 1])


def test_an_empty_part_changes_nothing():
    norm = CmBN(6).train()
    x, y = torch.randn(2, 2, 6, 4, 4)
    other = copy.deepcopy(norm)
    for layer in (norm, other):
        layer(x).square().sum().backward()
    assert other(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    torch.testing.assert_close(norm(y), other(y))


def test_an_iteration_that_never_ends_is_told():
    norm = CmBN(6).train()
    norm.iteration = 7
    norm.training_step.optimizer_steps = 1
    with pytest.warns(UserWarning), pytest.raises(
            RuntimeError, match='64 times in iteration 7'):
        for _ in range(65):
            norm(torch.randn(2, 6, 4, 4))


def test_checkpoints_hold_no_parts_and_loading_ends_the_step():
    norm = CmBN(6).train()
    norm(torch.randn(2, 6, 4, 4))
    assert norm.export_states() == []
    norm.load_state_dict(norm.state_dict())
    assert norm.held_iterations == []
