"""How a batch's moments move with the weight of the convolution before it."""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .calls import LinearCall
from .moments import Moments


class AffineMoments(NamedTuple):
    r"""Moments as first-order functions of the convolution's weight.

    At the weight :math:`\theta`, with the mean of the batch (of all of it,
    where several processes share it) held fixed as the centre :math:`c`,

    .. math::
        \mu(\theta) = \text{offset}_\mu + \langle\partial\mu, \theta\rangle,
        \qquad
        s(\theta) = \text{offset}_s + \langle\partial s, \theta\rangle,

    where :math:`s = \text{mean}((x - c)^2)`. The offsets make both exact at
    the weight they were taken at, however the derivatives are rounded, and no
    past weight is needed. All in float32 or float64.

    Attributes:
        centre (Tensor): Shape (C,).
        mean_offset (Tensor): Shape (C,).
        square_offset (Tensor): Shape (C,).
        d_mean (Tensor): One patch for each group of output channels, shape
            (groups, F) with F = C_in / groups * kh * kw for convolutions.
        d_square (Tensor): Shape (C, F).
    """
    centre: Tensor
    mean_offset: Tensor
    square_offset: Tensor
    d_mean: Tensor
    d_square: Tensor


@torch.no_grad()
def affine_moments(x: Tensor,
                   moments: Moments,
                   call: LinearCall,
                   centre: Optional[Tensor] = None) -> AffineMoments:
    """The moments of ``x`` as functions of the weight that made it.

    Args:
        x (Tensor): Output of the convolution, shape (N, C, H, W).
        moments (Moments): Moments of ``x``.
        call (LinearCall): The call that made ``x``.
        centre (Tensor, optional): Shape (C,). None: the mean of ``x``.

    Returns:
        AffineMoments: Exact at the present weight.
    """
    if centre is None:
        centre = moments.mean
    d_mean, d_square = moment_derivatives(x, moments, call, centre)
    mean, square = inner_products(d_mean[None], d_square[None], call.filters)
    own_square = moments.var + (moments.mean - centre).square()
    return AffineMoments(centre, moments.mean - mean[0],
                         own_square - square[0], d_mean, d_square)


@torch.no_grad()
def moment_derivatives(x: Tensor,
                       moments: Moments,
                       call: LinearCall,
                       centre: Tensor,
                       positions: Optional[int] = None,
                       turn: int = 0) -> Tuple[Tensor, Tensor]:
    r"""Derivatives of the moments of ``x`` by the weight that made it.

    CBN (arXiv:2002.05712) Eq. (7), (8) and Appendix B. Only channel j's own
    filter moves channel j's moments, so with patches :math:`p_i` of the input

    .. math::
        \frac{\partial\mu_j}{\partial\theta_j} = \frac1m\sum_i p_i, \qquad
        \frac{\partial s_j}{\partial\theta_j}
            = \frac2m\sum_i (x_{ij} - c_j)\, p_i :

    the first is one patch for all channels of a group, the second one
    weight-gradient convolution. It multiplies nothing but a small step of the
    weight, and may be estimated from some positions: as twice the covariance
    of output and patches there.

    Args:
        x (Tensor): Output of the convolution, shape (N, C, H, W).
        moments (Moments): Moments of ``x``.
        call (LinearCall): The call that made ``x``.
        centre (Tensor): c, shape (C,).
        positions (int, optional): How many, about, the second is estimated
            from. None: all.
        turn (int): Other positions in each turn.

    Returns:
        tuple[Tensor, Tensor]: Shapes (groups, F) and (C, F), as in
        :class:`AffineMoments`.
    """
    # Autocast would run the products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        part = None if positions is None else call.part(x, positions, turn)
        if part is None:
            return _derivatives_of_all(x, moments, call, centre)
        return _derivatives_of_part(x, moments, call, centre, *part)


