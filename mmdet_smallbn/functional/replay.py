r"""The past of CBN at today's weight (arXiv:2002.05712), Eq. (7)-(12).

A few positions of each past iteration are remembered: their input patches p
and the outputs y that the filters :math:`\theta_{t-\tau}` of then made of
them. Replaying them means to apply today's filters to the same patches. With
the step of each output, :math:`d_i = \langle p_i, \theta_t\rangle - y_i`, the
moments of that iteration move, to first order, by

.. math::
    \Delta\mu = \frac1P \sum_i d_i, \qquad
    \Delta\sigma^2 = \frac2{P - 1} \sum_i (y_i - \bar y)\, d_i,

which are Eq. (7) and (8), estimated from P positions, with the variance in
place of the mean square. Eq. (10), :math:`\max[\nu, \mu^2]`, reads

.. math::
    \mu_{t-\tau}(\theta_t) = \mu + \Delta\mu, \qquad
    \sigma^2_{t-\tau}(\theta_t) = \max\left(
        \sigma^2 + \Delta\sigma^2 - \Delta\mu^2,\ 0\right).

At the weight that an iteration was computed with, d is 0 and its moments are
exact, however few positions there are. Only channel j's own filter moves
channel j's moments (Appendix B), and convolution is linear in its filters, so
nothing else of the convolution matters: not its stride, its padding, or
whether it is transposed. A bias is a filter's weight for an input that is
always 1.
"""
from typing import Callable, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .sync import Processes


class Memory(NamedTuple):
    """What is remembered of the last k iterations of a layer.

    Attributes:
        moments (Tensor): Means and biased variances, shape (2, k, C).
        patches (Tensor, optional): Input patches, shape (k, P, groups, F).
            None: the moments do not move.
        outputs (Tensor, optional): What the filters of then made of them,
            shape (k, P, C).
        mean_scale (Tensor, optional): 1 / P of each iteration, shape (k, 1).
            Where P is less than in others, patches and outputs behind it are
            0.
        var_factor (Tensor, optional): Between the scales of Eq. (8) and (7),
            shape (k, 1): 2 P / (P - 1), or 2 if the positions are all that
            the batch had.
        part (Tensor, optional): This process's part of each batch, shape
            (k, 1), if several processes share it.
        offset (Tensor, optional): From the batch's mean to that of this
            process's part of it, shape (k, C).
    """
    moments: Tensor
    patches: Optional[Tensor] = None
    outputs: Optional[Tensor] = None
    mean_scale: Optional[Tensor] = None
    var_factor: Optional[Tensor] = None
    part: Optional[Tensor] = None
    offset: Optional[Tensor] = None


class Replay(NamedTuple):
    """The moments of k iterations at today's weight.

    Attributes:
        mean, var (Tensor): Eq. (7), (8), (10), shape (k, C).
        mean_step (Tensor, optional): How far the mean has moved, shape
            (k, C). None: nothing moves.
        centred (Tensor, optional): The remembered outputs less their means,
            shape (k, P, C).
    """
    mean: Tensor
    var: Tensor
    mean_step: Optional[Tensor] = None
    centred: Optional[Tensor] = None


class Pooled(NamedTuple):
    """The moments of the window, Eq. (9)-(11).

    Attributes:
        mean, var (Tensor): Shape (C,).
        share (Tensor): Weight of an iteration in them, shape (C,).
        unused (Tensor): Whether an iteration has no weight, shape (k, C).
    """
    mean: Tensor
    var: Tensor
    share: Tensor
    unused: Tensor


def _as_it_is(values: Tensor) -> torch.autocast:
    """Autocast would run the products in half precision."""
    return torch.autocast(values.device.type, enabled=False)


@torch.no_grad()
def apply_filters(patches: Tensor, filters: Tensor) -> Tensor:
    """Outputs of a convolution at some positions.

    Args:
        patches (Tensor): Shape (..., groups, F).
        filters (Tensor): Shape (C, F).

    Returns:
        Tensor: Shape (..., C), in the dtype of the patches.
    """
    *shape, groups, length = patches.shape
    rows = patches.reshape(-1, groups, length)
    filters = filters.detach().to(patches.dtype).view(groups, -1, length)
    with _as_it_is(rows):
        if groups == 1:
            outputs = rows.squeeze(1) @ filters[0].t()
        else:
            outputs = torch.bmm(
                rows.transpose(0, 1), filters.transpose(1, 2)).transpose(0, 1)
    return outputs.reshape(*shape, -1)


@torch.no_grad()
def replay(memory: Memory,
           now: Optional[Tensor] = None,
           processes: Optional[Processes] = None) -> Replay:
    """Eq. (7), (8) and (10): the moments of past iterations, now.

    Args:
        memory (Memory): What is remembered.
        now (Tensor, optional): What today's filters make of the patches,
            shape (k, P, C); used up. None: the moments are used as they are.
        processes (Processes, optional): Who has the other parts. One
            collective.

    Returns:
        Replay: The moments at today's weight.
    """
    mean, var = memory.moments
    if now is None:
        return Replay(mean, var)
    step = now.sub_(memory.outputs)
    mean_step = _mean(step, memory.mean_scale)
    centred = memory.outputs - _mean(memory.outputs,
                                     memory.mean_scale).unsqueeze(1)
    var_step = _mean(step.mul_(centred), memory.mean_scale)
    var_step = var_step.mul_(memory.var_factor)
    if processes is not None:
        # About the mean of the whole batch.
        var_step = var_step + 2 * memory.offset * mean_step
        mean_step, var_step = processes.sum(
            torch.stack([mean_step, var_step]) * memory.part)
    var = torch.addcmul(var_step.add_(var), mean_step, mean_step, value=-1)
    return Replay(mean + mean_step, var.clamp_(min=0), mean_step, centred)


