r"""CBN's statistics (arXiv:2002.05712), Eq. (7)-(11), in the paper's order.

A layer remembers a few positions of each past iteration: their input patches
p, and the outputs y that the filters of that iteration made of them. To replay
them is to apply today's filters to the same patches. With the step of each
output, :math:`d_i = \langle p_i, \theta_t\rangle - y_i`, the moments of that
iteration move, to first order, by

.. math::
    \Delta\mu = \frac1P \sum_i d_i, \qquad
    \Delta\sigma^2 = \frac2{P - 1} \sum_i (y_i - \bar y)\, d_i,

which are Eq. (7) and (8), estimated from P positions, with the variance in
place of the mean square. Eq. (10), :math:`\max[\nu, \mu^2]`, reads

.. math::
    \mu_{t-\tau}(\theta_t) = \mu + \Delta\mu, \qquad
    \sigma^2_{t-\tau}(\theta_t) = \max\left(
        \sigma^2 + \Delta\sigma^2 - \Delta\mu^2,\ 0\right).

If the weights have not changed, d is 0 and the moments are exact, however few
positions there are. Only channel j's own filter moves channel j's moments
(Appendix B), and a convolution is linear in its filters. So stride, padding
and transposition do not matter here, and a bias is a filter's weight for an
input that is always 1.

All functions take several layers at once, side by side over their channels:
C is the number of channels of all of them, k the window size. Eq. (12) is
:func:`mmdet_smallbn.functional.normalize`.
"""
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .sync import Processes


class Memory(NamedTuple):
    """What layers remember of their last iterations.

    Attributes:
        moments (Tensor): Means and biased variances, shape (2, C, k).
        outputs (Tensor): Remembered outputs y, shape (C, k, P). If an
            iteration has fewer positions, the rest is 0. P may be 0: the
            moments do not move.
        scales (Tensor): Of the sums in Eq. (7) and (8), shape (2, C, k):
            1 / P and 2 / (P - 1), or 2 / P if the positions are all that the
            batch had.
        is_past (Tensor): Whether a place holds a past iteration, shape
            (C, k).
        parts (Tensor, optional): If processes share a batch, shape
            (2, C, k): the part of this process in it, and the distance from
            the batch's mean to that of this part.
    """
    moments: Tensor
    outputs: Tensor
    scales: Tensor
    is_past: Tensor
    parts: Optional[Tensor] = None


class Replay(NamedTuple):
    """Moments of past iterations at today's weight.

    Attributes:
        mean, var (Tensor): Eq. (7), (8), (10), shape (C, k).
        mean_step (Tensor): How far the mean has moved, shape (C, k).
        centred (Tensor): Remembered outputs less their mean, (C, k, P).
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
        used (Tensor): Whether an iteration counts, shape (C, k).
    """
    moments: Tensor
    share: Tensor
    used: Tensor


