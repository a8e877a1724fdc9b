r"""Gradient of CBN's statistics with respect to the current filters.

The paper's gradients flow "to the network weights and activations at the
current iteration, :math:`\theta_t` and :math:`x_t`" (arXiv:2002.05712, Sec.
3.2). The past moments, Eq. (7) and (8), are functions of :math:`\theta_t`,
and the remembered values are constants. One node of the autograd graph
computes this gradient for all layers that were replayed together.
"""
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .eager import run_eagerly
from .replay import Memory, Pooled, Replay


class Loan:
    """Patches that a later backward pass needs.

    They must not be overwritten before that pass.

    Args:
        patches (Tensor): Patches, shape (N, groups, F).

    Attributes:
        is_open (bool): True until the backward pass has run.
        given (tuple): Values from the layer's backward pass, all of shape
            (C,): the mean, the inverse standard deviation, and the factor
            that turns the sums of g and g * x_hat into the share of one
            iteration in the gradient.
    """

    def __init__(self, patches: Tensor) -> None:
        self.patches = patches
        self.is_open = True
        self._version = patches._version
        self.given: Optional[Tuple[Tensor, Tensor, Tensor]] = None

    def by_filters(self, by_output: Tensor) -> Tensor:
        """Return the filters' gradient, (C, F), from the outputs', (C, N).

        Raises:
            RuntimeError: If another forward pass has overwritten the patches.
        """
        self.is_open = False
        if self._version != self.patches._version:
            raise RuntimeError(
                'a second backward pass through CBN came after another '
                'forward pass of the layer, which has overwritten the patches '
                'that it needs. Run all backward passes of a forward pass '
                'before the next forward pass')
        groups, length = self.patches.shape[1:]
        if groups == 1:
            return torch.mm(by_output, self.patches.squeeze(1))
        found = torch.bmm(
            by_output.unflatten(0, (groups, -1)), self.patches.transpose(0, 1))
        return found.view(-1, length)


class Past(NamedTuple):
    """Past of one layer at the current weights.

    Attributes:
        moments (Tensor): Mean and biased variance of the past iterations,
            shape (2, C).
        share (Tensor): Weight of one iteration in the window, shape (C,).
        shift, scale (Tensor, optional): Zeros of shape (C,) in the autograd
            graph. To first order, a change of the current filters changes the
            layer's shift and scale through the past moments. Through these
            two zeros the gradient flows back to the filters.
        loan (Loan, optional): Patches and values that the gradient needs.
    """
    moments: Tensor
    share: Tensor
    shift: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    loan: Optional[Loan] = None


class _FollowFilters(Function):

    @staticmethod
    def forward(ctx, memory, past, pooled, loans, *filters):
        ctx.set_materialize_grads(False)
        # The backward pass does not need these large tensors.
        ctx.replayed = memory._replace(
            mean=None, var=None, outputs=None), past, pooled
        ctx.loans = loans
        ctx.dtypes = [f.dtype for f in filters]
        ctx.sizes = [len(f) for f in filters]
        shift, scale = torch.zeros_like(pooled.moments).unbind()
        return (*shift.split(ctx.sizes), *scale.split(ctx.sizes))

    @staticmethod
    @once_differentiable
    @run_eagerly
    def backward(ctx, *sums):
        count, shares = len(ctx.loans), ctx.replayed[-1].share
        # A layer that does not contribute to the loss has no sums.
        known = [
            shares.new_zeros(5, size).unbind() if pair[0] is None
            else (*loan.given, *pair) for size, loan, *pair in zip(
                ctx.sizes, ctx.loans, sums[:count], sums[count:])
        ]
        by_output = _by_outputs(*ctx.replayed, *map(torch.cat, zip(*known)))
        return (None, ) * 4 + tuple(
            None if sum_g is None else loan.by_filters(part).to(dtype)
            for sum_g, loan, part, dtype in zip(
                sums, ctx.loans, by_output.flatten(1).split(ctx.sizes),
                ctx.dtypes))


def _by_outputs(memory: Memory, past: Replay, pooled: Pooled, mean: Tensor,
                inv_std: Tensor, scale: Tensor, sum_g: Tensor,
                sum_gx: Tensor) -> Tensor:
    """Return the gradient with respect to the remembered outputs.

    It comes from the sums of the layers' backward passes, back through Eq.
    (12), (9)-(11), (10), (8), (7).

    Returns:
        Tensor: Gradient, shape (C, k, P).
    """
    # Gradients with respect to the mean and variance of one iteration.
    by_mean = sum_g.mul_(inv_std.neg().mul_(scale))
    by_var = sum_gx.mul_(inv_std).mul_(inv_std).mul_(scale).mul_(-0.5)
    # The window's mean is the centre of the variance, not the past's mean.
    past_mean = pooled.moments[0]
    by_mean.addcmul_(by_var, mean.sub_(past_mean), value=-2)
    by_mean, by_var = by_mean.unsqueeze(1), by_var.unsqueeze(1)
    kept = past.var.sign()  # 0 where Eq. (10) clamps
    away = past.mean - past_mean.unsqueeze(1)
    away.addcmul_(kept, past.mean_step, value=-1)
    if memory.part is not None:
        away.addcmul_(memory.offset, kept)
        by_mean, by_var = by_mean * memory.part, by_var * memory.part
    by_step = torch.addcmul(by_mean, away, by_var, value=2)
    by_step.mul_(memory.mean_scale)
    by_slope = kept.mul_(by_var).mul_(memory.var_scale)
    by_output = torch.addcmul(
        by_step.unsqueeze(2), past.centred, by_slope.unsqueeze(2))
    # An unused iteration may hold NaN, and 0 * NaN is not 0.
    return by_output.masked_fill_(pooled.unused.unsqueeze(2), 0)


def follow_filters(memory: Memory, past: Replay, pooled: Pooled,
                   sizes: Sequence[int], filters: Sequence[Tensor],
                   loans: Sequence[Loan]) -> List[Past]:
    """Split the past by layer, and connect it to the current filters.

    Args:
        memory (Memory): Memory of all layers.
        past (Replay): Result of :func:`replay`.
        pooled (Pooled): Result of :func:`pool`.
        sizes (Sequence[int]): Channels of each layer.
        filters (Sequence[Tensor]): Current filters of each layer, in the
            autograd graph, shape (C, F).
        loans (Sequence[Loan]): Patches of each layer, shape (k * P, groups,
            F). If empty, no gradient flows to the filters.

    Returns:
        list[Past]: One for each layer.
    """
    pasts = [Past(*own) for own in zip(pooled.moments.split(sizes, 1),
                                       pooled.share.split(sizes))]
    if not loans:
        return pasts
    with torch.enable_grad():
        zeros = _FollowFilters.apply(memory, past, pooled, loans, *filters)
    return [
        own._replace(shift=shift, scale=scale, loan=loan)
        for own, shift, scale, loan in zip(
            pasts, zeros, zeros[len(loans):], loans)
    ]
