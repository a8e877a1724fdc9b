"""Per-channel moments of feature maps, and their pooling."""
import math
from typing import Callable, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

# A function from the batch's means of g and g * x_hat to the values that the
# backward pass uses in their place. g is the gradient with respect to the
# normalised x_hat. None for the first mean: it is 0, because the gradient's
# mean is not subtracted.
GradientStatistics = Callable[[Optional[Tensor], Tensor],
                              Tuple[Optional[Tensor], Tensor]]


class Moments(NamedTuple):
    """Per-channel mean and biased variance of one batch.

    The papers write the mean square where this class holds the variance. Both
    carry the same information, but ``E[x^2] - E[x]^2`` loses its digits in
    float32 if the mean is large compared to the standard deviation.

    Attributes:
        mean (Tensor): Mean, shape (C,), or (N, C) for each example.
        var (Tensor): Biased variance, same shape.
        count (int | Tensor): Number of values in each mean, N * H * W or
            H * W. A scalar tensor if several processes share the batch.
    """
    mean: Tensor
    var: Tensor
    count: Union[int, Tensor]

    def over_examples(self) -> 'Moments':
        """Pool the moments of all examples, (N, C), to the batch's, (C,)."""
        n, c = self.mean.shape
        if n == 0:
            return _no_moments(self.mean, (c, ))
        mean = self.mean.mean(0)
        away = self.mean - mean
        var = torch.addcmul(self.var, away, away).mean(0)
        return Moments(mean, var, n * self.count)

    def mean_square(self) -> Tensor:
        """Return the mean of the squares, same shape."""
        return self.var + self.mean.square()

    def unbiased_var(self) -> Tensor:
        """Return the unbiased variance; NaN if there is only one value."""
        if isinstance(self.count, int) and self.count == 1:
            return torch.full_like(self.var, math.nan)
        return self.var * (self.count / (self.count - 1))


