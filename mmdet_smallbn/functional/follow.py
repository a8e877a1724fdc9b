r"""The gradient of CBN's statistics by today's filters.

The paper's gradients flow "to the network weights and activations at the
current iteration, :math:`\theta_t` and :math:`x_t`" (arXiv:2002.05712, Sec.
3.2). The past's moments, Eq. (7) and (8), are functions of :math:`\theta_t`;
what is remembered is constant. One node of the autograd graph holds that for
all layers that were replayed together.
"""
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .replay import Memory, Pooled, Replay


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
        return (None, None, *(by if by is None else by.to(dtype)
                              for by, dtype in zip(by_filters, ctx.dtypes)))


class _Gradient:
    """From the sums of each layer's backward pass to its filters."""

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