def _derivatives_of_part(x: Tensor, moments: Moments, call: LinearCall,
                         centre: Tensor, part: Tensor,
                         call_of_part: LinearCall) -> Tuple[Tensor, Tensor]:
    dtype = moments.mean.dtype
    d_mean = call.patch_sum(x.shape[2:], dtype) / moments.count
    part = part.to(dtype)
    part = part - part.mean((0, 2, 3), keepdim=True)
    d_square = call_of_part.products(part) * (2 * part.size(1) / part.numel())
    if centre is not moments.mean:
        d_square += _of_shift(moments.mean - centre, d_mean)
    return d_mean, d_square


def _derivatives_of_all(x: Tensor, moments: Moments, call: LinearCall,
                        centre: Tensor) -> Tuple[Tensor, Tensor]:
    dtype = moments.mean.dtype
    # 1 / m, half before and half after the sum: neither the terms underflow
    # in float16 nor, but for the largest maps, the sum overflows.
    scale = moments.count**-0.5
    rounded = centre.to(x.dtype)
    centred = (x - rounded.view(1, -1, 1, 1)) * scale
    patches, products = call.patch_sums(centred, dtype)
    d_mean = patches / moments.count
    d_square = products.to(dtype) * (2 * scale)
    if rounded.dtype != dtype:
        d_square += _of_shift(rounded.to(dtype) - centre, d_mean)
    return d_mean, d_square


def _of_shift(shift: Tensor, d_mean: Tensor) -> Tensor:
    """What a shift of the centred values adds to the second derivative."""
    by_group = 2 * shift.view(len(d_mean), -1, 1)
    return (by_group * d_mean.unsqueeze(1)).flatten(0, 1)


def inner_products(d_mean: Tensor, d_square: Tensor,
                   filters: Tensor) -> Tensor:
    """Inner products of k pairs of derivatives with filters.

    Args:
        d_mean (Tensor): Shape (k, groups, F).
        d_square (Tensor): Shape (k, C, F).
        filters (Tensor): Shape (C, F).

    Returns:
        Tensor: Shape (2, k, C).
    """
    k, groups, _ = d_mean.shape
    filters = filters.detach().to(d_mean.dtype)
    by_group = filters.view(groups, -1, filters.size(1)).transpose(1, 2)
    # Autocast would run the products in half precision.
    with torch.autocast(filters.device.type, enabled=False):
        mean = torch.bmm(d_mean.transpose(0, 1), by_group)
        square = torch.bmm(d_square.transpose(0, 1), filters.unsqueeze(2))
    return torch.stack([
        mean.transpose(0, 1).reshape(k, -1),
        square.squeeze(2).transpose(0, 1)
    ])


@torch.no_grad()
def moments_at_weight(past: AffineMoments,
                      filters: Tensor,
                      bias: Optional[Tensor] = None
                      ) -> Tuple[Tensor, Tensor]:
    r"""Yesterday's moments at today's weight, CBN Eq. (7) and (8).

    Args:
        past (AffineMoments): k of them, stacked along a new first dimension.
        filters (Tensor): Today's weight, a row for each channel, shape (C,
            F).
        bias (Tensor, optional): Today's offset of the mean, shape (C,), if
            the convolution's bias trains: the offset is the bias. None: it
            has not moved.

    Returns:
        tuple[Tensor, Tensor]: Means, and mean squares about the centres, both
        of shape (k, C).
    """
    mean, square = inner_products(past.d_mean, past.d_square, filters)
    # The bias moves the mean one to one, and the mean square about the
    # batch's own mean not at all, to first order.
    mean = mean + (past.mean_offset if bias is None else bias)
    return mean, past.square_offset + square


def variance_about(centre: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    r"""Biased variance from the mean square about a centre, CBN Eq. (10).

    :math:`\nu - \mu^2 = s - (\mu - c)^2`, and :math:`\max[\nu, \mu^2]` is its
    clamping at zero.

    Args:
        centre, mean, square (Tensor): Of the same shape.

    Returns:
        Tensor: Same shape.
    """
    away = mean - centre
    return torch.addcmul(square, away, away, value=-1).clamp_(min=0)