def _no_moments(like: Tensor, shape: Tuple[int, ...]) -> Moments:
    zeros = like.new_zeros(shape, dtype=statistics_dtype(like))
    return Moments(zeros, zeros, 0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the moments: float32, or float64 for float64."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else x.dtype


def batch_moments(x: Tensor,
                  running_mean: Optional[Tensor] = None,
                  running_var: Optional[Tensor] = None,
                  momentum: float = 0.) -> Moments:
    """Return mean and biased variance of each channel over (N, H, W).

    It is one fused pass. The result is in float32 for half-precision inputs
    and in the input's dtype otherwise. No gradient flows through it, because
    the layers compute their backward pass in closed form.

    Args:
        x (Tensor): Shape (N, C, H, W). If it is empty, the moments are 0 and
            the count is 0.
        running_mean, running_var (Tensor, optional): Running statistics that
            are updated in the same pass, as ``nn.BatchNorm2d`` does; in the
            dtype of the moments.
        momentum (float): Weight of this batch in the running statistics.

    Returns:
        Moments: Mean and variance of shape (C,), and the count N * H * W.
    """
    if x.numel() == 0:
        return _no_moments(x, (x.size(1), ))
    with torch.no_grad():
        dtype = statistics_dtype(x)
        if running_mean is None and dtype != x.dtype:
            # The kernel's results have the dtype of the running buffers. These
            # two buffers only make it float32.
            running_mean, running_var = x.new_zeros((2, x.size(1)),
                                                    dtype=dtype)
        mean, var = torch.batch_norm_update_stats(
            x.detach(), running_mean, running_var, momentum)
    return Moments(mean, var, x.numel() // x.size(1))


def example_moments(x: Tensor) -> Moments:
    """Return mean and biased variance of each example's channels over (H, W).

    As :func:`batch_moments`, but for each example alone.

    Args:
        x (Tensor): Shape (N, C, H, W). If it is empty, the moments are 0 and
            the count is 0.

    Returns:
        Moments: Mean and variance of shape (N, C), and the count H * W.
    """
    n, c, h, w = x.shape
    if x.numel() == 0:
        return _no_moments(x, (n, c))
    moments = batch_moments(x.detach().reshape(1, n * c, h, w))
    return Moments(
        moments.mean.view(n, c), moments.var.view(n, c), h * w)


def pool_moments(means: Tensor, variances: Tensor,
                 weights: Tensor) -> Tuple[Tensor, Tensor]:
    r"""Return mean and variance of a weighted mixture of batches.

    .. math::
        \bar\mu = \sum_\tau w_\tau \mu_\tau, \qquad
        \bar\sigma^2 = \sum_\tau w_\tau
            \left[\sigma_\tau^2 + (\mu_\tau - \bar\mu)^2\right],

    which equals :math:`\bar\nu - \bar\mu^2` with
    :math:`\nu_\tau = \sigma_\tau^2 + \mu_\tau^2` (CBN, arXiv:2002.05712, Eq.
    9-11), but without the cancellation in float32.

    Args:
        means (Tensor): Means, shape (k, ...).
        variances (Tensor): Biased variances, same shape.
        weights (Tensor): Non-negative weights of a shape that broadcasts to
            the same shape. They are normalised to a sum of 1. Entries with
            the weight 0 may be NaN.

    Returns:
        tuple[Tensor, Tensor]: The pooled mean and biased variance, without
        the first dimension. NaN where all weights are 0.
    """
    # 0 * NaN is NaN.
    used = weights > 0
    means = torch.where(used, means, 0.)
    total = weights.sum(0)
    mean = (weights * means).sum(0) / total
    away = means - mean
    scatter = torch.where(used, torch.addcmul(variances, away, away), 0.)
    return mean, (weights * scatter).sum(0) / total


def mix_moments(moments: Tensor, new: Tensor, weight) -> Tensor:
    """Return the moments of a mixture of two batches.

    It is :func:`pool_moments` of two batches.

    Args:
        moments (Tensor): Mean and biased variance of the first batch, shape
            (2, ...).
        new (Tensor): The same of the second batch, same shape.
        weight (float | Tensor): Weight of the second batch, from 0 to 1.

    Returns:
        Tensor: Mean and biased variance of the mixture, same shape.
    """
    mixed = torch.lerp(moments, new, weight)
    mean, var = mixed.unbind()
    # The product is weight * (1 - weight) * squared distance of the means.
    var.addcmul_(new[0] - mean, mean - moments[0])
    return mixed


@torch.no_grad()
def move_towards(average: Tensor, value: Tensor, weight,
                 finite_only: bool) -> None:
    """Update a moving average with a value, in place.

    Args:
        average (Tensor): Moving average, shape (C,).
        value (Tensor): New value, same shape, any dtype.
        weight (float | Tensor): Weight of the value.
        finite_only (bool): If True, non-finite values are left out.
    """
    now = average.to(value.dtype)
    if finite_only:
        # x - x is 0 only if x is finite.
        value = torch.where(value - value == 0, value, now)
    if now is average:
        average.lerp_(value, weight)
    else:
        average.copy_(torch.lerp(now, value, weight))


def average_groups(values: Tensor, num_groups: int,
                   examples_per_group: int) -> Tensor:
    """Replace each value by the average of its group.

    A group holds some examples and some channels. Examples are grouped in
    their order. The last group may be smaller, and a batch smaller than a
    group is one group.

    Args:
        values (Tensor): Values, shape (N, C).
        num_groups (int): Groups of neighbouring channels; must divide C.
        examples_per_group (int): Examples in a group.

    Returns:
        Tensor: Averages, shape (N, C), constant in each group.
    """
    n, c = values.shape
    rest = n % examples_per_group
    if rest and rest < n:
        return torch.cat([
            average_groups(part, num_groups, examples_per_group)
            for part in (values[:-rest], values[-rest:])
        ])
    blocks = values.view(-1, rest or examples_per_group, num_groups,
                         c // num_groups)
    average = blocks.mean((1, 3), keepdim=True)
    return average.expand_as(blocks).reshape(n, c)


def pool_groups(moments: Moments,
                average: Callable[[Tensor], Tensor]) -> Tuple[Tensor, Tensor]:
    """Return mean and variance of groups of examples and channels.

    Args:
        moments (Moments): Moments of each example, shape (N, C), all with the
            same count.
        average (callable): Function that replaces each value of shape (N, C)
            by the average of its group, such as :func:`average_groups`.

    Returns:
        tuple[Tensor, Tensor]: Mean and biased variance, shape (N, C).
    """
    mean = average(moments.mean)
    return mean, average(moments.var + (moments.mean - mean).square())