def apply_filters(filters: Tensor, patches: Tensor, out: Tensor) -> Tensor:
    """Outputs of a convolution at some positions.

    Args:
        filters (Tensor): Shape (C, F).
        patches (Tensor): Shape (N, groups, F).
        out (Tensor): Where to write the outputs, shape (C, N), in the dtype
            of the patches. Autocast has no say in it.

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
    """Eq. (7), (8) and (10).

    Args:
        memory (Memory): What is remembered.
        now (Tensor): What today's filters make of the patches, shape
            (C, k, P). It is overwritten.
        processes (Processes, optional): Who has the other parts. One
            collective.

    Returns:
        Replay: Moments at today's weight.
    """
    mean, var = memory.moments
    mean_scale, var_scale = memory.scales
    step = now.sub_(memory.outputs)
    mean_step = step.sum(2).mul_(mean_scale)
    output_mean = memory.outputs.sum(2).mul_(mean_scale)
    centred = memory.outputs - output_mean.unsqueeze(2)
    var_step = step.mul_(centred).sum(2).mul_(var_scale)
    if processes is not None:
        part, offset = memory.parts  # about the mean of the whole batch
        var_step.addcmul_(offset, mean_step, value=2)
        mean_step, var_step = processes.sum(
            torch.stack([mean_step, var_step]).mul_(part))
    var = (var + var_step).addcmul_(mean_step, mean_step, value=-1)
    return Replay(mean + mean_step, var.clamp_(min=0), mean_step, centred)


@torch.no_grad()
def pool(past: Replay, is_past: Tensor) -> Pooled:
    r"""Eq. (9)-(11), of the past iterations alone.

    :math:`\bar\nu - \bar\mu^2` is the mean of :math:`\sigma^2_\tau +
    (\mu_\tau - \bar\mu)^2`. Every iteration has the same weight, whatever
    its batch size. If an iteration's moments are not finite in a channel, it
    does not count there. The present iteration comes in by
    :func:`mmdet_smallbn.functional.mix_moments`, with the weight ``share``;
    it always counts, so that the loss shows what is wrong with it.

    Args:
        past (Replay): Moments at today's weight.
        is_past (Tensor): As in :class:`Memory`.

    Returns:
        Pooled: Mean, biased variance and weights.
    """
    both = past.mean + past.var
    used = both.sub_(both).eq(0).logical_and_(is_past)
    count = used.sum(1, dtype=both.dtype)
    per_count = count.clamp(min=1).reciprocal_().unsqueeze(1)
    unused = used.logical_not()
    mean = past.mean.masked_fill(unused, 0).sum(1, keepdim=True)
    mean.mul_(per_count)
    away = past.mean - mean
    var = torch.addcmul(past.var, away, away).masked_fill_(unused, 0)
    var = var.sum(1, keepdim=True).mul_(per_count)
    return Pooled(
        torch.cat([mean, var], 1).t(), count.add_(1).reciprocal_(), used)


class Loan:
    """Patches that a backward pass is going to need.

    Attributes:
        patches (Tensor): Shape (N, groups, F).
        is_open (bool): Whether the backward pass is still to come.
    """

    def __init__(self, patches: Tensor) -> None:
        self.patches = patches
        self.is_open = True
        self._version: Optional[int] = None
        self.given: Optional[Tuple[Tensor, Tensor, Tensor]] = None

    def seal(self) -> None:
        """From now on nobody may write to the patches."""
        self._version = self.patches._version

    def give(self, mean: Tensor, inv_std: Tensor, scale: Tensor) -> None:
        """What a layer's backward pass knows of its forward pass.

        Args:
            mean, inv_std (Tensor): What it normalised with, shape (C,).
            scale (Tensor): From its sums of g and g * x_hat to the part of
                one iteration in the gradient, shape (C,).
        """
        self.given = mean, inv_std, scale

    def close(self) -> None:
        """The backward pass is here.

        Raises:
            RuntimeError: If another forward pass has written to the patches.
        """
        self.is_open = False
        if self._version not in (None, self.patches._version):
            raise RuntimeError(
                'a graph with CBN cannot be walked a second time after '
                'another forward pass of the layer. Run all backward passes '
                'of a forward pass before the next one')


class Past(NamedTuple):
    """The past of one layer, at today's weight.

    Attributes:
        moments (Tensor): Mean and biased variance of the past iterations,
            shape (2, C).
        share (Tensor): Weight of one iteration in the window, shape (C,).
        shift, scale (Tensor, optional): Zeros of shape (C,), live to
            autograd. To first order, a change of today's filters changes the
            layer's shift and scale, by way of the past's moments. These two
            stand for that.
        loan (Loan, optional): What the gradient needs.
    """
    moments: Tensor
    share: Tensor
    shift: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    loan: Optional[Loan] = None


class Follower(NamedTuple):
    """A layer whose past follows today's filters in the backward pass.

    Attributes:
        filters (Tensor): Live to autograd, shape (C, F).
        patches (Tensor): Shape (k * P, groups, F).
    """
    filters: Tensor
    patches: Tensor


class _FollowFilters(Function):

    @staticmethod
    def forward(ctx, gradient, loans, *filters):
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        ctx.loans = loans
        ctx.dtypes = [f.dtype for f in filters]
        sizes = [len(f) for f in filters]
        zeros = gradient.pooled.moments.new_zeros(2, sum(sizes))
        return (*zeros[0].split(sizes), *zeros[1].split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *sums):
        count = len(ctx.loans)
        by_filters = ctx.gradient.by_filters(
            ctx.loans, list(zip(sums[:count], sums[count:])))
        return (None, None, *(by if by is None or by.dtype == dtype else by.to(dtype)
                              for by, dtype in zip(by_filters, ctx.dtypes)))


class _Gradient:
    r"""The gradient of the pooled moments by today's filters.

    The paper's gradients flow "to the network weights and activations at the
    current iteration, :math:`\theta_t` and :math:`x_t`": Eq. (7), (8) are
    functions of :math:`\theta_t`. What is remembered is constant. The present
    iteration's own moments are no part of this gradient.
    """

    def __init__(self, memory: Memory, past: Replay, pooled: Pooled,
                 channels: List[slice]) -> None:
        self.pooled = pooled
        self._centred = past.centred
        self._channels = channels
        self._coefficients = self._of_outputs(memory, past, pooled)

    @staticmethod
    @torch.no_grad()
    def _of_outputs(memory: Memory, past: Replay,
                    pooled: Pooled) -> Tuple[Tensor, Tensor, Tensor]:
        """From the gradient by one iteration's part to that by its outputs.

        An output's gradient is ``a * by_mean + (2 * b + c * centred) *
        by_var``. Each has shape (C, k). Through Eq. (9)-(11), (10), (8), (7).
        """
        kept = past.var.sign()  # 0 where Eq. (10) clamps
        away = past.mean - pooled.moments[0].unsqueeze(1)
        a, c = memory.scales
        b = away.addcmul_(kept, past.mean_step, value=-1)
        a, c = a.clone(), c * kept
        if memory.parts is not None:
            part, offset = memory.parts
            b.addcmul_(offset, kept)
            a, c = a.mul_(part), c.mul_(part)
        return a, b.mul_(a), c

    def by_filters(self, loans: Sequence[Loan],
                   sums: Sequence[tuple]) -> List[Optional[Tensor]]:
        """Gradient by each layer's filters; None if no sums came to it."""
        live = [i for i, pair in enumerate(sums) if pair[0] is not None]
        if not live:
            return [None] * len(sums)
        pasts = torch.cat([
            self.pooled.moments[0, self._channels[i]] for i in live])
        mean, inv_std, scale, sum_g, sum_gx = (
            torch.cat(values) for values in zip(*(
                (*loans[i].given, *sums[i]) for i in live)))
        by_mean = sum_g.mul_(inv_std.neg().mul_(scale))
        by_var = sum_gx.mul_(inv_std).mul_(inv_std).mul_(scale).mul_(-0.5)
        # Moments are pooled about the mean of the window, not of its past.
        by_mean.addcmul_(by_var, mean.sub_(pasts), value=-2)
        a, b, c, centred, used = (
            self._of(live, values)
            for values in (*self._coefficients, self._centred,
                           self.pooled.used))
        by_mean, by_var = by_mean.unsqueeze(1), by_var.unsqueeze(1)
        by_mean = (a * by_mean).addcmul_(b, by_var, value=2)
        by_var = c * by_var
        by_output = torch.addcmul(
            by_mean.unsqueeze(2), centred, by_var.unsqueeze(2))
        # What does not count may be NaN, and 0 times it is to be 0.
        by_output.masked_fill_(used.logical_not().unsqueeze(2), 0)
        found: List[Optional[Tensor]] = [None] * len(sums)
        start = 0
        for i in live:
            loans[i].close()
            stop = start + len(sums[i][0])
            found[i] = _by_filters(by_output[start:stop].flatten(1),
                                   loans[i].patches)
            start = stop
        return found

    def _of(self, live: List[int], values: Tensor) -> Tensor:
        if len(live) == len(self._channels) and (
                sum(c.stop - c.start for c in self._channels) == len(values)):
            return values
        return torch.cat([values[self._channels[i]] for i in live])


