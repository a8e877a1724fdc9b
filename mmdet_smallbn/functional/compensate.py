r"""How a batch's moments move with the weight of the convolution before it.

CBN (arXiv:2002.05712) Eq. (7), (8) and Appendix B. Only channel j's own
filter moves channel j's moments, so with patches :math:`p_i` of the input,
the mean :math:`\mu` and the mean square :math:`s` about a centre c that is
held fixed,

.. math::
    \frac{\partial\mu_j}{\partial\theta_j} = \frac1m\sum_i p_i, \qquad
    \frac{\partial s_j}{\partial\theta_j}
        = \frac2m\sum_i (x_{ij} - c_j)\, p_i :

the first is one patch for all channels of a group, the second one
weight-gradient convolution. They multiply nothing but a small step of the
weight, and where there are many may be estimated from some positions. An
estimate can be kept as its factors, the patches at P positions and their
weights :math:`w_{ij} = \frac2{P - 1} (x_{ij} - \bar x_j)`: P (groups F + C)
numbers where the derivatives are (groups + C) F.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .calls import ConvCall, LinearCall
from .moments import Moments

# What has no more positions and no more weights is taken whole.
_WHOLE_POSITIONS = 1024
_WHOLE_WEIGHTS = 2**16


def _as_it_is(values: Tensor) -> torch.autocast:
    """Autocast would run the products in half precision."""
    return torch.autocast(values.device.type, enabled=False)


def is_sampled(x: Tensor, call: LinearCall, positions: Optional[int]) -> bool:
    """Whether derivatives are estimated: where it is asked, of what is large.

    Args:
        x (Tensor): Output of the convolution, shape (N, C, H, W).
        call (LinearCall): The call that made ``x``. Deformable convolutions
            are never sampled.
        positions (int, optional): How many to estimate from.
    """
    if positions is None or not isinstance(call, ConvCall):
        return False
    found = x.numel() // x.size(1)
    return found > positions and (found > _WHOLE_POSITIONS or
                                  call.weight.numel() > _WHOLE_WEIGHTS)


def factors_are_smaller(call: LinearCall, positions: int) -> bool:
    """Whether a sample's factors take less memory than derivatives."""
    channels, length = call.filters.shape
    return positions * (call.groups * length + channels) < length * (
        call.groups + channels)


@torch.no_grad()
def moment_derivatives(x: Tensor,
                       moments: Moments,
                       call: LinearCall,
                       centre: Optional[Tensor] = None,
                       positions: Optional[int] = None,
                       turn: int = 0) -> Tuple[Tensor, Tensor]:
    """Derivatives of the moments of ``x`` by the weight that made it.

    Args:
        x (Tensor): Output of the convolution, shape (N, C, H, W). Of an empty
            one the derivatives are 0.
        moments (Moments): Moments of ``x``.
        call (LinearCall): The call that made ``x``.
        centre (Tensor, optional): c, shape (C,). None: the mean of ``x``.
        positions (int, optional): How many they are estimated from, at least
            2, where :func:`is_sampled`. None: all.
        turn (int): Other positions in each turn.

    Returns:
        tuple[Tensor, Tensor]: In float32 or float64, of the mean one patch
        for each group of output channels, shape (groups, F) with
        F = C_in / groups * kh * kw for convolutions, and of the mean square,
        shape (C, F).
    """
    if not is_sampled(x, call, positions):
        with _as_it_is(x):
            return _derivatives_of_all(x, moments, call, centre)
    shift = None if centre is None else moments.mean - centre
    dtype = moments.mean.dtype
    patches = call.sample(x, positions, turn).to(dtype)
    values = patch_values(patches[None], call.filters, dtype)[0]
    weights = sample_weights(values, values.mean(0), shift)
    patches = patches.flatten(2)
    by_group = weights.view(positions, call.groups, -1).permute(1, 2, 0)
    with _as_it_is(x):
        d_square = torch.bmm(by_group, patches.transpose(0, 1))
    return patches.mean(0), d_square.flatten(0, 1)


def _derivatives_of_all(x: Tensor, moments: Moments, call: LinearCall,
                        centre: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    dtype = moments.mean.dtype
    if x.numel() == 0:
        length = call.filters.size(1)
        return (moments.mean.new_zeros((call.groups, length)),
                moments.mean.new_zeros((x.size(1), length)))
    if centre is None:
        centre = moments.mean
    # 1 / m, half before and half after the sum: neither the terms underflow
    # in float16 nor, but for the largest maps, the sum overflows.
    scale = moments.count**-0.5
    rounded = centre.to(x.dtype)
    centred = (x - rounded.view(1, -1, 1, 1)) * scale
    patches, products = call.patch_sums(centred, dtype)
    d_mean = patches / moments.count
    d_square = products.to(dtype) * (2 * scale)
    if rounded.dtype != dtype:
        shift = 2 * (rounded.to(dtype) - centre).view(len(d_mean), -1, 1)
        d_square += (shift * d_mean.unsqueeze(1)).flatten(0, 1)
    return d_mean, d_square


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
    k, groups, length = d_mean.shape
    filters = filters.detach().to(d_mean.dtype)
    with _as_it_is(filters):
        mean = torch.bmm(
            d_mean.transpose(0, 1),
            filters.view(groups, -1, length).transpose(1, 2))
        square = torch.bmm(d_square.transpose(0, 1), filters.unsqueeze(2))
    return torch.stack([
        mean.transpose(0, 1).reshape(k, -1),
        square.squeeze(2).transpose(0, 1)
    ])


def patch_values(patches: Tensor, filters: Tensor,
                 dtype: torch.dtype) -> Tensor:
    """What filters make of patches, without a bias.

    Args:
        patches (Tensor): Of k samples, shape (k, P, groups, C_in / groups,
            kh, kw).
        filters (Tensor): Shape (C, F).
        dtype (torch.dtype): To compute in.

    Returns:
        Tensor: Shape (k, P, C).
    """
    k, p, groups = patches.shape[:3]
    channels, length = filters.shape
    rows = patches.to(dtype).reshape(k * p, groups, length)
    filters = filters.detach().to(dtype).view(groups, -1, length)
    with _as_it_is(rows):
        values = torch.bmm(rows.transpose(0, 1), filters.transpose(1, 2))
    return values.transpose(0, 1).reshape(k, p, channels)


def sample_weights(values: Tensor,
                   mean: Tensor,
                   shift: Optional[Tensor] = None,
                   out: Optional[Tensor] = None) -> Tensor:
    """Weights w of a sample's patches in the derivative of the mean square.

    Args:
        values (Tensor): Outputs at the positions, shape (P, C), with a bias
            or without.
        mean (Tensor): Their mean over the positions, shape (C,).
        shift (Tensor, optional): From the centre to the batch's mean, shape
            (C,). None: 0.
        out (Tensor, optional): Where to write them.

    Returns:
        Tensor: Shape (P, C).
    """
    p = len(values)
    weights = torch.sub(values, mean, out=out).mul_(2 / (p - 1))
    return weights if shift is None else weights.add_(shift, alpha=2 / p)


def sample_products(values: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
    """As :func:`inner_products`, of k samples.

    Args:
        values (Tensor): What the filters make of the patches, shape (k, P,
            C); used up.
        mean (Tensor): Their means over the positions, shape (k, C).
        weights (Tensor): Shape (k, P, C).

    Returns:
        Tensor: Shape (2, k, C).
    """
    return torch.stack([mean, values.mul_(weights).sum(1)])


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
