"""Renormalisation: change from one pair of statistics to another."""
from typing import Optional, Tuple

import torch
from torch import Tensor


def renormalization(mean: Optional[Tensor], var: Tensor,
                    target_mean: Optional[Tensor], target_var: Tensor,
                    eps: float, r_max: float,
                    d_max: float) -> Tuple[Tensor, Optional[Tensor]]:
    r"""Return the clipped factor and shift from one normalisation to another.

    Batch Renormalization (arXiv:1702.03275), Algorithm 1; MABN
    (arXiv:2001.06838), Eq. (14) and (19):

    .. math::
        r = \text{clip}\left(\frac{\sigma}{\hat\sigma},
            \frac{1}{r_{max}}, r_{max}\right), \qquad
        d = \text{clip}\left(\frac{\mu - \hat\mu}{\hat\sigma},
            -d_{max}, d_{max}\right),

    with :math:`\sigma = \sqrt{\text{var} + \epsilon}`. Without clipping,
    :math:`r\hat x + d` is :math:`x` normalised with the targets.

    Args:
        mean, var (Tensor): Statistics that x is normalised with, shape (C,).
            ``mean`` is None if no mean is subtracted.
        target_mean, target_var (Tensor): Statistics to change to, shape (C,).
        eps (float): Added to both variances, inside the root.
        r_max (float): Largest r, at least 1.
        d_max (float): Largest d, at least 0.

    Returns:
        tuple[Tensor, Tensor]: r and d, shape (C,), constants to autograd. d
        is None if ``mean`` is None.
    """
    with torch.no_grad():
        var, target = torch._foreach_add([var, target_var.to(var.dtype)], eps)
        r = var.div_(target).sqrt_().clamp_(1 / r_max, r_max)
        d = None
        if mean is not None:
            d = (mean - target_mean) * target.rsqrt_()
            d = d.clamp_(-d_max, d_max)
    return r, d
