"""Normalisation in evaluation."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .moments import (Moments, average_groups, example_moments, mix_moments,
                      pool_groups, statistics_dtype)
from .normalize import normalize, scale_and_shift


def fold_groups(mean: Tensor, var: Tensor,
                num_groups: Optional[int]) -> Tuple[Tensor, Tensor]:
    """Pool the moments of each group of channels.

    Args:
        mean (Tensor): Mean, shape (C,).
        var (Tensor): Biased variance, shape (C,).
        num_groups (int, optional): Groups of neighbouring channels. None:
            each channel is its own group.

    Returns:
        tuple[Tensor, Tensor]: Mean and biased variance, shape (C,), constant
        in each group. With groups they are at least in float32.
    """
    if num_groups is None or num_groups == mean.numel():
        return mean, var
    # Squares of half-precision means would overflow.
    dtype = statistics_dtype(mean)
    folded = pool_groups(
        Moments(mean[None].to(dtype), var[None].to(dtype), 1),
        lambda values: average_groups(values, num_groups, 1))
    return folded[0][0], folded[1][0]


def normalize_for_inference(x: Tensor,
                            mean: Tensor,
                            var: Tensor,
                            weight: Optional[Tensor] = None,
                            bias: Optional[Tensor] = None,
                            eps: float = 1e-5,
                            example_weight: float = 0.,
                            num_groups: Optional[int] = None,
                            centered: bool = True) -> Tensor:
    r"""Normalise with moving averages and each example's own moments.

    Inference example weighting (arXiv:1906.03548, Eq. 3):

    .. math::
        \mu = (1 - \alpha)\,m_x + \alpha\,E[x], \qquad
        \sigma^2 = (1 - \alpha)\,m_{x^2} + \alpha\,E[x^2] - \mu^2,

    where the arguments hold variances in place of second moments. With
    :math:`\alpha = 0` this is the evaluation of batch normalisation, an
    affine map of each channel. With groups and :math:`\alpha = 1` it is group
    normalisation. Gradients flow through the example's own moments.

    Args:
        x (Tensor): Shape (N, C, H, W).
        mean (Tensor): Moving average :math:`m_x` of the mean, shape (C,).
        var (Tensor): :math:`m_{x^2} - m_x^2`, shape (C,).
        weight (Tensor, optional): Scale, shape (C,).
        bias (Tensor, optional): Shift, shape (C,).
        eps (float): Added to the variance, inside the root.
        example_weight (float): :math:`\alpha`, from 0 to 1.
        num_groups (int, optional): Groups of neighbouring channels; all
            moments are over a group. None: each channel is its own group.
        centered (bool): If False, no mean is subtracted: ``mean`` is 0 and
            ``var`` is the mean square. The same holds for the example's own
            moments, so :math:`\mu` is 0.

    Returns:
        Tensor: Same shape and dtype as ``x``.
    """
    # torch.group_norm does not accept half-precision features with float32
    # parameters.
    if example_weight == 1 and centered and x.numel() and (
            weight is None or weight.dtype == x.dtype):
        return torch.group_norm(x, num_groups or int(mean.numel()), weight,
                                bias, eps)
    mean, var = fold_groups(mean, var, num_groups)
    if not example_weight:
        return scale_and_shift(x, mean, var, weight, bias, eps)
    n, c = x.shape[:2]

    def average(values: Tensor, repeats: int = 1) -> Tensor:
        return average_groups(values, repeats * (num_groups or c), 1)

    own = example_moments(x)
    if not centered:
        own = Moments(torch.zeros_like(own.mean), own.mean_square(), own.count)
    own = pool_groups(own, average)
    given = (v.to(own[0].dtype).expand(n, c) for v in (mean, var))
    mean, var = mix_moments(
        torch.stack(list(given)), torch.stack(own), example_weight)

    def gradient(mean_g: Tensor, mean_gx: Tensor):
        both = average(torch.cat([mean_g, mean_gx], 1), 2) * example_weight
        mean_g, mean_gx = both.chunk(2, 1)
        return (mean_g if centered else None), mean_gx

    return normalize(x, mean, var, weight, bias, eps, gradient=gradient)
