"""Normalisation with given statistics, and its backward in closed form."""
from typing import Callable, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .moments import (Moments, average_groups, example_moments, mix_moments,
                      pool_groups, statistics_dtype)

# From this batch's means of g and of g * x_hat, where g is the gradient by
# the normalised x_hat, to the values that the backward uses in their place.
# None for the first: it is zero, the mean is not subtracted.
GradientStatistics = Callable[[Tensor, Tensor], Tuple[Optional[Tensor],
                                                      Tensor]]


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _batch_norm(x, mean, var, weight, bias, eps):
    # Half-precision parameters beside float32 statistics are refused by the
    # fused kernel: they go in as float32, the output stays x.dtype.
    if mean.dtype != x.dtype:
        weight, bias = (p if p is None else p.to(mean.dtype)
                        for p in (weight, bias))
    return F.batch_norm(x, mean, var, weight, bias, False, 0., eps)


class _Normalize(Function):

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps, share, gradient, count):
        wide = weight if weight is None else weight.to(mean.dtype)
        ctx.save_for_backward(x, mean, torch.rsqrt(var + eps), wide, share)
        ctx.eps = eps
        ctx.gradient = gradient
        ctx.count = count
        if x.numel() == 0:
            return torch.empty_like(x)
        return _batch_norm(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, inv_std, weight, share = ctx.saved_tensors
        need_x, need_mean, _, need_weight, need_bias = (
            ctx.needs_input_grad[:5])
        g_scale = None  # of the sums below, where they are not g's
        if x.numel() == 0:  # the fused kernel divides by the count
            dweight, dbias = torch.zeros_like(mean), torch.zeros_like(mean)
            dx, sums = grad, (dbias, dweight)
            if ctx.gradient is not None:  # other processes may wait for it
                sums = ctx.gradient(*sums)
                sums = _sums(ctx, *sums) if need_mean else None
        elif ctx.gradient is None:
            dx, dweight, dbias = _backward_of_share(
                grad, x, mean, inv_std, weight, share, ctx.eps,
                [need_x, need_weight or need_mean, need_bias or need_mean])
            sums, g_scale = (dbias, dweight), weight
        else:
            dx, dweight, dbias, sums = _backward_with(ctx, grad, x, mean,
                                                      inv_std, weight, share)
        dmean = dvar = None
        if need_mean:
            slope = inv_std if g_scale is None else inv_std * g_scale
            slope = -slope
            dmean = slope * sums[0]
            dvar = slope.mul_(inv_std).mul_(sums[1]).mul_(0.5)
        return (dx if need_x else None, dmean, dvar,
                dweight if need_weight else None, dbias if need_bias else None,
                None, None, None, None)


def _sums(ctx, mean_g, mean_gx):
    """Sums of g and g * x_hat over all that the means are over."""
    return (None if mean_g is None else mean_g * ctx.count,
            mean_gx * ctx.count)


def _backward_of_share(grad, x, mean, inv_std, weight, share, eps, need):
    # BatchNorm's fused backward at the pooled statistics sends the whole
    # gradient of mean and variance to this batch. It owns `share` of it:
    # dx = share * dx_batch_norm + (1 - share) * weight * inv_std * grad.
    scale = weight
    if share is not None:
        scale = share if weight is None else share * weight
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, mean, inv_std, True, eps, need)
    if share is not None and need[0]:
        rest = (1 - share) * inv_std
        if weight is not None:
            rest = rest * weight
        dx.addcmul_(grad, _per_channel(rest))
    return dx, dweight, dbias


def _backward_with(ctx, grad, x, mean, inv_std, weight, share):
    # dx = inv_std * (g - mean_g - x_hat * mean_gx), g = weight * grad.
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inv_std, True, ctx.eps,
        [False, True, True])
    scale = inv_std
    per_value = x.size(1) / x.numel()
    mean_g, mean_gx = dbias * per_value, dweight * per_value
    if weight is not None:
        scale = scale * weight
        mean_g, mean_gx = mean_g * weight, mean_gx * weight
    mean_g, mean_gx = ctx.gradient(mean_g, mean_gx)
    sums = _sums(ctx, mean_g, mean_gx) if ctx.needs_input_grad[1] else None
    if share is not None:
        mean_g, mean_gx = mean_g * share, mean_gx * share
    slope = -inv_std.square() * mean_gx
    if mean_g is None:
        dx = x * _per_channel(slope)
    else:
        offset = -inv_std * mean_g - slope * mean
        dx = torch.addcmul(_per_channel(offset), x, _per_channel(slope))
    # Beside float32 statistics half precision has become float32.
    return (dx.addcmul_(grad, _per_channel(scale)).to(x.dtype), dweight, dbias,
            sums)


