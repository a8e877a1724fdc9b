"""Per-channel moments of a feature map, and how several are pooled."""
import math
from typing import Callable, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

# From this batch's means of g and of g * x_hat, where g is the gradient by
# the normalised x_hat, to the values that the backward uses in their place.
# None for the first: it is zero, the mean is not subtracted.
GradientStatistics = Callable[[Optional[Tensor], Tensor],
                              Tuple[Optional[Tensor], Tensor]]


class Moments(NamedTuple):
    """Per-channel mean and biased variance of one batch.

    The variance stands where the papers write the mean square: the two carry
    the same information, but ``E[x^2] - E[x]^2`` cancels in float32 once the
    mean is large against the deviation, and the variance does not.

    Attributes:
        mean (Tensor): Shape (C,), or (N, C) of each example by itself.
        var (Tensor): Biased variance, same shape.
        count (int | Tensor): Values behind each entry, N * H * W or H * W. A
            scalar tensor where several processes share the batch.
    """
    mean: Tensor
    var: Tensor
    count: Union[int, Tensor]

    def over_examples(self) -> 'Moments':
        """From those of each example, (N, C), to those of the batch, (C,)."""
        n, c = self.mean.shape
        if n == 0:
            return _no_moments(self.mean, (c, ))
        mean = self.mean.mean(0)
        away = self.mean - mean
        var = torch.addcmul(self.var, away, away).mean(0)
        return Moments(mean, var, n * self.count)

    def mean_square(self) -> Tensor:
        """Mean of the squares, same shape."""
        return self.var + self.mean.square()

    def unbiased_var(self) -> Tensor:
        """Variance with Bessel's correction; NaN of one value."""
        if isinstance(self.count, int) and self.count == 1:
            return torch.full_like(self.var, math.nan)
        return self.var * (self.count / (self.count - 1))


def _no_moments(like: Tensor, shape: Tuple[int, ...]) -> Moments:
    zeros = like.new_zeros(shape, dtype=statistics_dtype(like))
    return Moments(zeros, zeros, 0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the moments of ``x``: float32, or float64 for float64."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else x.dtype


def batch_moments(x: Tensor,
                  running_mean: Optional[Tensor] = None,
                  running_var: Optional[Tensor] = None,
                  momentum: float = 0.) -> Moments:
    """Mean and biased variance of each channel over (N, H, W).

    One fused pass. The result is in float32 for half-precision inputs and in
    the input's dtype otherwise. No gradient flows through it: the layers'
    closed-form backward accounts for it.

    Args:
        x (Tensor): Shape (N, C, H, W). Of an empty one the moments are 0,
            with a count of 0.
        running_mean, running_var (Tensor, optional): To update on the way, as
            ``nn.BatchNorm2d`` does; in the dtype of the moments.
        momentum (float): Weight of this batch in them.

    Returns:
        Moments: Mean and variance of shape (C,), and the count N * H * W.
    """
    if x.numel() == 0:
        return _no_moments(x, (x.size(1), ))
    with torch.no_grad():
        dtype = statistics_dtype(x)
        if running_mean is None and dtype != x.dtype:
            # The kernel's results take the dtype of the running buffers:
            # these two only ask it for float32.
            running_mean, running_var = x.new_zeros((2, x.size(1)),
                                                    dtype=dtype)
        mean, var = torch.batch_norm_update_stats(
            x.detach(), running_mean, running_var, momentum)
    return Moments(mean, var, x.numel() // x.size(1))


def example_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel of each example, over (H, W).

    As :func:`batch_moments`, but every example by itself.

    Args:
        x (Tensor): Shape (N, C, H, W). Of an empty one the moments are 0,
            with a count of 0.

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
    r"""Mean and variance of a weighted mixture of batches.

    .. math::
        \bar\mu = \sum_\tau w_\tau \mu_\tau, \qquad
        \bar\sigma^2 = \sum_\tau w_\tau
            \left[\sigma_\tau^2 + (\mu_\tau - \bar\mu)^2\right],

    which equals :math:`\bar\nu - \bar\mu^2` with
    :math:`\nu_\tau = \sigma_\tau^2 + \mu_\tau^2` (as CBN, arXiv:2002.05712,
    Eq. 9-11, writes it), without its cancellation.

    Args:
        means (Tensor): Shape (k, ...).
        variances (Tensor): Biased variances, same shape.
        weights (Tensor): Weights, not negative, of a shape that broadcasts to
            it; brought to a sum of 1 here. What has the weight 0 may be NaN.

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
    """Two batches' moments mixed: :func:`pool_moments` of two.

    Args:
        moments (Tensor): Mean and biased variance of the first, shape
            (2, ...).
        new (Tensor): Of the second, same shape.
        weight (float | Tensor): Weight of the second, from 0 to 1.

    Returns:
        Tensor: Mean and biased variance of the mixture, same shape.
    """
    mixed = torch.lerp(moments, new, weight)
    mean, var = mixed.unbind()
    # Their product is weight * (1 - weight) times the squared distance.
    var.addcmul_(new[0] - mean, mean - moments[0])
    return mixed


@torch.no_grad()
def move_towards(average: Tensor, value: Tensor, weight,
                 finite_only: bool) -> None:
    """Let a moving average take in a value, in place.

    Args:
        average (Tensor): Shape (C,).
        value (Tensor): Same shape, in any dtype.
        weight (float | Tensor): Of the value.
        finite_only (bool): Whether what is not finite is left out.
    """
    now = average.to(value.dtype)
    if finite_only:
        # x - x is 0 for what is finite alone.
        value = torch.where(value - value == 0, value, now)
    if now is average:
        average.lerp_(value, weight)
    else:
        average.copy_(torch.lerp(now, value, weight))


def average_groups(values: Tensor, num_groups: int,
                   examples_per_group: int) -> Tensor:
    """Average over groups of examples and channels, given back to each.

    The examples are taken in their order. The last group of them may be
    smaller, and a batch smaller than a group is one group.

    Args:
        values (Tensor): Shape (N, C).
        num_groups (int): Groups of neighbouring channels; divides C.
        examples_per_group (int): Examples in a group.

    Returns:
        Tensor: Shape (N, C), constant in each group.
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
    """Mean and variance of groups of examples and channels.

    Args:
        moments (Moments): Of each example, shape (N, C), over equally many
            values.
        average (callable): From values of shape (N, C) to their averages over
            the groups, given back to each; as :func:`average_groups`.

    Returns:
        tuple[Tensor, Tensor]: Mean and biased variance, shape (N, C).
    """
    mean = average(moments.mean)
    return mean, average(moments.var + (moments.mean - mean).square())