def _mean(values: Tensor, scale: Tensor) -> Tensor:
    """Mean over the positions, of shape (k, P, C)."""
    return values.sum(1).mul_(scale)


@torch.no_grad()
def pool(past: Replay,
         place: int,
         is_there: Union[bool, Tensor] = True) -> Pooled:
    r"""Eq. (9)-(11): the moments of the window.

    :math:`\bar\nu - \bar\mu^2` is the mean of :math:`\sigma^2_\tau +
    (\mu_\tau - \bar\mu)^2`. Every iteration has the same weight, whatever
    its batch size. A past iteration whose moments are not finite in a
    channel has no weight in it. The present one always has: the loss shows
    what is wrong with it.

    Args:
        past (Replay): Moments of the k iterations.
        place (int): Which of them is the present one.
        is_there (bool | Tensor): False if the present one is an empty batch.

    Returns:
        Pooled: Mean, biased variance and weights.
    """
    present = past.mean[place]
    values = present.new_empty((2, *past.mean.shape))
    # About the present mean, which is not far: nothing cancels.
    away = torch.sub(past.mean, present, out=values[0])
    square = torch.addcmul(past.var, away, away, out=values[1])
    unused = square - square != 0  # not finite
    if is_there is True:
        unused[place].fill_(False)
    else:
        unused[place] = ~is_there
    share = (len(away) - unused.sum(0, dtype=away.dtype)).reciprocal_()
    away, square = values.masked_fill_(unused, 0).sum(1).mul_(share)
    return Pooled(present + away,
                  torch.addcmul(square, away, away, value=-1), share, unused)


class _FollowFilters(Function):

    @staticmethod
    def forward(ctx, filters, memory, past, pooled, place, done):
        ctx.save_for_backward(memory.patches, past.centred)
        ctx.memory = memory._replace(patches=None, outputs=None)
        ctx.past = past._replace(centred=None)
        ctx.pooled = pooled
        ctx.place = place
        ctx.done = done
        ctx.dtype = filters.dtype
        return pooled.mean.detach(), pooled.var.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, grad_var):
        memory, past, pooled = ctx.memory, ctx.past, ctx.pooled
        patches, centred = ctx.saved_tensors
        ctx.done()
        # By the moments of each iteration, through Eq. (9)-(11); the present
        # one's are x's. The scale is that of Eq. (7).
        weight = pooled.share * memory.mean_scale
        weight[ctx.place].fill_(0)
        by_var = weight * grad_var
        by_mean = torch.addcmul(
            weight * grad_mean, by_var, past.mean - pooled.mean, value=2)
        # By the outputs at the positions, through Eq. (10), (8), (7).
        by_var = by_var.mul_(past.var > 0)
        by_mean = by_mean.addcmul_(by_var, past.mean_step, value=-2)
        if memory.part is not None:
            by_mean = (by_mean + 2 * by_var * memory.offset) * memory.part
            by_var = by_var * memory.part
        by_var = by_var * memory.var_factor
        # What is not used may be NaN, and 0 times it is to be 0.
        by_mean, by_var = (
            by.masked_fill_(pooled.unused, 0).unsqueeze(1)
            for by in (by_mean, by_var))
        by_output = torch.addcmul(by_mean, centred, by_var).flatten(0, 1)
        patches = patches.flatten(0, 1)
        groups = patches.size(1)
        with _as_it_is(patches):
            if groups == 1:
                grad = by_output.t() @ patches.squeeze(1)
            else:
                grad = torch.bmm(
                    by_output.unflatten(1, (groups, -1)).permute(1, 2, 0),
                    patches.transpose(0, 1)).flatten(0, 1)
        return grad.to(ctx.dtype), None, None, None, None, None


def follow_filters(filters: Tensor,
                   memory: Memory,
                   past: Replay,
                   pooled: Pooled,
                   place: int,
                   done: Callable[[], None] = lambda: None
                   ) -> Tuple[Tensor, Tensor]:
    r"""The pooled moments, as functions of today's filters.

    The paper's gradients flow "to the network weights and activations at the
    current iteration, :math:`\theta_t` and :math:`x_t`": Eq. (7), (8) are
    functions of :math:`\theta_t`. What was remembered is constant. The part
    of the present iteration's moments is not in this gradient; it is that of
    :func:`normalize` with ``share``.

    Args:
        filters (Tensor): Today's, shape (C, F), live to autograd.
        memory (Memory): What was replayed.
        past (Replay): What :func:`replay` gave.
        pooled (Pooled): What :func:`pool` gave.
        place (int): Which iteration is the present one.
        done (callable): Called once the backward pass needs the patches no
            more.

    Returns:
        tuple[Tensor, Tensor]: Mean and variance of shape (C,).
    """
    return _FollowFilters.apply(filters, memory, past, pooled, place, done)