def _by_filters(by_output: Tensor, patches: Tensor) -> Tensor:
    """From the gradient by outputs, (C, N), to that by filters, (C, F)."""
    groups, length = patches.shape[1:]
    found = patches.new_empty(len(by_output), length)
    if groups == 1:
        return torch.mm(by_output, patches.squeeze(1), out=found)
    torch.bmm(
        by_output.unflatten(0, (groups, -1)), patches.transpose(0, 1),
        out=found.unflatten(0, (groups, -1)))
    return found


def follow_filters(memory: Memory, past: Replay, pooled: Pooled,
                   channels: Sequence[slice],
                   followers: Sequence[Optional[Follower]]) -> List[Past]:
    """Hand each layer its past, as a function of today's filters.

    Args:
        memory (Memory): What was replayed, of all layers.
        past (Replay): What :func:`replay` gave.
        pooled (Pooled): What :func:`pool` gave.
        channels (Sequence[slice]): Those of each layer.
        followers (Sequence[Follower, optional]): None: the gradient does not
            flow to the layer's filters.

    Returns:
        list[Past]: Of each layer.
    """
    pasts = [
        Past(pooled.moments[:, own], pooled.share[own]) for own in channels]
    live = [i for i, follower in enumerate(followers) if follower is not None]
    if not live:
        return pasts
    loans = [Loan(followers[i].patches) for i in live]
    gradient = _Gradient(memory, past, pooled, [channels[i] for i in live])
    with torch.enable_grad():
        zeros = _FollowFilters.apply(gradient, loans,
                                     *(followers[i].filters for i in live))
    for place, (i, loan) in enumerate(zip(live, loans)):
        pasts[i] = pasts[i]._replace(
            shift=zeros[place], scale=zeros[len(live) + place], loan=loan)
    return pasts
