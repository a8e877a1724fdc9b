"""Normalisation with given statistics, and its backward in closed form."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


class _Normalize(Function):

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps, share):
        # Half-precision parameters beside float32 statistics are refused by
        # the fused kernel: they go in as float32, the output stays x.dtype.
        weight_, bias_ = (p if p is None else p.to(mean.dtype)
                          for p in (weight, bias))
        ctx.save_for_backward(x, mean, torch.rsqrt(var + eps), weight_, share)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight_, bias_, False, 0., eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, inv_std, weight, share = ctx.saved_tensors
        # BatchNorm's fused backward at the pooled statistics sends the whole
        # gradient of mean and variance to this batch. It owns `share` of it:
        # dx = share * dx_batch_norm + (1 - share) * weight * inv_std * grad.
        scale = weight
        if share is not None:
            scale = share if weight is None else share * weight
        need = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, inv_std, True, ctx.eps, need)
        if share is not None and need[0]:
            rest = (1 - share) * inv_std
            if weight is not None:
                rest = rest * weight
            dx.addcmul_(grad, _per_channel(rest))
        return (dx if need[0] else None, None, None,
                dweight if need[1] else None, dbias if need[2] else None,
                None, None)


def normalize(x: Tensor,
              mean: Tensor,
              var: Tensor,
              weight: Optional[Tensor] = None,
              bias: Optional[Tensor] = None,
              eps: float = 1e-5,
              share: Optional[Tensor] = None) -> Tensor:
    r"""Normalise with given statistics, of which this batch is a part.

    .. math::
        \hat x = \frac{x - \bar\mu}{\sqrt{\bar\sigma^2 + \epsilon}}, \qquad
        y = \gamma \hat x + \beta.

    The statistics are those of a pool of batches in which ``x`` has the weight
    ``share``, 1 / k for one of k iterations (CBN, arXiv:2002.05712, Eq. 12).
    Gradients flow through this batch's part of them, the others are
    constants. With m values a channel:

    .. math::
        \frac{\partial L}{\partial x} = \frac{\gamma}{\bar\sigma}
        \left[dy - \frac{\sum dy}{km}
        - \hat x\,\frac{\sum dy\,\hat x}{km}\right].

    Args:
        x (Tensor): Shape (N, C, H, W).
        mean (Tensor): Pooled mean, shape (C,).
        var (Tensor): Pooled biased variance, shape (C,).
        weight (Tensor, optional): Scale, shape (C,).
        bias (Tensor, optional): Shift, shape (C,).
        eps (float): Added to the variance, inside the root.
        share (Tensor, optional): Weight of this batch in the pool, shape
            (C,). None: the statistics are this batch's alone, and the result
            is that of batch normalisation.

    Returns:
        Tensor: Same shape and dtype as ``x``.
    """
    return _Normalize.apply(x, mean, var, weight, bias, eps, share)
