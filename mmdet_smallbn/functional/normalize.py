"""Normalisation with given statistics and a closed-form backward pass."""
from typing import Optional, Union

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .follow import Past
from .moments import GradientStatistics


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def scale_and_shift(x: Tensor, mean: Tensor, var: Tensor,
                    weight: Optional[Tensor], bias: Optional[Tensor],
                    eps: float) -> Tensor:
    """Run the forward pass of :func:`normalize`; the gradient is torch's."""
    # The fused kernel refuses half-precision parameters with float32
    # statistics, so it gets float32 parameters. The output stays in x.dtype.
    if mean.dtype != x.dtype:
        weight, bias = (p if p is None else p.to(mean.dtype)
                        for p in (weight, bias))
    return torch.batch_norm(x, weight, bias, mean, var, False, 0., eps,
                            torch.backends.cudnn.enabled)


class _Normalize(Function):

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, shift, scale, eps, gradient,
                centered, count, loan):
        wide = weight if weight is None else weight.to(mean.dtype)
        spread = torch.rsqrt(var + eps) if centered else var
        ctx.save_for_backward(x, mean, spread, wide)
        ctx.eps = eps
        ctx.gradient = gradient
        ctx.centered = centered
        ctx.count = count
        ctx.loan = loan
        if x.numel() == 0:
            return torch.empty_like(x)
        return scale_and_shift(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need_x, _, _, need_weight, need_bias = ctx.needs_input_grad[:5]
        saved = ctx.saved_tensors
        x, mean, inv_std, _ = saved
        if not ctx.centered:
            dx, dweight, dbias = _backward_uncentred(ctx, grad, *saved)
        elif callable(ctx.gradient) or x.numel() == 0:
            dx, dweight, dbias, sums = _backward_with(ctx, grad, *saved)
            scale = torch.ones_like(mean) if sums is not None else None
        else:
            dx, dweight, dbias, scale = _backward_of_share(ctx, grad, *saved)
            sums = dbias, dweight
        dshift = dscale = None
        if ctx.loan is not None:
            ctx.loan.given = mean, inv_std, scale
            dshift, dscale = sums
        return (dx if need_x else None, None, None,
                dweight if need_weight else None, dbias if need_bias else None,
                dshift, dscale, None, None, None, None, None)


def _backward_of_share(ctx, grad, x, mean, inv_std, weight):
    # BatchNorm's fused backward pass with the pooled statistics gives this
    # batch the whole gradient of mean and variance. Only `share` of it is the
    # batch's own:
    # dx = share * dx_batch_norm + (1 - share) * weight * inv_std * grad.
    share, scale = ctx.gradient, weight
    if share is not None:
        scale = share if weight is None else share * weight
    need = ctx.needs_input_grad
    follows = ctx.loan is not None
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        grad, x, scale, None, None, mean, inv_std, True, ctx.eps,
        [need[0], need[3] or follows, need[4] or follows])
    if share is not None and need[0]:
        rest = (1 if weight is None else weight) - scale
        dx.addcmul_(grad, _per_channel(rest.mul_(inv_std)))
    return dx, dweight, dbias, scale


def _backward_uncentred(ctx, grad, x, mean, var, weight):
    # dx = (g - z * mean_gz) / sqrt(var + eps); the kernel computes the first
    # term.
    if x.numel() == 0:
        dx, dweight, dbias = grad, torch.zeros_like(var), torch.zeros_like(var)
    else:
        # The CUDA kernel requires the tensors that training would have saved.
        nothing = mean.new_empty(0)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, nothing, nothing, False, ctx.eps,
            [True, True, ctx.needs_input_grad[4]])
    per_value = x.size(1) / max(x.numel(), 1)
    _, mean_gz = ctx.gradient(
        None, dweight * (per_value if weight is None else weight * per_value))
    if x.numel():
        slope = mean_gz / (var + ctx.eps)
        dx.addcmul_(x, _per_channel(slope), value=-1)
    return dx, dweight, dbias