def normalize(x: Tensor,
              mean: Tensor,
              var: Tensor,
              weight: Optional[Tensor] = None,
              bias: Optional[Tensor] = None,
              eps: float = 1e-5,
              share: Optional[Tensor] = None,
              gradient: Optional[GradientStatistics] = None,
              count: Union[int, Tensor, None] = None) -> Tensor:
    r"""Normalise with given statistics, in both passes.

    .. math::
        \hat x = \frac{x - \bar\mu}{\sqrt{\bar\sigma^2 + \epsilon}}, \qquad
        y = \gamma \hat x + \beta.

    Batch normalisation has two statistics in the forward pass and two in the
    backward one (MABN, arXiv:2001.06838, Sec. 3.1). With
    :math:`g = \gamma\,\partial L / \partial y` and the means over the batch
    :math:`\bar g` of :math:`g` and :math:`\bar\Psi` of :math:`g\hat x`:

    .. math::
        \frac{\partial L}{\partial x} = \frac{1}{\bar\sigma}
            \left[g - \bar g - \hat x\,\bar\Psi\right], \qquad
        \frac{\partial L}{\partial \gamma} = \sum \frac{\partial L}
            {\partial y}\,\hat x, \qquad
        \frac{\partial L}{\partial \beta} = \sum \frac{\partial L}
            {\partial y}.

    What stands for :math:`\bar g` and :math:`\bar\Psi` is

    - by default this batch's means: the forward statistics are its own;
    - with ``gradient``, what it makes of them: a moving average, a sum over
      groups or processes;
    - with ``share``, that part of them: the forward statistics are those of a
      pool in which this batch has the weight ``share``, 1 / k for one of k
      iterations (CBN, arXiv:2002.05712, Eq. 12).

    ``mean`` and ``var`` may be functions of something else, too, such as the
    rest of a pool. To that flows the whole gradient by them,

    .. math::
        \frac{\partial L}{\partial\bar\mu} = -\frac1{\bar\sigma} \sum g,
        \qquad
        \frac{\partial L}{\partial\bar\sigma^2} =
            -\frac1{2\bar\sigma^2} \sum g \hat x,

    which must not lead back to ``x``.

    Args:
        x (Tensor): Shape (N, C, H, W).
        mean (Tensor): Mean, shape (C,), or (N, C) for statistics of each
            example.
        var (Tensor): Biased variance, same shape.
        weight (Tensor, optional): Scale, shape (C,).
        bias (Tensor, optional): Shift, shape (C,).
        eps (float): Added to the variance, inside the root.
        share (Tensor, optional): Weight of this batch in the pool, shape
            (C,).
        gradient (callable, optional): From the batch's means of g and of
            g * x_hat, in the shape of ``mean``, to the values to use. Called
            once a backward pass.
        count (int | Tensor, optional): Values a channel behind what
            ``gradient`` gives, for the gradient by ``mean`` and ``var``.

    Returns:
        Tensor: Same shape and dtype as ``x``.
    """
    if mean.dim() == 1:
        return _Normalize.apply(x, mean, var, weight, bias, eps, share,
                                gradient, count)
    return _normalize_examples(x, mean, var, weight, bias, eps, gradient)


def _normalize_examples(x, mean, var, weight, bias, eps, gradient):
    """Each channel of each example is a channel to the fused kernels."""
    n, c, h, w = x.shape
    shape = mean.shape

    def of_examples(mean_g: Tensor, mean_gx: Tensor):
        pooled = gradient(mean_g.view(shape), mean_gx.view(shape))
        return tuple(v if v is None else v.flatten() for v in pooled)

    channels_last = (
        x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous())
    weight, bias = (p if p is None else p.repeat(n) for p in (weight, bias))
    out = _Normalize.apply(
        x.reshape(1, n * c, h, w), mean.flatten(), var.flatten(), weight, bias,
        eps, None, of_examples, None)
    # Not a view to autograd: what follows in place, behind activation
    # checkpointing, would be refused.
    out = torch.ops.aten._unsafe_view(out, x.shape)
    if channels_last:
        out = out.contiguous(memory_format=torch.channels_last)
    return out


def renormalization(mean: Optional[Tensor], var: Tensor,
                    target_mean: Optional[Tensor], target_var: Tensor,
                    eps: float, r_max: float,
                    d_max: float) -> Tuple[Tensor, Optional[Tensor]]:
    r"""Factor and shift from one normalisation to another, clipped.

    Batch Renormalization (arXiv:1702.03275), Algorithm 1; MABN
    (arXiv:2001.06838), Eq. (14) and (19):

    .. math::
        r = \text{clip}\left(\frac{\sigma}{\hat\sigma},
            \frac{1}{r_{max}}, r_{max}\right), \qquad
        d = \text{clip}\left(\frac{\mu - \hat\mu}{\hat\sigma},
            -d_{max}, d_{max}\right),

    with :math:`\sigma = \sqrt{\text{var} + \epsilon}`, so that without
    clipping :math:`r\hat x + d` is :math:`x` normalised by the targets.

    Args:
        mean, var (Tensor): What x is normalised with, shape (C,). No mean:
            none is subtracted.
        target_mean, target_var (Tensor): Where the result should be, shape
            (C,).
        eps (float): Added to both variances, inside the root.
        r_max (float): At least 1.
        d_max (float): At least 0.

    Returns:
        tuple[Tensor, Tensor]: r and d, shape (C,), constants to autograd; no
        d without a mean.
    """
    with torch.no_grad():
        inv_target = torch.rsqrt(target_var.to(var.dtype) + eps)
        r = (torch.sqrt(var + eps) * inv_target).clamp(1 / r_max, r_max)
        d = None
        if mean is not None:
            d = ((mean - target_mean) * inv_target).clamp(-d_max, d_max)
    return r, d


