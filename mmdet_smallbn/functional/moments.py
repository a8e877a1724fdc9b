"""Per-channel moments of a feature map, and how several are pooled."""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Per-channel mean and biased variance of one batch.

    The variance stands where the papers write the mean square: the two carry
    the same information, but ``E[x^2] - E[x]^2`` cancels in float32 once the
    mean is large against the deviation, and the variance does not.

    Attributes:
        mean (Tensor): Shape (C,).
        var (Tensor): Biased variance, shape (C,).
        count (int): Values behind each entry, N * H * W.
    """
    mean: Tensor
    var: Tensor
    count: int

    def unbiased_var(self) -> Optional[Tensor]:
        """Variance with Bessel's correction, shape (C,); None of one value."""
        if self.count == 1:
            return None
        return self.var * (self.count / (self.count - 1))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the moments of ``x``: float32, or float64 for float64."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else x.dtype


def batch_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel over (N, H, W).

    One fused pass. The result is in float32 for half-precision inputs and in
    the input's dtype otherwise. No gradient flows through it: the layers'
    closed-form backward accounts for it.

    Args:
        x (Tensor): Shape (N, C, H, W), not empty.

    Returns:
        Moments: Mean and variance of shape (C,), and the count N * H * W.
    """
    with torch.no_grad():
        running = (None, None)
        dtype = statistics_dtype(x)
        if dtype != x.dtype:
            # The kernel's results take the dtype of the running buffers:
            # these two only ask it for float32.
            running = tuple(x.new_zeros((2, x.size(1)), dtype=dtype))
        mean, var = torch.batch_norm_update_stats(x.detach(), *running, 0.)
    return Moments(mean, var, x.numel() // x.size(1))


def pool_moments(means: Tensor, variances: Tensor,
                 valid: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    r"""Mean and variance of the equal-weight mixture of several batches.

    .. math::
        \bar\mu = \frac1k\sum_\tau \mu_\tau, \qquad
        \bar\sigma^2 = \frac1k\sum_\tau
            \left[\sigma_\tau^2 + (\mu_\tau - \bar\mu)^2\right],

    which equals :math:`\bar\nu - \bar\mu^2` with
    :math:`\nu_\tau = \sigma_\tau^2 + \mu_\tau^2` (CBN, arXiv:2002.05712,
    Eq. 9-11), without its cancellation. Every batch has the same weight,
    whatever its size, as in the paper.

    Args:
        means (Tensor): Shape (k, C).
        variances (Tensor): Biased variances, shape (k, C).
        valid (Tensor): Boolean mask of shape (k, C): which entries count. At
            least one of each channel.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The pooled mean, the pooled biased
        variance and the weight 1 / k of one entry, each of shape (C,).
    """
    zero = means.new_zeros(())
    share = valid.sum(0).to(means.dtype).reciprocal()
    mean = torch.where(valid, means, zero).sum(0) * share
    scatter = variances + (means - mean).square()
    var = torch.where(valid, scatter, zero).sum(0) * share
    return mean, var, share
