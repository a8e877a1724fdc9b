r"""CBN's statistics (arXiv:2002.05712), Eq. (7)-(11), in the paper's order.

A layer remembers a few positions of each past iteration: their input patches
p, and the outputs y of that iteration's filters. A replay applies the current
filters to the same patches. Each output changes by :math:`d_i = \langle p_i,
\theta_t\rangle - y_i`. To first order, the moments of that iteration change
by

.. math::
    \Delta\mu = \frac1P \sum_i d_i, \qquad
    \Delta\sigma^2 = \frac2{P - 1} \sum_i (y_i - \bar y)\, d_i.

These are Eq. (7) and (8), estimated from P positions, with the variance in
place of the mean square. Eq. (10), :math:`\max[\nu, \mu^2]`, becomes

.. math::
    \mu_{t-\tau}(\theta_t) = \mu + \Delta\mu, \qquad
    \sigma^2_{t-\tau}(\theta_t) = \max\left(
        \sigma^2 + \Delta\sigma^2 - \Delta\mu^2,\ 0\right).

If the weights have not changed, d is 0 and the moments are exact for any
number of positions. Only channel j's own filter changes channel j's moments
(Appendix B), and a convolution is linear in its filters. So stride, padding
and transposition do not matter here, and a bias is the weight of an input
that is always 1.

All functions take several layers together, concatenated along the channels.
C is the number of channels of all layers, and k is the number of past
iterations. Eq. (12) is :func:`mmdet_smallbn.functional.normalize`.
"""
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from .sync import Processes


class Memory(NamedTuple):
    """Remembered past iterations of one layer or several layers.

    Attributes:
        mean, var (Tensor): Means and biased variances, shape (C, k).
        outputs (Tensor): Remembered outputs y, shape (C, k, P). If an
            iteration has fewer positions, the rest is 0. If P is 0, the
            moments do not change.
        mean_scale, var_scale (float | Tensor): Factors of the sums in Eq. (7)
            and (8), numbers or of shape (C, k): 1 / P and 2 / (P - 1), or
            2 / P if all positions of the batch are remembered.
        part, offset (Tensor, optional): For a batch that processes share, of
            shape (C, k): this process's part of the batch, and the mean of
            this part minus the mean of the batch.
    """
    mean: Tensor
    var: Tensor
    outputs: Tensor
    mean_scale: Union[float, Tensor]
    var_scale: Union[float, Tensor]
    part: Optional[Tensor] = None
    offset: Optional[Tensor] = None


class Replay(NamedTuple):
    """Moments of past iterations at the current weights.

    Attributes:
        mean, var (Tensor): Eq. (7), (8), (10), shape (C, k).
        mean_step (Tensor): Change of the mean, shape (C, k).
        centred (Tensor): Remembered outputs minus their mean, (C, k, P).
    """
    mean: Tensor
    var: Tensor
    mean_step: Tensor
    centred: Tensor


class Pooled(NamedTuple):
    """Moments of the past part of a window.

    Attributes:
        moments (Tensor): Mean and biased variance, shape (2, C).
        share (Tensor): Weight of one iteration in the window, shape (C,).
        unused (Tensor): True if an iteration is left out, shape (C, k).
    """
    moments: Tensor
    share: Tensor
    unused: Tensor


def apply_filters(filters: Tensor, patches: Tensor, out: Tensor) -> Tensor:
    """Compute the outputs of a convolution at some positions.

    Args:
        filters (Tensor): Filters, shape (C, F).
        patches (Tensor): Input patches, shape (N, groups, F).
        out (Tensor): Tensor for the outputs, shape (C, N), in the dtype of
            the patches, also under autocast.

    Returns:
        Tensor: ``out``.
    """
    filters = filters.detach()
    if filters.dtype != patches.dtype:
        filters = filters.to(patches.dtype)
    groups = patches.size(1)
    if groups == 1:
        return torch.mm(filters, patches.squeeze(1).t(), out=out)
    torch.bmm(
        filters.unflatten(0, (groups, -1)), patches.permute(1, 2, 0),
        out=out.unflatten(0, (groups, -1)))
    return out


@torch.no_grad()
def replay(memory: Memory,
           now: Tensor,
           processes: Optional[Processes] = None) -> Replay:
    """Compute the moments at the current weights, Eq. (7), (8) and (10).

    Args:
        memory (Memory): The remembered iterations.
        now (Tensor): Outputs of the current filters for the same patches,
            shape (C, k, P). It is overwritten.
        processes (Processes, optional): The processes that share the batch.
            They run one collective.

    Returns:
        Replay: Moments at the current weights.
    """
    step = now.sub_(memory.outputs)
    mean_step = step.sum(2).mul_(memory.mean_scale)
    output_mean = memory.outputs.sum(2).mul_(memory.mean_scale)
    centred = memory.outputs - output_mean.unsqueeze(2)
    var_step = step.mul_(centred).sum(2).mul_(memory.var_scale)
    if processes is not None:
        # The change for this process's part, about the whole batch's mean.
        var_step.addcmul_(memory.offset, mean_step, value=2)
        mean_step, var_step = processes.sum(
            torch.stack([mean_step, var_step]).mul_(memory.part))
    var = (memory.var + var_step).addcmul_(mean_step, mean_step, value=-1)
    return Replay(memory.mean + mean_step, var.clamp_(min=0), mean_step,
                  centred)


@torch.no_grad()
def pool(past: Replay) -> Pooled:
    r"""Pool the past iterations alone, Eq. (9)-(11).

    :math:`\bar\nu - \bar\mu^2` is the mean of :math:`\sigma^2_\tau +
    (\mu_\tau - \bar\mu)^2`. Every iteration has the same weight, whatever
    its batch size. A channel leaves out an iteration if its moments there are
    not finite. :func:`mmdet_smallbn.functional.mix_moments` adds the present
    iteration with the weight ``share``. The present iteration always counts,
    so that non-finite values show in the loss.

    Args:
        past (Replay): Moments at the current weights.

    Returns:
        Pooled: Mean, biased variance and weights.
    """
    both = past.mean + past.var
    unused = both.sub_(both).ne(0)  # NaN is not equal to 0
    count = unused.logical_not().sum(1, keepdim=True, dtype=both.dtype)
    per_count = count.clamp(min=1).reciprocal_()
    mean = past.mean.masked_fill(unused, 0).sum(1, keepdim=True)
    mean.mul_(per_count)
    away = past.mean - mean
    var = torch.addcmul(past.var, away, away).masked_fill_(unused, 0)
    var = var.sum(1, keepdim=True).mul_(per_count)
    share = count.add_(1).reciprocal_().squeeze(1)
    return Pooled(torch.cat([mean, var]).view(2, -1), share, unused)