def fold_groups(mean: Tensor, var: Tensor,
                num_groups: Optional[int]) -> Tuple[Tensor, Tensor]:
    """Moments of groups of channels, given back to each channel.

    Args:
        mean (Tensor): Shape (C,).
        var (Tensor): Biased variance, shape (C,).
        num_groups (int, optional): Groups of neighbouring channels. None:
            each channel by itself.

    Returns:
        tuple[Tensor, Tensor]: Shape (C,), constant in each group; in float32
        at least if there are groups.
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
    r"""Normalise with moving averages, and each example's own moments.

    Inference example weighting (arXiv:1906.03548, Eq. 3):

    .. math::
        \mu = (1 - \alpha)\,m_x + \alpha\,E[x], \qquad
        \sigma^2 = (1 - \alpha)\,m_{x^2} + \alpha\,E[x^2] - \mu^2,

    where the second moments are kept as variances. With
    :math:`\alpha = 0` this is batch normalisation's evaluation, an affine map
    of each channel; with groups and :math:`\alpha = 1`, group normalisation.
    Gradients flow through the example's own part.

    Args:
        x (Tensor): Shape (N, C, H, W).
        mean (Tensor): Moving average :math:`m_x` of the mean, shape (C,).
        var (Tensor): :math:`m_{x^2} - m_x^2`, shape (C,).
        weight (Tensor, optional): Scale, shape (C,).
        bias (Tensor, optional): Shift, shape (C,).
        eps (float): Added to the variance, inside the root.
        example_weight (float): :math:`\alpha`, from 0 to 1.
        num_groups (int, optional): Groups of neighbouring channels that all
            moments are over. None: each channel by itself.
        centered (bool): False: there is no mean to subtract, ``mean`` is 0
            and ``var`` the mean square; so it is for the example, :math:`\mu`
            is 0.

    Returns:
        Tensor: Same shape and dtype as ``x``.
    """
    # Half-precision features beside float32 parameters are refused there.
    if example_weight == 1 and centered and x.numel() and (
            weight is None or weight.dtype == x.dtype):
        return torch.group_norm(x, num_groups or int(mean.numel()), weight,
                                bias, eps)
    if example_weight and _is_exporting():
        return _weigh_examples_plainly(x, mean, var, weight, bias, eps,
                                       example_weight, num_groups, centered)
    mean, var = fold_groups(mean, var, num_groups)
    if not example_weight:
        return _batch_norm(x, mean, var, weight, bias, eps)
    n, c = x.shape[:2]

    def average(values: Tensor, repeats: int = 1) -> Tensor:
        return average_groups(values, repeats * (num_groups or c), 1)

    own = example_moments(x)
    if not centered:
        own = Moments(torch.zeros_like(own.mean), own.mean_square(), own.count)
    own = pool_groups(own, average)
    given = (v.to(own[0].dtype).expand(n, c) for v in (mean, var))
    mean, var = mix_moments(*given, *own, example_weight)

    def gradient(mean_g: Tensor, mean_gx: Tensor):
        both = average(torch.cat([mean_g, mean_gx], 1), 2) * example_weight
        mean_g, mean_gx = both.chunk(2, 1)
        return (mean_g if centered else None), mean_gx

    return normalize(x, mean, var, weight, bias, eps, gradient=gradient)


def _is_exporting() -> bool:
    """Whether this runs to be written down, for ONNX or by torch.export."""
    by_compiler = getattr(
        getattr(torch, 'compiler', None), 'is_exporting', lambda: False)
    return torch.onnx.is_in_onnx_export() or by_compiler()


def _weigh_examples_plainly(x, mean, var, weight, bias, eps, example_weight,
                            num_groups, centered):
    """What :func:`normalize_for_inference` does, in common operators.

    Other runtimes have neither the fused kernel of the moments nor our
    autograd function. Slower here: each operator is a pass over the features.
    """
    groups = num_groups or int(mean.numel())
    values = x.to(statistics_dtype(x)).reshape(x.size(0), groups, -1)
    mean, var = (v.to(values.dtype).view(groups, -1) for v in (mean, var))
    of_groups = mean.mean(1, keepdim=True)
    var = (var + (mean - of_groups).square()).mean(1)
    mean = of_groups.squeeze(1)
    own_mean = values.mean(2) if centered else mean
    own_var = (values - own_mean.unsqueeze(-1)).square().mean(2)
    mean, var = mix_moments(mean, var, own_mean, own_var, example_weight)
    out = (values - mean.unsqueeze(-1)) * torch.rsqrt(var + eps).unsqueeze(-1)
    out = out.reshape(x.shape)
    if weight is not None:
        out = out * _per_channel(weight)
    if bias is not None:
        out = out + _per_channel(bias)
    return out.to(x.dtype)