def _backward_with(ctx, grad, x, mean, inv_std, weight):
    # dx = inv_std * (g - mean_g - x_hat * mean_gx), g = weight * grad.
    if x.numel():
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inv_std, True, ctx.eps,
            [False, True, True])
    else:  # the fused kernel would divide by a count of 0
        dweight, dbias = torch.zeros_like(mean), torch.zeros_like(mean)
    scale, per_value = inv_std, x.size(1) / max(x.numel(), 1)
    if weight is not None:
        scale, per_value = scale * weight, weight * per_value
    mean_g, mean_gx = dbias * per_value, dweight * per_value
    if callable(ctx.gradient):  # also if x is empty: it may be a collective
        mean_g, mean_gx = ctx.gradient(mean_g, mean_gx)
    sums = None
    if ctx.loan is not None:
        sums = mean_g * ctx.count, mean_gx * ctx.count
    dx = grad
    if x.numel():
        slope = inv_std * mean_gx * inv_std
        if mean_g is None:
            dx = grad * _per_channel(scale)
        else:
            offset = torch.addcmul(
                inv_std * mean_g, slope, mean, value=-1)
            dx = torch.addcmul(_per_channel(-offset), grad,
                               _per_channel(scale))
        # With float32 statistics a half-precision dx has become float32.
        dx = dx.addcmul_(x, _per_channel(slope), value=-1).to(x.dtype)
    return dx, dweight, dbias, sums


def normalize(x: Tensor,
              mean: Tensor,
              var: Tensor,
              weight: Optional[Tensor] = None,
              bias: Optional[Tensor] = None,
              eps: float = 1e-5,
              gradient: Union[Tensor, GradientStatistics, None] = None,
              centered: bool = True,
              past: Optional[Past] = None,
              count: Union[int, Tensor, None] = None) -> Tensor:
    r"""Normalise with given statistics in the forward and backward pass.

    .. math::
        \hat x = \frac{x - \bar\mu}{\sqrt{\bar\sigma^2 + \epsilon}}, \qquad
        y = \gamma \hat x + \beta.

    Batch normalisation has two statistics in the forward pass and two in the
    backward pass (MABN, arXiv:2001.06838, Sec. 3.1). Let
    :math:`g = \gamma\,\partial L / \partial y`, and let :math:`\bar g` and
    :math:`\bar\Psi` be the means of :math:`g` and :math:`g\hat x` over the
    batch. Then:

    .. math::
        \frac{\partial L}{\partial x} = \frac{1}{\bar\sigma}
            \left[g - \bar g - \hat x\,\bar\Psi\right], \qquad
        \frac{\partial L}{\partial \gamma} = \sum \frac{\partial L}
            {\partial y}\,\hat x, \qquad
        \frac{\partial L}{\partial \beta} = \sum \frac{\partial L}
            {\partial y}.

    ``gradient`` selects the values of :math:`\bar g` and :math:`\bar\Psi`:

    - None: this batch's means. The forward statistics are its own.
    - A tensor: this factor times the batch's means. The forward statistics
      are those of a pool in which this batch has that weight, 1 / k for one
      of k iterations (CBN, arXiv:2002.05712, Eq. 12).
    - A function: its result for the batch's means, such as a moving average
      or a sum over groups or processes.

    ``mean`` and ``var`` are constants to autograd, with one exception:
    through ``shift`` and ``scale`` of ``past`` the gradient flows to the
    current filters.

    Args:
        x (Tensor): Input, shape (N, C, H, W).
        mean (Tensor): Mean, shape (C,), or (N, C) for statistics of each
            example.
        var (Tensor): Biased variance, same shape.
        weight (Tensor, optional): Scale, shape (C,).
        bias (Tensor, optional): Shift, shape (C,).
        eps (float): Added to the variance, inside the root.
        gradient (Tensor | callable, optional): Weight of this batch in the
            statistics, shape (C,), or a function from the batch's means of g
            and g * x_hat, in the shape of ``mean``, to the values to use. It
            is called once in a backward pass.
        centered (bool): If False, ``mean`` is 0 and ``var`` is the mean
            square, and ``gradient`` is called with None for the mean of g.
        past (Past, optional): Past iterations that the statistics contain.
        count (int | Tensor, optional): Number of values in each mean that
            ``gradient`` returns. Required with ``past``.

    Returns:
        Tensor: Same shape and dtype as ``x``.
    """
    if mean.dim() == 1:
        # The kernels require contiguous statistics.
        mean, var = mean.contiguous(), var.contiguous()
        shift = scale = loan = None
        if past is not None and torch.is_grad_enabled():
            shift, scale, loan = past.shift, past.scale, past.loan
        return _Normalize.apply(x, mean, var, weight, bias, shift, scale, eps,
                                gradient, centered, count, loan)
    return _normalize_examples(x, mean, var, weight, bias, eps, gradient)


def _normalize_examples(x, mean, var, weight, bias, eps, gradient):
    """Normalise with each channel of each example as a kernel's channel."""
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
        None, None, eps, None if gradient is None else of_examples, True, None,
        None)
    # This must not be a view for autograd: behind activation checkpointing,
    # autograd refuses an in-place operation on a view.
    out = torch.ops.aten._unsafe_view(out, x.shape)
    if channels_last:
        out = out.contiguous(memory_format=torch.channels_last)
    return out
